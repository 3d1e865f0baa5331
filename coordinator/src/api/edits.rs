//! Edits of logits that a request asks for: penalties, biases, bans, a least length.
//!
//! Owns their ranges and defaults, and the way from words to token ids.
//!
//! **Invariant:** edits that leave [`EditFields::resolve`] name tokens of the vocabulary only.

use std::sync::Arc;

use phalanx_proto::{LogitEdits, TokenId};
use serde_json::Value;

use super::error::ApiError;
use super::fields::{Bounds, Fields, type_name};
use super::options::take_token_ids;
use super::served_models::ServedModel;
use crate::text::{TextError, TextModel};

/// Most biases of one request.
const NUM_BIASES_MAX: usize = 1024;
/// Biases are clamped to this.
const BIAS_MAX: f32 = 100.0;
/// Most sequences of tokens that banned words become.
const NUM_BAD_WORDS_MAX: usize = 128;

const PENALTY: Bounds = Bounds { min: -2.0, above_min: false, max: 2.0, words: "between -2 and 2" };
const REPETITION: Bounds = Bounds { min: 0.0, above_min: true, max: f32::MAX as f64, words: "above 0" };
const FEATURE: &str = "a change of logits on this device";

/// The request's own values, before defaults.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct EditFields {
    presence_penalty: f32,
    frequency_penalty: f32,
    repetition_penalty: Option<f32>,
    /// Tokens before which the output does not stop.
    pub min_tokens: u32,
    bias: Vec<(TokenId, f32)>,
    allowed: Option<Vec<TokenId>>,
    bad_words: Vec<String>,
}

impl EditFields {
    /// Takes the fields.
    ///
    /// # Errors
    /// A wrong type, or a value out of range.
    pub fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        Ok(Self {
            presence_penalty: fields.number("presence_penalty", PENALTY)?.unwrap_or(0.0),
            frequency_penalty: fields.number("frequency_penalty", PENALTY)?.unwrap_or(0.0),
            repetition_penalty: fields.number("repetition_penalty", REPETITION)?.map(|p| p.max(f32::MIN_POSITIVE)),
            min_tokens: fields.integer("min_tokens", 0, i64::from(u32::MAX))?.unwrap_or(0) as u32,
            bias: take_bias(fields)?,
            allowed: take_allowed(fields)?,
            bad_words: take_bad_words(fields)?,
        })
    }

    /// The first field that changes something.
    pub fn asked(&self) -> Option<&'static str> {
        let asked = [
            ("presence_penalty", self.presence_penalty != 0.0),
            ("frequency_penalty", self.frequency_penalty != 0.0),
            ("repetition_penalty", self.repetition_penalty.is_some_and(|penalty| penalty != 1.0)),
            ("min_tokens", self.min_tokens > 0),
            ("logit_bias", !self.bias.is_empty()),
            ("allowed_token_ids", self.allowed.is_some()),
            ("bad_words", !self.bad_words.is_empty()),
        ];
        asked.into_iter().find(|(_, changes)| *changes).map(|(name, _)| name)
    }

    /// The edits for a model; none where nothing is edited. `end_tokens` would end the output.
    ///
    /// # Errors
    /// A token outside of the vocabulary, words that cannot be tokenized, or a device that edits nothing.
    pub fn resolve(&self, model: &ServedModel, end_tokens: Vec<TokenId>) -> Result<Option<Arc<LogitEdits>>, ApiError> {
        let limits = model.engine.limits();
        if let (Some(param), false) = (self.asked(), limits.features.edits) {
            return Err(ApiError::Unsupported { param: param.into(), feature: FEATURE });
        }
        check_vocabulary("logit_bias", self.bias.iter().map(|(token, _)| *token), limits.vocab_size)?;
        check_vocabulary("allowed_token_ids", self.allowed.iter().flatten().copied(), limits.vocab_size)?;
        // A model's own default is no request: a device that cannot apply it goes without.
        let default = model.defaults.repetition_penalty.filter(|penalty| limits.features.edits && *penalty > 0.0);
        let edits = LogitEdits {
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            repetition_penalty: self.repetition_penalty.or(default).unwrap_or(1.0),
            min_tokens: self.min_tokens,
            end_tokens: if self.min_tokens > 0 { end_tokens } else { Vec::new() },
            bias: self.bias.clone(),
            allowed: self.allowed.clone().unwrap_or_default(),
            bad_words: self.bad_words(model)?,
            ..LogitEdits::default()
        };
        Ok((!edits.is_neutral()).then(|| Arc::new(edits)))
    }

    /// Each word as it stands at the beginning of a text, and behind a space where that makes other tokens.
    fn bad_words(&self, model: &ServedModel) -> Result<Vec<Vec<TokenId>>, ApiError> {
        const PARAM: &str = "bad_words";
        if self.bad_words.is_empty() {
            return Ok(Vec::new());
        }
        let missing = || ApiError::NoTokenizer { param: PARAM, model: model.name.clone() };
        let text = model.text.as_ref().ok_or_else(missing)?;
        let refused = |source| ApiError::Text { param: PARAM, source };
        let mut all = Vec::new();
        for word in &self.bad_words {
            all.append(&mut token_forms(text, word.trim_start()).map_err(refused)?);
        }
        if all.len() > NUM_BAD_WORDS_MAX {
            let expected =
                format!("at most {NUM_BAD_WORDS_MAX} sequences of tokens, with and without a space before them");
            return Err(ApiError::OutOfRange { param: PARAM.into(), value: all.len().to_string(), expected });
        }
        Ok(all)
    }
}

fn token_forms(text: &TextModel, word: &str) -> Result<Vec<Vec<TokenId>>, TextError> {
    let bare = text.encode(word, false)?;
    let behind_space = text.encode(&format!(" {word}"), false)?;
    let differs = behind_space.first() != bare.first() && behind_space.len() == bare.len();
    let mut forms = vec![bare];
    forms.extend(differs.then_some(behind_space));
    forms.retain(|form| !form.is_empty());
    Ok(forms)
}

fn check_vocabulary(param: &str, tokens: impl Iterator<Item = TokenId>, vocab_size: u32) -> Result<(), ApiError> {
    match tokens.into_iter().find(|token| token.0 >= vocab_size) {
        None => Ok(()),
        Some(token) => {
            let expected = format!("within the vocabulary of {vocab_size}");
            Err(ApiError::OutOfRange { param: param.into(), value: token.to_string(), expected })
        }
    }
}

fn take_bias(fields: &mut Fields) -> Result<Vec<(TokenId, f32)>, ApiError> {
    const PARAM: &str = "logit_bias";
    let Some(members) = fields.object(PARAM, "logit_bias.")? else { return Ok(Vec::new()) };
    let members = members.into_members();
    if members.len() > NUM_BIASES_MAX {
        let expected = format!("an object of at most {NUM_BIASES_MAX} members");
        return Err(ApiError::OutOfRange { param: PARAM.into(), value: members.len().to_string(), expected });
    }
    let bias = |(token, value): (String, Value)| {
        let param = format!("{PARAM}.{token}");
        let number = value.as_f64().ok_or_else(|| ApiError::WrongType {
            param: param.clone(),
            expected: "a number",
            found: type_name(&value),
        })?;
        let expected = "named by a token id".into();
        let id = token.parse().map_err(|_| ApiError::OutOfRange { param, value: token.clone(), expected })?;
        Ok((TokenId(id), (number as f32).clamp(-BIAS_MAX, BIAS_MAX)))
    };
    members.into_iter().map(bias).collect()
}

fn take_allowed(fields: &mut Fields) -> Result<Option<Vec<TokenId>>, ApiError> {
    const PARAM: &str = "allowed_token_ids";
    let Some(given) = fields.take(PARAM) else { return Ok(None) };
    let mut only = Fields::new([(PARAM.to_owned(), given)].into_iter().collect());
    let mut allowed = take_token_ids(&mut only, PARAM)?;
    if allowed.is_empty() {
        let expected = "a list of at least one token id".into();
        return Err(ApiError::OutOfRange { param: PARAM.into(), value: "[]".into(), expected });
    }
    allowed.sort_unstable();
    allowed.dedup();
    Ok(Some(allowed))
}

fn take_bad_words(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    const PARAM: &str = "bad_words";
    let items = fields.list(PARAM)?.unwrap_or_default();
    if items.len() > NUM_BAD_WORDS_MAX {
        let expected = format!("a list of at most {NUM_BAD_WORDS_MAX} words");
        return Err(ApiError::OutOfRange { param: PARAM.into(), value: items.len().to_string(), expected });
    }
    let word = |(at, item): (usize, Value)| match item {
        Value::String(word) if !word.trim().is_empty() => Ok(word),
        Value::String(word) => {
            let (param, value) = (format!("{PARAM}[{at}]"), format!("{word:?}"));
            Err(ApiError::OutOfRange { param, value, expected: "a word".into() })
        }
        other => {
            let param = format!("{PARAM}[{at}]");
            Err(ApiError::WrongType { param, expected: "a string", found: type_name(&other) })
        }
    };
    items.into_iter().enumerate().map(word).collect()
}
