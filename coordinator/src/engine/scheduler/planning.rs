//! The next step: who has rows in it, and where their keys and values go.
//!
//! **Invariant:** a plan stays within the tokens, the sequences and the bytes that a step may have.

use phalanx_proto::{
    NewSequence, PLAN_BYTES_MAX, POOLED_ROWS_MAX, PlanRow, SamplerVariant, SeqId, SeqSlot, StepId, StepPlan, TokenMask,
};

use super::super::block_manager::{BlockManager, BlockTable};
use super::super::sequence::{Phase, Sequence};
use super::{PlannedStep, Scheduler, register};

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
