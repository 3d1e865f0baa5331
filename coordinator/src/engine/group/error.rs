//! Why a group is broken.
//!
//! **Invariant:** each of them names the rank that failed first, as far as it can be known.

use std::time::Duration;

use phalanx_proto::{Phase, Rank, RankFailure, StepId};

/// Why a group is broken. Each names the rank that failed first.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
pub enum GroupError {
    /// The cluster gave the group up: a machine or a process of it is gone.
    #[error("{reason}")]
    GivenUp {
        /// What was seen.
        reason: String,
    },
    /// A rank's stream ended.
    #[error("rank {rank} went away in phase {phase}")]
    Gone {
        /// Which.
        rank: Rank,
        /// What it did then.
        phase: Phase,
    },
    /// A rank gave up.
    #[error("rank {rank} failed in phase {}: {} ({})", .failure.phase, .failure.message, .failure.code)]
    Failed {
        /// Which.
        rank: Rank,
        /// What it said.
        failure: RankFailure,
    },
    /// A rank did not get ready in time.
    #[error("rank {rank} is late in phase {phase}: nothing within {limit:?}")]
    StartLate {
        /// Which.
        rank: Rank,
        /// In which phase.
        phase: Phase,
        /// The phase's deadline.
        limit: Duration,
    },
    /// Ranks did not answer a step in time. One that hangs makes those wait that share a collective with it: they are not
    /// named where they still answer when they are told to end.
    #[error("late: no answer to step {step} within {limit:?} from rank {}", numbers(.ranks))]
    StepLate {
        /// Those that hang, or all that are late where that cannot be told.
        ranks: Vec<Rank>,
        /// Which step.
        step: StepId,
        /// The step's deadline.
        limit: Duration,
    },
    /// A rank does not agree with the head.
    #[error("rank {rank} disagrees about {what} of step {step}")]
    Diverged {
        /// Which.
        rank: Rank,
        /// In which step.
        step: StepId,
        /// `the plans` or `the tokens`.
        what: &'static str,
    },
    /// A rank said what it must not say now.
    #[error("rank {rank} sent {what}, out of turn")]
    OutOfTurn {
        /// Which.
        rank: Rank,
        /// The message.
        what: &'static str,
    },
    /// The ranks' numbers are not 0 to `world_size` - 1, each once.
    #[error("the group has {num_links} links, and rank {rank} is not where it should be")]
    WrongRanks {
        /// The first one that is wrong.
        rank: Rank,
        /// Links that were given.
        num_links: usize,
    },
    /// No KV block fits on a rank.
    #[error("rank {rank} has no room for a KV block: {free_bytes} bytes are free, a block takes {block_bytes}")]
    NoRoom {
        /// Which.
        rank: Rank,
        /// Bytes free on its device.
        free_bytes: u64,
        /// Bytes of one block.
        block_bytes: u64,
    },
}

fn numbers(ranks: &[Rank]) -> String {
    ranks.iter().map(Rank::to_string).collect::<Vec<_>>().join(", ")
}

impl GroupError {
    /// Whether it says no more than that a rank missed another one.
    pub(super) fn is_complaint(&self) -> bool {
        matches!(self, Self::Failed { failure, .. } if matches!(failure.code.as_str(), "communicator" | "deadline"))
    }
}
