//! From a wish to a group that serves, and from a broken group to the next one.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use phalanx_proto::{DeploymentName, Epoch, EventRecord, NodeId};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use super::super::chronicle::{Level, event};
use super::super::deployment::{
    CheckedSpec, DeployEvent, DeployFailure, DeployFailureCode, Deployment, DeploymentState, recent_restarts,
};
use super::super::event::{ClusterEvent, GroupKey};
use super::super::launch::{self, GroupStart};
use super::super::named_group::NamedGroup;
use super::super::placement::{Placement, Shortage, Wanted, place};
use super::super::placement_group::{GroupState, Place};
use super::super::replica::Stage;
use super::super::spec::TensorParallelSize;
use super::super::{ServingChange, report};
use super::Reconciler;
use super::grouping::free_slot;
use crate::config::defaults;

/// Restarts wait longer each time, up to this many doublings of the settling time.
const BACKOFF_DOUBLINGS_MAX: u32 = 4;

/// Who is next to be given slots: a place in its list.
enum Turn {
    Group(usize),
    Deployment(usize),
}

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
            if known.group.is_seated() {
                let message = format!("the processes of the failed deployment {name} are still ending");
                return Err(fail(DeployFailureCode::Busy, message, "Try again in a moment".to_owned()));
            }
        }
        let size = self.world_size(&checked);
        if let Some(known) = self.deployment_mut(&name) {
            let last = known.last_incarnation();
            self.last_incarnation = self.last_incarnation.max(last);
        }
        let mut deployment = Deployment::new(checked, size, self.last_incarnation, now);
        deployment.watchers.push(watcher);
        match self.could_place(&deployment) {
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
        let replicas = deployment.replicas.len();
        let text = format!("{} is to be served: {replicas} x {size} ranks", deployment.checked.spec.model);
        self.tell_deployment(&name, event(Level::Info, "deployment_accepted", text));
        self.deployments.push((name, deployment));
        Ok(())
    }

    /// Whether a deployment that is asked for fits, now or ever.
    fn could_place(&self, deployment: &Deployment) -> Placement {
        let wanted = deployment.wanted();
        let Some(group) = deployment.checked.spec.placement_group() else {
            return place(&self.capacities(), &self.holds(), &wanted);
        };
        match self.free_in_group(group, wanted.tensor_parallel_size * wanted.replicas) {
            Ok((_, None)) => Placement::Placed(Vec::new()),
            Ok((_, Some(shortage))) => Placement::Pending(shortage),
            Err((shortage, is_final)) if is_final && !wanted.waits => Placement::Infeasible(shortage),
            Err((shortage, _)) => Placement::Pending(shortage),
        }
    }

    fn world_size(&self, checked: &CheckedSpec) -> u32 {
        match checked.spec.tensor_parallel_size {
            TensorParallelSize::Fixed(size) => size,
            TensorParallelSize::Auto => {
                let heads = u32::try_from(checked.geometry.num_heads).unwrap_or(u32::MAX);
                let roomiest = match checked.spec.placement_group() {
                    Some(group) => self.free_in_group(group, 1).ok().map(|(free, _)| free.len() as u32),
                    None => self.capacities().iter().map(|node| node.num_slots - node.num_used).max(),
                };
                roomiest.unwrap_or(1).clamp(1, heads)
            }
        }
    }

    /// Places what has no slots: first bundles that lost theirs, then the oldest wish.
    pub(super) fn place_waiting(&mut self, now: Instant) {
        self.unseat_groups(now);
        let groups = self.groups.iter().enumerate().filter(|(_, named)| named.is_waiting());
        let mut turns: Vec<(bool, u64, Turn)> = groups
            .map(|(index, named)| (named.group.state() != GroupState::Rescheduling, named.order, Turn::Group(index)))
            .collect();
        let deployments = self.deployments.iter().enumerate().filter(|(_, (_, deployment))| {
            deployment.wanted().replicas > 0 && !deployment.gave_up && deployment.stopping_since.is_none()
        });
        turns.extend(deployments.map(|(index, (_, known))| (true, known.order, Turn::Deployment(index))));
        turns.sort_by_key(|(later, order, _)| (*later, *order));
        for (_, _, turn) in turns {
            match turn {
                Turn::Group(index) => self.place_group(index, now),
                Turn::Deployment(index) => self.place_deployment(index, now),
            }
        }
        self.follow_machines(now);
    }

    /// Gives deployments whose replicas follow the machines what nobody else waits for, and takes back what they cannot use.
    fn follow_machines(&mut self, now: Instant) {
        for (_, deployment) in &mut self.deployments {
            let is_settled = deployment.has_served && deployment.rolling.is_none() && !deployment.gave_up;
            let serves = deployment.replicas.iter().any(|replica| replica.engine().is_some());
            if deployment.is_auto() && is_settled && serves && deployment.stopping_since.is_none() {
                deployment.stale |= deployment.shrink();
            }
        }
        let waits = |deployment: &Deployment| {
            !deployment.is_auto()
                && deployment.wanted().replicas > 0
                && !deployment.gave_up
                && deployment.stopping_since.is_none()
        };
        if self.groups.iter().any(NamedGroup::is_waiting) || self.deployments.iter().any(|(_, known)| waits(known)) {
            return;
        }
        for index in 0..self.deployments.len() {
            let (_, deployment) = &self.deployments[index];
            let has_room = deployment.replicas.len() < defaults::REPLICAS_MAX as usize;
            let is_whole = deployment.state == DeploymentState::Ready && deployment.wanted().replicas == 0;
            if deployment.is_auto() && is_whole && has_room && deployment.rolling.is_none() && self.fits_one_more(index)
            {
                let (name, deployment) = &mut self.deployments[index];
                deployment.grow();
                info!(group_id = %name, num_replicas = deployment.replicas.len(), "one more replica");
                self.place_deployment(index, now);
            }
        }
    }

    /// Whether one more replica of a deployment would find its slots now.
    pub(super) fn fits_one_more(&self, index: usize) -> bool {
        let (_, deployment) = &self.deployments[index];
        let wanted = Wanted { replicas: 1, ..deployment.wanted() };
        match deployment.checked.spec.placement_group() {
            Some(group) => matches!(self.free_in_group(group, wanted.tensor_parallel_size), Ok((_, None))),
            None => matches!(place(&self.capacities(), &self.holds(), &wanted), Placement::Placed(_)),
        }
    }

    fn place_deployment(&mut self, index: usize, now: Instant) {
        let (_, deployment) = &self.deployments[index];
        let wanted = deployment.wanted();
        if let Some(group) = deployment.checked.spec.placement_group().map(str::to_owned) {
            return match self.places_in_group(index, &group) {
                Ok(places) => self.take_slots(index, places, now),
                Err((shortage, _)) => self.keep_waiting(index, &shortage, &wanted, now),
            };
        }
        match place(&self.capacities(), &self.holds(), &wanted) {
            Placement::Placed(nodes) => {
                let mut taken = self.taken();
                let mut place = |node: NodeId| Place { slot: free_slot(&mut taken, &node), node };
                let places = nodes.into_iter().map(|replica| replica.into_iter().map(&mut place).collect()).collect();
                self.take_slots(index, places, now);
            }
            Placement::Pending(shortage) | Placement::Infeasible(shortage) => {
                self.keep_waiting(index, &shortage, &wanted, now);
            }
        }
    }

    fn take_slots(&mut self, index: usize, replicas: Vec<Vec<Place>>, now: Instant) {
        let (name, deployment) = &mut self.deployments[index];
        let mut replicas = replicas.into_iter();
        let mut words = Vec::new();
        for (number, replica) in deployment.replicas.iter_mut().enumerate() {
            if !matches!(replica.stage, Stage::Unplaced) {
                continue;
            }
            let Some(places) = replicas.next() else { break };
            words.extend(places.iter().map(|place| format!("{} slot {}", place.node, place.slot)));
            deployment.group.place(number as u32, places.clone());
            replica.launch(places, now);
        }
        (deployment.placed_at, deployment.placed_order) = (SystemTime::now(), self.next_order);
        self.next_order += 1;
        if !deployment.has_served {
            deployment.reason.clear();
        }
        info!(group_id = %name, places = words.join(", "), "placed");
        deployment.state = deployment.derive_state();
        let text = format!("placed on {}", words.join(", "));
        deployment.tell_line(text.clone());
        let name = name.clone();
        let _ = self.serving.try_send(ServingChange::Starting(Arc::clone(&deployment.checked)));
        self.tell_deployment(&name, event(Level::Info, "placed", text));
    }

    fn keep_waiting(&mut self, index: usize, shortage: &Shortage, wanted: &Wanted, now: Instant) {
        let (name, deployment) = &mut self.deployments[index];
        if deployment.is_auto() && deployment.replicas.iter().any(|replica| replica.engine().is_some()) {
            return;
        }
        let late = !deployment.has_served && deployment.wait_until.is_some_and(|until| now >= until);
        if late {
            let wait = deployment.checked.spec.wait.unwrap_or_default();
            let message = format!("waited {} s for machines: {}", wait.as_secs(), shortage.reason);
            warn!(group_id = %name, reason = shortage.reason, "deployment could not be placed in time");
            let name = name.clone();
            let given_up = event(Level::Error, "not_placed", message.clone());
            deployment.group.give_up(shortage.reason.clone());
            let hint =
                format!("Join more machines, or use less than --tensor-parallel-size {}", wanted.tensor_parallel_size);
            deployment.give_up(DeployFailureCode::Timeout, message, hint);
            self.tell_deployment(&name, given_up);
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
        let (name, waits) =
            (name.clone(), event(Level::Warn, "waits", format!("waits for slots: {}", shortage.reason)));
        self.tell_deployment(&name, waits);
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
        if let (Stage::Unplaced, Some(engine)) =
            (&deployment.replicas[number].stage, &deployment.replicas[number].engine)
        {
            // Its requests need not wait for a machine.
            engine.move_to(deployment.serving().cloned().collect());
        }
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
            Stage::Yielding { until, why } => {
                if replica.has_yielded(until, now) {
                    replica.moves = true;
                    self.break_group(&key, why.to_owned(), now);
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
        if replica.moves {
            info!(group_id = %key.deployment, incarnation = key.incarnation.0, reason = cause, "group ends");
        } else {
            warn!(group_id = %key.deployment, incarnation = key.incarnation.0, reason = cause, "group broke");
        }
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
        // What became of the processes is told when it is known; what was asked for is no failure.
        let is_asked = deployment.replicas.get(key.replica as usize).is_some_and(|replica| replica.moves);
        let level = if is_asked { Level::Info } else { Level::Warn };
        let kind = if is_asked { "group_ends" } else { "group_broke" };
        let text = format!("the group ends: {}; its requests wait", deployment.reason);
        self.tell_group(key, event(level, kind, text));
    }

    /// The processes of a broken group have ended: start again, wait for a machine, or give up.
    fn decide(&mut self, index: usize, number: usize, now: Instant) {
        let (max, window) = (self.settings.restarts_max, self.settings.restart_window);
        let alive: BTreeSet<NodeId> = self.capacities().into_iter().map(|node| node.id).collect();
        let theirs = self.slots_of_its_group(index);
        let (name, deployment) = &self.deployments[index];
        let incarnation = deployment.replicas[number].incarnation;
        let key = GroupKey { deployment: name.clone(), replica: number as u32, incarnation };
        // The next processes have not failed.
        let standing = self.standing(&key);
        let (name, deployment) = &mut self.deployments[index];
        let replica = &mut deployment.replicas[number];
        let reason = replica.reason();
        let restarts = recent_restarts(&mut replica.restarts, now, window);
        if !deployment.has_served {
            let rank = standing.rank.unwrap_or_default();
            let hint = format!("See what it wrote: coordinator logs {name}/{number}/{rank}");
            deployment.give_up(DeployFailureCode::StartFailed, reason, hint);
        } else if restarts >= max && !replica.moves {
            let minutes = window.as_secs() / 60;
            let message = format!("{reason}; gave up after {restarts} restarts in {minutes} minutes");
            let hint = format!("coordinator undeploy {name}, then serve it again");
            deployment.give_up(DeployFailureCode::StartFailed, message, hint);
        } else {
            if replica.moves {
                deployment.reason = format!("{reason}; starting again");
            } else {
                replica.restarts.push(now);
                deployment.reason = format!("{reason}; starting again (restart {} of {max})", restarts + 1);
            }
            let places = deployment.group.places(number as u32);
            let may_stay =
                |place: &Place| alive.contains(&place.node) && theirs.as_ref().is_none_or(|t| t.contains(place));
            if !places.is_empty() && places.iter().all(may_stay) {
                replica.launch(places, now);
            } else {
                deployment.group.reschedule(number as u32, reason);
                replica.stage = Stage::Unplaced;
            }
            info!(group_id = %name, reason = deployment.reason, "group starts again");
        }
        let gave_up = deployment.gave_up;
        let (level, kind) = if gave_up { (Level::Error, "gave_up") } else { (Level::Info, "starts_again") };
        let text = deployment.reason.clone();
        self.chronicle.note(EventRecord { level: level.as_str().to_owned(), kind: kind.to_owned(), text, ..standing });
    }

    /// Slots that a deployment in a placement group may use; the group may have lost some. None: any.
    pub(super) fn slots_of_its_group(&self, index: usize) -> Option<Vec<Place>> {
        let group = self.deployments[index].1.checked.spec.placement_group()?;
        let named = self.groups.iter().find(|named| named.spec.name == group);
        Some(named.map(|named| named.group.slots().collect()).unwrap_or_default())
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
    pub(super) fn published(&mut self, name: &DeploymentName, result: Result<(), String>, now: Instant) {
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
            let mut status = report::deployment(name, deployment, now);
            let engines = deployment.replicas.iter().filter_map(|replica| replica.engine());
            status.num_blocks_free = engines.map(|engine| engine.snapshot().num_blocks_free).sum();
            deployment.tell(&DeployEvent::Ready(status));
            info!(group_id = %name, "deployment ready");
            self.tell_deployment(name, event(Level::Info, "deployment_ready", format!("{name} is ready")));
        }
    }
}

fn late_ranks(replica: &super::super::replica::Replica, seconds: u64) -> String {
    let late = replica.ranks.iter().enumerate().filter(|(_, record)| !record.dialed);
    let names: Vec<String> =
        late.map(|(rank, record)| format!("rank {rank} (pid {} on {})", record.pid(), record.place.node)).collect();
    format!("phase connect: {} did not dial the head within {seconds} s", names.join(", "))
}
