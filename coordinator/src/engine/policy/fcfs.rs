//! First come, first served: the oldest is never preempted for a younger one, so it always ends.
//!
//! Knows arrival order only. **Invariant:** ids grow with arrival, and the queue stays sorted by them.

use std::collections::VecDeque;

use phalanx_proto::SeqId;

pub(super) fn enqueue(waiting: &mut VecDeque<SeqId>, id: SeqId) {
    let place = waiting.iter().rposition(|other| *other < id).map_or(0, |index| index + 1);
    waiting.insert(place, id);
}

/// In front of everything that came later: of two sequences that are preempted the older one returns first.
pub(super) fn requeue(waiting: &mut VecDeque<SeqId>, id: SeqId) {
    let place = waiting.iter().position(|other| *other > id).unwrap_or(waiting.len());
    waiting.insert(place, id);
}

pub(super) fn next(waiting: &VecDeque<SeqId>) -> Option<SeqId> {
    waiting.front().copied()
}

pub(super) fn victim(running: &[SeqId]) -> Option<SeqId> {
    running.last().copied()
}
