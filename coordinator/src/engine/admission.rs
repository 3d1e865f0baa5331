//! What an engine accepts, decided before any work is spent.
//!
//! Knows limits and one request. **Invariant:** an admitted request can run to its end alone, whatever the others do.

use std::num::NonZeroU32;

use super::request::{EngineError, EngineLimits, GenerateRequest};

/// Most rows of a plan, so that it stays under `PLAN_BYTES_MAX` with a new block for each.
const PLAN_ROWS_MAX: u32 = 1024;

impl EngineLimits {
    /// Longest sequence that this engine can hold: the model's context, or what all KV blocks hold.
    ///
    /// The last token of a sequence needs no KV, hence the one more.
    pub fn context(&self) -> u32 {
        self.max_model_len.min(self.num_blocks.saturating_mul(self.block_size).saturating_add(1))
    }

    /// Most tokens that a sequence may have before it goes on: one that is pooled needs no room behind them.
    pub fn known_max(&self, pools: bool) -> u32 {
        if pools {
            self.max_model_len.min(self.num_blocks.saturating_mul(self.block_size))
        } else {
            self.context().saturating_sub(1)
        }
    }

    /// Most sequences that run at once: each decodes one token in each step.
    pub fn num_running_max(&self) -> u32 {
        self.max_num_seqs.min(self.max_num_batched_tokens).clamp(1, PLAN_ROWS_MAX)
    }

    /// Most requests accepted and not finished: those that run and those that wait.
    pub fn num_accepted_max(&self) -> u32 {
        self.num_running_max().saturating_add(self.max_queue)
    }

    /// Checks a request and gives its `max_tokens`, clamped to the context.
    ///
    /// # Errors
    /// The request can never run here; the client must change it.
    pub fn admit(&self, request: &GenerateRequest) -> Result<NonZeroU32, EngineError> {
        let prompt_tokens = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
        if prompt_tokens == 0 {
            return Err(EngineError::EmptyPrompt);
        }
        let pools = request.sampling.pooling.is_some();
        if prompt_tokens > self.max_model_len - u32::from(!pools) {
            return Err(EngineError::PromptTooLong { prompt_tokens, max_model_len: self.max_model_len });
        }
        if let Some(&token) = request.prompt.iter().find(|token| token.0 >= self.vocab_size) {
            return Err(EngineError::UnknownToken { token, vocab_size: self.vocab_size });
        }
        let needed = prompt_tokens.div_ceil(self.block_size);
        if needed > self.num_blocks {
            return Err(EngineError::TooFewBlocks { needed, total: self.num_blocks });
        }
        let room = NonZeroU32::new(self.context() - prompt_tokens).unwrap_or(NonZeroU32::MIN);
        Ok(request.max_tokens.min(room))
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::{SamplingParams, TokenId};

    use super::*;

    fn admit(num_prompt: u32, max_tokens: u32) -> Result<u32, EngineError> {
        let limits = EngineLimits {
            num_blocks: 4,
            max_model_len: 100,
            max_num_seqs: 4,
            max_num_batched_tokens: 64,
            max_queue: 4,
            vocab_size: 50,
            features: phalanx_proto::SamplerFeatures::default(),
            ..EngineLimits::for_tests()
        };
        let request = GenerateRequest {
            request_id: String::new(),
            prompt: (0..num_prompt).map(TokenId).collect(),
            sampling: SamplingParams::default(),
            max_tokens: NonZeroU32::new(max_tokens).unwrap(),
            stop_token_ids: vec![],
            constraint: None,
            priority: 0,
            cache_salt: None,
        };
        limits.admit(&request).map(NonZeroU32::get)
    }

    #[test]
    fn requests_are_checked_and_clamped() {
        assert_eq!(admit(0, 1), Err(EngineError::EmptyPrompt));
        assert_eq!(admit(10, 5), Ok(5));
        assert_eq!(admit(10, 500), Ok(55), "all blocks hold 64 tokens, and the last one needs none");
        assert_eq!(admit(51, 5), Err(EngineError::UnknownToken { token: TokenId(50), vocab_size: 50 }));
        assert_eq!(admit(100, 1), Err(EngineError::PromptTooLong { prompt_tokens: 100, max_model_len: 100 }));
        assert!(matches!(admit(65, 1), Err(EngineError::UnknownToken { .. })));
    }
}
