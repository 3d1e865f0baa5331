//! What the store must know, and that nothing is told to agents before it does.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::super::deployment::{DeployFailureCode, Deployment};
use super::super::event::ClusterEvent;
use super::super::record::DeploymentRecord;
use super::super::{ClusterError, ServingChange};
use super::Reconciler;
use crate::store::{Change, StoreError};

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
    pub(super) fn restore(&mut self, mut records: Vec<DeploymentRecord>, now: Instant) {
        records.sort_by_key(DeploymentRecord::order);
        for record in records {
            self.next_order = self.next_order.max(record.order() + 1);
            let mut deployment = record.restore(now);
            (deployment.kept, deployment.was_kept) = (Some(version(&deployment)), true);
            let checked = Arc::clone(&deployment.checked);
            info!(group_id = %checked.spec.name, state = deployment.state.as_str(), "deployment comes back");
            let name = checked.spec.name.clone();
            // A table that is full reads the tokenizer when the group is ready.
            let _ = self.serving.try_send(ServingChange::Starting(checked));
            self.deployments.push((name, deployment));
        }
    }

    /// Hands to the store what it does not know yet.
    pub(super) fn keep(&mut self, now: Instant) {
        let Some(store) = self.settings.store.clone() else { return };
        for index in 0..self.deployments.len() {
            let (name, deployment) = &self.deployments[index];
            let never_served = deployment.gave_up && !deployment.has_served;
            let wanted = (deployment.stopping_since.is_none() && !never_served).then(|| version(deployment));
            // What is new is tried at once, what failed after a pause.
            if deployment.kept == wanted && deployment.keep_again_at.is_none_or(|at| now < at) {
                continue;
            }
            let record = match wanted.as_ref().map(|_| DeploymentRecord::of(deployment).to_bytes()).transpose() {
                Ok(record) => record,
                Err(error) => {
                    error!(group_id = %name, %error, "deployment cannot be written down");
                    continue;
                }
            };
            let (events, deployment) = (self.events.clone(), name.clone());
            let done = move |result: Result<(), StoreError>| {
                let result = result.map_err(|error| error.to_string());
                let _ = events.blocking_send(ClusterEvent::Kept { deployment, result });
            };
            if store.write(Change { name: name.to_string(), record, done: Box::new(done) }) {
                self.num_keeping += 1;
                let deployment = &mut self.deployments[index].1;
                (deployment.kept, deployment.keep_again_at) = (wanted, None);
            }
        }
    }

    /// Whether the store has not answered yet: until then nothing new is told to anybody.
    pub(super) fn is_keeping(&self) -> bool {
        self.num_keeping > 0
    }

    /// A change is on disk, or cannot be.
    pub(super) fn kept(&mut self, name: &phalanx_proto::DeploymentName, result: Result<(), String>, now: Instant) {
        self.num_keeping -= 1;
        let Some(deployment) = self.deployment_mut(name) else { return };
        match result {
            Ok(()) => deployment.was_kept = true,
            Err(reason) if deployment.was_kept => {
                // What serves goes on serving: it only would not come back as it is now. What ends has not ended before.
                warn!(group_id = %name, reason, "deployment is not on disk as it is");
                deployment.keep_again_at = Some(now + KEEP_AGAIN);
                for reply in std::mem::take(&mut deployment.undeploy_replies) {
                    let (name, reason) = (name.clone(), reason.clone());
                    let _ = reply.send(Err(ClusterError::NotKept { name, reason }));
                }
            }
            Err(reason) => {
                error!(group_id = %name, reason, "deployment refused: it cannot be kept");
                let message = format!("the head cannot write it down: {reason}");
                let hint = "Free space in the store folder of the head's PHALANX_HOME".to_owned();
                deployment.give_up(DeployFailureCode::StartFailed, message, hint);
            }
        }
    }
}
