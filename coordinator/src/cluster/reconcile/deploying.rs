//! From a wish to a group that serves, and from a broken group to the next one.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use phalanx_proto::{DeploymentName, Epoch, NodeId};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use super::super::deployment::{
    CheckedSpec, DeployEvent, DeployFailure, DeployFailureCode, Deployment, recent_restarts,
};
use super::super::event::{ClusterEvent, GroupKey};
use super::super::launch::{self, GroupStart};
use super::super::nodes::NodeState;
use super::super::placement::{Hold, NodeCapacity, Placement, Shortage, Wanted, place};
use super::super::placement_group::Place;
use super::super::replica::Stage;
use super::super::spec::TensorParallelSize;
use super::super::{ServingChange, report};
use super::Reconciler;

/// Restarts wait longer each time, up to this many doublings of the settling time.
const BACKOFF_DOUBLINGS_MAX: u32 = 4;

impl Reconciler {
    /// Takes a wish in, or says at once why it cannot be met.
    pub(super) fn deploy(&mut self, checked: CheckedSpec, watcher: mpsc::Sender<DeployEvent>, now: Instant) {
        if let Err(failure) = self.admit(checked, watcher.clone(), now) {
            let _ = watcher.try_send(DeployEvent::Failed(failure));
        }
    }

    fn admit(
        &mut self,
        checked: CheckedSpec,
        watcher: mpsc::Sender<DeployEvent>,
        now: Instant,
    ) -> Result<(), DeployFailure> {
        let fail = |code, message: String, hint: String| DeployFailure { code, message, hint };
        if self.stopping.is_some() {
            return Err(fail(DeployFailureCode::Stopped, "the head is stopping".to_owned(), String::new()));
        }
        let name = checked.spec.name.clone();
        if let Some(known) = self.deployment_mut(&name) {
            if !known.gave_up {
                let state = known.state.as_str();
                let message = format!("a deployment is named {name} already ({state})");
                let hint = format!("coordinator undeploy {name} ends it; --served-model-name gives this one another");
                return Err(fail(DeployFailureCode::NameTaken, message, hint));
            }
            if known.group.bundles().iter().any(Option::is_some) {
                let message = format!("the processes of the failed deployment {name} are still ending");
                return Err(fail(DeployFailureCode::Busy, message, "Try again in a moment".to_owned()));
            }
        }
        let size = self.world_size(&checked);
        let mut deployment = Deployment::new(checked, size, now);
        deployment.watchers.push(watcher);
        match place(&self.capacities(), &self.holds(), &deployment.wanted()) {
            Placement::Infeasible(Shortage { reason, hint, .. }) => {
                return Err(fail(DeployFailureCode::Infeasible, reason, hint));
            }
            Placement::Pending(Shortage { reason, hint, .. }) if deployment.wait_until.is_none() => {
                return Err(fail(DeployFailureCode::Busy, reason, hint));
            }
            Placement::Placed(_) | Placement::Pending(_) => {}
        }
        info!(group_id = %name, model = %deployment.checked.spec.model, world_size = size, "deployment accepted");
        self.deployments.retain(|(known, _)| *known != name);
        deployment.order = self.next_order;
        self.next_order += 1;
        self.deployments.push((name, deployment));
        Ok(())
    }

    fn world_size(&self, checked: &CheckedSpec) -> u32 {
        match checked.spec.tensor_parallel_size {
            TensorParallelSize::Fixed(size) => size,
            TensorParallelSize::Auto => {
                let heads = u32::try_from(checked.geometry.num_heads).unwrap_or(u32::MAX);
                let nodes = self.capacities();
                let roomiest = nodes.iter().map(|node| node.num_slots - node.num_used).max();
                roomiest.unwrap_or(1).clamp(1, heads)
            }
        }
    }

    /// Slots that are taken, from the one record of it.
    fn taken(&self) -> BTreeSet<(NodeId, u32)> {
        let bundles = self.deployments.iter().flat_map(|(_, deployment)| deployment.group.bundles());
        bundles.flatten().map(|place| (place.node.clone(), place.slot)).collect()
    }

    /// Nodes that may take work.
    fn capacities(&self) -> Vec<NodeCapacity> {
        let taken = self.taken();
        let alive = self.nodes.iter().filter(|node| node.state == NodeState::Alive);
        alive
            .map(|node| NodeCapacity {
                id: node.hello.node_id.clone(),
                device_kind: node.hello.device_kind,
                num_slots: node.hello.num_slots,
                num_used: taken.iter().filter(|(id, _)| *id == node.hello.node_id).count() as u32,
            })
            .collect()
    }

    /// Who holds slots of nodes that may take work.
    fn holds(&self) -> Vec<Hold> {
        let mut holds = Vec::new();
        for (name, deployment) in &self.deployments {
            let num_slots = deployment.group.bundles().iter().flatten().count() as u32;
            if num_slots > 0 {
                let since = report::clock(deployment.placed_at);
                holds.push(Hold { deployment: name.to_string(), num_slots, since });
            }
        }
        holds
    }

    /// Places what has no slots, oldest wish first.
    pub(super) fn place_waiting(&mut self, now: Instant) {
        for index in 0..self.deployments.len() {
            let (_, deployment) = &self.deployments[index];
            let wanted = deployment.wanted();
            if wanted.replicas == 0 || deployment.gave_up || deployment.stopping_since.is_some() {
                continue;
            }
            match place(&self.capacities(), &self.holds(), &wanted) {
                Placement::Placed(nodes) => self.take_slots(index, nodes, now),
                Placement::Pending(shortage) | Placement::Infeasible(shortage) => {
                    self.keep_waiting(index, &shortage, &wanted, now);
                }
            }
        }
    }

    fn take_slots(&mut self, index: usize, replicas: Vec<Vec<NodeId>>, now: Instant) {
        let mut taken = self.taken();
        let (name, deployment) = &mut self.deployments[index];
        let mut replicas = replicas.into_iter();
        let mut words = Vec::new();
        for (number, replica) in deployment.replicas.iter_mut().enumerate() {
            if !matches!(replica.stage, Stage::Unplaced) {
                continue;
            }
            let Some(nodes) = replicas.next() else { break };
            let mut places = Vec::new();
            for node in nodes {
                let slot = (0..).find(|slot| !taken.contains(&(node.clone(), *slot))).unwrap_or_default();
                taken.insert((node.clone(), slot));
                words.push(format!("{node} slot {slot}"));
                places.push(Place { node, slot });
            }
            deployment.group.place(number as u32, places.clone());
            replica.launch(places, now);
        }
        deployment.placed_at = SystemTime::now();
        if !deployment.has_served {
            deployment.reason.clear();
        }
        info!(group_id = %name, places = words.join(", "), "placed");
        deployment.state = deployment.derive_state();
        deployment.tell_line(format!("placed on {}", words.join(", ")));
        let _ = self.serving.try_send(ServingChange::Starting(Arc::clone(&deployment.checked)));
    }

    fn keep_waiting(&mut self, index: usize, shortage: &Shortage, wanted: &Wanted, now: Instant) {
        let (name, deployment) = &mut self.deployments[index];
        let late = !deployment.has_served && deployment.wait_until.is_some_and(|until| now >= until);
        if late {
            let wait = deployment.checked.spec.wait.unwrap_or_default();
            let message = format!("waited {} s for machines: {}", wait.as_secs(), shortage.reason);
            warn!(group_id = %name, reason = shortage.reason, "deployment could not be placed in time");
            deployment.group.give_up(shortage.reason.clone());
            let hint =
                format!("Join more machines, or use less than --tensor-parallel-size {}", wanted.tensor_parallel_size);
            deployment.give_up(DeployFailureCode::Timeout, message, hint);
            return;
        }
        if deployment.group.reason() == shortage.reason {
            return;
        }
        deployment.group.explain(shortage.reason.clone());
        let cause = deployment.replicas.iter().find(|replica| !replica.cause.is_empty());
        deployment.reason = match cause {
            Some(replica) => format!("{}; waits for a machine: {}", replica.reason(), shortage.reason),
            None => shortage.reason.clone(),
        };
        deployment.tell_line(format!("pending: {}", shortage.reason));
    }

    /// Moves every replica as far as it can go.
    pub(super) fn advance(&mut self, now: Instant) {
        for index in 0..self.deployments.len() {
            for replica in 0..self.deployments[index].1.replicas.len() {
                self.advance_replica(index, replica, now);
            }
            self.release_ended(index, now);
            let (_, deployment) = &mut self.deployments[index];
            deployment.state = deployment.derive_state();
        }
        self.finish_undeploys(now);
    }

    fn advance_replica(&mut self, index: usize, number: usize, now: Instant) {
        let (name, deployment) = &mut self.deployments[index];
        let replica = &mut deployment.replicas[number];
        let key = GroupKey { deployment: name.clone(), replica: number as u32, incarnation: replica.incarnation };
        match replica.stage {
            Stage::Connecting { since } => {
                if let Some(links) = replica.take_links() {
                    let kept = match replica.resumes() {
                        Ok(kept) => kept,
                        Err(cause) => return self.break_group(&key, cause, now),
                    };
                    let nodes = replica.ranks.iter().map(|rank| rank.place.node.clone()).collect();
                    replica.epoch = Epoch(replica.epoch.0 + 1);
                    let epoch = replica.epoch;
                    let load = launch::load_model(&deployment.checked, self.settings.term, epoch, nodes);
                    let limits = launch::engine_limits(&deployment.checked);
                    let (fuse, given_up) = oneshot::channel();
                    replica.fuse = Some(fuse);
                    let engine = replica.engine.clone();
                    let start = GroupStart { key, links, load, kept, limits, engine, given_up };
                    replica.stage = Stage::Starting { _starter: launch::start_group(start, self.events.clone()) };
                } else if now.saturating_duration_since(since) >= self.settings.connect_deadline {
                    let cause = late_ranks(replica, self.settings.connect_deadline.as_secs());
                    self.break_group(&key, cause, now);
                }
            }
            Stage::Broken { since, decide_at } => {
                let overdue = now.saturating_duration_since(since) >= self.settings.end_deadline;
                if now >= decide_at && (overdue || replica.is_gone(since, now)) {
                    self.decide(index, number, now);
                }
            }
            Stage::Unplaced => {
                let since = *replica.unplaced_since.get_or_insert(now);
                if now.saturating_duration_since(since) >= self.settings.no_machine_deadline {
                    let waited = self.settings.no_machine_deadline.as_secs();
                    replica.fail_requests(&format!(
                        "{}; no machine to start again on within {waited} s",
                        replica.reason()
                    ));
                }
            }
            Stage::Starting { .. } | Stage::Serving | Stage::Draining | Stage::Ended { .. } => {}
        }
    }

    /// A group broke: its processes end, and after a while its fate is decided.
    pub(super) fn break_group(&mut self, key: &GroupKey, cause: String, now: Instant) {
        let (settle, window) = (self.settings.settle, self.settings.restart_window);
        let forgiven_after = self.settings.forgiven_after;
        let Some(deployment) = self.deployment_mut(&key.deployment) else { return };
        let stopping = deployment.stopping_since.is_some();
        let Some(replica) = deployment.replicas.get_mut(key.replica as usize) else { return };
        warn!(group_id = %key.deployment, incarnation = key.incarnation.0, reason = cause, "group broke");
        if stopping {
            replica.stage = Stage::Ended { since: now };
            replica.fail_requests(&cause);
            return;
        }
        if replica.has_proved_itself(now, forgiven_after) {
            replica.restarts.clear();
        }
        let doublings = (recent_restarts(&mut replica.restarts, now, window) as u32).min(BACKOFF_DOUBLINGS_MAX);
        replica.break_down(cause, now, now + settle * 2u32.pow(doublings));
        deployment.reason = replica.reason();
        deployment.state = deployment.derive_state();
        let text = format!("broke: {}", deployment.reason);
        deployment.tell_line(text);
    }

    /// The processes of a broken group have ended: start again, wait for a machine, or give up.
    fn decide(&mut self, index: usize, number: usize, now: Instant) {
        let (max, window) = (self.settings.restarts_max, self.settings.restart_window);
        let alive: BTreeSet<NodeId> = self.capacities().into_iter().map(|node| node.id).collect();
        let (name, deployment) = &mut self.deployments[index];
        let replica = &mut deployment.replicas[number];
        let reason = replica.reason();
        let restarts = recent_restarts(&mut replica.restarts, now, window);
        if !deployment.has_served {
            deployment.give_up(
                DeployFailureCode::StartFailed,
                reason,
                "The ranks' logs are in the logs folder of their node's PHALANX_HOME".to_owned(),
            );
        } else if restarts >= max {
            let minutes = window.as_secs() / 60;
            let message = format!("{reason}; gave up after {restarts} restarts in {minutes} minutes");
            let hint = format!("coordinator undeploy {name}, then serve it again");
            deployment.give_up(DeployFailureCode::StartFailed, message, hint);
        } else {
            replica.restarts.push(now);
            deployment.reason = format!("{reason}; starting again (restart {} of {max})", restarts + 1);
            let places = deployment.group.places(number as u32);
            if !places.is_empty() && places.iter().all(|place| alive.contains(&place.node)) {
                replica.launch(places, now);
            } else {
                deployment.group.reschedule(number as u32, reason);
                replica.stage = Stage::Unplaced;
            }
            info!(group_id = %name, reason = deployment.reason, "group starts again");
        }
    }

    /// Tells the rest of the head what serves, once for each change.
    pub(super) fn publish(&mut self) {
        for (name, deployment) in &mut self.deployments {
            if !deployment.stale || deployment.publishing || deployment.stopping_since.is_some() {
                continue;
            }
            let engines: Vec<_> = deployment.replicas.iter().filter_map(|r| r.engine().cloned()).collect();
            let complete = engines.len() == deployment.replicas.len();
            if engines.is_empty() || !(complete || deployment.has_served) {
                continue;
            }
            let (done, answer) = oneshot::channel();
            let checked = Arc::clone(&deployment.checked);
            if self.serving.try_send(ServingChange::Ready { checked, engines, done }).is_err() {
                continue;
            }
            deployment.publishing = true;
            deployment.stale = false;
            let (events, deployment) = (self.events.clone(), name.clone());
            tokio::spawn(async move {
                let result = answer.await.unwrap_or_else(|_| Err("the head is stopping".to_owned()));
                let _ = events.send(ClusterEvent::Published { deployment, result }).await;
            });
        }
    }

    /// Requests find the deployment, or its text side cannot be used.
    pub(super) fn published(&mut self, name: &DeploymentName, result: Result<(), String>) {
        let Some(deployment) = self.deployment_mut(name) else { return };
        if !std::mem::take(&mut deployment.publishing) {
            return;
        }
        if let Err(message) = result {
            warn!(group_id = %name, reason = message, "deployment cannot answer requests");
            deployment.give_up(DeployFailureCode::Model, message, String::new());
            return;
        }
        deployment.published = true;
        if deployment.settle_state() {
            let mut status = report::deployment(name, deployment);
            let engines = deployment.replicas.iter().filter_map(|replica| replica.engine());
            status.num_blocks_free = engines.map(|engine| engine.snapshot().num_blocks_free).sum();
            deployment.tell(&DeployEvent::Ready(status));
            info!(group_id = %name, "deployment ready");
        }
    }
}

fn late_ranks(replica: &super::super::replica::Replica, seconds: u64) -> String {
    let late = replica.ranks.iter().enumerate().filter(|(_, record)| !record.dialed);
    let names: Vec<String> =
        late.map(|(rank, record)| format!("rank {rank} (pid {} on {})", record.pid(), record.place.node)).collect();
    format!("phase connect: {} did not dial the head within {seconds} s", names.join(", "))
}
