//! Who runs next, and who gives way.
//!
//! Knows the order of sequences only: no blocks, no tokens, no time.
//!
//! **Invariant:** a policy orders; it never drops or duplicates a sequence.
//! **Invariant:** the queue is sorted by the policy's order, which is total: one sequence is always before all others.

mod fcfs;
mod priority;

use std::collections::VecDeque;

use phalanx_proto::SeqId;
use serde::{Deserialize, Serialize};

/// The scheduling policies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// First come, first served, whatever priority a request names; the last one to start gives way.
    Fcfs,
    /// The lowest number first, and first come, first served among equals; the highest number gives way.
    #[default]
    Priority,
}

impl std::str::FromStr for Policy {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "fcfs" => Ok(Self::Fcfs),
            "priority" => Ok(Self::Priority),
            other => Err(format!("{other} is neither fcfs nor priority")),
        }
    }
}

impl std::fmt::Display for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fcfs => "fcfs",
            Self::Priority => "priority",
        })
    }
}

/// What decides when a sequence's turn comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// The request's own number: lower runs first.
    pub priority: i32,
    /// The sequence with which its request came: itself, or the first one of a request that runs as several.
    pub arrival: SeqId,
    /// The sequence.
    pub id: SeqId,
}

impl Policy {
    /// Whether a request's own number changes its turn.
    pub fn reads_priority(self) -> bool {
        match self {
            Self::Fcfs => false,
            Self::Priority => true,
        }
    }

    /// Puts a sequence in the queue: a new one, or one that was preempted.
    pub fn enqueue(self, waiting: &mut VecDeque<Turn>, turn: Turn) {
        let place = match self {
            Self::Fcfs => fcfs::place(waiting, turn),
            Self::Priority => priority::place(waiting, turn),
        };
        waiting.insert(place, turn);
    }

    /// The sequence to start next; the scheduler takes it out once it fits.
    pub fn next(self, waiting: &VecDeque<Turn>) -> Option<SeqId> {
        waiting.front().map(|turn| turn.id)
    }

    /// True where a running sequence keeps its blocks longer than one that starts now; of all, the last one gives way first.
    pub fn outlasts(self, running: Turn, starting: Turn) -> bool {
        match self {
            Self::Fcfs => fcfs::outlasts(running, starting),
            Self::Priority => priority::outlasts(running, starting),
        }
    }
}
