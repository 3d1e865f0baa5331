//! The lowest number first; among equals first come, first served. One that waits interrupts none that runs.
//!
//! Where all numbers are equal, as where nobody names one, this is first come, first served.
//!
//! **Invariant:** the oldest of the lowest number is never preempted for another, so it always ends.

use std::collections::VecDeque;

use super::Turn;

pub(super) fn place(waiting: &VecDeque<Turn>, turn: Turn) -> usize {
    let key = |turn: &Turn| (turn.priority, turn.arrival, turn.id);
    waiting.partition_point(|other| key(other) < key(&turn))
}

/// The one of the highest number that started last gives way first.
pub(super) fn outlasts(running: Turn, starting: Turn) -> bool {
    running.priority <= starting.priority
}
