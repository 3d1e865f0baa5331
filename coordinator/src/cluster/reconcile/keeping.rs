//! What the store must know, and that nothing is told to agents before it does.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_proto::DeploymentName;
use tracing::{error, info, warn};

use super::super::deployment::{DeployFailure, DeployFailureCode, Deployment};
use super::super::event::ClusterEvent;
use super::super::named_group::GroupRecord;
use super::super::record::{DeploymentRecord, Restored};
use super::super::{ClusterError, ServingChange};
use super::Reconciler;
use crate::store::{Change, StoreError, Table};

/// Said of what has lost slots while nothing could be written.
const GIVEN_AWAY: &str = "its slots were given to others while the store could not write it down";
/// When a store that could not write is asked again.
const KEEP_AGAIN: Duration = Duration::from_secs(2);

/// What of a deployment the store holds or is about to hold: a cheap sign of its record.
pub(in super::super) type KeptVersion = Vec<(u64, u64, bool)>;

fn version(deployment: &Deployment) -> KeptVersion {
    let replicas = deployment.replicas.iter();
    replicas.map(|replica| (replica.incarnation.0, replica.epoch.0, replica.wants_processes())).collect()
}

impl Reconciler {
    /// Takes in what an earlier head has left.
    pub(super) fn restore(&mut self, restored: Restored, now: Instant) {
        let Restored { deployments: mut records, groups } = restored;
        self.groups = groups.into_iter().map(|record| record.restore(now)).collect();
        self.groups.sort_by_key(|named| named.order);
        self.next_order = self.groups.iter().map(|named| named.order.max(named.seated_order) + 1).max().unwrap_or(0);
        for named in &self.groups {
            info!(placement_group = named.spec.name, "placement group comes back");
        }
        records.sort_by_key(DeploymentRecord::order);
        for record in records {
            let mut deployment = record.restore(now);
            self.next_order = self.next_order.max(deployment.order.max(deployment.placed_order) + 1);
            (deployment.kept, deployment.was_kept) = (Some(version(&deployment)), true);
            let checked = Arc::clone(&deployment.checked);
            info!(group_id = %checked.spec.name, state = deployment.state.as_str(), "deployment comes back");
            let name = checked.spec.name.clone();
            // A table that is full reads the tokenizer when the group is ready.
            let _ = self.serving.try_send(ServingChange::Starting(checked));
            self.last_incarnation = self.last_incarnation.max(deployment.last_incarnation());
            self.deployments.push((name, deployment));
        }
        self.settle_slots();
    }

    /// Whoever was given a slot last keeps it: what a full disk could not write down claims what was given to others since.
    fn settle_slots(&mut self) {
        let is_inside = |deployment: &Deployment| deployment.checked.spec.placement_group().is_some();
        let groups = self.groups.iter().enumerate().map(|(index, named)| (named.seated_order, index, true));
        let deployments = self.deployments.iter().enumerate().filter(|(_, (_, known))| !is_inside(known));
        let deployments = deployments.map(|(index, (_, known))| (known.placed_order, index, false));
        let mut holders: Vec<(u64, usize, bool)> = groups.chain(deployments).collect();
        holders.sort_by_key(|(order, ..)| Reverse(*order));
        let mut taken = BTreeSet::new();
        for (_, index, is_group) in holders {
            if is_group {
                let named = &mut self.groups[index];
                named.lose_seats(|node, slots| {
                    slots.iter().any(|slot| taken.contains(&(node.clone(), *slot))).then(|| GIVEN_AWAY.to_owned())
                });
                taken.extend(named.group.slots().map(|place| (place.node, place.slot)));
            } else {
                self.deployments[index].1.keep_slots(&mut taken, |_| true);
            }
        }
        let mut inside: Vec<usize> =
            (0..self.deployments.len()).filter(|index| is_inside(&self.deployments[*index].1)).collect();
        inside.sort_by_key(|index| Reverse(self.deployments[*index].1.placed_order));
        let mut taken = BTreeSet::new();
        for index in inside {
            let theirs = self.slots_of_its_group(index).unwrap_or_default();
            self.deployments[index].1.keep_slots(&mut taken, |place| theirs.contains(place));
        }
    }

    /// Hands to the store what it does not know yet.
    pub(super) fn keep(&mut self, now: Instant) {
        self.keep_groups(now);
        for index in 0..self.deployments.len() {
            let (name, deployment) = &self.deployments[index];
            let never_served = deployment.gave_up && !deployment.has_served;
            let wanted = (deployment.stopping_since.is_none() && !never_served).then(|| version(deployment));
            // What is new is tried at once, what failed after a pause.
            if deployment.kept == wanted && deployment.keep_again_at.is_none_or(|at| now < at) {
                continue;
            }
            let record = wanted.as_ref().map(|_| DeploymentRecord::of(deployment).to_bytes()).transpose();
            let name = name.to_string();
            if self.write_down(Table::Deployments, name, record) {
                let deployment = &mut self.deployments[index].1;
                (deployment.kept, deployment.keep_again_at) = (wanted, None);
            }
        }
    }

    /// A group that is removed leaves the disk after what ran in it: without it, that could never run again.
    fn keep_groups(&mut self, now: Instant) {
        for index in 0..self.groups.len() {
            let named = &self.groups[index];
            if named.removing && self.is_in_use(&named.spec.name) {
                continue;
            }
            let wanted = named.version();
            if named.kept == wanted && named.keep_again_at.is_none_or(|at| now < at) {
                continue;
            }
            let record = wanted.as_ref().map(|_| GroupRecord::of(named).to_bytes()).transpose();
            let name = named.spec.name.clone();
            if self.write_down(Table::PlacementGroups, name, record) {
                let named = &mut self.groups[index];
                (named.kept, named.keep_again_at) = (wanted, None);
            }
        }
    }

    /// Hands a record to the store; true where it took it, or where nothing is kept at all.
    fn write_down(&mut self, table: Table, name: String, record: Result<Option<Vec<u8>>, serde_json::Error>) -> bool {
        let Some(store) = &self.settings.store else { return true };
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                error!(?table, name, %error, "a record cannot be written down");
                return false;
            }
        };
        let (events, whose) = (self.events.clone(), name.clone());
        let done = move |result: Result<(), StoreError>| {
            let result = result.map_err(|error| error.to_string());
            let _ = events.blocking_send(ClusterEvent::Kept { table, name: whose, result });
        };
        let taken = store.write(Change { table, name, record, done: Box::new(done) });
        self.num_keeping += usize::from(taken);
        taken
    }

    /// Whether the store has not answered yet: until then nothing new is told to anybody.
    pub(super) fn is_keeping(&self) -> bool {
        self.num_keeping > 0
    }

    /// A change is on disk, or cannot be.
    pub(super) fn kept(&mut self, table: Table, name: String, result: Result<(), String>, now: Instant) {
        self.num_keeping -= 1;
        match table {
            Table::Deployments => self.deployment_kept(&DeploymentName(name), result, now),
            Table::PlacementGroups => self.group_kept(&name, result, now),
        }
    }

    fn deployment_kept(&mut self, name: &DeploymentName, result: Result<(), String>, now: Instant) {
        let Some(deployment) = self.deployment_mut(name) else { return };
        match result {
            Ok(()) => deployment.was_kept = true,
            Err(reason) if deployment.was_kept => {
                // What serves goes on serving: it only would not come back as it is now. What ends has not ended before.
                warn!(group_id = %name, reason, "deployment is not on disk as it is");
                deployment.keep_again_at = Some(now + KEEP_AGAIN);
                for reply in std::mem::take(&mut deployment.undeploy_replies) {
                    let (name, reason) = (name.to_string(), reason.clone());
                    let _ = reply.send(Err(ClusterError::NotKept { name, reason }));
                }
            }
            Err(reason) => {
                error!(group_id = %name, reason, "deployment refused: it cannot be kept");
                let (message, hint) = unwritable(&reason);
                deployment.give_up(DeployFailureCode::StartFailed, message, hint);
            }
        }
    }

    /// A group that nobody was told of, and that cannot be kept, ends: what still waits for the disk may get there.
    fn group_kept(&mut self, name: &str, result: Result<(), String>, now: Instant) {
        let Some(named) = self.groups.iter_mut().find(|named| named.spec.name == name) else { return };
        let Err(reason) = result else {
            named.was_kept = true;
            return;
        };
        warn!(placement_group = name, reason, "placement group is not on disk as it is");
        if let Some(reply) = named.create_reply.take() {
            let (message, hint) = unwritable(&reason);
            let _ = reply.send(Err(DeployFailure { code: DeployFailureCode::StartFailed, message, hint }));
            named.removing = true;
        }
        if named.was_kept {
            named.keep_again_at = Some(now + KEEP_AGAIN);
            for reply in std::mem::take(&mut named.remove_replies) {
                let _ = reply.send(Err(ClusterError::NotKept { name: name.to_owned(), reason: reason.clone() }));
            }
        } else {
            self.refuse_inside(name, &reason);
        }
    }

    /// What was to run in a group that is refused is refused with it.
    fn refuse_inside(&mut self, group: &str, reason: &str) {
        let is_inside = |known: &Deployment| known.checked.spec.placement_group() == Some(group);
        for (_, deployment) in self.deployments.iter_mut().filter(|(_, known)| is_inside(known)) {
            let (message, hint) = unwritable(reason);
            let message = format!("placement group {group} was refused: {message}");
            deployment.give_up(DeployFailureCode::StartFailed, message, hint);
        }
    }
}

fn unwritable(reason: &str) -> (String, String) {
    let hint = "Free space in the store folder of the head's PHALANX_HOME".to_owned();
    (format!("the head cannot write it down: {reason}"), hint)
}
