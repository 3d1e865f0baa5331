//! Undeploy, leave, stop: the reverse, drained first, answered when processes have ended.

use std::time::Instant;

use phalanx_proto::{AgentCommand, DeploymentName, NodeId};
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::super::chronicle::{Level, event};
use super::super::deployment::{DeployEvent, DeployFailure, DeployFailureCode, Deployment};
use super::super::event::GroupKey;
use super::super::replica::Stage;
use super::super::{ClusterError, ServingChange, launch};
use super::{Reconciler, Stopping};

impl Reconciler {
    /// Begins the end of a deployment.
    pub(super) fn undeploy(
        &mut self,
        name: &DeploymentName,
        reply: oneshot::Sender<Result<(), ClusterError>>,
        now: Instant,
    ) {
        let deployment = match self.known_deployment(name) {
            Ok(deployment) => deployment,
            Err(error) => return drop(reply.send(Err(error))),
        };
        deployment.undeploy_replies.push(reply);
        self.begin_stop(name, now);
    }

    pub(super) fn begin_stop(&mut self, name: &DeploymentName, now: Instant) {
        let (drain, events) = (self.settings.drain, self.events.clone());
        let Some(deployment) = self.deployment_mut(name) else { return };
        if deployment.stopping_since.replace(now).is_some() {
            return;
        }
        info!(group_id = %name, "deployment stops");
        let stops = event(Level::Info, "deployment_stops", "it is removed: what runs may still end");
        for (number, replica) in deployment.replicas.iter_mut().enumerate() {
            let key = GroupKey { deployment: name.clone(), replica: number as u32, incarnation: replica.incarnation };
            match (&replica.stage, &replica.engine) {
                (Stage::Serving | Stage::Yielding { .. }, Some(engine)) => {
                    launch::stop_engine(key, engine.clone(), drain, events.clone());
                    replica.stage = Stage::Draining;
                }
                (Stage::Draining, _) => {}
                (_, engine) => {
                    engine.iter().for_each(|engine| launch::discard_engine((*engine).clone()));
                    replica.stage = Stage::Ended { since: now };
                }
            }
        }
        let _ = self.serving.try_send(ServingChange::Gone(name.clone()));
        self.tell_deployment(name, stops);
    }

    /// A group has drained: its processes may end.
    pub(super) fn group_stopped(&mut self, key: &GroupKey, now: Instant) {
        let Some(deployment) = self.deployment_mut(&key.deployment) else { return };
        let stopping = deployment.stopping_since.is_some();
        let Some(replica) = deployment.replicas.get_mut(key.replica as usize) else { return };
        if replica.incarnation != key.incarnation || !matches!(replica.stage, Stage::Draining) {
            return;
        }
        replica.engine = None;
        if stopping {
            replica.stage = Stage::Ended { since: now };
        }
    }

    /// Gives the slots of a deployment back once the processes are gone that held them.
    pub(super) fn release_ended(&mut self, index: usize, now: Instant) {
        let (_, deployment) = &mut self.deployments[index];
        if deployment.gave_up && deployment.stopping_since.is_none() {
            for replica in &mut deployment.replicas {
                if !matches!(replica.stage, Stage::Ended { .. }) {
                    replica.stage = Stage::Ended { since: now };
                }
            }
        }
        let gone = deployment.replicas.iter().all(|replica| match replica.stage {
            Stage::Ended { since } => replica.is_gone(since, now),
            _ => false,
        });
        if gone && deployment.group.is_seated() {
            deployment.group.remove();
        }
    }

    /// Answers those who wait for an end, and forgets what has ended.
    pub(super) fn finish_undeploys(&mut self, now: Instant) {
        let deadline = self.settings.end_deadline;
        for (name, deployment) in &mut self.deployments {
            if deployment.stopping_since.is_none() || has_ended(deployment) {
                continue;
            }
            let overdue = deployment.replicas.iter().any(|replica| {
                matches!(replica.stage, Stage::Ended { since } if now.saturating_duration_since(since) > deadline)
            });
            for reply in if overdue { std::mem::take(&mut deployment.undeploy_replies) } else { Vec::new() } {
                let error = ClusterError::StillRunning { name: name.clone(), which: lingering(deployment) };
                warn!(%error, "undeploy is late");
                let _ = reply.send(Err(error));
            }
        }
        if self.is_keeping() {
            // An end that was told must not come back.
            return;
        }
        for (_, deployment) in self.deployments.iter_mut().filter(|(_, deployment)| has_ended(deployment)) {
            let message = "it was removed".to_owned();
            let failure = DeployFailure { code: DeployFailureCode::Stopped, message, hint: String::new() };
            deployment.tell(&DeployEvent::Failed(failure));
            for reply in std::mem::take(&mut deployment.undeploy_replies) {
                let _ = reply.send(Ok(()));
            }
        }
        let ended = self.deployments.iter().filter(|(_, deployment)| has_ended(deployment));
        self.last_incarnation = ended.map(|(_, known)| known.last_incarnation()).fold(self.last_incarnation, Ord::max);
        self.deployments.retain(|(_, deployment)| !has_ended(deployment));
    }

    /// Begins the end of a node's membership.
    pub(super) fn leave(&mut self, node: NodeId, reply: oneshot::Sender<Result<(), ClusterError>>) {
        let Some(link) = self.agents.get(&node) else {
            let known = self.agents.keys().map(ToString::to_string).collect();
            let _ = reply.send(Err(ClusterError::UnknownNode { name: node, known }));
            return;
        };
        self.nodes.leaving(&node, link.session, "asked to leave".to_owned());
        self.leaving.entry(node).or_default().replies.push(reply);
    }

    /// Drains what runs on leaving nodes, then ends their agents.
    pub(super) fn send_away(&mut self, now: Instant) {
        for node in self.leaving.keys().cloned().collect::<Vec<_>>() {
            let busy = self.drain_node(&node, now);
            let Some(leaving) = self.leaving.get_mut(&node).filter(|leaving| !busy && !leaving.told) else { continue };
            if let Some(link) = self.agents.get(&node) {
                leaving.told = link.commands.try_send(AgentCommand::End("the node leaves".to_owned())).is_ok();
            }
        }
    }

    /// Moves the groups of a node away; true while there are any.
    fn drain_node(&mut self, node: &NodeId, now: Instant) -> bool {
        let have_room: Vec<bool> = (0..self.deployments.len()).map(|index| self.fits_one_more(index)).collect();
        let (drain, drain_in_place) = (self.settings.drain, self.settings.drain_in_place);
        let mut busy = false;
        for ((_, deployment), has_room) in self.deployments.iter_mut().zip(have_room) {
            // Where nothing else has room for what would be left, it may take longer to end here.
            let patience = if has_room { drain } else { drain_in_place };
            for replica in &mut deployment.replicas {
                // Of processes that ended before any agent spoke of them nobody will hear.
                let is_gone = match replica.stage {
                    Stage::Unplaced => true,
                    Stage::Ended { since } | Stage::Broken { since, .. } => replica.is_gone(since, now),
                    _ => false,
                };
                if is_gone || !replica.lingering().any(|rank| rank.place.node == *node) {
                    continue;
                }
                busy = true;
                replica.yield_work("its node leaves", now + patience);
            }
        }
        busy
    }

    /// Begins the end of everything.
    pub(super) fn stop(&mut self, reply: oneshot::Sender<()>, now: Instant) {
        let stopping =
            self.stopping.get_or_insert_with(|| Stopping { since: now, agents_told: None, replies: Vec::new() });
        stopping.replies.push(reply);
        for name in self.deployments.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            self.begin_stop(&name, now);
        }
    }

    /// Ends agents after deployments; true when all are gone, or late.
    pub(super) fn end_all(&mut self, now: Instant) -> bool {
        let Some(stopping) = &mut self.stopping else { return false };
        let late = self.settings.drain + self.settings.end_deadline;
        if !self.deployments.is_empty() && now.saturating_duration_since(stopping.since) < late {
            return false;
        }
        let told = *stopping.agents_told.get_or_insert_with(|| {
            for link in self.agents.values() {
                let _ = link.commands.try_send(AgentCommand::End("the cluster stops".to_owned()));
            }
            now
        });
        if !self.agents.is_empty() && now.saturating_duration_since(told) < self.settings.end_deadline {
            return false;
        }
        for reply in std::mem::take(&mut stopping.replies) {
            let _ = reply.send(());
        }
        info!("cluster stopped");
        true
    }
}

fn has_ended(deployment: &Deployment) -> bool {
    let ended = deployment.replicas.iter().all(|replica| matches!(replica.stage, Stage::Ended { .. }));
    // A record that nobody has taken off the disk yet would come back with the next head.
    let is_forgotten = deployment.kept.is_none() && deployment.keep_again_at.is_none();
    deployment.stopping_since.is_some() && ended && is_forgotten && !deployment.group.is_seated()
}

fn lingering(deployment: &Deployment) -> String {
    let mut words = Vec::new();
    for replica in &deployment.replicas {
        for (rank, record) in replica.ranks.iter().enumerate() {
            if replica.lingering().any(|other| other.place == record.place) {
                words.push(format!("rank {rank} (pid {} on {})", record.pid(), record.place.node));
            }
        }
    }
    words.join(", ")
}
