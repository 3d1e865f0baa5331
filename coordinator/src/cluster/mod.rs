//! Membership, placement and the deployments of a cluster.
//!
//! One task ([`reconcile`]) owns all state; everyone else sends it events through one bounded queue and reads the board.
//! Knows engines only to start and stop them; knows no text and no HTTP.
//!
//! **Invariant:** what runs follows from what is desired: each turn compares both and sends the difference, so an event
//! that comes twice, late or never leads to the same end.

mod admission;
mod board;
pub mod bundle;
mod chronicle;
mod deployment;
mod event;
mod handle;
mod launch;
pub mod membership;
mod named_group;
mod nodes;
pub mod placement;
mod placement_group;
mod reconcile;
mod record;
mod replica;
mod report;
mod spec;
pub mod strategy;

pub use board::StatusBoard;
pub use chronicle::Chronicle;
pub use deployment::{CheckedSpec, DeployEvent, DeployFailure, DeployFailureCode, DeploymentState};
pub use event::ServingChange;
pub use handle::{ClusterHandle, ClusterSettings, stand_by, start};
pub use named_group::{GroupRecord, GroupSpec};
pub use nodes::{AgentSession, JoinError, NodeState, Patience};
pub use record::{DeploymentRecord, Restored};
pub use spec::{DeploymentSpec, ReplicaCount, TensorParallelSize};

use phalanx_proto::{DeploymentName, NodeId, RankKey};

/// Why the cluster refuses something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// A machine may not join.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// A rank that nobody asked for.
    #[error("rank {key} is not asked for: {reason}")]
    UnknownRank {
        /// What it says it is.
        key: RankKey,
        /// What does not fit.
        reason: &'static str,
    },
    /// No deployment of this name.
    #[error("no deployment is named {name}; there {}", listing(.known))]
    UnknownDeployment {
        /// What was asked for.
        name: DeploymentName,
        /// What there is.
        known: Vec<String>,
    },
    /// No node of this id.
    #[error("no node is named {name}; there {}", listing(.known))]
    UnknownNode {
        /// What was asked for.
        name: NodeId,
        /// What there is.
        known: Vec<String>,
    },
    /// No placement group of this name.
    #[error("no placement group is named {name}; there {}", listing(.known))]
    UnknownGroup {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<String>,
    },
    /// Something runs in a placement group.
    #[error("placement group {name} is in use by {}: undeploy first, or --force ends both", .deployments.join(", "))]
    GroupInUse {
        /// The group.
        name: String,
        /// What runs there.
        deployments: Vec<String>,
    },
    /// A deployment cannot be started again.
    #[error("{name} cannot be restarted: {reason}")]
    CannotRestart {
        /// The deployment.
        name: DeploymentName,
        /// Why.
        reason: String,
    },
    /// Processes did not end in time.
    #[error("processes of {name} have not ended in time: {which}")]
    StillRunning {
        /// The deployment.
        name: DeploymentName,
        /// Ranks, pids and nodes.
        which: String,
    },
    /// This head leads no cluster now.
    #[error("this head stands by: {}", leading(.leader))]
    Standby {
        /// Cluster address of the head that leads, where one does.
        leader: Option<String>,
    },
    /// The store cannot write that a deployment or a placement group has ended.
    #[error("the end of {name} cannot be written down, so it has not ended: {reason}")]
    NotKept {
        /// Whose.
        name: String,
        /// What the store said.
        reason: String,
    },
    /// The head ends, or its queue is full.
    #[error("the head is stopping or overloaded")]
    Unavailable,
}

fn leading(leader: &Option<String>) -> String {
    leader.as_ref().map_or_else(|| "no head leads now".to_owned(), |leader| format!("{leader} leads"))
}

fn listing(known: &[String]) -> String {
    if known.is_empty() { "is none".to_owned() } else { format!("are: {}", known.join(", ")) }
}
