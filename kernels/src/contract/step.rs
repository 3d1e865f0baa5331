//! What a step computes, and what comes of it.

use std::ops::Range;
use std::sync::Arc;

use crate::ops::edit::{LogitEdits, TokenHistory};

/// What a step computes, on the host. `T` rows: the tokens of all sequences, one after the other.
#[derive(Debug, Clone, Default)]
pub struct StepInputs {
    /// `[T]` token ids, or [`LAST_TOKEN`] and a slot.
    pub token_ids: Vec<u32>,
    /// `[T]` positions.
    pub positions: Vec<u32>,
    /// `[T]` slot where the row's K and V are stored.
    pub kv_slots: Vec<u32>,
    /// Sequences, in batch order.
    pub seqs: Vec<SeqInputs>,
    /// Block tables, one after the other.
    pub block_tables: Vec<u32>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
    /// How the first of the logit rows are drawn.
    pub samples: Vec<SampleRow>,
    /// Which of them may draw certain tokens only.
    pub masks: Vec<SampleMask>,
    /// Which of them have their logits edited.
    pub edits: Vec<SampleEdits>,
    /// What is scored.
    pub scores: Vec<ScoreRow>,
}

/// The tokens that a sampled row may draw. Scores are those of the raw logits, as without a mask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampleMask {
    /// Index into [`StepInputs::samples`].
    pub row: u32,
    /// Token `t` of the whole vocabulary is allowed where bit `t % 32` of word `t / 32` is set.
    pub words: Arc<[u32]>,
}

/// How the logits of a sampled row are edited before it draws; scores are those of the raw logits.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleEdits {
    /// Index into [`StepInputs::samples`].
    pub row: u32,
    /// The edits.
    pub edits: Arc<LogitEdits>,
    /// The sequence's tokens, where it draws for the first time in its slot. From then on the backend keeps them: a token that it has
    /// drawn belongs to them.
    pub history: Option<Arc<TokenHistory>>,
}

/// One sequence's share of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeqInputs {
    /// Its first row in the batch.
    pub query_start: u32,
    /// Its rows.
    pub query_len: u32,
    /// Tokens that its last query may see, its own included.
    pub context_len: u32,
    /// Where its block table begins in `StepInputs::block_tables`.
    pub table_start: u32,
}

/// In [`StepInputs::token_ids`]: no id, but the slot (in the other bits) whose last sampled token stands here.
pub const LAST_TOKEN: u32 = 1 << 31;

/// How the sampled rows of a step are drawn; the same on every rank, since it changes the sequence of collectives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum SamplerKind {
    /// Every row takes the highest logit.
    #[default]
    Greedy,
    /// Rows draw from the whole distribution.
    NoCut,
    /// Some row has top-k, top-p or min-p.
    Cut,
}

/// A row whose next token is wanted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleRow {
    /// Where the token is kept for later steps.
    pub slot: u32,
    /// Index of the output token that is drawn.
    pub output_index: u32,
    /// Keys the counter-based random numbers.
    pub seed: u64,
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// In (0, 1]; 1 is off.
    pub top_p: f32,
    /// In [0, 1]; 0 is off.
    pub min_p: f32,
}

/// A token whose log-probability is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoreRow {
    /// Row of the logits buffer.
    pub row: u32,
    /// The token; `None` for the one that is sampled for the row in this step.
    pub token: Option<u32>,
    /// Alternatives to report, at most [`SCORED_TOP_MAX`].
    pub num_top: u32,
}

/// Most alternatives that are reported beside a token.
pub const SCORED_TOP_MAX: u32 = 20;

/// A scored token: log-probabilities are natural and of the raw logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// The token.
    pub token: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// Its place among all tokens, 1 for the best.
    pub rank: u32,
    /// The best tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// What a step sampled and scored.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepResult {
    /// One entry a sampled row; `None` where it has no finite logit at all.
    pub tokens: Vec<Option<u32>>,
    /// One entry a scored row.
    pub scores: Vec<Scored>,
}

/// This rank's part of the vocabulary in a row of the logits buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VocabSlice {
    /// Columns of the tokens that the rank owns.
    pub columns: Range<usize>,
    /// Id of the token in the first of them.
    pub first_id: u32,
}

/// A part of a step that a device may record and replay; see [`Ops::run`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StepPart {
    /// From tokens to hidden states.
    Forward,
    /// From hidden states to tokens.
    Sample(SamplerKind),
    /// From hidden states to log-probabilities.
    Score,
}

/// A step that is run before the first real one, so that nothing is recorded or tuned later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WarmUpStep {
    /// Sequences that decode one token.
    pub num_decodes: usize,
    /// Tokens that each of them sees, 0 for its own only.
    pub context: usize,
    /// Tokens of one more sequence's prompt.
    pub num_prompt_tokens: usize,
    /// How rows are drawn.
    pub sampler: SamplerKind,
}

/// What a backend's sampler can do beside drawing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SamplerFeatures {
    /// [`StepInputs::masks`].
    pub masks: bool,
    /// [`StepInputs::edits`].
    pub edits: bool,
    /// Whether masks and edits leave the logits as they were. Where not, they are projected again before they are scored.
    pub keeps_logits: bool,
}
