//! First come, first served: the oldest is never preempted for a younger one, so it always ends.
//!
//! Knows arrival order only. **Invariant:** ids grow with arrival, and the queue stays sorted by them.

use std::collections::VecDeque;

use super::Turn;

/// Behind everything that came before: of two sequences that are preempted the older one returns first.
pub(super) fn place(waiting: &VecDeque<Turn>, turn: Turn) -> usize {
    let key = |turn: &Turn| (turn.arrival, turn.id);
    waiting.partition_point(|other| key(other) < key(&turn))
}

/// The last one to start gives way first.
pub(super) fn outlasts(_running: Turn, _starting: Turn) -> bool {
    true
}
