//! Tokens that are scored because they are known beforehand: those of a prompt, and those that a request names.
//!
//! Knows which of a step's rows predicts which tokens, and in what order their scores come. Scores nothing itself.
//!
//! **Invariant:** the scores that [`PromptChunk::take`] and [`NamedTokens::take`] consume are as many as `wanted` has asked for.

use phalanx_kernels::{SCORED_TOP_MAX, ScoreRow, Scored, StepInputs};
use phalanx_proto::{LogitEdits, PromptLogprobs, SeqSlot, TokenId, TokenLogprobs};

/// One token, scored by a row of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The row.
    pub row: u32,
    /// The token.
    pub token: TokenId,
    /// Alternatives to report.
    pub num_top: u32,
}

/// Prompt tokens that a step's chunk predicts, and whose log-probabilities are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptChunk {
    /// The sequence's slot.
    pub slot: SeqSlot,
    /// Position of the first predicted token.
    pub start: u32,
    /// Batch row that predicts it; the others follow.
    pub first_row: u32,
    /// The predicted tokens.
    pub tokens: Vec<TokenId>,
    /// Alternatives to report.
    pub num_top: u32,
    /// For each predicted token those that the request names at its place; nothing where it names none.
    pub named: Vec<Vec<TokenId>>,
}

impl PromptChunk {
    /// Tokens from position `start` on, predicted from `first_row` on.
    pub fn new(
        slot: SeqSlot,
        start: u32,
        first_row: u32,
        tokens: &[TokenId],
        num_top: u32,
        edits: Option<&LogitEdits>,
    ) -> Self {
        let named = edits.filter(|edits| !edits.scored_prompt.is_empty()).map(|edits| {
            let at = |position: u32| {
                let place = position.checked_sub(edits.scored_prompt_start)? as usize;
                edits.scored_prompt.get(place).cloned()
            };
            (start..start + tokens.len() as u32).map(|position| at(position).unwrap_or_default()).collect()
        });
        let num_top = num_top.min(SCORED_TOP_MAX);
        Self { slot, start, first_row, tokens: tokens.to_vec(), num_top, named: named.unwrap_or_default() }
    }

    /// Each predicted token, and behind it those that are named at its place.
    pub fn wanted(&self) -> impl Iterator<Item = Wanted> + '_ {
        (self.first_row..).zip(&self.tokens).enumerate().flat_map(|(at, (row, token))| {
            let own = Wanted { row, token: *token, num_top: self.num_top };
            let named = self.named.get(at).into_iter().flatten();
            std::iter::once(own).chain(named.map(move |token| Wanted { row, token: *token, num_top: 0 }))
        })
    }

    /// Takes the scores of what it wanted.
    pub fn take(&self, scored: &mut impl Iterator<Item = Scored>) -> PromptLogprobs {
        let entry = |at: usize| {
            let mut entry = token_logprobs(scored.next()?);
            let num_named = self.named.get(at).map_or(0, Vec::len);
            entry.top.extend(scored.by_ref().take(num_named).map(alternative));
            Some(entry)
        };
        PromptLogprobs { slot: self.slot, start: self.start, tokens: (0..self.tokens.len()).map_while(entry).collect() }
    }
}

/// Tokens that a request names, to be scored beside one that is drawn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedTokens {
    /// The drawn one, among the step's samples.
    pub sample: u32,
    /// Batch row that predicts it.
    pub row: u32,
    /// The tokens.
    pub tokens: Vec<TokenId>,
}

impl NamedTokens {
    /// The tokens.
    pub fn wanted(&self) -> impl Iterator<Item = Wanted> + '_ {
        self.tokens.iter().map(|token| Wanted { row: self.row, token: *token, num_top: 0 })
    }

    /// Takes the scores of what it wanted; with them the sample that they belong to.
    pub fn take(&self, scored: &mut impl Iterator<Item = Scored>) -> (u32, Vec<(TokenId, f32)>) {
        (self.sample, scored.take(self.tokens.len()).map(alternative).collect())
    }
}

/// Writes one pass that scores `pass`, in place of what a step had to sample and to score.
pub fn write_pass(pass: &[Wanted], step: &mut StepInputs) {
    step.samples.clear();
    step.masks.clear();
    step.edits.clear();
    step.logit_rows.clear();
    step.scores.clear();
    for wanted in pass {
        // Tokens of one row stand behind each other and share its logits.
        if step.logit_rows.last() != Some(&wanted.row) {
            step.logit_rows.push(wanted.row);
        }
        let row = step.logit_rows.len() as u32 - 1;
        step.scores.push(ScoreRow { row, token: Some(wanted.token.0), num_top: wanted.num_top });
    }
}

/// A score as it is told.
pub fn token_logprobs(scored: Scored) -> TokenLogprobs {
    TokenLogprobs {
        token: TokenId(scored.token),
        logprob: scored.logprob,
        rank: scored.rank,
        top: scored.top.into_iter().map(|(token, logprob)| (TokenId(token), logprob)).collect(),
    }
}

fn alternative(scored: Scored) -> (TokenId, f32) {
    (TokenId(scored.token), scored.logprob)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(ids: &[u32]) -> Vec<TokenId> {
        ids.iter().copied().map(TokenId).collect()
    }

    #[test]
    fn named_tokens_share_the_row_of_the_token_at_their_place() {
        let edits = LogitEdits {
            scored_prompt: vec![ids(&[50]), ids(&[60, 61])],
            scored_prompt_start: 4,
            ..LogitEdits::default()
        };
        let chunk = PromptChunk::new(SeqSlot(1), 3, 10, &ids(&[3, 4, 5]), 2, Some(&edits));
        let wanted: Vec<Wanted> = chunk.wanted().collect();
        let mut step = StepInputs::default();
        write_pass(&wanted, &mut step);
        assert_eq!(step.logit_rows, [10, 11, 12]);
        let written: Vec<_> = step.scores.iter().map(|score| (score.row, score.token, score.num_top)).collect();
        let expected = [(0, 3, 2), (1, 4, 2), (1, 50, 0), (2, 5, 2), (2, 60, 0), (2, 61, 0)];
        assert_eq!(written, expected.map(|(row, token, num_top)| (row, Some(token), num_top)));
        let scored = wanted.iter().map(|wanted| Scored {
            token: wanted.token.0,
            logprob: -(wanted.token.0 as f32),
            rank: 1,
            top: vec![(9, -0.5); wanted.num_top as usize],
        });
        let told = chunk.take(&mut scored.into_iter());
        let tops: Vec<Vec<u32>> =
            told.tokens.iter().map(|entry| entry.top.iter().map(|(token, _)| token.0).collect()).collect();
        assert_eq!(tops, [vec![9, 9], vec![9, 9, 50], vec![9, 9, 60, 61]]);
        assert_eq!((told.start, told.tokens.len(), told.tokens[1].token), (3, 3, TokenId(4)));
    }
}
