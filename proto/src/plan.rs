//! Plans and their results: what the head asks of every rank in one step, and what comes back.

mod chain;
mod wire;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use self::chain::Fnv;

use crate::{
    BlockId, Epoch, Incarnation, LogitEdits, PooledRow, Pooling, SeqId, SeqSlot, StepId, Term, TokenId, TokenMask,
};

/// Which sampler a step runs; the same on every rank, since it changes the sequence of collectives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SamplerVariant {
    /// Every row takes the highest logit.
    #[default]
    Greedy,
    /// Rows draw from the whole distribution (temperature only).
    NoCut,
    /// Some row has top-k, top-p or min-p.
    Cut,
}

/// How a rank samples a sequence. Ranges were checked where the request was parsed.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// In (0, 1]; 1 is off.
    pub top_p: f32,
    /// In [0, 1]; 0 is off.
    pub min_p: f32,
    /// Keys the counter-based random numbers.
    pub seed: u64,
    /// How many of the best tokens to report beside the sampled one (0: the sampled one only).
    pub logprobs: Option<u32>,
    /// The same for each prompt token.
    pub prompt_logprobs: Option<u32>,
    /// How logits are edited before a token is drawn. They travel ahead of the plan.
    pub edits: Option<Arc<LogitEdits>>,
    /// Where set, no token is drawn: the prompt's hidden states are pooled when all of it is computed.
    pub pooling: Option<Pooling>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            logprobs: None,
            prompt_logprobs: None,
            edits: None,
            pooling: None,
        }
    }
}

impl SamplingParams {
    /// The cheapest sampler that serves these parameters.
    pub fn variant(&self) -> SamplerVariant {
        if self.temperature == 0.0 {
            SamplerVariant::Greedy
        } else if self.top_k == 0 && self.top_p >= 1.0 && self.min_p <= 0.0 {
            SamplerVariant::NoCut
        } else {
            SamplerVariant::Cut
        }
    }
}

/// A sequence enters the batch: new, preempted or replayed, always by this one message.
#[derive(Debug, Clone, PartialEq)]
pub struct NewSequence {
    /// Where the ranks keep it.
    pub slot: SeqSlot,
    /// The engine's name for it.
    pub seq_id: SeqId,
    /// Prompt and, after a preemption or a replay, the tokens so far.
    pub tokens: Vec<TokenId>,
    /// How many of `tokens` are prompt: the index of an output token counts from here.
    pub num_prompt_tokens: u32,
    /// Blocks that the prefix cache already holds; the first row starts behind them.
    pub blocks: Vec<BlockId>,
    /// How it is sampled.
    pub sampling: SamplingParams,
}

/// The work of one sequence in one step: a prefill chunk or one decoded token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanRow {
    /// The sequence's slot.
    pub slot: SeqSlot,
    /// Position of the first token that is computed.
    pub start: u32,
    /// Tokens that are computed, at least 1.
    pub num_tokens: u32,
    /// Blocks appended to the sequence's table.
    pub new_blocks: Vec<BlockId>,
    /// True where the row ends at the last known token, so that one is sampled behind it; never of a sequence that is pooled.
    pub samples: bool,
    /// The step whose sampled token this row consumes; it may still be in flight.
    pub consumes: Option<StepId>,
    /// True where the row ends at the last token of a sequence that is pooled, so that its vector is given.
    pub pools: bool,
}

/// One step for every rank of a group: a delta against the batch that the ranks hold.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepPlan {
    /// Life of the head.
    pub term: Term,
    /// Life of the rank processes.
    pub incarnation: Incarnation,
    /// Life of sequences and blocks.
    pub epoch: Epoch,
    /// Number of the step within the epoch.
    pub step: StepId,
    /// Chain over all plans of the epoch up to and with this one; see [`StepPlan::chain`].
    pub plan_hash: u64,
    /// The last step whose tokens the head had committed when it sent this.
    pub committed_step: StepId,
    /// Chain over the tokens sampled up to `committed_step`; see [`StepOutput::chain`].
    pub token_hash: u64,
    /// Which sampler runs.
    pub sampler: SamplerVariant,
    /// Sequences that leave the batch before this step.
    pub released_slots: Vec<SeqSlot>,
    /// Sequences that enter it.
    pub new_sequences: Vec<NewSequence>,
    /// The work, in batch order.
    pub rows: Vec<PlanRow>,
    /// Rows that may draw certain tokens only, in the order of the rows. They travel ahead of the plan.
    pub masks: Vec<TokenMask>,
}

/// A token with its log-probability (of the raw logits) and the best alternatives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprobs {
    /// The token that stands in the text.
    pub token: TokenId,
    /// Its natural log-probability.
    pub logprob: f32,
    /// Its place among all tokens, 1 for the best.
    pub rank: u32,
    /// The best tokens, best first.
    pub top: Vec<(TokenId, f32)>,
}

/// The token sampled for one row.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledRow {
    /// The sequence's slot.
    pub slot: SeqSlot,
    /// The token.
    pub token: TokenId,
    /// Present where asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// Log-probabilities of a chunk of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptLogprobs {
    /// The sequence's slot.
    pub slot: SeqSlot,
    /// Position of the first described token (never 0: nothing comes before it).
    pub start: u32,
    /// One entry a token.
    pub tokens: Vec<TokenLogprobs>,
}

/// What a rank answers to a plan. Tokens and log-probabilities come from rank 0 only.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepOutput {
    /// The plan's epoch.
    pub epoch: Epoch,
    /// The plan's step.
    pub step: StepId,
    /// Device time of the step, microseconds.
    pub elapsed_us: u64,
    /// The plan chain as this rank computed it.
    pub plan_hash: u64,
    /// The token chain through this step: equal on all ranks.
    pub token_hash: u64,
    /// One entry for each row that samples, in plan order.
    pub rows: Vec<SampledRow>,
    /// Log-probabilities of prompt chunks computed in this step.
    pub prompt_logprobs: Vec<PromptLogprobs>,
    /// Prompts that are pooled and ended in this step, at most [`crate::POOLED_ROWS_MAX`].
    pub pooled: Vec<PooledRow>,
}

impl StepPlan {
    /// Tokens that the step computes.
    pub fn num_tokens(&self) -> u32 {
        self.rows.iter().map(|row| row.num_tokens).sum()
    }
}

#[cfg(test)]
mod tests;
