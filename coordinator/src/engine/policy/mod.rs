//! Who runs next, and who gives way.
//!
//! Knows the order of sequences only: no blocks, no tokens, no time.
//!
//! **Invariant:** a policy orders; it never drops or duplicates a sequence.

mod fcfs;

use std::collections::VecDeque;

use phalanx_proto::SeqId;

/// The scheduling policies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// First come, first served; the youngest gives way.
    #[default]
    Fcfs,
}

impl Policy {
    /// Puts a new sequence in the queue.
    pub fn enqueue(self, waiting: &mut VecDeque<SeqId>, id: SeqId) {
        match self {
            Self::Fcfs => fcfs::enqueue(waiting, id),
        }
    }

    /// Puts a preempted sequence back.
    pub fn requeue(self, waiting: &mut VecDeque<SeqId>, id: SeqId) {
        match self {
            Self::Fcfs => fcfs::requeue(waiting, id),
        }
    }

    /// The sequence to start next; the scheduler takes it out once it fits.
    pub fn next(self, waiting: &VecDeque<SeqId>) -> Option<SeqId> {
        match self {
            Self::Fcfs => fcfs::next(waiting),
        }
    }

    /// The running sequence that gives its blocks back, where `running` is in the order of their start.
    pub fn victim(self, running: &[SeqId]) -> Option<SeqId> {
        match self {
            Self::Fcfs => fcfs::victim(running),
        }
    }
}
