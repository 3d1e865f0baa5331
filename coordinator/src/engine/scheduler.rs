//! Chooses the work of each step and takes its tokens in: continuous batching, chunked prefill, preemption by recompute.
//!
//! Pure and synchronous: no clock, no channel, no rank. Plans leave as [`PlannedStep`]s in order and come back to
//! [`Scheduler::commit`] in the same order, up to `steps_in_flight_max` later.
//!
//! **Invariant:** every sequence that was enqueued ends in exactly one `Finished` or `Failed` event, and each output index is emitted once.
//! **Invariant:** `running` is in the policy's order, and the last one gives way first; it has no row in the plan that is being made.
//! **Invariant:** if a sequence waits and no step is in flight, [`Scheduler::plan`] gives a plan, unless constraints are away.

mod replay;

use std::collections::{HashMap, VecDeque};

use phalanx_proto::{
    NewSequence, PLAN_BYTES_MAX, POOLED_ROWS_MAX, PlanRow, PromptLogprobs, SampledRow, SamplerVariant, SeqId, SeqSlot,
    StepId, StepOutput, StepPlan, TokenMask,
};

use super::block_manager::{BlockManager, BlockTable};
use super::constraint::{ConstraintAnswer, ConstraintWork, NextTokens};
use super::policy::{Policy, Turn};
use super::request::{EngineError, EngineLimits, FinishReason, TokenEvent};
use super::sequence::{Phase, Sequence};
use super::step_time::StepTime;

/// Bytes of a plan that are kept for its head and for prompt tokens sent inline; see `group.rs`.
const PLAN_RESERVED_BYTES: usize = 8 * 1024;
/// Most bytes of an encoded row without its blocks, and of a released slot beside it.
const ROW_BYTES_MAX: usize = 40;
/// Most bytes of an encoded new sequence without its blocks and tokens.
const NEW_SEQUENCE_BYTES_MAX: usize = 96;
/// Most bytes of an encoded block number.
const BLOCK_BYTES_MAX: usize = 5;
/// Prompt tokens a step that are described with log-probabilities: each needs a row of logits over the vocabulary.
const PROMPT_LOGPROBS_CHUNK_MAX: u32 = 256;
/// One in so many blocks stays available when a sequence starts beside others, so that they need not preempt at once.
const RESERVE_SHARE: u32 = 64;

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

/// A plan in the making.
struct Draft {
    step: StepId,
    rows: Vec<PlanRow>,
    sequences: Vec<SeqId>,
    new_sequences: Vec<NewSequence>,
    masks: Vec<TokenMask>,
    sampler: SamplerVariant,
    num_decode: u32,
    /// The sequence that has this step for itself.
    alone: Option<SeqId>,
    tokens_left: u32,
    prefill_left: u32,
    bytes_left: usize,
    /// Rows that wait one step for a block in quarantine.
    num_stalled: u32,
    preempted: bool,
}

impl Draft {
    fn push(&mut self, sequence: &mut Sequence, num_tokens: u32, block_size: u32) {
        let Some(row) = sequence.plan_row(self.step, num_tokens, block_size) else { return };
        self.tokens_left -= num_tokens;
        self.bytes_left = self.bytes_left.saturating_sub(ROW_BYTES_MAX + row.new_blocks.len() * BLOCK_BYTES_MAX);
        if row.samples && sequence.sampling.variant() as u32 > self.sampler as u32 {
            self.sampler = sequence.sampling.variant();
        }
        if row.samples {
            self.masks.extend(sequence.take_mask());
        }
        self.rows.push(row);
        self.sequences.push(sequence.id);
    }

    /// Whether the step may have rows of this sequence.
    fn admits(&self, id: SeqId) -> bool {
        self.alone.is_none_or(|alone| alone == id)
    }

    /// Whether the step may give one vector more, where the sequence is pooled.
    fn has_room_for(&self, sequence: &Sequence) -> bool {
        !sequence.pools() || self.rows.iter().filter(|row| row.pools).count() < POOLED_ROWS_MAX
    }

    /// Blocks that fit in the plan beside `bytes`.
    fn num_blocks_max(&self, bytes: usize) -> usize {
        self.bytes_left.saturating_sub(bytes) / BLOCK_BYTES_MAX
    }
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

    /// The next step, if there is work: every decoding sequence first, then chunks of prompts, then new sequences.
    pub fn plan(&mut self, blocks: &mut BlockManager) -> Option<PlannedStep> {
        let mut draft = self.draft();
        draft.alone = self.suspect(blocks);
        if draft.alone.is_some_and(|id| self.has_others_in_flight(id)) {
            return None;
        }
        self.plan_decodes(&mut draft, blocks);
        draft.num_decode = draft.rows.len() as u32;
        let num_behind =
            self.running.len() as u32 - draft.num_decode + self.waiting.len().min(self.free_slots.len()) as u32;
        let budget = self.limits.step_time_budget;
        let prefill_max = self.step_time.num_prefill_tokens(draft.num_decode, num_behind, budget);
        draft.prefill_left = prefill_max.min(draft.tokens_left);
        self.plan_chunks(&mut draft);
        self.start_waiting(&mut draft, blocks);
        self.issue(draft, blocks)
    }

    /// Takes the tokens of a step in: the oldest one in flight. Gives the events in order.
    pub fn commit(&mut self, step: PlannedStep, output: StepOutput, blocks: &mut BlockManager) -> Vec<SeqEvent> {
        let PlannedStep { plan, sequences, num_decode } = step;
        self.step_time.observe(num_decode, plan.num_tokens() - num_decode, output.elapsed_us);
        for chunk in output.prompt_logprobs {
            self.commit_prompt_logprobs(chunk, &plan, &sequences);
        }
        let sampling = plan.rows.iter().zip(&sequences).filter(|(row, _)| row.samples);
        for ((_, id), sampled) in sampling.zip(output.rows) {
            self.commit_token(*id, sampled, blocks);
        }
        let pooling = plan.rows.iter().zip(&sequences).filter(|(row, _)| row.pools);
        for ((_, id), pooled) in pooling.zip(output.pooled) {
            self.commit_pooled(*id, pooled.values, blocks);
        }
        blocks.commit(plan.step);
        self.committed_step = plan.step;
        self.counters.steps += 1;
        self.take_events()
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

    fn draft(&self) -> Draft {
        let num_released = self.released_slots.len();
        Draft {
            step: StepId(self.last_step.0 + 1),
            rows: Vec::with_capacity(self.running.len()),
            sequences: Vec::with_capacity(self.running.len()),
            new_sequences: Vec::new(),
            masks: Vec::new(),
            sampler: SamplerVariant::Greedy,
            num_decode: 0,
            alone: None,
            tokens_left: self.limits.max_num_batched_tokens,
            prefill_left: 0,
            bytes_left: PLAN_BYTES_MAX - PLAN_RESERVED_BYTES - num_released * BLOCK_BYTES_MAX,
            num_stalled: 0,
            preempted: false,
        }
    }

    fn plan_decodes(&mut self, draft: &mut Draft, blocks: &mut BlockManager) {
        let mut next = 0;
        while let Some(&id) = self.running.get(next) {
            next += 1;
            let fits = draft.tokens_left > 0 && draft.bytes_left >= ROW_BYTES_MAX + BLOCK_BYTES_MAX;
            if !fits || !draft.admits(id) || !self.sequences.get(&id).is_some_and(Sequence::can_decode) {
                continue;
            }
            if !self.make_room(id, draft, blocks) {
                continue;
            }
            if let Some(sequence) = self.sequences.get_mut(&id) {
                draft.push(sequence, 1, blocks.block_size());
            }
        }
    }

    /// Gives a sequence the block that its next token needs, taking it from younger ones if it must. False: not in this step.
    fn make_room(&mut self, id: SeqId, draft: &mut Draft, blocks: &mut BlockManager) -> bool {
        loop {
            let Some(sequence) = self.sequences.get_mut(&id) else { return false };
            let needs_block = sequence.needs_block(blocks.block_size());
            let Phase::Running(residence) = &mut sequence.phase else { return false };
            if !needs_block || blocks.grow(&mut residence.blocks) {
                return true;
            }
            if blocks.num_quarantined() > draft.num_stalled {
                // A block comes back with a step in flight: to preempt now would free nothing sooner.
                draft.num_stalled += 1;
                return false;
            }
            // One that has the step for itself gives way to nobody: it would start again and lack the same block.
            let victim = self.running.iter().rev().copied().find(|other| draft.alone != Some(*other));
            let Some(victim) = victim else { return false };
            self.preempt(victim, blocks);
            draft.preempted = true;
        }
    }

    fn plan_chunks(&mut self, draft: &mut Draft) {
        for id in &self.running {
            let Some(sequence) = self.sequences.get_mut(id) else { continue };
            if sequence.num_prefill_left() > 0 && draft.admits(*id) {
                plan_chunk(sequence, draft, self.limits.block_size);
            }
        }
    }

    fn start_waiting(&mut self, draft: &mut Draft, blocks: &mut BlockManager) {
        while draft.prefill_left > 0 && !draft.preempted && draft.num_stalled == 0 {
            let Some(id) = self.policy.next(&self.waiting).filter(|id| draft.admits(*id)) else { return };
            if self.is_being_computed(id, draft, blocks) {
                return;
            }
            let Some(sequence) = self.sequences.get_mut(&id) else { return };
            if sequence.runs_alone() && draft.alone != Some(id) {
                return;
            }
            if sequence.num_in_flight() > 0
                || !sequence.may_sample()
                || !draft.has_room_for(sequence)
                || draft.num_blocks_max(NEW_SEQUENCE_BYTES_MAX + ROW_BYTES_MAX) == 0
            {
                return;
            }
            let reserve = if self.running.is_empty() || draft.alone.is_some() {
                0
            } else {
                blocks.num_blocks().div_ceil(RESERVE_SHARE)
            };
            let Some(slot) = self.free_slots.pop() else { return };
            let Some(table) = open_table(sequence, draft, blocks, reserve) else {
                self.free_slots.push(slot);
                return;
            };
            if sequence.brings_prompt() {
                self.counters.prompt_tokens += u64::from(sequence.num_prompt_tokens());
                self.counters.cached_tokens += table.num_cached() as u64 * u64::from(self.limits.block_size);
            }
            start(sequence, slot, table, draft, self.limits.block_size);
            self.waiting.retain(|other| other.id != id);
            self.enter(id);
        }
    }

    /// Puts a sequence among the running ones, in the policy's order.
    fn enter(&mut self, id: SeqId) {
        let turn = |id: &SeqId| self.sequences.get(id).map(|sequence| sequence.turn);
        let Some(own) = turn(&id) else { return };
        let outlasts = |other: &SeqId| turn(other).is_some_and(|other| self.policy.outlasts(other, own));
        let place = self.running.partition_point(outlasts);
        self.running.insert(place, id);
    }

    /// True where a prompt in this plan computes the next block that a waiting sequence needs: a plan later it is shared.
    fn is_being_computed(&mut self, id: SeqId, draft: &Draft, blocks: &BlockManager) -> bool {
        let Some(sequence) = self.sequences.get_mut(&id) else { return false };
        if !blocks.is_caching() || sequence.wants_whole_prompt() {
            return false;
        }
        let prefix = sequence.hashes(blocks.block_size(), sequence.tokens().len() as u32 - 1);
        let index = blocks.num_found(prefix);
        let Some(&hash) = prefix.get(index) else { return false };
        draft.sequences[draft.num_decode as usize..].iter().any(|other| {
            let other = self.sequences.get_mut(other);
            other.is_some_and(|other| other.computes(index, hash, self.limits.block_size))
        })
    }

    /// Makes a plan of a draft that has work, and lets later plans find the prompt blocks that it computes.
    fn issue(&mut self, draft: Draft, blocks: &mut BlockManager) -> Option<PlannedStep> {
        if draft.rows.is_empty() {
            return None;
        }
        self.last_step = draft.step;
        for id in &draft.sequences[draft.num_decode as usize..] {
            if let Some(sequence) = self.sequences.get_mut(id) {
                register(sequence, blocks);
            }
        }
        let plan = StepPlan {
            step: draft.step,
            sampler: draft.sampler,
            released_slots: std::mem::take(&mut self.released_slots),
            new_sequences: draft.new_sequences,
            rows: draft.rows,
            masks: draft.masks,
            ..StepPlan::default()
        };
        Some(PlannedStep { plan, sequences: draft.sequences, num_decode: draft.num_decode })
    }

    fn commit_token(&mut self, id: SeqId, sampled: SampledRow, blocks: &mut BlockManager) {
        // Gone: it ended or was cancelled while this token was in flight, which is dropped.
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        self.counters.generated_tokens += 1;
        let events = &mut self.events;
        let reason = sequence.commit(sampled.token, sampled.logprobs, |event| events.push((id, event)));
        match reason {
            Some(reason) => self.finish(id, reason, blocks),
            None => {
                register(sequence, blocks);
                self.constraint_work.extend(sequence.take_constraint_work());
            }
        }
    }

    /// What constraints have to do now: each is answered by [`Scheduler::resume`].
    pub(super) fn take_constraint_work(&mut self) -> Vec<ConstraintWork> {
        std::mem::take(&mut self.constraint_work)
    }

    /// A constraint is back. Its sequence goes on, or ends where its text is complete or cannot be continued.
    pub(super) fn resume(&mut self, answer: ConstraintAnswer, blocks: &mut BlockManager) {
        let ConstraintAnswer { id, result } = answer;
        // Gone: it was cancelled meanwhile.
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        match result {
            Ok(constraint) if *constraint.next() == NextTokens::Done => self.finish(id, FinishReason::Complete, blocks),
            Ok(constraint) => sequence.resume(constraint),
            Err(error) => {
                self.remove(id, blocks);
                let error = EngineError::Constraint { reason: error.reason };
                self.events.push((id, TokenEvent::Failed(error)));
            }
        }
    }

    fn commit_prompt_logprobs(&mut self, chunk: PromptLogprobs, plan: &StepPlan, sequences: &[SeqId]) {
        let Some(index) = plan.rows.iter().position(|row| row.slot == chunk.slot) else { return };
        if let Some(sequence) = sequences.get(index).and_then(|id| self.sequences.get_mut(id)) {
            sequence.commit_prompt_logprobs(chunk);
        }
    }

    /// A prompt's vector is there, which is all that was asked for.
    fn commit_pooled(&mut self, id: SeqId, values: Vec<f32>, blocks: &mut BlockManager) {
        if self.sequences.contains_key(&id) {
            self.events.push((id, TokenEvent::Pooled(values)));
            self.finish(id, FinishReason::Complete, blocks);
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

/// Plans as much of a prompt as the step has room for.
fn plan_chunk(sequence: &mut Sequence, draft: &mut Draft, block_size: u32) {
    let num_blocks_max = draft.num_blocks_max(ROW_BYTES_MAX) as u32;
    let mut num_tokens = sequence.num_prefill_left().min(draft.prefill_left).min(num_blocks_max * block_size);
    if sequence.wants_prompt_logprobs() {
        num_tokens = num_tokens.min(PROMPT_LOGPROBS_CHUNK_MAX);
    }
    if num_tokens > 0 && draft.has_room_for(sequence) {
        draft.prefill_left -= num_tokens;
        draft.push(sequence, num_tokens, block_size);
    }
}

/// Blocks for all known tokens of a waiting sequence, the first ones from the prefix cache.
///
/// At least the last token is computed even where every block is cached: its logits are needed.
fn open_table(sequence: &mut Sequence, draft: &Draft, blocks: &mut BlockManager, reserve: u32) -> Option<BlockTable> {
    let num_tokens = sequence.tokens().len() as u32;
    let num_blocks = num_tokens.div_ceil(blocks.block_size()) as usize;
    if !blocks.is_caching() || sequence.wants_whole_prompt() {
        return blocks.open(&[], num_blocks, reserve);
    }
    let num_named_max = draft.num_blocks_max(NEW_SEQUENCE_BYTES_MAX + ROW_BYTES_MAX + BLOCK_BYTES_MAX);
    let prefix = sequence.hashes(blocks.block_size(), num_tokens - 1);
    blocks.open(&prefix[..prefix.len().min(num_named_max)], num_blocks, reserve)
}

/// Puts a sequence in the batch, with a first chunk.
fn start(sequence: &mut Sequence, slot: SeqSlot, table: BlockTable, draft: &mut Draft, block_size: u32) {
    let cached = table.blocks()[..table.num_cached()].to_vec();
    draft.bytes_left = draft.bytes_left.saturating_sub(NEW_SEQUENCE_BYTES_MAX + cached.len() * BLOCK_BYTES_MAX);
    sequence.start(slot, table, block_size);
    draft.new_sequences.push(NewSequence {
        slot,
        seq_id: sequence.id,
        tokens: sequence.tokens().to_vec(),
        num_prompt_tokens: sequence.num_prompt_tokens(),
        blocks: cached,
        sampling: sequence.sampling.clone(),
    });
    plan_chunk(sequence, draft, block_size);
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
