//! The cluster's task: takes one event at a time, then compares what is desired with what is observed and sends the difference.
//!
//! Owns nodes, agents' links and deployments; nobody else writes them. Handlers change records only; what follows from
//! the records happens in [`Reconciler::turn`], each part of which may run again at any time.
//!
//! **Invariant:** a turn never waits: channels to agents are tried, engines are started and stopped in tasks of their own.

mod agents;
mod deploying;
mod ending;
mod grouping;
mod keeping;
mod restarting;
#[cfg(test)]
mod simulation;
mod telling;

pub(super) use keeping::KeptVersion;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use phalanx_proto::{
    AgentCommand, DeploymentName, DesiredRank, DesiredRanks, Incarnation, LogPart, NodeId, Rank, RankKey,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;

use super::chronicle::{Chronicle, Level, event};
use super::deployment::Deployment;
use super::event::{ClusterEvent, GroupKey};
use super::handle::ClusterSettings;
use super::named_group::NamedGroup;
use super::nodes::{AgentSession, NodeTable};
use super::record::Restored;
use super::replica::Replica;
use super::{ClusterError, ServingChange, StatusBoard, report};

/// How often the task looks at its clock.
const TICK: Duration = Duration::from_millis(100);

/// The way to one agent, and what it was told last.
struct AgentLink {
    session: AgentSession,
    commands: mpsc::Sender<AgentCommand>,
    revision: u64,
    told: Option<Vec<DesiredRank>>,
}

/// The end of one node's membership.
#[derive(Default)]
struct Leaving {
    told: bool,
    replies: Vec<oneshot::Sender<Result<(), ClusterError>>>,
}

/// The end of the whole cluster.
struct Stopping {
    since: Instant,
    agents_told: Option<Instant>,
    replies: Vec<oneshot::Sender<()>>,
}

/// The owner of a cluster's state.
pub(super) struct Reconciler {
    settings: ClusterSettings,
    nodes: NodeTable,
    agents: BTreeMap<NodeId, AgentLink>,
    /// In the order in which they were asked for.
    deployments: Vec<(DeploymentName, Deployment)>,
    /// Placement groups that were asked for by name, in that order.
    groups: Vec<NamedGroup>,
    leaving: BTreeMap<NodeId, Leaving>,
    stopping: Option<Stopping>,
    /// Since when this head looks.
    started: Instant,
    /// Changes that the store has not answered.
    num_keeping: usize,
    /// The next deployment's place among the others.
    next_order: u64,
    /// The last incarnation of replicas of deployments that are not there any more.
    last_incarnation: Incarnation,
    events: mpsc::Sender<ClusterEvent>,
    serving: mpsc::Sender<ServingChange>,
    board: StatusBoard,
    /// Where what happens is told.
    chronicle: Chronicle,
    /// Who waits for parts of logs, by the numbers of their requests.
    log_reads: BTreeMap<u64, (NodeId, oneshot::Sender<LogPart>)>,
    next_log_read: u64,
    /// Nodes of which it was told that they are late.
    suspects: BTreeSet<NodeId>,
}

impl Reconciler {
    pub fn new(
        settings: ClusterSettings,
        restored: Restored,
        events: mpsc::Sender<ClusterEvent>,
        serving: mpsc::Sender<ServingChange>,
        board: StatusBoard,
    ) -> Self {
        let chronicle = settings.chronicle.clone();
        let mut reconciler = Self {
            chronicle,
            log_reads: BTreeMap::new(),
            next_log_read: 1,
            suspects: BTreeSet::new(),
            nodes: NodeTable::new(settings.patience),
            settings,
            agents: BTreeMap::new(),
            deployments: Vec::new(),
            groups: Vec::new(),
            started: Instant::now(),
            leaving: BTreeMap::new(),
            stopping: None,
            num_keeping: 0,
            next_order: 0,
            last_incarnation: Incarnation(0),
            events,
            serving,
            board,
        };
        let now = Instant::now();
        let text = format!("head {} started (term {})", reconciler.settings.head.address, reconciler.settings.term);
        reconciler.chronicle.note(event(Level::Info, "head_started", text));
        reconciler.restore(restored, now);
        reconciler.post(now);
        reconciler
    }

    /// Takes events until the cluster has stopped.
    pub async fn run(mut self, mut inbox: mpsc::Receiver<ClusterEvent>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let event = tokio::select! {
                event = inbox.recv() => event,
                _ = ticks.tick() => None,
            };
            let now = Instant::now();
            if let Some(event) = event {
                self.handle(event, now);
            }
            if self.turn(now) {
                return;
            }
        }
    }

    /// One comparison of desired and observed. True when everything has ended.
    fn turn(&mut self, now: Instant) -> bool {
        for node in self.nodes.tick(now) {
            self.tell_node_died(&node);
            self.lose_node(&node, now);
        }
        self.tell_suspects();
        self.place_waiting(now);
        self.advance(now);
        self.roll(now);
        self.publish();
        self.keep(now);
        self.finish_groups();
        self.tell_agents(now);
        self.send_away(now);
        let ended = self.end_all(now);
        self.post(now);
        ended
    }

    fn handle(&mut self, event: ClusterEvent, now: Instant) {
        match event {
            ClusterEvent::AgentJoined { hello, peer, commands, reply } => {
                let _ = reply.send(self.agent_joined(*hello, peer, commands, now));
            }
            ClusterEvent::AgentSaid { node, session, event } => self.agent_said(&node, session, event, now),
            ClusterEvent::AgentGone { node, session } => self.agent_gone(&node, session, now),
            ClusterEvent::RankDialed { hello, link, reply } => {
                let _ = reply.send(self.rank_dialed(hello, link, now));
            }
            ClusterEvent::RankProgress { group, step } => self.rank_progress(&group, step, now),
            ClusterEvent::GroupStarted { group, result } => self.group_started(&group, result, now),
            ClusterEvent::GroupFailed { group, reason } => self.group_failed(&group, reason, now),
            ClusterEvent::GroupStopped { group } => self.group_stopped(&group, now),
            ClusterEvent::Kept { table, name, result } => self.kept(table, name, result, now),
            ClusterEvent::Published { deployment, result } => self.published(&deployment, result, now),
            ClusterEvent::Deploy { checked, watcher } => self.deploy(*checked, watcher, now),
            ClusterEvent::Undeploy { name, reply } => self.undeploy(&name, reply, now),
            ClusterEvent::CreateGroup { spec, reply } => self.create_group(spec, reply, now),
            ClusterEvent::RemoveGroup { name, force, reply } => self.remove_group(&name, force, reply, now),
            ClusterEvent::Restart { name, reply } => self.restart(&name, reply, now),
            ClusterEvent::ReadLog { node, request, reply } => self.read_log(&node, request, reply),
            ClusterEvent::Leave { node, reply } => self.leave(node, reply),
            ClusterEvent::Stop { reply } => self.stop(reply, now),
        }
    }

    fn deployment_mut(&mut self, name: &DeploymentName) -> Option<&mut Deployment> {
        self.deployments.iter_mut().find(|(known, _)| known == name).map(|(_, deployment)| deployment)
    }

    /// The same for somebody who named it.
    fn known_deployment(&mut self, name: &DeploymentName) -> Result<&mut Deployment, ClusterError> {
        match self.deployments.iter().position(|(known, _)| known == name) {
            Some(at) => Ok(&mut self.deployments[at].1),
            None => {
                let known = self.deployments.iter().map(|(name, _)| name.to_string()).collect();
                Err(ClusterError::UnknownDeployment { name: name.clone(), known })
            }
        }
    }

    /// The replica, if the key's incarnation is its present one.
    fn replica_mut(&mut self, key: &GroupKey) -> Option<&mut Replica> {
        let deployment = self.deployment_mut(&key.deployment)?;
        deployment.replicas.get_mut(key.replica as usize).filter(|replica| replica.incarnation == key.incarnation)
    }

    /// Sends each agent what should run on its node, if that is not what it was told last.
    fn tell_agents(&mut self, now: Instant) {
        if self.is_keeping() {
            return;
        }
        let mut unreachable = Vec::new();
        let desired: Vec<(NodeId, Vec<DesiredRank>)> =
            self.agents.keys().map(|node| (node.clone(), self.desired(node))).collect();
        for (node, ranks) in desired {
            let Some(link) = self.agents.get_mut(&node).filter(|link| link.told.as_ref() != Some(&ranks)) else {
                continue;
            };
            link.revision += 1;
            let message = DesiredRanks { revision: link.revision, ranks: ranks.clone() };
            match link.commands.try_send(AgentCommand::Desired(message)) {
                Ok(()) => link.told = Some(ranks),
                Err(_) => unreachable.push((node, link.session)),
            }
        }
        for (node, session) in unreachable {
            self.agent_gone(&node, session, now);
        }
    }

    /// Every rank that should run on a node.
    fn desired(&self, node: &NodeId) -> Vec<DesiredRank> {
        let mut desired = Vec::new();
        for (name, deployment) in &self.deployments {
            for (number, replica) in deployment.replicas.iter().enumerate() {
                if !replica.wants_processes() {
                    continue;
                }
                for (rank, record) in replica.ranks.iter().enumerate().filter(|(_, r)| r.place.node == *node) {
                    desired.push(DesiredRank {
                        key: RankKey {
                            deployment: name.clone(),
                            replica: u32::try_from(number).unwrap_or(u32::MAX),
                            rank: Rank(u32::try_from(rank).unwrap_or(u32::MAX)),
                            incarnation: replica.incarnation,
                        },
                        device_slot: record.place.slot,
                        num_threads: None,
                        launch_token: record.token.reveal().to_owned(),
                        env: deployment.checked.spec.rank_env(),
                    });
                }
            }
        }
        desired
    }

    fn post(&self, now: Instant) {
        let head = self.settings.head.clone();
        let (snapshot, engines) = report::snapshot(head, &self.nodes, &self.deployments, &self.groups, now);
        self.board.post(snapshot, engines);
    }
}
