//! One sequence of the batch: its tokens, its block table, how far it is computed, and what a row of a plan makes of it.

use std::collections::VecDeque;
use std::sync::Arc;

use phalanx_kernels::ops::edit::{LogitEdits, TokenHistory};
use phalanx_kernels::{LAST_TOKEN, SCORED_TOP_MAX, SampleEdits, SampleRow, ScoreRow, SeqInputs, StepInputs};
use phalanx_proto::{NewSequence, PlanRow, Pooling, SamplerVariant, SamplingParams, SeqSlot, StepId, TokenId};

use super::{BatchLimits, StepWork};
use crate::edits;
use crate::error::Divergence;
use crate::pooling::PoolChunk;
use crate::scoring::{NamedTokens, PromptChunk};

/// A sequence as this rank knows it.
#[derive(Debug)]
pub(super) struct Sequence {
    tokens: Vec<TokenId>,
    num_prompt_tokens: u32,
    blocks: Vec<u32>,
    sampling: SamplingParams,
    /// How its logits are edited.
    edits: Option<Arc<LogitEdits>>,
    /// The backend has the tokens that edits look at.
    has_history: bool,
    /// Positions whose K and V are stored; `None` until its first row says where it begins.
    num_computed: Option<u32>,
    /// The step that sampled the last token, or will.
    sampled_in: Option<StepId>,
    /// Steps in flight that sample for it, oldest first: its last tokens are theirs.
    pending: VecDeque<StepId>,
}

impl Sequence {
    /// A sequence that enters the batch.
    ///
    /// # Errors
    /// It names blocks that do not exist, or too many.
    pub(super) fn new(new: &NewSequence, limits: &BatchLimits) -> Result<Self, Divergence> {
        let mut sequence = Self {
            tokens: new.tokens.clone(),
            num_prompt_tokens: new.num_prompt_tokens,
            blocks: Vec::with_capacity(limits.max_model_len.div_ceil(limits.block_size)),
            sampling: new.sampling.clone(),
            edits: edits::to_kernel(new.sampling.edits.as_deref(), limits.vocab_size).map(Arc::new),
            has_history: false,
            num_computed: None,
            sampled_in: None,
            pending: VecDeque::new(),
        };
        sequence.extend_table(new.slot, new.blocks.iter().map(|block| block.0), limits)?;
        Ok(sequence)
    }

    /// Whether a step with this sampler gives what the row asks for.
    pub(super) fn is_served(&self, row: &PlanRow, sampler: SamplerVariant) -> bool {
        match &self.sampling.pooling {
            Some(_) => !row.samples,
            None => !row.pools && (!row.samples || self.sampling.variant() as u32 <= sampler as u32),
        }
    }

    fn extend_table(
        &mut self,
        slot: SeqSlot,
        blocks: impl Iterator<Item = u32>,
        limits: &BatchLimits,
    ) -> Result<(), Divergence> {
        for block in blocks {
            if block as usize >= limits.num_blocks {
                let block = phalanx_proto::BlockId(block);
                return Err(Divergence::Block { slot, block, num_blocks: limits.num_blocks });
            }
            self.blocks.push(block);
        }
        if self.blocks.len() > limits.max_model_len.div_ceil(limits.block_size) {
            return Err(self.bad_table(slot, limits.max_model_len, limits));
        }
        Ok(())
    }

    fn bad_table(&self, slot: SeqSlot, num_tokens: usize, limits: &BatchLimits) -> Divergence {
        Divergence::Table { slot, num_blocks: self.blocks.len(), num_tokens, block_size: limits.block_size }
    }

    /// Checks a row against the sequence and moves it on.
    pub(super) fn advance(&mut self, row: &PlanRow, limits: &BatchLimits) -> Result<(), Divergence> {
        let slot = row.slot;
        let cached = (self.blocks.len() * limits.block_size) as u32;
        match self.num_computed {
            Some(expected) if row.start != expected => {
                return Err(Divergence::Start { slot, expected, found: row.start });
            }
            None if row.start > 0 && self.sampling.pooling == Some(Pooling::Mean) => {
                return Err(Divergence::Start { slot, expected: 0, found: row.start });
            }
            None if row.start > cached => return Err(Divergence::Start { slot, expected: cached, found: row.start }),
            _ => {}
        }
        if let Some(found) = row.consumes.filter(|step| self.sampled_in != Some(*step)) {
            return Err(Divergence::Consumes { slot, last: self.sampled_in, found });
        }
        let end = u64::from(row.start) + u64::from(row.num_tokens);
        let reaches_last = end == self.tokens.len() as u64;
        let fits = end <= self.tokens.len() as u64 && end <= limits.max_model_len as u64 && row.num_tokens > 0;
        if !fits || ((row.samples || row.pools || row.consumes.is_some()) && !reaches_last) {
            return Err(Divergence::End { slot, end, num_tokens: self.tokens.len() });
        }
        self.extend_table(slot, row.new_blocks.iter().map(|block| block.0), limits)?;
        if (end as usize).div_ceil(limits.block_size) > self.blocks.len() {
            return Err(self.bad_table(slot, end as usize, limits));
        }
        self.num_computed = Some(end as u32);
        Ok(())
    }

    /// Writes a checked row's inputs.
    pub(super) fn write(&mut self, row: &PlanRow, block_size: u32, work: &mut StepWork) {
        let inputs = &mut work.inputs;
        let (query_start, end) = (inputs.token_ids.len() as u32, row.start + row.num_tokens);
        let tokens = &self.tokens[row.start as usize..end as usize];
        inputs.token_ids.extend(tokens.iter().map(|token| token.0));
        if !self.pending.is_empty() && end as usize == self.tokens.len() {
            // Only the last token can be pending here: a sequence is never ahead of itself by two.
            if let Some(last) = inputs.token_ids.last_mut() {
                *last = LAST_TOKEN | row.slot.0;
            }
        }
        inputs.positions.extend(row.start..end);
        inputs.kv_slots.extend(
            (row.start..end)
                .map(|position| self.blocks[(position / block_size) as usize] * block_size + position % block_size),
        );
        let table_start = inputs.block_tables.len() as u32;
        inputs.seqs.push(SeqInputs { query_start, query_len: row.num_tokens, context_len: end, table_start });
        inputs.block_tables.extend_from_slice(&self.blocks[..end.div_ceil(block_size) as usize]);
        if row.samples {
            inputs.logit_rows.push(query_start + row.num_tokens - 1);
            if let Some(num_top) = self.sampling.logprobs {
                let row = inputs.samples.len() as u32;
                inputs.scores.push(ScoreRow { row, token: None, num_top: num_top.min(SCORED_TOP_MAX) });
            }
            self.write_named(inputs, query_start + row.num_tokens - 1, &mut work.named);
            self.write_edits(inputs);
            inputs.samples.push(self.sample_row(row.slot));
        }
        self.write_prompt(row, query_start, work);
        work.pools.extend(self.sampling.pooling.and_then(|pooling| PoolChunk::new(pooling, row, query_start)));
    }

    /// Gives the next sampled row its edits; the first one of a sequence brings the tokens, which are all known then.
    fn write_edits(&mut self, inputs: &mut StepInputs) {
        let Some(edits) = &self.edits else { return };
        let is_first = !std::mem::replace(&mut self.has_history, true);
        let history = is_first.then(|| {
            let tokens: Vec<u32> = self.tokens.iter().map(|token| token.0).collect();
            let (prompt, output) = tokens.split_at(self.num_prompt_tokens as usize);
            Arc::new(TokenHistory::new(prompt, output))
        });
        inputs.edits.push(SampleEdits { row: inputs.samples.len() as u32, edits: Arc::clone(edits), history });
    }

    /// Asks for the scores of the tokens that the request names, beside the next sampled row.
    fn write_named(&self, inputs: &StepInputs, row: u32, named: &mut Vec<NamedTokens>) {
        let tokens = self.sampling.edits.iter().flat_map(|edits| &edits.scored).copied().collect::<Vec<_>>();
        if !tokens.is_empty() {
            named.push(NamedTokens { sample: inputs.samples.len() as u32, row, tokens });
        }
    }

    /// How the sequence's next token is drawn.
    fn sample_row(&self, slot: SeqSlot) -> SampleRow {
        let SamplingParams { temperature, top_k, top_p, min_p, seed, .. } = self.sampling;
        let output_index = (self.tokens.len() as u32).saturating_sub(self.num_prompt_tokens);
        SampleRow { slot: slot.0, output_index, seed, temperature, top_k, top_p, min_p }
    }

    /// Holds the place of the token that `step` samples.
    pub(super) fn expect_token(&mut self, step: StepId) {
        self.tokens.push(TokenId(0));
        self.pending.push_back(step);
        self.sampled_in = Some(step);
    }

    /// Puts a step's token in its place, unless another sequence took the slot since.
    pub(super) fn commit(&mut self, step: StepId, token: TokenId) {
        if self.pending.front() == Some(&step) {
            let place = self.tokens.len() - self.pending.len();
            self.tokens[place] = token;
            self.pending.pop_front();
        }
    }

    /// Position `p` predicts the prompt's token at `p + 1`, which may lie beyond the chunk.
    fn write_prompt(&self, row: &PlanRow, first_row: u32, work: &mut StepWork) {
        let Some(num_top) = self.sampling.prompt_logprobs else { return };
        let (start, end) = (row.start + 1, (row.start + row.num_tokens + 1).min(self.num_prompt_tokens));
        if let Some(tokens) = self.tokens.get(start as usize..end as usize).filter(|tokens| !tokens.is_empty()) {
            let edits = self.sampling.edits.as_deref();
            work.prompts.push(PromptChunk::new(row.slot, start, first_row, tokens, num_top, edits));
        }
    }
}
