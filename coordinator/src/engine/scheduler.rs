//! Chooses the work of each step and takes its tokens in: continuous batching, chunked prefill, preemption by recompute.
//!
//! Pure and synchronous: no clock, no channel, no rank. Plans leave as [`PlannedStep`]s in order and come back to
//! [`Scheduler::commit`] in the same order, up to `steps_in_flight_max` later.
//!
//! **Invariant:** every sequence that was enqueued ends in exactly one `Finished` or `Failed` event, and each output index is emitted once.
//! **Invariant:** `running` is in the policy's order, and the last one gives way first; it has no row in the plan that is being made.
//! **Invariant:** if a sequence waits and no step is in flight, [`Scheduler::plan`] gives a plan, unless constraints are away.

mod committing;
mod planning;
mod replay;

use std::collections::{HashMap, VecDeque};

use phalanx_proto::{SeqId, SeqSlot, StepId, StepPlan};

use super::block_manager::BlockManager;
use super::constraint::ConstraintWork;
use super::policy::{Policy, Turn};
use super::request::{EngineError, EngineLimits, FinishReason, TokenEvent};
use super::sequence::{Phase, Sequence};
use super::step_time::StepTime;

/// A plan, and whose rows it has.
#[derive(Debug)]
pub struct PlannedStep {
    /// What the ranks do.
    pub plan: StepPlan,
    /// The sequence of each row.
    pub sequences: Vec<SeqId>,
    num_decode: u32,
}

/// An event for the stream of one sequence.
pub type SeqEvent = (SeqId, TokenEvent);

/// What the scheduler has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Steps committed.
    pub steps: u64,
    /// Prompt tokens of sequences that started, each once.
    pub prompt_tokens: u64,
    /// Of these, found in the prefix cache.
    pub cached_tokens: u64,
    /// Tokens emitted.
    pub generated_tokens: u64,
    /// Sequences that gave their blocks back and start again.
    pub preemptions: u64,
    /// Sequences that ended, whatever the reason.
    pub finished: u64,
    /// Sequences that went on in another epoch than they had run in.
    pub replays: u64,
}

/// Sequences of one engine, and the order of their work.
#[derive(Debug)]
pub struct Scheduler {
    limits: EngineLimits,
    policy: Policy,
    sequences: HashMap<SeqId, Sequence>,
    waiting: VecDeque<Turn>,
    running: Vec<SeqId>,
    free_slots: Vec<SeqSlot>,
    /// Slots whose release no plan has told yet.
    released_slots: Vec<SeqSlot>,
    last_step: StepId,
    committed_step: StepId,
    step_time: StepTime,
    events: Vec<SeqEvent>,
    constraint_work: Vec<ConstraintWork>,
    counters: Counters,
}

impl Scheduler {
    /// Nothing waits, nothing runs.
    pub fn new(limits: EngineLimits) -> Self {
        let free_slots = (0..limits.num_running_max()).rev().map(SeqSlot).collect();
        Self {
            policy: limits.policy,
            limits,
            sequences: HashMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            free_slots,
            released_slots: Vec::new(),
            last_step: StepId(0),
            committed_step: StepId(0),
            step_time: StepTime::default(),
            events: Vec::new(),
            constraint_work: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// Sequences in the batch.
    pub fn num_running(&self) -> u32 {
        self.running.len() as u32
    }

    /// Sequences in the queue, new and preempted.
    pub fn num_waiting(&self) -> u32 {
        self.waiting.len() as u32
    }

    /// True where no sequence is left.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// What was done so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Takes a new sequence in.
    pub fn enqueue(&mut self, sequence: Sequence) {
        let id = sequence.id;
        self.policy.enqueue(&mut self.waiting, sequence.turn);
        self.sequences.insert(id, sequence);
        self.fit(id);
    }

    /// The client is gone: the sequence leaves at the next plan, its tokens in flight are dropped. Unknown ids have ended before.
    pub fn abort(&mut self, id: SeqId, blocks: &mut BlockManager) {
        self.finish(id, FinishReason::Aborted, blocks);
    }

    /// Ends every sequence with `error`.
    pub fn fail_all(&mut self, error: &EngineError, blocks: &mut BlockManager) {
        let mut ids: Vec<SeqId> = self.sequences.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            if self.remove(id, blocks).is_some() {
                self.events.push((id, TokenEvent::Failed(error.clone())));
            }
        }
    }

    /// Events that no step brought: aborts and failures.
    pub fn take_events(&mut self) -> Vec<SeqEvent> {
        std::mem::take(&mut self.events)
    }

    /// Checks this module's invariants and those of the blocks.
    ///
    /// # Panics
    /// If one does not hold.
    pub fn check_invariants(&self, blocks: &BlockManager) {
        let mut held = HashMap::new();
        let mut slots: Vec<SeqSlot> = self.free_slots.clone();
        for id in &self.running {
            let Some(Phase::Running(residence)) = self.sequences.get(id).map(|sequence| &sequence.phase) else {
                unreachable!("sequence {id} is listed as running");
            };
            slots.push(residence.slot);
            for block in residence.blocks.blocks() {
                *held.entry(*block).or_insert(0) += 1;
            }
        }
        blocks.check_invariants(&held);
        slots.sort_unstable();
        assert!(slots.iter().copied().eq((0..self.limits.num_running_max()).map(SeqSlot)), "each slot is in one place");
        let num_listed = self.running.len() + self.waiting.len();
        assert_eq!(num_listed, self.sequences.len(), "a sequence waits or runs");
        for Turn { id, .. } in &self.waiting {
            let waits = self.sequences.get(id).is_some_and(|sequence| matches!(sequence.phase, Phase::Waiting));
            assert!(waits, "sequence {id} is listed as waiting");
        }
    }

    fn finish(&mut self, id: SeqId, reason: FinishReason, blocks: &mut BlockManager) {
        if let Some(sequence) = self.remove(id, blocks) {
            self.events.push((id, TokenEvent::Finished { reason, usage: sequence.usage() }));
        }
    }

    /// Forgets a sequence and gives back what it held.
    fn remove(&mut self, id: SeqId, blocks: &mut BlockManager) -> Option<Sequence> {
        let mut sequence = self.sequences.remove(&id)?;
        if !self.leave(&mut sequence, blocks) {
            self.waiting.retain(|other| other.id != id);
        }
        self.counters.finished += 1;
        Some(sequence)
    }

    fn preempt(&mut self, id: SeqId, blocks: &mut BlockManager) {
        let Some(mut sequence) = self.sequences.remove(&id) else { return };
        let was_running = self.leave(&mut sequence, blocks);
        assert!(was_running, "sequence {id} gives way without running");
        self.policy.enqueue(&mut self.waiting, sequence.turn);
        self.sequences.insert(id, sequence);
        self.counters.preemptions += 1;
    }

    /// Takes a sequence out of the batch, and the next plan tells the ranks. False: it was not in it.
    fn leave(&mut self, sequence: &mut Sequence, blocks: &mut BlockManager) -> bool {
        let Some(residence) = sequence.stop() else { return false };
        blocks.release(residence.blocks, residence.last_planned);
        self.released_slots.push(residence.slot);
        self.free_slots.push(residence.slot);
        self.running.retain(|other| *other != sequence.id);
        true
    }
}

/// Enters the full blocks of a sequence into the prefix cache: known tokens whose KV a plan computes.
fn register(sequence: &mut Sequence, blocks: &mut BlockManager) {
    if !blocks.is_caching() {
        return;
    }
    let Phase::Running(residence) = &mut sequence.phase else { return };
    let num_planned = residence.num_planned;
    let mut table = std::mem::take(&mut residence.blocks);
    blocks.register(&mut table, sequence.hashes(blocks.block_size(), num_planned));
    if let Phase::Running(residence) = &mut sequence.phase {
        residence.blocks = table;
    }
}
