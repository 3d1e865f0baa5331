//! Edits of a sequence's logits before its next token is drawn: penalties, biases, bans.
//!
//! Order of application: allowed tokens, banned words, a least length, biases, repetition, frequency, presence. Temperature and cuts
//! come after. Each edit looks at one token at a time, so a rank edits its slice of the vocabulary alone, and no rank needs another's.
//!
//! **Invariant:** what an edit gives depends only on the logit, the edits and the sequence's tokens: a history that is built from all
//! tokens at once equals one that grew token by token.

use std::collections::HashMap;

/// How a sequence's logits are edited. What is neutral edits nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct LogitEdits {
    /// Subtracted from tokens of the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted for each time that a token stands in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies other logits of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of single tokens.
    pub bias: Vec<(u32, f32)>,
    /// The only tokens that may be drawn: token `t` where bit `t % 32` of word `t / 32` is set.
    pub allowed: Option<Vec<u32>>,
    /// Sequences of tokens that may not stand in the output.
    pub bad_words: Vec<Vec<u32>>,
    /// Tokens of the output before which `end_tokens` may not be drawn.
    pub min_tokens: u32,
    /// The tokens that would end the output.
    pub end_tokens: Vec<u32>,
}

impl Default for LogitEdits {
    fn default() -> Self {
        Self {
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            bias: Vec::new(),
            allowed: None,
            bad_words: Vec::new(),
            min_tokens: 0,
            end_tokens: Vec::new(),
        }
    }
}

/// The tokens of a sequence, as edits look at them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenHistory {
    /// How often each token stands in the output; 0 for one of the prompt alone.
    counts: HashMap<u32, u32>,
    output: Vec<u32>,
}

impl TokenHistory {
    /// Of a prompt and an output.
    pub fn new(prompt: &[u32], output: &[u32]) -> Self {
        let mut history = Self { counts: prompt.iter().map(|token| (*token, 0)).collect(), output: Vec::new() };
        output.iter().for_each(|token| history.push(*token));
        history
    }

    /// How often each token stands in the output, those of the prompt included.
    pub(crate) fn counts(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.counts.iter().map(|(token, count)| (*token, *count))
    }

    /// The output's tokens.
    pub(crate) fn output(&self) -> &[u32] {
        &self.output
    }

    /// The output grows by a token.
    pub fn push(&mut self, token: u32) {
        *self.counts.entry(token).or_insert(0) += 1;
        self.output.push(token);
    }
}

/// The logit of a token, where it is in a slice that begins with `first_id`.
fn logit_of(logits: &mut [f32], first_id: u32, token: u32) -> Option<&mut f32> {
    logits.get_mut(token.checked_sub(first_id)? as usize)
}

/// Takes away what a bit mask over the vocabulary does not allow.
pub fn apply_mask(words: &[u32], logits: &mut [f32], first_id: u32) {
    for (token, logit) in (first_id..).zip(logits) {
        let word = words.get((token / u32::BITS) as usize).copied().unwrap_or(0);
        if word >> (token % u32::BITS) & 1 == 0 {
            *logit = f32::NEG_INFINITY;
        }
    }
}

impl LogitEdits {
    /// Edits this rank's slice of a row: the logits of the tokens from `first_id` on.
    pub fn apply(&self, history: &TokenHistory, logits: &mut [f32], first_id: u32) {
        if let Some(words) = &self.allowed {
            apply_mask(words, logits, first_id);
        }
        let mut ban = |token: u32| {
            if let Some(logit) = logit_of(logits, first_id, token) {
                *logit = f32::NEG_INFINITY;
            }
        };
        for word in &self.bad_words {
            let Some((last, before)) = word.split_last() else { continue };
            if history.output.ends_with(before) {
                ban(*last);
            }
        }
        if history.output.len() < self.min_tokens as usize {
            self.end_tokens.iter().for_each(|token| ban(*token));
        }
        for (token, bias) in &self.bias {
            if let Some(logit) = logit_of(logits, first_id, *token) {
                *logit += bias;
            }
        }
        self.penalize(history, logits, first_id);
    }

    /// Whether tokens that stand already are penalised.
    pub(crate) fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }

    fn penalize(&self, history: &TokenHistory, logits: &mut [f32], first_id: u32) {
        if !self.penalises() {
            return;
        }
        for (token, count) in &history.counts {
            let Some(logit) = logit_of(logits, first_id, *token) else { continue };
            *logit = if *logit > 0.0 { *logit / self.repetition_penalty } else { *logit * self.repetition_penalty };
            if *count > 0 {
                *logit -= self.frequency_penalty * *count as f32;
                *logit -= self.presence_penalty;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Five tokens from 10 on, whole and in two parts.
    #[track_caller]
    fn check(edits: &LogitEdits, output: &[u32], expected: [f32; 5]) {
        let logits = [2.0, -1.0, 0.5, 3.0, -2.0];
        let history = TokenHistory::new(&[10, 14], output);
        let mut whole = logits;
        edits.apply(&history, &mut whole, 10);
        assert_eq!(whole, expected);
        let mut parts = logits;
        let (first, second) = parts.split_at_mut(2);
        edits.apply(&history, first, 10);
        edits.apply(&history, second, 12);
        assert_eq!(parts, expected);
    }

    const NONE: f32 = f32::NEG_INFINITY;

    #[test]
    fn each_edit_does_what_it_says() {
        let neutral = LogitEdits::default();
        check(&neutral, &[11, 11], [2.0, -1.0, 0.5, 3.0, -2.0]);
        check(&LogitEdits { repetition_penalty: 2.0, ..neutral.clone() }, &[11], [1.0, -2.0, 0.5, 3.0, -4.0]);
        check(&LogitEdits { frequency_penalty: 0.5, ..neutral.clone() }, &[11, 11], [2.0, -2.0, 0.5, 3.0, -2.0]);
        check(&LogitEdits { presence_penalty: 0.5, ..neutral.clone() }, &[11, 11], [2.0, -1.5, 0.5, 3.0, -2.0]);
        check(&LogitEdits { bias: vec![(12, 1.0), (99, 1.0)], ..neutral.clone() }, &[], [2.0, -1.0, 1.5, 3.0, -2.0]);
        let allowed = LogitEdits { allowed: Some(vec![1 << 10 | 1 << 13]), ..neutral.clone() };
        check(&allowed, &[], [2.0, NONE, NONE, 3.0, NONE]);
    }

    #[test]
    fn words_are_banned_where_their_beginning_stands_in_the_output() {
        let edits = LogitEdits { bad_words: vec![vec![10], vec![7, 8, 11], vec![14, 12]], ..LogitEdits::default() };
        check(&edits, &[], [NONE, -1.0, 0.5, 3.0, -2.0]);
        check(&edits, &[7, 8], [NONE, NONE, 0.5, 3.0, -2.0]);
        check(&edits, &[8, 7], [NONE, -1.0, 0.5, 3.0, -2.0]);
    }

    #[test]
    fn nothing_ends_before_its_least_length() {
        let edits = LogitEdits { min_tokens: 2, end_tokens: vec![13], ..LogitEdits::default() };
        check(&edits, &[5], [2.0, -1.0, 0.5, NONE, -2.0]);
        check(&edits, &[5, 5], [2.0, -1.0, 0.5, 3.0, -2.0]);
    }

    #[test]
    fn histories_grow_to_what_they_are_built_as() {
        let mut grown = TokenHistory::new(&[1, 2], &[3]);
        grown.push(2);
        assert_eq!(grown, TokenHistory::new(&[1, 2], &[3, 2]));
    }
}
