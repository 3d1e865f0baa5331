//! The way to the cluster's task: what others may ask of it.

use std::time::{Duration, Instant};

use phalanx_proto::{
    AgentCommand, AgentEvent, AgentHello, DeploymentName, HeadSocket, HeadStatus, LogPart, LogRequest, NodeId,
    PlacementGroupStatus, RankHello, StatusSnapshot, Term,
};
use tokio::sync::{mpsc, oneshot, watch};

use super::chronicle::Chronicle;
use super::deployment::{CheckedSpec, DeployEvent, DeployFailure};
use super::event::ClusterEvent;
use super::named_group::GroupSpec;
use super::nodes::{AgentSession, Patience};
use super::reconcile::Reconciler;
use super::record::Restored;
use super::{ClusterError, ServingChange, StatusBoard};
use crate::config::defaults;
use crate::engine::group::RankLink;
use crate::store::StoreWriter;
use crate::store::etcd::HeadsSeen;

/// What a cluster is told once, when it starts.
#[derive(Debug, Clone)]
pub struct ClusterSettings {
    /// This life of the head.
    pub term: Term,
    /// The head's part of `status`.
    pub head: HeadStatus,
    /// The Unix socket for this machine.
    pub socket: Option<HeadSocket>,
    /// Time between heartbeats.
    pub heartbeat: Duration,
    /// When a silent agent is late, and dead.
    pub patience: Patience,
    /// How long agents and ranks outlive the head.
    pub head_grace: Duration,
    /// Time for ranks to be started and to dial.
    pub connect_deadline: Duration,
    /// How long a broken group waits for word of its processes.
    pub settle: Duration,
    /// Time for processes to end.
    pub end_deadline: Duration,
    /// Time for running requests when their deployment stops.
    pub drain: Duration,
    /// Time for running requests of a replica whose node leaves, where no other node has room for it.
    pub drain_in_place: Duration,
    /// Longest wait of running requests while there is no machine to start their group on.
    pub no_machine_deadline: Duration,
    /// The heads of this cluster, where there may be several.
    pub heads: Option<watch::Receiver<HeadsSeen>>,
    /// Where what happens is told.
    pub chronicle: Chronicle,
    /// Where what must survive is written; none: nowhere.
    pub store: Option<StoreWriter>,
    /// Most restarts of a replica within `restart_window`.
    pub restarts_max: usize,
    /// A group that has served so long begins a new count.
    pub forgiven_after: Duration,
    /// The window in which restarts are counted.
    pub restart_window: Duration,
}

impl ClusterSettings {
    /// The defaults of `config`.
    pub fn new(term: Term, head: HeadStatus, socket: Option<HeadSocket>, head_grace: Duration) -> Self {
        Self {
            term,
            head,
            socket,
            heartbeat: defaults::HEARTBEAT,
            patience: Patience::of(defaults::NODE_TIMEOUT),
            head_grace,
            connect_deadline: defaults::CONNECT_DEADLINE,
            settle: defaults::SETTLE,
            end_deadline: defaults::END_DEADLINE,
            drain: defaults::DRAIN,
            drain_in_place: defaults::DRAIN_IN_PLACE,
            no_machine_deadline: defaults::NO_MACHINE_DEADLINE,
            heads: None,
            chronicle: Chronicle::default(),
            store: None,
            restarts_max: defaults::RESTARTS_MAX,
            forgiven_after: defaults::RESTARTS_FORGIVEN_AFTER,
            restart_window: defaults::RESTART_WINDOW,
        }
    }
}

/// Starts the cluster's task on the current runtime, with what an earlier head has left. It ends after
/// [`ClusterHandle::stop`].
pub fn start(
    settings: ClusterSettings,
    restored: Restored,
    serving: mpsc::Sender<ServingChange>,
) -> (ClusterHandle, StatusBoard) {
    let (events, inbox) = mpsc::channel(defaults::CLUSTER_QUEUE);
    let board = StatusBoard::new(Instant::now()).with_heads(settings.heads.clone());
    let handle = ClusterHandle { events: events.clone(), stands_by: None };
    tokio::spawn(Reconciler::new(settings, restored, events, serving, board.clone()).run(inbox));
    (handle, board)
}

/// The cluster of a head that stands by: it has nothing, takes nothing in, and ends after [`ClusterHandle::stop`].
pub fn stand_by(head: HeadStatus, heads: watch::Receiver<HeadsSeen>) -> (ClusterHandle, StatusBoard) {
    let (events, mut inbox) = mpsc::channel(1);
    tokio::spawn(async move {
        while let Some(event) = inbox.recv().await {
            if let ClusterEvent::Stop { reply } = event {
                let _ = reply.send(());
                return;
            }
        }
    });
    let board = StatusBoard::new(Instant::now()).with_heads(Some(heads.clone()));
    board.post(StatusSnapshot { head, ..StatusSnapshot::default() }, Vec::new());
    (ClusterHandle { events, stands_by: Some(heads) }, board)
}

/// Asks things of the cluster's task.
#[derive(Clone)]
pub struct ClusterHandle {
    events: mpsc::Sender<ClusterEvent>,
    /// Present where this head does not lead.
    stands_by: Option<watch::Receiver<HeadsSeen>>,
}

impl ClusterHandle {
    /// Takes an agent in; what it should do comes through `commands`.
    ///
    /// # Errors
    /// The agent may not join, or the head is stopping.
    pub async fn join(
        &self,
        hello: AgentHello,
        peer: String,
        commands: mpsc::Sender<AgentCommand>,
    ) -> Result<AgentSession, ClusterError> {
        self.ask(|reply| ClusterEvent::AgentJoined { hello: Box::new(hello), peer, commands, reply }).await?
    }

    /// Passes on what an agent said.
    ///
    /// # Errors
    /// The head is stopping.
    pub async fn agent_said(
        &self,
        node: &NodeId,
        session: AgentSession,
        event: AgentEvent,
    ) -> Result<(), ClusterError> {
        self.send(ClusterEvent::AgentSaid { node: node.clone(), session, event }).await
    }

    /// Tells that an agent's stream ended.
    ///
    /// # Errors
    /// The head is stopping.
    pub async fn agent_gone(&self, node: &NodeId, session: AgentSession) -> Result<(), ClusterError> {
        self.send(ClusterEvent::AgentGone { node: node.clone(), session }).await
    }

    /// Takes a rank's stream in.
    ///
    /// # Errors
    /// Nobody asked for this rank; it should end.
    pub async fn rank_dialed(&self, hello: RankHello, link: RankLink) -> Result<(), ClusterError> {
        self.ask(|reply| ClusterEvent::RankDialed { hello, link, reply }).await?
    }

    /// Asks for a deployment; `watcher` hears how it goes, last `Ready` or `Failed`.
    ///
    /// # Errors
    /// The head is stopping.
    pub async fn deploy(&self, checked: CheckedSpec, watcher: mpsc::Sender<DeployEvent>) -> Result<(), ClusterError> {
        self.send(ClusterEvent::Deploy { checked: Box::new(checked), watcher }).await
    }

    /// Removes a deployment; returns when its slots are free.
    ///
    /// # Errors
    /// There is none of this name, or its processes did not end in time.
    pub async fn undeploy(&self, name: DeploymentName) -> Result<(), ClusterError> {
        self.ask(|reply| ClusterEvent::Undeploy { name, reply }).await?
    }

    /// Asks for bundles by name; returns when they are reserved or wait for it, on disk.
    ///
    /// # Errors
    /// They can never be had on the machines that are there, or the head is stopping.
    pub async fn create_group(
        &self,
        spec: GroupSpec,
    ) -> Result<Result<PlacementGroupStatus, DeployFailure>, ClusterError> {
        self.ask(|reply| ClusterEvent::CreateGroup { spec, reply }).await
    }

    /// Gives bundles back; with `force`, what runs in them ends first.
    ///
    /// # Errors
    /// There is no such group, or something runs in it.
    pub async fn remove_group(&self, name: String, force: bool) -> Result<(), ClusterError> {
        self.ask(|reply| ClusterEvent::RemoveGroup { name, force, reply }).await?
    }

    /// Starts a deployment's replicas again, one after the other; returns when all serve.
    ///
    /// # Errors
    /// There is none of this name, or it does not serve.
    pub async fn restart(&self, name: DeploymentName) -> Result<(), ClusterError> {
        self.ask(|reply| ClusterEvent::Restart { name, reply }).await?
    }

    /// A part of a log on a node.
    ///
    /// # Errors
    /// The node is not there, or too many logs are read at once.
    pub async fn read_log(&self, node: NodeId, request: LogRequest) -> Result<LogPart, ClusterError> {
        self.ask(|reply| ClusterEvent::ReadLog { node, request, reply }).await
    }

    /// Sends a node away: its ranks end, then its agent.
    ///
    /// # Errors
    /// There is none of this id.
    pub async fn leave(&self, node: NodeId) -> Result<(), ClusterError> {
        self.ask(|reply| ClusterEvent::Leave { node, reply }).await?
    }

    /// Ends all deployments, then all agents; returns when they are gone or the deadline has passed.
    ///
    /// # Errors
    /// The head is stopping already.
    pub async fn stop(&self) -> Result<(), ClusterError> {
        self.ask(|reply| ClusterEvent::Stop { reply }).await
    }

    /// Resolves when the cluster's task has ended.
    pub async fn stopped(&self) {
        self.events.closed().await;
    }

    async fn send(&self, event: ClusterEvent) -> Result<(), ClusterError> {
        if let Some(heads) = self.stands_by.as_ref().filter(|_| !matches!(event, ClusterEvent::Stop { .. })) {
            let leader = heads.borrow().leader.as_ref().map(|leader| leader.address.clone());
            return Err(ClusterError::Standby { leader });
        }
        self.events.send(event).await.map_err(|_| ClusterError::Unavailable)
    }

    async fn ask<T>(&self, event: impl FnOnce(oneshot::Sender<T>) -> ClusterEvent) -> Result<T, ClusterError> {
        let (reply, answer) = oneshot::channel();
        self.send(event(reply)).await?;
        answer.await.map_err(|_| ClusterError::Unavailable)
    }
}
