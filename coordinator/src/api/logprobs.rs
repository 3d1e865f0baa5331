//! Log-probabilities in the three formats that clients know: chat, completions, and prompts by token id.
//!
//! **Invariant:** numbers are finite: what has no probability is shown as [`LOGPROB_MIN`], since JSON has no infinity.

use std::collections::BTreeMap;

use phalanx_proto::{TokenId, TokenLogprobs};
use schemars::JsonSchema;
use serde::{Serialize, Serializer, ser::SerializeMap};

use crate::text::TextModel;

/// Stands for minus infinity.
pub const LOGPROB_MIN: f32 = -9999.0;

/// Turns token ids into the words of log-probabilities.
#[derive(Clone, Copy)]
pub struct TokenNames<'a> {
    /// Absent where there is no tokenizer.
    pub text: Option<&'a TextModel>,
    /// Name tokens by their ids all the same.
    pub as_ids: bool,
}

impl TokenNames<'_> {
    /// How a token is written.
    pub fn name(&self, token: TokenId) -> String {
        match self.text {
            Some(text) if !self.as_ids => text.token_text(token),
            _ => format!("token_id:{token}"),
        }
    }

    fn decoded(&self, token: TokenId) -> Option<String> {
        self.text.map(|text| text.token_text(token))
    }
}

/// `choices[].logprobs` of chat.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ChatLogprobs {
    content: Vec<ChatToken>,
}

/// One token with its alternatives.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct ChatToken {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
    top_logprobs: Vec<ChatAlternative>,
}

#[derive(Debug, Clone, Serialize, JsonSchema)]
struct ChatAlternative {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl ChatLogprobs {
    /// The list itself.
    pub fn into_tokens(self) -> Vec<ChatToken> {
        self.content
    }

    /// The tokens of an answer, or of one chunk of it.
    pub fn new(entries: &[TokenLogprobs], names: TokenNames<'_>) -> Self {
        let alternative = |&(token, logprob): &(TokenId, f32)| {
            let token = names.name(token);
            ChatAlternative { bytes: token.as_bytes().to_vec(), token, logprob: finite(logprob) }
        };
        let content = entries.iter().map(|entry| {
            let token = names.name(entry.token);
            ChatToken {
                bytes: token.as_bytes().to_vec(),
                token,
                logprob: finite(entry.logprob),
                top_logprobs: entry.top.iter().map(alternative).collect(),
            }
        });
        Self { content: content.collect() }
    }
}

/// `choices[].logprobs` of completions.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    #[schemars(with = "Vec<Option<BTreeMap<String, f32>>>")]
    top_logprobs: Vec<Option<Alternatives>>,
}

impl CompletionLogprobs {
    /// Adds a token that nothing comes before. `offset` counts characters of the answer's text and moves on.
    pub fn push_first(&mut self, token: TokenId, names: TokenNames<'_>, offset: &mut usize) {
        self.push_name(names.name(token), offset);
        self.token_logprobs.push(None);
        self.top_logprobs.push(None);
    }

    /// Adds tokens.
    pub fn extend(&mut self, entries: &[TokenLogprobs], names: TokenNames<'_>, offset: &mut usize) {
        for entry in entries {
            let name = names.name(entry.token);
            let mut alternatives = Alternatives::default();
            for (token, logprob) in &entry.top {
                alternatives.add(names.name(*token), finite(*logprob));
            }
            alternatives.add(name.clone(), finite(entry.logprob));
            self.push_name(name, offset);
            self.token_logprobs.push(Some(finite(entry.logprob)));
            self.top_logprobs.push(Some(alternatives));
        }
    }

    fn push_name(&mut self, name: String, offset: &mut usize) {
        self.text_offset.push(*offset);
        *offset += name.chars().count();
        self.tokens.push(name);
    }
}

/// An object from token text to log-probability; of tokens with equal text the first, which is the likelier one, stays.
#[derive(Debug, Default)]
struct Alternatives(Vec<(String, f32)>);

impl Alternatives {
    fn add(&mut self, name: String, logprob: f32) {
        if self.0.iter().all(|(other, _)| *other != name) {
            self.0.push((name, logprob));
        }
    }
}

impl Serialize for Alternatives {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, logprob)| (name, logprob)))
    }
}

/// `prompt_logprobs`: null for the first position, then an object from token id to its entry.
#[derive(Debug, JsonSchema)]
pub struct PromptLogprobs(#[schemars(with = "Vec<Option<BTreeMap<String, PromptEntry>>>")] Vec<Option<PromptPosition>>);

#[derive(Debug)]
struct PromptPosition(Vec<(TokenId, PromptEntry)>);

#[derive(Debug, Serialize, JsonSchema)]
struct PromptEntry {
    logprob: f32,
    rank: u32,
    decoded_token: Option<String>,
}

impl PromptLogprobs {
    /// The positions of a prompt, of which `entries` describes all but the first. Keeps the `num_best` best of each.
    pub fn new(entries: &[TokenLogprobs], num_best: u32, names: TokenNames<'_>) -> Self {
        let position = |entry: &TokenLogprobs| {
            let shown = |token: TokenId, logprob: f32, rank: u32| {
                (token, PromptEntry { logprob: finite(logprob), rank, decoded_token: names.decoded(token) })
            };
            let best = entry.top.iter().take(num_best as usize).zip(1..);
            let mut shown_tokens: Vec<_> = best.map(|(&(token, logprob), rank)| shown(token, logprob, rank)).collect();
            if shown_tokens.iter().all(|(token, _)| *token != entry.token) {
                shown_tokens.push(shown(entry.token, entry.logprob, entry.rank));
            }
            Some(PromptPosition(shown_tokens))
        };
        Self(std::iter::once(None).chain(entries.iter().map(position)).collect())
    }
}

impl Serialize for PromptLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl Serialize for PromptPosition {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, entry) in &self.0 {
            map.serialize_entry(&token.to_string(), entry)?;
        }
        map.end()
    }
}

/// The number as JSON can hold it.
pub fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob.max(LOGPROB_MIN) } else { LOGPROB_MIN }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_TEXT: TokenNames<'static> = TokenNames { text: None, as_ids: false };

    fn entry(token: u32, logprob: f32, rank: u32, top: &[(u32, f32)]) -> TokenLogprobs {
        let top = top.iter().map(|&(token, logprob)| (TokenId(token), logprob)).collect();
        TokenLogprobs { token: TokenId(token), logprob, rank, top }
    }

    fn check(value: &impl Serialize, expected: &str) {
        assert_eq!(serde_json::to_string(value).unwrap(), expected);
    }

    #[test]
    fn chat_lists_tokens_with_alternatives() {
        let entries = [entry(5, -0.1, 1, &[(5, -0.1), (6, f32::NEG_INFINITY)])];
        check(
            &ChatLogprobs::new(&entries, NO_TEXT),
            r#"{"content":[{"token":"token_id:5","logprob":-0.1,"bytes":[116,111,107,101,110,95,105,100,58,53],"top_logprobs":[{"token":"token_id:5","logprob":-0.1,"bytes":[116,111,107,101,110,95,105,100,58,53]},{"token":"token_id:6","logprob":-9999.0,"bytes":[116,111,107,101,110,95,105,100,58,54]}]}]}"#,
        );
    }

    #[test]
    fn completions_list_columns_and_always_the_chosen_token() {
        let mut offset = 0;
        let mut logprobs = CompletionLogprobs::default();
        logprobs.push_first(TokenId(1), NO_TEXT, &mut offset);
        logprobs.extend(&[entry(5, -2.5, 7, &[(6, -0.25)])], NO_TEXT, &mut offset);
        check(
            &logprobs,
            r#"{"text_offset":[0,10],"token_logprobs":[null,-2.5],"tokens":["token_id:1","token_id:5"],"top_logprobs":[null,{"token_id:6":-0.25,"token_id:5":-2.5}]}"#,
        );
    }

    #[test]
    fn prompts_are_described_by_token_id() {
        let entries = [entry(5, -2.5, 7, &[(6, -0.25), (9, -1.0)]), entry(6, -0.25, 1, &[(6, -0.25), (9, -1.0)])];
        check(
            &PromptLogprobs::new(&entries, 1, NO_TEXT),
            r#"[null,{"6":{"logprob":-0.25,"rank":1,"decoded_token":null},"5":{"logprob":-2.5,"rank":7,"decoded_token":null}},{"6":{"logprob":-0.25,"rank":1,"decoded_token":null}}]"#,
        );
    }
}
