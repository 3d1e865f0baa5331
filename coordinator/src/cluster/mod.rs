//! Membership, placement and the deployments of a cluster.
//!
//! One task ([`reconcile`]) owns all state; everyone else sends it events through one bounded queue and reads the board.
//! Knows engines only to start and stop them; knows no text and no HTTP.
//!
//! **Invariant:** what runs follows from what is desired: each turn compares both and sends the difference, so an event
//! that comes twice, late or never leads to the same end.

mod admission;
mod board;
mod deployment;
mod event;
mod handle;
mod launch;
pub mod membership;

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
pub use deployment::{CheckedSpec, DeployEvent, DeployFailure, DeployFailureCode, DeploymentState};
pub use event::ServingChange;
pub use handle::{ClusterHandle, ClusterSettings, stand_by, start};
pub use nodes::{AgentSession, JoinError, NodeState, Patience};
pub use record::DeploymentRecord;
pub use spec::{DeploymentSpec, TensorParallelSize};

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
