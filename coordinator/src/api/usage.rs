//! Tokens of a request, as answers and streams tell them.

use schemars::JsonSchema;
use serde::Serialize;

use super::choice::{Delta, Output};

/// The `usage` object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Usage {
    prompt_tokens: u64,
    total_tokens: u64,
    completion_tokens: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens_details: Option<PromptDetails>,
    #[serde(skip_serializing_if = "Option::is_none")]
    completion_tokens_details: Option<CompletionDetails>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
struct PromptDetails {
    cached_tokens: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
struct CompletionDetails {
    reasoning_tokens: u64,
}

impl Usage {
    /// Counts nothing but the prompts.
    pub fn of_prompts<T>(prompts: &[Vec<T>]) -> Self {
        let prompt_tokens = prompts.iter().map(|prompt| prompt.len() as u64).sum();
        Self {
            prompt_tokens,
            total_tokens: prompt_tokens,
            completion_tokens: 0,
            prompt_tokens_details: None,
            completion_tokens_details: None,
        }
    }

    /// Counts outputs that have ended.
    pub fn add_outputs(&mut self, outputs: &[Output]) {
        for output in outputs {
            self.add_tokens(output.tokens.len());
            self.add_cached(output.end.as_ref().and_then(|end| end.cached_tokens));
        }
    }

    /// Counts what a delta brought.
    pub fn add_delta(&mut self, delta: &Delta) {
        self.add_tokens(delta.tokens.len());
        self.add_cached(delta.end.as_ref().and_then(|end| end.cached_tokens));
    }

    /// Says how many of the outputs' tokens are thoughts; none where the model has none.
    pub fn set_reasoning(&mut self, reasoning_tokens: Option<u64>) {
        self.completion_tokens_details =
            reasoning_tokens.map(|reasoning_tokens| CompletionDetails { reasoning_tokens });
    }

    /// Tokens of the prompts.
    pub fn prompt_tokens(&self) -> u64 {
        self.prompt_tokens
    }

    /// Tokens of the outputs.
    pub fn completion_tokens(&self) -> u64 {
        self.completion_tokens
    }

    /// Prompt tokens that the prefix cache had, as far as the engine told.
    pub fn cached_tokens(&self) -> u64 {
        self.prompt_tokens_details.map_or(0, |details| details.cached_tokens)
    }

    fn add_tokens(&mut self, count: usize) {
        self.completion_tokens += count as u64;
        self.total_tokens += count as u64;
    }

    /// Several outputs of one prompt each tell what they found; the first tells what the request saved.
    fn add_cached(&mut self, cached_tokens: Option<u32>) {
        if let (Some(cached), None) = (cached_tokens, self.prompt_tokens_details) {
            self.prompt_tokens_details = Some(PromptDetails { cached_tokens: cached.into() });
        }
    }
}
