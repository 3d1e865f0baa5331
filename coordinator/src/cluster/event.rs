//! What reaches the cluster's task, and what it tells the rest of the head.

use std::sync::Arc;

use phalanx_proto::{
    AgentCommand, AgentEvent, AgentHello, DeploymentName, Epoch, Incarnation, LogPart, LogRequest, NodeId, Phase, Rank,
    RankCapacity, RankHello,
};
use tokio::sync::{mpsc, oneshot};

use super::ClusterError;
use super::deployment::{CheckedSpec, DeployEvent};
use super::named_group::{GroupReply, GroupSpec};
use super::nodes::AgentSession;
use crate::engine::EngineHandle;
use crate::engine::group::RankLink;
use crate::store::Table;

/// Names one incarnation of one replica: answers of an older one are ignored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GroupKey {
    pub deployment: DeploymentName,
    pub replica: u32,
    pub incarnation: Incarnation,
}

/// A group that takes steps.
#[derive(Debug)]
pub(super) struct StartedGroup {
    pub engine: EngineHandle,
    pub num_blocks: u32,
    pub epoch: Epoch,
    /// Requests do not find this engine yet.
    pub is_new: bool,
}

/// How far a rank's start is.
#[derive(Debug, Clone)]
pub(super) struct RankStep {
    pub rank: Rank,
    pub phase: Phase,
    pub fraction: Option<f32>,
    pub detail: String,
    pub capacity: Option<RankCapacity>,
}

/// Everything that happens to a cluster.
pub(super) enum ClusterEvent {
    /// An agent dialed and said hello.
    AgentJoined {
        hello: Box<AgentHello>,
        peer: String,
        commands: mpsc::Sender<AgentCommand>,
        reply: oneshot::Sender<Result<AgentSession, ClusterError>>,
    },
    /// An agent said something.
    AgentSaid { node: NodeId, session: AgentSession, event: AgentEvent },
    /// An agent's stream ended.
    AgentGone { node: NodeId, session: AgentSession },
    /// A rank dialed and said hello.
    RankDialed { hello: RankHello, link: RankLink, reply: oneshot::Sender<Result<(), ClusterError>> },
    /// A rank went on with its start.
    RankProgress { group: GroupKey, step: RankStep },
    /// A group's start ended.
    GroupStarted { group: GroupKey, result: Result<StartedGroup, String> },
    /// A group that took steps broke.
    GroupFailed { group: GroupKey, reason: String },
    /// A group has drained.
    GroupStopped { group: GroupKey },
    /// The store has written what it was given, or cannot.
    Kept { table: Table, name: String, result: Result<(), String> },
    /// The table of served models was brought up to date.
    Published { deployment: DeploymentName, result: Result<(), String> },
    /// Someone asks for a deployment.
    Deploy { checked: Box<CheckedSpec>, watcher: mpsc::Sender<DeployEvent> },
    /// Someone asks for its end.
    Undeploy { name: DeploymentName, reply: oneshot::Sender<Result<(), ClusterError>> },
    /// Someone asks for bundles by name.
    CreateGroup { spec: GroupSpec, reply: GroupReply },
    /// Someone gives them back; with `force`, what runs in them ends.
    RemoveGroup { name: String, force: bool, reply: oneshot::Sender<Result<(), ClusterError>> },
    /// Someone asks for new processes of a deployment, replica by replica.
    Restart { name: DeploymentName, reply: oneshot::Sender<Result<(), ClusterError>> },
    /// Someone asks for a part of a log on a node.
    ReadLog { node: NodeId, request: LogRequest, reply: oneshot::Sender<LogPart> },
    /// Someone asks for a node's end.
    Leave { node: NodeId, reply: oneshot::Sender<Result<(), ClusterError>> },
    /// Someone asks for the end of everything.
    Stop { reply: oneshot::Sender<()> },
}

/// What the rest of the head does when a deployment begins or ends to serve.
#[derive(Debug)]
pub enum ServingChange {
    /// Ranks are starting: whatever takes time for this model may begin.
    Starting(Arc<CheckedSpec>),
    /// These engines serve it from now on, in place of any others.
    Ready {
        /// The deployment.
        checked: Arc<CheckedSpec>,
        /// One for each replica that serves.
        engines: Vec<EngineHandle>,
        /// Answered when requests find it.
        done: oneshot::Sender<Result<(), String>>,
    },
    /// Nothing serves it any more.
    Gone(DeploymentName),
}
