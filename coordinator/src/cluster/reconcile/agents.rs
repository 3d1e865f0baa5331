//! What agents and ranks say, taken into the records.

use std::time::Instant;

use phalanx_proto::{
    AgentCommand, AgentEvent, AgentHello, AgentWelcome, NodeId, Phase, Rank, RankHello, RankKey, RankObserved,
    RankProcess,
};
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::super::chronicle::{Level, event};
use super::super::event::{GroupKey, RankStep, StartedGroup};
use super::super::nodes::{AgentSession, JoinError};
use super::super::replica::{Process, Stage};
use super::super::{ClusterError, launch};
use super::{AgentLink, Reconciler};
use crate::engine::group::RankLink;

impl Reconciler {
    pub(super) fn agent_joined(
        &mut self,
        hello: AgentHello,
        peer: String,
        commands: mpsc::Sender<AgentCommand>,
        now: Instant,
    ) -> Result<AgentSession, ClusterError> {
        if self.stopping.is_some() {
            return Err(JoinError::Stopping.into());
        }
        let id = hello.node_id.clone();
        let address = if hello.address.is_empty() { peer } else { hello.address.clone() };
        let (num_slots, pid) = (hello.num_slots, hello.pid);
        let is_same_process = self.nodes.node(&id).is_some_and(|known| known.hello.pid == pid);
        let session = self.nodes.join(hello, address, now)?;
        if self.agents.remove(&id).is_some() {
            self.break_groups_on(&id, format!("the agent of {id} dialed again"), now);
        }
        let welcome = AgentWelcome {
            term: self.settings.term,
            heartbeat: self.settings.heartbeat,
            head_grace: self.settings.head_grace,
            version: phalanx_proto::VERSION.to_owned(),
            socket: self.settings.socket.clone(),
        };
        commands.try_send(AgentCommand::Welcome(welcome)).map_err(|_| ClusterError::Unavailable)?;
        info!(node_id = %id, num_slots, pid, "node joined");
        let text = format!("node {id} joined with {num_slots} slots (agent pid {pid})");
        self.tell_node(&id, event(Level::Info, "node_joined", text));
        self.agents.insert(id.clone(), AgentLink { session, commands, revision: 0, told: None });
        self.leave_on(&id, session, is_same_process);
        Ok(session)
    }

    /// An agent that was to leave dialed again, before its stream was seen to end: it still is to. Another process in its place
    /// has come since it left.
    fn leave_on(&mut self, node: &NodeId, session: AgentSession, is_same_process: bool) {
        if is_same_process && let Some(leaving) = self.leaving.get_mut(node) {
            leaving.told = false;
            self.nodes.leaving(node, session, "asked to leave".to_owned());
            return;
        }
        for reply in self.leaving.remove(node).unwrap_or_default().replies {
            let _ = reply.send(Ok(()));
        }
    }

    pub(super) fn agent_said(&mut self, node: &NodeId, session: AgentSession, said: AgentEvent, now: Instant) {
        if !self.nodes.heard(node, session, now) {
            return;
        }
        match said {
            AgentEvent::Heartbeat { round_trip: Some(round_trip), .. } => {
                if let Some(slow) = self.nodes.note_round_trip(node, round_trip) {
                    warn!(node_id = %node, round_trip_ms = slow.as_millis() as u64, "the way to a node is slow");
                }
            }
            AgentEvent::Hello(_) | AgentEvent::Heartbeat { round_trip: None, .. } => {}
            AgentEvent::Rank(observed) => self.rank_observed(node, observed, now),
            AgentEvent::Log(part) => self.log_was_read(node, part),
            AgentEvent::Draining(reason) => {
                info!(node_id = %node, reason, "node drains");
                let text =
                    format!("node {node} leaves: no new work goes there, what runs may end or goes on elsewhere");
                self.tell_node(node, event(Level::Info, "node_drains", text));
                self.nodes.leaving(node, session, reason);
                self.leaving.entry(node.clone()).or_default();
            }
            AgentEvent::Leaving(reason) => {
                info!(node_id = %node, reason, "node leaves");
                self.tell_node(node, event(Level::Info, "node_left", format!("node {node} leaves: {reason}")));
                self.nodes.leaving(node, session, reason);
                self.leaving.entry(node.clone()).or_default();
            }
        }
    }

    pub(super) fn agent_gone(&mut self, node: &NodeId, session: AgentSession, now: Instant) {
        if self.agents.get(node).is_some_and(|link| link.session == session) {
            self.agents.remove(node);
        }
        if self.nodes.closed(node, session) && self.stopping.is_none() {
            warn!(node_id = %node, "node died");
            self.tell_node_died(node);
        }
        if self.nodes.node(node).is_some_and(|known| known.session == session) {
            self.lose_node(node, now);
        }
    }

    /// A node's processes are gone, in whatever way.
    pub(super) fn lose_node(&mut self, node: &NodeId, now: Instant) {
        self.agents.remove(node);
        let reason = self.nodes.node(node).map(|known| known.reason.clone()).unwrap_or_default();
        self.break_groups_on(node, format!("node {node} is gone: {reason}"), now);
        for reply in self.leaving.remove(node).unwrap_or_default().replies {
            let _ = reply.send(Ok(()));
        }
    }

    fn break_groups_on(&mut self, node: &NodeId, cause: String, now: Instant) {
        let mut broken = Vec::new();
        for (name, deployment) in &mut self.deployments {
            for (number, replica) in deployment.replicas.iter_mut().enumerate() {
                let lost = replica.lose_node(node);
                if lost && replica.wants_processes() {
                    let (deployment, incarnation) = (name.clone(), replica.incarnation);
                    broken.push(GroupKey { deployment, replica: number as u32, incarnation });
                } else if lost && matches!(replica.stage, Stage::Broken { .. }) {
                    // Ranks die with their agent, and their streams often end before its own.
                    replica.cause = format!("{cause}; first seen: {}", replica.cause);
                    deployment.reason = replica.reason();
                }
            }
        }
        for key in broken {
            self.break_group(&key, cause.clone(), now);
        }
    }

    /// Of an incarnation that a full disk forgot, and that was counted again elsewhere, another node may still speak.
    fn rank_observed(&mut self, node: &NodeId, observed: RankObserved, now: Instant) {
        let RankObserved { key: RankKey { deployment, replica, rank, incarnation }, pid, state } = observed;
        let key = GroupKey { deployment, replica, incarnation };
        let ended = matches!(state, RankProcess::Exited { .. });
        let Some(replica) = self.replica_mut(&key) else { return };
        if replica.rank_mut(rank).is_none_or(|record| record.place.node != *node) {
            return;
        }
        replica.observe(rank, pid, state);
        match replica.stage {
            Stage::Connecting { .. } if ended => {
                let cause = replica.exit_words(|process| process.has_exited()).unwrap_or_default();
                self.break_group(&key, cause, now);
            }
            Stage::Broken { .. } if ended => {
                let reason = replica.reason();
                if let Some(deployment) = self.deployment_mut(&key.deployment) {
                    deployment.reason = reason;
                }
            }
            _ => {}
        }
    }

    pub(super) fn rank_dialed(&mut self, hello: RankHello, link: RankLink, now: Instant) -> Result<(), ClusterError> {
        let RankHello { deployment, replica, rank, incarnation, .. } = &hello;
        let (deployment, replica, rank, incarnation) = (deployment.clone(), *replica, *rank, *incarnation);
        let key = RankKey { deployment: deployment.clone(), replica, rank, incarnation };
        let group = GroupKey { deployment, replica, incarnation };
        let refuse = |reason| ClusterError::UnknownRank { key: key.clone(), reason };
        let known = self.replica_mut(&group).ok_or_else(|| refuse("no such group"))?;
        let connecting = matches!(known.stage, Stage::Connecting { .. });
        let record = known.rank_mut(rank).ok_or_else(|| refuse("no such rank"))?;
        if !record.token.matches(&hello.launch_token) {
            return Err(refuse("its launch token is another"));
        }
        if hello.version != phalanx_proto::VERSION {
            return Err(refuse("its version is another"));
        }
        if record.place.node != hello.node_id || record.dialed || !connecting {
            return Err(refuse("it is on another node, or has dialed already"));
        }
        record.dialed = true;
        record.device = hello.device;
        record.resumes = hello.resumes;
        if record.process == Process::Asked {
            record.process = Process::Dialed(hello.pid);
        }
        record.link = Some(link);
        record.enter(Phase::Device, None, String::new(), now);
        info!(group_id = %group.deployment, rank = rank.0, pid = hello.pid, "rank connected");
        self.tell_phase(&group, rank, Phase::Connect, Some(1.0), "");
        Ok(())
    }

    pub(super) fn rank_progress(&mut self, group: &GroupKey, step: RankStep, now: Instant) {
        let RankStep { rank, phase, fraction, detail, capacity } = step;
        let Some(record) = self.replica_mut(group).and_then(|replica| replica.rank_mut(rank)) else { return };
        record.capacity = capacity.or(record.capacity);
        record.enter(phase, fraction, detail.clone(), now);
        self.tell_phase(group, rank, phase, fraction, &detail);
    }

    fn tell_phase(&mut self, group: &GroupKey, rank: Rank, phase: Phase, fraction: Option<f32>, detail: &str) {
        if let Some(deployment) = self.deployment_mut(&group.deployment) {
            deployment.tell_phase(group.replica, rank, phase, fraction, detail);
        }
    }

    pub(super) fn group_started(&mut self, key: &GroupKey, result: Result<StartedGroup, String>, now: Instant) {
        let events = self.events.clone();
        let wanted = self.replica_mut(key).filter(|replica| matches!(replica.stage, Stage::Starting { .. }));
        match (wanted, result) {
            (Some(replica), Ok(group)) => {
                for rank in &mut replica.ranks {
                    rank.enter(Phase::Ready, None, String::new(), now);
                }
                let StartedGroup { engine, num_blocks, epoch, is_new } = group;
                replica.num_blocks = num_blocks;
                launch::watch_engine(key.clone(), engine.clone(), epoch, events);
                replica.stage = Stage::Serving;
                replica.serves_since = Some((now, engine.snapshot().counters.finished));
                replica.engine = Some(engine);
                info!(group_id = %key.deployment, incarnation = key.incarnation.0, epoch = epoch.0, "group ready");
                let ready = event(Level::Info, "group_ready", replica.start_words(now));
                self.tell_group(key, ready);
                if let Some(deployment) = self.deployment_mut(&key.deployment) {
                    deployment.stale |= is_new;
                    deployment.settle_state();
                }
            }
            (Some(_), Err(cause)) => self.break_group(key, cause, now),
            // An engine that went on is not ours to end: it hears of the break through its group.
            (None, Ok(group)) if group.is_new => launch::discard_engine(group.engine),
            (None, Ok(_)) => {}
            (None, Err(_)) => {}
        }
    }

    pub(super) fn group_failed(&mut self, key: &GroupKey, reason: String, now: Instant) {
        let serving = self.replica_mut(key).is_some_and(|replica| replica.engine().is_some());
        if serving {
            self.break_group(key, reason, now);
        }
    }
}
