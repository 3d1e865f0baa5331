//! The cluster's task: takes one event at a time, then compares what is desired with what is observed and sends the difference.
//!
//! Owns nodes, agents' links and deployments; nobody else writes them. Handlers change records only; what follows from
//! the records happens in [`Reconciler::turn`], each part of which may run again at any time.
//!
//! **Invariant:** a turn never waits: channels to agents are tried, engines are started and stopped in tasks of their own.

mod agents;
mod deploying;
mod ending;
mod keeping;
#[cfg(test)]
mod simulation;

pub(super) use keeping::KeptVersion;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use phalanx_proto::{AgentCommand, DeploymentName, DesiredRank, DesiredRanks, NodeId, Rank, RankKey};
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;

use super::deployment::Deployment;
use super::event::{ClusterEvent, GroupKey};
use super::handle::ClusterSettings;
use super::nodes::{AgentSession, NodeTable};
use super::record::DeploymentRecord;
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
    leaving: BTreeMap<NodeId, Leaving>,
    stopping: Option<Stopping>,
    /// Changes that the store has not answered.
    num_keeping: usize,
    /// The next deployment's place among the others.
    next_order: u64,
    events: mpsc::Sender<ClusterEvent>,
    serving: mpsc::Sender<ServingChange>,
    board: StatusBoard,
}

impl Reconciler {
    pub fn new(
        settings: ClusterSettings,
        restored: Vec<DeploymentRecord>,
        events: mpsc::Sender<ClusterEvent>,
        serving: mpsc::Sender<ServingChange>,
        board: StatusBoard,
    ) -> Self {
        let mut reconciler = Self {
            nodes: NodeTable::new(settings.patience),
            settings,
            agents: BTreeMap::new(),
            deployments: Vec::new(),
            leaving: BTreeMap::new(),
            stopping: None,
            num_keeping: 0,
            next_order: 0,
            events,
            serving,
            board,
        };
        let now = Instant::now();
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
            self.lose_node(&node, now);
        }
        self.place_waiting(now);
        self.advance(now);
        self.publish();
        self.keep(now);
        self.tell_agents(now);
        self.send_away();
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
            ClusterEvent::Kept { deployment, result } => self.kept(&deployment, result, now),
            ClusterEvent::Published { deployment, result } => self.published(&deployment, result),
            ClusterEvent::Deploy { checked, watcher } => self.deploy(*checked, watcher, now),
            ClusterEvent::Undeploy { name, reply } => self.undeploy(&name, reply, now),
            ClusterEvent::Leave { node, reply } => self.leave(node, reply),
            ClusterEvent::Stop { reply } => self.stop(reply, now),
        }
    }

    fn deployment_mut(&mut self, name: &DeploymentName) -> Option<&mut Deployment> {
        self.deployments.iter_mut().find(|(known, _)| known == name).map(|(_, deployment)| deployment)
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
        let (snapshot, engines) = report::snapshot(head, &self.nodes, &self.deployments, now);
        self.board.post(snapshot, engines);
    }
}
