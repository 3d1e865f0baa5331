//! Log-probabilities of tokens that a request names: `logprob_token_ids` beside each drawn token, `prompt_logprob_token_ids` at places
//! of the prompt.
//!
//! **Invariant:** what leaves [`ScoringFields::add_to`] names tokens of the vocabulary, and places that the prompt has.

use std::sync::Arc;

use phalanx_proto::{LogitEdits, TokenId, TokenLogprobs};
use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, type_name};
use super::logprobs::finite;
use super::options::{NUM_LOGPROBS_MAX, take_token_ids, token_id};

/// Most tokens that are named for the output.
const NUM_TOKENS_MAX: usize = 128;
/// Most tokens that are named for the prompt, over all its places.
const NUM_CANDIDATES_MAX: usize = 32 * 1024;

const TOKENS: &str = "logprob_token_ids";
const CANDIDATES: &str = "prompt_logprob_token_ids";
const START: &str = "prompt_logprob_start";

/// Tokens named for places of a prompt; `None` fills a list up.
type Candidates = Vec<Option<TokenId>>;

/// The places of the prompt that are scored, and for which tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptScoring {
    /// The first place is that of the token behind this one.
    start: u32,
    rows: Rows,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Rows {
    /// The same tokens at each place.
    Same(Candidates),
    /// Its own for each.
    Each(Vec<Candidates>),
}

/// What a request asks to be scored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScoringFields {
    /// Beside each token of the output.
    pub tokens: Vec<TokenId>,
    /// In the prompt.
    pub prompt: Option<PromptScoring>,
}

impl ScoringFields {
    /// Takes the fields.
    ///
    /// # Errors
    /// A wrong type, too many tokens, or a place without tokens for it.
    pub fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let tokens = take_token_ids(fields, TOKENS)?;
        at_most(TOKENS, "token ids", tokens.len(), NUM_TOKENS_MAX)?;
        let start = fields.integer(START, 0, u32::MAX.into())?;
        let items = fields.list(CANDIDATES)?.filter(|items| !items.is_empty());
        let Some(items) = items else {
            if start.is_some_and(|start| start > 0) {
                let rule = "prompt_logprob_start needs prompt_logprob_token_ids";
                return Err(ApiError::Conflict { param: START, rule });
            }
            return Ok(Self { tokens, prompt: None });
        };
        let prompt = PromptScoring { start: start.unwrap_or(0) as u32, rows: Rows::read(&items)? };
        Ok(Self { tokens, prompt: Some(prompt) })
    }

    /// Holds the fields against others of the request.
    ///
    /// # Errors
    /// The answer is streamed.
    pub fn check(&self, streams: bool) -> Result<(), ApiError> {
        if streams && self.prompt.is_some() {
            let rule = "prompt_logprob_token_ids cannot be streamed; set stream to false";
            return Err(ApiError::Conflict { param: CANDIDATES, rule });
        }
        Ok(())
    }

    /// Adds what is scored to what a sequence behind a prompt of `num_tokens` is sent.
    ///
    /// # Errors
    /// A token outside of the vocabulary, or places that the prompt does not have.
    pub fn add_to(
        &self,
        edits: Option<Arc<LogitEdits>>,
        num_tokens: usize,
        vocab_size: u32,
    ) -> Result<Option<Arc<LogitEdits>>, ApiError> {
        if self.tokens.is_empty() && self.prompt.is_none() {
            return Ok(edits);
        }
        in_vocabulary(TOKENS, self.tokens.iter(), vocab_size)?;
        let mut edits = edits.map(Arc::unwrap_or_clone).unwrap_or_default();
        edits.scored.clone_from(&self.tokens);
        if let Some(prompt) = &self.prompt {
            edits.scored_prompt = prompt.places(num_tokens, vocab_size)?;
            edits.scored_prompt_start = prompt.start + 1;
        }
        Ok(Some(Arc::new(edits)))
    }

    /// Takes the scores of named tokens off what describes a prompt; a list for each place, nothing where nothing was named.
    pub fn split(&self, entries: &mut [TokenLogprobs]) -> Option<Vec<Vec<Option<f32>>>> {
        let prompt = self.prompt.as_ref()?;
        let scored = entries.iter_mut().skip(prompt.start as usize).enumerate();
        Some(scored.map(|(at, entry)| scores(prompt.rows.at(at), entry)).collect())
    }
}

/// The scores of the named tokens, which stand behind the best ones.
fn scores(candidates: &[Option<TokenId>], entry: &mut TokenLogprobs) -> Vec<Option<f32>> {
    let num_named = candidates.iter().flatten().count();
    let named = entry.top.split_off(entry.top.len().saturating_sub(num_named));
    let mut named = named.into_iter().map(|(_, logprob)| finite(logprob));
    candidates.iter().map(|candidate| candidate.and_then(|_| named.next())).collect()
}

impl PromptScoring {
    /// Tokens for each place of a prompt.
    fn places(&self, num_tokens: usize, vocab_size: u32) -> Result<Vec<Vec<TokenId>>, ApiError> {
        let num_places = num_tokens.saturating_sub(1).checked_sub(self.start as usize).ok_or_else(|| {
            let expected = format!("below the number of tokens of the prompt, which is {num_tokens}");
            ApiError::OutOfRange { param: START.into(), value: self.start.to_string(), expected }
        })?;
        if let Rows::Each(rows) = &self.rows
            && rows.len() != num_places
        {
            let expected = format!("{num_places} lists, one for each token of the prompt behind {START} and the first");
            return Err(ApiError::OutOfRange { param: CANDIDATES.into(), value: rows.len().to_string(), expected });
        }
        let places: Vec<Vec<TokenId>> =
            (0..num_places).map(|at| self.rows.at(at).iter().flatten().copied().collect()).collect();
        in_vocabulary(CANDIDATES, places.iter().flatten(), vocab_size)?;
        at_most(CANDIDATES, "token ids in all", places.iter().map(Vec::len).sum(), NUM_CANDIDATES_MAX)?;
        Ok(places)
    }
}

impl Rows {
    fn read(items: &[Value]) -> Result<Self, ApiError> {
        if items.iter().all(Value::is_number) {
            return Ok(Self::Same(candidates(items, |at| format!("{CANDIDATES}[{at}]"))?));
        }
        let row = |(at, item): (usize, &Value)| match item {
            Value::Array(items) => candidates(items, |inner| format!("{CANDIDATES}[{at}][{inner}]")),
            other => {
                let param = format!("{CANDIDATES}[{at}]");
                Err(ApiError::WrongType { param, expected: "a list of token ids", found: type_name(other) })
            }
        };
        Ok(Self::Each(items.iter().enumerate().map(row).collect::<Result<_, _>>()?))
    }

    /// The tokens named for a place.
    fn at(&self, place: usize) -> &[Option<TokenId>] {
        match self {
            Self::Same(candidates) => candidates,
            Self::Each(rows) => rows.get(place).map(Vec::as_slice).unwrap_or_default(),
        }
    }
}

/// Token ids; -1 names none.
fn candidates(items: &[Value], param: impl Fn(usize) -> String) -> Result<Candidates, ApiError> {
    at_most(CANDIDATES, "token ids for a place", items.len(), NUM_LOGPROBS_MAX as usize)?;
    let one = |(at, item): (usize, &Value)| match item.as_i64() {
        Some(-1) => Ok(None),
        _ => token_id(item, || param(at)).map(Some),
    };
    items.iter().enumerate().map(one).collect()
}

fn at_most(param: &str, what: &str, num: usize, max: usize) -> Result<(), ApiError> {
    if num <= max {
        return Ok(());
    }
    Err(ApiError::OutOfRange { param: param.into(), value: num.to_string(), expected: format!("at most {max} {what}") })
}

fn in_vocabulary<'a>(
    param: &str,
    mut tokens: impl Iterator<Item = &'a TokenId>,
    vocab_size: u32,
) -> Result<(), ApiError> {
    let Some(token) = tokens.find(|token| token.0 >= vocab_size) else { return Ok(()) };
    let expected = format!("within the vocabulary of {vocab_size}");
    Err(ApiError::OutOfRange { param: param.into(), value: token.to_string(), expected })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What a prompt of five tokens is scored for, of a vocabulary of 100.
    #[track_caller]
    fn check(body: &Value, expected: Result<(u32, &[&[u32]]), &str>) {
        let fields = &mut Fields::new(body.as_object().unwrap().clone());
        let edits = ScoringFields::take(fields).and_then(|scoring| scoring.add_to(None, 5, 100));
        let told = edits.map_err(|error| error.to_string()).map(|edits| {
            let edits = edits.map(Arc::unwrap_or_clone).unwrap_or_default();
            let row = |row: &Vec<TokenId>| row.iter().map(|token| token.0).collect::<Vec<u32>>();
            (edits.scored_prompt_start, edits.scored_prompt.iter().map(row).collect::<Vec<_>>())
        });
        let expected = expected.map(|(start, rows)| (start, rows.iter().map(|row| row.to_vec()).collect::<Vec<_>>()));
        assert_eq!(told, expected.map_err(str::to_owned), "{body}");
    }

    #[test]
    fn places_are_checked_against_the_prompt() {
        check(&json!({}), Ok((0, &[])));
        check(&json!({"prompt_logprob_token_ids": [7, 8]}), Ok((1, &[&[7, 8][..]; 4])));
        check(&json!({"prompt_logprob_token_ids": [7], "prompt_logprob_start": 3}), Ok((4, &[&[7]])));
        check(&json!({"prompt_logprob_token_ids": [7], "prompt_logprob_start": 4}), Ok((5, &[])));
        check(
            &json!({"prompt_logprob_token_ids": [[1, -1], [2, 3]], "prompt_logprob_start": 2}),
            Ok((3, &[&[1], &[2, 3]])),
        );
        let below = "prompt_logprob_start must be below the number of tokens of the prompt, which is 5; it is 5";
        check(&json!({"prompt_logprob_token_ids": [7], "prompt_logprob_start": 5}), Err(below));
        let lists = "prompt_logprob_token_ids must be 4 lists, one for each token of the prompt behind \
                     prompt_logprob_start and the first; it is 1";
        check(&json!({"prompt_logprob_token_ids": [[7]]}), Err(lists));
        check(
            &json!({"prompt_logprob_token_ids": [100]}),
            Err("prompt_logprob_token_ids must be within the vocabulary of 100; it is 100"),
        );
        check(
            &json!({"prompt_logprob_token_ids": [vec![1; 21]]}),
            Err("prompt_logprob_token_ids must be at most 20 token ids for a place; it is 21"),
        );
        check(&json!({"prompt_logprob_start": 1}), Err("prompt_logprob_start needs prompt_logprob_token_ids"));
        check(
            &json!({"logprob_token_ids": vec![1; 129]}),
            Err("logprob_token_ids must be at most 128 token ids; it is 129"),
        );
    }

    #[test]
    fn scores_come_back_in_their_places() {
        let body = json!({"prompt_logprob_token_ids": [[-1, 4], [5, 6]], "prompt_logprob_start": 1});
        let scoring = ScoringFields::take(&mut Fields::new(body.as_object().unwrap().clone())).unwrap();
        let entry = |top: &[(u32, f32)]| {
            let top = top.iter().map(|(token, logprob)| (TokenId(*token), *logprob)).collect();
            TokenLogprobs { token: TokenId(1), logprob: -0.5, rank: 1, top }
        };
        let mut entries = [
            entry(&[(9, -0.1)]),
            entry(&[(9, -0.1), (4, -3.0)]),
            entry(&[(9, -0.1), (5, f32::NEG_INFINITY), (6, -2.0)]),
        ];
        let expected = vec![vec![None, Some(-3.0)], vec![Some(-9999.0), Some(-2.0)]];
        assert_eq!(scoring.split(&mut entries), Some(expected));
        assert!(entries.iter().all(|entry| entry.top == [(TokenId(9), -0.1)]));
        assert_eq!(ScoringFields::default().split(&mut entries), None);
    }
}
