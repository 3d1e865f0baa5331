//! Placement groups that are asked for by name: created whole or refused, brought back after a node's death, removed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Instant, SystemTime};

use phalanx_proto::{EventRecord, NodeId};
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::super::chronicle::{Level, event};
use super::super::deployment::{DeployFailure, DeployFailureCode, Deployment};
use super::super::named_group::{GroupReply, GroupSpec, NamedGroup};
use super::super::nodes::NodeState;
use super::super::placement::{Hold, Holder, NodeCapacity, Placement, Shortage, place_group};
use super::super::placement_group::{Place, Seat};
use super::super::{ClusterError, report};
use super::Reconciler;
use crate::config::defaults;

impl Reconciler {
    /// Takes a group in, or says at once why it can never be met. The answer comes when it is on disk.
    pub(super) fn create_group(&mut self, spec: GroupSpec, reply: GroupReply, now: Instant) {
        let admitted = self.admit_group(&spec);
        if let Err(failure) = admitted {
            let _ = reply.send(Err(failure));
            return;
        }
        let mut named = NamedGroup::new(spec, self.next_order, now);
        self.next_order += 1;
        named.create_reply = Some(reply);
        info!(placement_group = named.spec.name, strategy = %named.spec.strategy, "placement group accepted");
        self.groups.push(named);
        self.place_waiting(now);
    }

    fn admit_group(&self, spec: &GroupSpec) -> Result<(), DeployFailure> {
        let fail = |code, message: String, hint: String| DeployFailure { code, message, hint };
        if self.stopping.is_some() {
            return Err(fail(DeployFailureCode::Stopped, "the head is stopping".to_owned(), String::new()));
        }
        if let Err(message) = spec.check() {
            return Err(fail(DeployFailureCode::Invalid, message, String::new()));
        }
        let name = &spec.name;
        if let Some(known) = self.groups.iter().find(|known| known.spec.name == *name) {
            let message = format!("a placement group is named {name} already ({})", known.group.state().as_str());
            let hint = format!("coordinator placement-group remove {name} ends it");
            return Err(fail(DeployFailureCode::NameTaken, message, hint));
        }
        if self.groups.len() >= defaults::GROUPS_MAX {
            let message = format!("there are {} placement groups already", defaults::GROUPS_MAX);
            return Err(fail(DeployFailureCode::Invalid, message, "Remove one first".to_owned()));
        }
        let wanted = NamedGroup::new(spec.clone(), 0, Instant::now()).wanted();
        match place_group(&self.capacities(), &self.holds(), &wanted) {
            Placement::Infeasible(Shortage { reason, hint, .. }) if spec.wait.is_none() => {
                Err(fail(DeployFailureCode::Infeasible, reason, hint))
            }
            Placement::Placed(_) | Placement::Pending(_) | Placement::Infeasible(_) => Ok(()),
        }
    }

    /// Begins the end of a group. What runs in it is in the way, unless it may be ended with it.
    pub(super) fn remove_group(
        &mut self,
        name: &str,
        force: bool,
        reply: oneshot::Sender<Result<(), ClusterError>>,
        now: Instant,
    ) {
        let known = self.groups.iter().map(|known| known.spec.name.clone()).collect();
        if !self.groups.iter().any(|known| known.spec.name == name) {
            let _ = reply.send(Err(ClusterError::UnknownGroup { name: name.to_owned(), known }));
            return;
        }
        let inside = self.deployments_in(name);
        if !inside.is_empty() && !force {
            let deployments = inside.iter().map(ToString::to_string).collect();
            let _ = reply.send(Err(ClusterError::GroupInUse { name: name.to_owned(), deployments }));
            return;
        }
        for deployment in inside {
            self.begin_stop(&deployment, now);
        }
        if let Some(named) = self.groups.iter_mut().find(|known| known.spec.name == name) {
            info!(placement_group = name, "placement group is removed");
            self.chronicle.note(EventRecord {
                placement_group: Some(name.to_owned()),
                ..event(Level::Info, "group_removed", "it is removed")
            });
            named.removing = true;
            named.remove_replies.push(reply);
        }
    }

    fn deployments_in(&self, group: &str) -> Vec<phalanx_proto::DeploymentName> {
        let inside = self.deployments.iter().filter(|(_, known)| known.checked.spec.placement_group() == Some(group));
        inside.map(|(name, _)| name.clone()).collect()
    }

    /// Takes seats back whose node is gone. A node that this life of the head has not seen yet has time to come.
    pub(super) fn unseat_groups(&mut self, now: Instant) {
        let patient = now.saturating_duration_since(self.started) < self.settings.connect_deadline;
        let nodes = &self.nodes;
        let why = |id: &NodeId, slots: &[u32]| match nodes.node(id) {
            None if patient => None,
            None => Some(format!("node {id} has not come back since the head was started")),
            Some(node) if matches!(node.state, NodeState::Dead | NodeState::Left) => {
                Some(format!("node {id} is gone: {}", node.reason))
            }
            Some(node) if slots.iter().any(|slot| *slot >= node.hello.num_slots) => {
                Some(format!("node {id} offers {} slots now", node.hello.num_slots))
            }
            Some(_) => None,
        };
        let mut lost = Vec::new();
        for named in &mut self.groups {
            let before = named.group.state();
            named.lose_seats(why);
            if named.group.state() != before {
                warn!(placement_group = named.spec.name, reason = named.group.reason(), "bundles lost their node");
                let text = format!("bundles have to move: {}", named.group.reason());
                lost.push((named.spec.name.clone(), text));
            }
        }
        for (name, text) in lost {
            self.tell_placement_group(&name, event(Level::Warn, "group_rescheduling", text));
        }
    }

    /// Gives seats to the bundles of a group that have none: to all of them, or to none.
    pub(super) fn place_group(&mut self, index: usize, now: Instant) {
        let wanted = self.groups[index].wanted();
        match place_group(&self.capacities(), &self.holds(), &wanted) {
            Placement::Placed(replicas) => {
                let nodes = replicas.into_iter().next().unwrap_or_default();
                self.seat_group(index, nodes);
            }
            Placement::Pending(shortage) => self.let_group_wait(index, &shortage, false, now),
            Placement::Infeasible(shortage) => self.let_group_wait(index, &shortage, true, now),
        }
    }

    fn seat_group(&mut self, index: usize, nodes: Vec<NodeId>) {
        let mut taken = self.taken();
        let named = &mut self.groups[index];
        let bundles = named.group.bundles().iter().enumerate();
        let unplaced: Vec<(usize, u32)> =
            bundles.filter(|(_, bundle)| bundle.seat.is_none()).map(|(place, b)| (place, b.spec.slots)).collect();
        for ((bundle, num_slots), node) in unplaced.into_iter().zip(nodes) {
            let slots: Vec<u32> = (0..num_slots).map(|_| free_slot(&mut taken, &node)).collect();
            named.group.seat(bundle, Seat { node, slots });
        }
        (named.seated_at, named.seated_order) = (SystemTime::now(), self.next_order);
        self.next_order += 1;
        info!(placement_group = named.spec.name, "placement group created");
        let nodes: Vec<String> =
            named.group.bundles().iter().filter_map(|b| Some(b.seat.as_ref()?.node.to_string())).collect();
        let (name, text) = (named.spec.name.clone(), format!("created on {}", nodes.join(", ")));
        self.tell_placement_group(&name, event(Level::Info, "group_created", text));
    }

    fn let_group_wait(&mut self, index: usize, shortage: &Shortage, is_infeasible: bool, now: Instant) {
        let named = &mut self.groups[index];
        let overdue = is_infeasible && named.wait_until.is_some_and(|until| now >= until);
        let mut reason = shortage.reason.clone();
        if overdue {
            reason = format!("waited {} s for machines: {reason}", named.spec.wait.unwrap_or_default().as_secs());
        }
        if named.group.reason() != reason {
            named.group.wait(reason.clone(), is_infeasible);
            let name = named.spec.name.clone();
            self.tell_placement_group(&name, event(Level::Warn, "waits", format!("waits: {reason}")));
        }
    }

    /// Places for what a deployment in a group lacks: the group's slots in the order of its bundles.
    pub(super) fn places_in_group(&self, index: usize, group: &str) -> Result<Vec<Vec<Place>>, (Shortage, bool)> {
        let (_, deployment) = &self.deployments[index];
        let wanted = deployment.wanted();
        let size = wanted.tensor_parallel_size as usize;
        let (free, shortage) = self.free_in_group(group, wanted.tensor_parallel_size * wanted.replicas)?;
        if let Some(shortage) = shortage {
            return Err((shortage, false));
        }
        Ok(free.chunks_exact(size).take(wanted.replicas as usize).map(<[Place]>::to_vec).collect())
    }

    /// The free slots of a group, with why they are too few; the error says so too, and whether that can never change.
    pub(super) fn free_in_group(
        &self,
        name: &str,
        needed: u32,
    ) -> Result<(Vec<Place>, Option<Shortage>), (Shortage, bool)> {
        let shortage = |busy, reason, hint: &str| Shortage { busy, reason, hint: hint.to_owned() };
        let Some(named) = self.groups.iter().find(|known| known.spec.name == name && !known.removing) else {
            let reason = format!("needs placement group {name}, and there is none of this name");
            let hint = format!("coordinator placement-group create --name {name} --bundle gpu=1 makes one");
            return Err((shortage(false, reason, &hint), true));
        };
        let total: u32 = named.spec.bundles.iter().map(|bundle| bundle.slots).sum();
        if total < needed {
            let reason = format!("needs {needed} slots of placement group {name}; it has {total}");
            let hint = format!("Use at most {total} ranks, or make a larger group");
            return Err((shortage(false, reason, &hint), true));
        }
        if !named.is_created() {
            let (state, why) = (named.group.state().as_str(), named.group.reason());
            let reason = format!("needs placement group {name}, which is {state}: {why}");
            return Err((shortage(true, reason, "Use --wait 10m"), false));
        }
        let mut used = BTreeSet::new();
        let mut holders = String::new();
        for (deployment, known) in &self.deployments {
            let held: Vec<Place> = known.group.slots().collect();
            if known.checked.spec.placement_group() == Some(name) && !held.is_empty() {
                let since = report::clock(known.placed_at);
                holders.push_str(&format!("; {} held by deployment {deployment} since {since}", held.len()));
                used.extend(held.into_iter().map(|place| (place.node, place.slot)));
            }
        }
        let free: Vec<Place> =
            named.group.slots().filter(|place| !used.contains(&(place.node.clone(), place.slot))).collect();
        if free.len() >= needed as usize {
            return Ok((free, None));
        }
        let num_free = free.len();
        let reason = format!("needs {needed} slots of placement group {name}; {num_free} of {total} are free{holders}");
        Ok((free, Some(shortage(true, reason, "Use --wait 10m, or undeploy what runs in it"))))
    }

    /// Answers who waits for a group's beginning or end, once the store knows of it.
    pub(super) fn finish_groups(&mut self) {
        if self.is_keeping() {
            return;
        }
        let nodes = &self.nodes;
        for named in &mut self.groups {
            if named.version() == named.kept
                && let Some(reply) = named.create_reply.take()
            {
                let _ = reply.send(Ok(report::named_group_status(named, &[], nodes)));
            }
        }
        for named in self.groups.iter_mut().filter(|named| named.is_forgotten()) {
            named.group.remove();
            for reply in std::mem::take(&mut named.remove_replies) {
                let _ = reply.send(Ok(()));
            }
        }
        self.groups.retain(|named| !named.is_forgotten());
    }

    /// Whether deployments have slots of a group, or are ending in it. One that waits for a group of its name keeps none.
    pub(super) fn is_in_use(&self, group: &str) -> bool {
        let is_inside = |known: &Deployment| known.checked.spec.placement_group() == Some(group);
        let has_part = |known: &Deployment| known.stopping_since.is_some() || known.group.is_seated();
        self.deployments.iter().any(|(_, known)| is_inside(known) && has_part(known))
    }

    // ---- what is taken ----

    /// Slots that are taken, from the one record of it.
    pub(super) fn taken(&self) -> BTreeSet<(NodeId, u32)> {
        let ranks = self.deployments.iter().flat_map(|(_, deployment)| deployment.group.slots());
        let reserved = self.groups.iter().flat_map(|named| named.group.slots());
        ranks.chain(reserved).map(|place| (place.node, place.slot)).collect()
    }

    /// Nodes that may take work.
    pub(super) fn capacities(&self) -> Vec<NodeCapacity> {
        let taken = self.taken();
        let mut millicpus: BTreeMap<&NodeId, u32> = BTreeMap::new();
        for bundle in self.groups.iter().flat_map(|named| named.group.bundles()) {
            if let Some(seat) = &bundle.seat {
                *millicpus.entry(&seat.node).or_default() += bundle.spec.millicpus;
            }
        }
        let alive = self.nodes.iter().filter(|node| node.state == NodeState::Alive);
        alive
            .map(|node| NodeCapacity {
                id: node.hello.node_id.clone(),
                device_kind: node.hello.device_kind,
                num_slots: node.hello.num_slots,
                num_used: taken.iter().filter(|(id, _)| *id == node.hello.node_id).count() as u32,
                millicpus: node.hello.num_cpus.saturating_mul(1000),
                millicpus_used: millicpus.get(&node.hello.node_id).copied().unwrap_or_default(),
                labels: node.labels(),
            })
            .collect()
    }

    /// Who holds slots of nodes that may take work. What runs in a group is not named beside the group.
    pub(super) fn holds(&self) -> Vec<Hold> {
        let deployments = self.deployments.iter().filter(|(_, known)| known.checked.spec.placement_group().is_none());
        let deployments = deployments.map(|(name, known)| {
            (Holder::Deployment(name.to_string()), known.placed_at, known.group.slots().collect::<Vec<_>>())
        });
        let groups = self.groups.iter().map(|named| {
            (Holder::Group(named.spec.name.clone()), named.seated_at, named.group.slots().collect::<Vec<_>>())
        });
        let mut holds = Vec::new();
        for (holder, since, places) in deployments.chain(groups) {
            let mut per_node: BTreeMap<NodeId, u32> = BTreeMap::new();
            for place in places {
                *per_node.entry(place.node).or_default() += 1;
            }
            let alive = |id: &NodeId| self.nodes.node(id).is_some_and(|node| node.state == NodeState::Alive);
            let since = report::clock(since);
            for (node, num_slots) in per_node.into_iter().filter(|(node, _)| alive(node)) {
                holds.push(Hold { holder: holder.clone(), node, num_slots, since: since.clone() });
            }
        }
        holds
    }
}

/// The first slot of a node that nobody has; it is taken from now on.
pub(super) fn free_slot(taken: &mut BTreeSet<(NodeId, u32)>, node: &NodeId) -> u32 {
    let slot = (0..).find(|slot| !taken.contains(&(node.clone(), *slot))).unwrap_or_default();
    taken.insert((node.clone(), slot));
    slot
}
