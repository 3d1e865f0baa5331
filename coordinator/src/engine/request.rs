//! What crosses between the API runtime and an engine.

use std::num::NonZeroU32;
use std::time::Duration;

use phalanx_proto::{SamplerFeatures, SamplingParams, TokenId, TokenLogprobs};

use super::block_manager::BlockHash;
use super::constraint::Constraint;
use super::policy::Policy;
use crate::config::defaults;

/// A request as the engine sees it: validated, tokenized, without text.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// The client's name for it, for logs.
    pub request_id: String,
    /// At least one token.
    pub prompt: Vec<TokenId>,
    /// How to sample; the seed is always set here.
    pub sampling: SamplingParams,
    /// Most output tokens; clamped to the context by the engine.
    pub max_tokens: NonZeroU32,
    /// Tokens that end the sequence: the model's end tokens (unless ignored) and the request's own.
    pub stop_token_ids: Vec<TokenId>,
    /// Limits its tokens.
    pub constraint: Option<Constraint>,
    /// Lower runs first, where the policy looks at it.
    pub priority: i32,
    /// Stands before its first block: prefixes are shared only behind the same one.
    pub cache_salt: Option<BlockHash>,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token; the token itself is not among the emitted ones' text, but is emitted as an event before.
    Stop(TokenId),
    /// `max_tokens` or the context is full.
    Length,
    /// The request's constraint allows nothing more, or its prompt is pooled: what was asked for is complete.
    Complete,
    /// The client went away.
    Aborted,
}

/// Tokens counted for a finished request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated, the stop token included.
    pub completion_tokens: u32,
    /// Prompt tokens whose KV blocks came from the prefix cache.
    pub cached_tokens: u32,
}

/// What a `TokenStream` yields; ends with `Finished` or `Failed`, exactly once.
#[derive(Debug, Clone)]
pub enum TokenEvent {
    /// Log-probabilities of the prompt from its second token on; comes before the first `Token`, once complete.
    PromptLogprobs(Vec<TokenLogprobs>),
    /// One output token.
    Token {
        /// Output index, from 0; each index is emitted once.
        index: u32,
        /// The token.
        token: TokenId,
        /// Present where asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// The hidden states of a prompt that was to be pooled, not normalised; no token comes.
    Pooled(Vec<f32>),
    /// The sequence ended as it should.
    Finished {
        /// Why.
        reason: FinishReason,
        /// What it cost.
        usage: Usage,
    },
    /// The sequence cannot go on.
    Failed(EngineError),
}

/// Why an engine refuses a request or gives it up.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum EngineError {
    /// Nothing to continue.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The queue is full; try again later.
    #[error("{waiting} requests wait already; the limit is {max_queue}")]
    QueueFull {
        /// Requests that wait.
        waiting: u32,
        /// The limit.
        max_queue: u32,
        /// When a place may be free.
        retry_after: Duration,
    },
    /// The prompt leaves no room for an answer.
    #[error("the prompt has {prompt_tokens} tokens; this model's context is {max_model_len}")]
    PromptTooLong {
        /// Its length.
        prompt_tokens: u32,
        /// The limit, prompt and output together.
        max_model_len: u32,
    },
    /// A token id outside the vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        token: TokenId,
        /// Rows of the embedding.
        vocab_size: u32,
    },
    /// More KV blocks than the group has.
    #[error("the request needs {needed} KV blocks; the deployment has {total}")]
    TooFewBlocks {
        /// Blocks for the whole sequence.
        needed: u32,
        /// Blocks that exist.
        total: u32,
    },
    /// The group broke: a rank died, disagreed or was late.
    #[error("the tensor-parallel group failed: {reason}")]
    GroupFailed {
        /// Which rank, and how.
        reason: String,
    },
    /// The request's constraint cannot go on.
    #[error("the output could not be held to its grammar: {reason}")]
    Constraint {
        /// Why.
        reason: String,
    },
    /// The deployment is being removed.
    #[error("the deployment is stopping")]
    Stopping,
}

/// Limits of one engine; each has a default in `config.rs`.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineLimits {
    /// KV blocks: the minimum over ranks.
    pub num_blocks: u32,
    /// Tokens in a block.
    pub block_size: u32,
    /// Longest sequence, prompt and output together.
    pub max_model_len: u32,
    /// Most sequences in a step.
    pub max_num_seqs: u32,
    /// Most tokens in a step.
    pub max_num_batched_tokens: u32,
    /// Most requests that wait.
    pub max_queue: u32,
    /// Plans queued at the ranks.
    pub steps_in_flight_max: u32,
    /// Rows of the embedding.
    pub vocab_size: u32,
    /// Blocks of equal prefixes are shared.
    pub enable_prefix_caching: bool,
    /// A step's chunks are sized so that it takes about this long.
    pub step_time_budget: Duration,
    /// Shortest deadline of a step.
    pub step_deadline_min: Duration,
    /// Who runs next, and who gives way.
    pub policy: Policy,
    /// What happens when the group breaks.
    pub recovery: RecoveryLimits,
    /// What the ranks' samplers can do; known once they have said so.
    pub features: SamplerFeatures,
}

#[cfg(test)]
impl EngineLimits {
    /// Those of a small engine: a test names what it needs otherwise.
    pub(crate) fn for_tests() -> Self {
        Self {
            num_blocks: 64,
            block_size: 16,
            max_model_len: 256,
            max_num_seqs: 8,
            max_num_batched_tokens: 256,
            max_queue: 8,
            steps_in_flight_max: 2,
            vocab_size: 515,
            enable_prefix_caching: true,
            step_time_budget: Duration::from_millis(10),
            step_deadline_min: Duration::from_secs(5),
            policy: Policy::default(),
            recovery: RecoveryLimits::default(),
            features: SamplerFeatures { masks: true, edits: true },
        }
    }
}

/// How often and how long an engine goes on after its group broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecoveryLimits {
    /// Most epochs that may end under one request: with the next one it fails.
    pub replays_max: u32,
    /// Longest wait for the next group; zero: the engine fails with its group.
    pub deadline: Duration,
}

impl Default for RecoveryLimits {
    fn default() -> Self {
        Self { replays_max: defaults::REPLAYS_MAX, deadline: defaults::RECOVERY_DEADLINE }
    }
}
