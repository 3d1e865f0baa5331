//! From one epoch to the next: what becomes of the sequences whose group broke.
//!
//! Pure, as the scheduler is. A sequence keeps its prompt and its committed tokens; what was in flight is computed again, and
//! comes out the same because random numbers depend on seed and output index only.
//!
//! **Invariant:** after [`Scheduler::end_epoch`] no sequence runs, owns a slot or has a token in flight, and none is lost.
//! **Invariant:** a sequence that was in two broken batches has its steps for itself until it has passed the place where it stood, so one
//! that breaks its group is found and fails by itself.

use phalanx_proto::{SeqId, SeqSlot, StepId};

use super::super::block_manager::BlockManager;
use super::super::request::{EngineError, TokenEvent};
use super::super::sequence::{Phase, Sequence};
use super::Scheduler;

impl Scheduler {
    /// The group is gone, and with it all that it held: what ran waits again, in its old order, before what came later.
    ///
    /// Those whose budget of replays is spent fail with `error`.
    pub fn end_epoch(&mut self, replays_max: u32, error: &EngineError) {
        for id in std::mem::take(&mut self.running) {
            if let Some(sequence) = self.sequences.get(&id) {
                self.policy.enqueue(&mut self.waiting, sequence.turn);
            }
        }
        let mut spent = Vec::new();
        for (id, sequence) in &mut self.sequences {
            match sequence.interrupt(self.committed_step) {
                Some(num_breaks) if num_breaks > replays_max => spent.push(*id),
                Some(_) => self.counters.replays += 1,
                None => {}
            }
        }
        self.free_slots = (0..self.limits.num_running_max()).rev().map(SeqSlot).collect();
        self.released_slots.clear();
        (self.last_step, self.committed_step) = (StepId(0), StepId(0));
        spent.sort_unstable();
        for id in spent {
            self.fail_waiting(id, error.clone());
        }
    }

    /// Another group takes over, with so many KV blocks. What no longer fits ends here.
    pub fn begin_epoch(&mut self, num_blocks: u32) {
        self.limits.num_blocks = num_blocks;
        let mut ids: Vec<SeqId> = self.waiting.iter().map(|turn| turn.id).collect();
        ids.sort_unstable();
        for id in ids {
            self.fit(id);
        }
    }

    /// Shortens what a waiting sequence may still generate to what the KV blocks hold; fails it where not even what is known fits.
    pub(super) fn fit(&mut self, id: SeqId) {
        let total = self.limits.num_blocks;
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.shorten(self.limits.context());
        if sequence.tokens().len() as u32 > self.limits.known_max(sequence.pools()) {
            let needed = (sequence.tokens().len() as u32).div_ceil(self.limits.block_size);
            self.fail_waiting(id, EngineError::TooFewBlocks { needed, total });
        }
    }

    /// The sequence that must have the next step for itself: one in the batch, or the next one where it fits in.
    pub(super) fn suspect(&self, blocks: &BlockManager) -> Option<SeqId> {
        let runs_alone = |id: &&SeqId| self.sequences.get(id).is_some_and(Sequence::runs_alone);
        if let Some(id) = self.running.iter().find(runs_alone) {
            return Some(*id);
        }
        let id = self.policy.next(&self.waiting).filter(|id| runs_alone(&id))?;
        let num_tokens = self.sequences.get(&id)?.tokens().len() as u32;
        let fits = num_tokens.div_ceil(blocks.block_size()) <= blocks.num_available();
        (fits && !self.free_slots.is_empty()).then_some(id)
    }

    /// True where a step in flight has rows of another sequence of the batch than this one.
    pub(super) fn has_others_in_flight(&self, id: SeqId) -> bool {
        let mut others = self.running.iter().filter(|other| **other != id).filter_map(|id| self.sequences.get(id));
        others.any(|other| other.is_in_flight(self.committed_step))
    }

    /// Sequences that wait and could go on with another group at once, in the order of their turns.
    pub(in crate::engine) fn movable(&self) -> Vec<SeqId> {
        // One whose constraint is away is not whole.
        let is_whole = |id: &SeqId| self.sequences.get(id).is_some_and(Sequence::may_sample);
        self.waiting.iter().map(|turn| turn.id).filter(is_whole).collect()
    }

    /// Lets a sequence go that waits.
    pub(in crate::engine) fn take_waiting(&mut self, id: SeqId) -> Option<Sequence> {
        let place = self.waiting.iter().position(|turn| turn.id == id)?;
        self.waiting.remove(place);
        self.sequences.remove(&id)
    }

    fn fail_waiting(&mut self, id: SeqId, error: EngineError) {
        let Some(sequence) = self.sequences.remove(&id) else { return };
        debug_assert!(matches!(sequence.phase, Phase::Waiting), "only waiting sequences fail here");
        self.waiting.retain(|other| other.id != id);
        self.counters.finished += 1;
        self.events.push((id, TokenEvent::Failed(error)));
    }
}
