//! What a client asked of a generation, apart from its prompt: fields that chat and completions share.
//!
//! Owns their ranges, neutral values and defaults. Does not know prompts, engines or answers.
//!
//! **Invariant:** options that exist are within range and ask for nothing that the engine cannot do.

use std::num::NonZeroU32;

use phalanx_formats::GenerationDefaults;
use phalanx_proto::{SamplingParams, TokenId};
use serde_json::Value;

use super::beam::{self, BeamFields};
use super::delivery::Delivery;
use super::edits::EditFields;
use super::error::ApiError;
use super::fields::{Bounds, Fields, Neutral, type_name};
use super::logprobs::TokenNames;
use super::repetition::RepetitionRule;
use super::reply::REQUEST_ID_CHARS_MAX;
use super::scoring::ScoringFields;
use super::structured::{self, Structure};
use super::truncation::Truncation;
use crate::text::TextModel;

/// Most outputs of one prompt.
pub const NUM_CHOICES_MAX: i64 = 16_384;
/// Most stop strings of one request.
pub const NUM_STOPS_MAX: usize = 4;
/// Most alternatives reported beside a token.
pub const NUM_LOGPROBS_MAX: i64 = 20;
/// Temperatures below this are greedy.
const TEMPERATURE_GREEDY: f32 = 1e-5;
/// Other temperatures are raised to this.
const TEMPERATURE_MIN: f32 = 0.01;

const TEMPERATURE: Bounds = Bounds { min: 0.0, above_min: false, max: 2.0, words: "between 0 and 2" };
const TOP_P: Bounds = Bounds { min: 0.0, above_min: true, max: 1.0, words: "above 0 and at most 1" };
const MIN_P: Bounds = Bounds { min: 0.0, above_min: false, max: 1.0, words: "between 0 and 1" };

/// How a stream is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamOptions {
    /// One more chunk with the usage at the end.
    pub include_usage: bool,
    /// Usage on each chunk.
    pub continuous_usage: bool,
}

/// The request's own sampling values, before defaults.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SamplingFields {
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    seed: Option<i64>,
}

/// Validated options of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Outputs of each prompt.
    pub num_choices: NonZeroU32,
    /// Outputs that are made to choose from; at least `num_choices`.
    pub best_of: NonZeroU32,
    /// Sampling, before defaults.
    pub sampling: SamplingFields,
    /// How logits are edited, before defaults.
    pub edits: EditFields,
    /// Strings that end an output.
    pub stops: Vec<String>,
    /// Keep what ended the output in its text.
    pub include_stop: bool,
    /// Tokens that end an output, beside the model's own.
    pub stop_token_ids: Vec<TokenId>,
    /// The model's own end tokens end nothing.
    pub ignore_eos: bool,
    /// Log-probabilities of output tokens with so many alternatives.
    pub logprobs: Option<u32>,
    /// The same for prompt tokens.
    pub prompt_logprobs: Option<u32>,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Add the tokenizer's own special tokens to the prompt; the default differs by endpoint.
    pub add_special_tokens: Option<bool>,
    /// Answer with token ids too.
    pub return_token_ids: bool,
    /// Name tokens in log-probabilities by `token_id:N`.
    pub tokens_as_ids: bool,
    /// Present where the answer is streamed.
    pub stream: Option<StreamOptions>,
    /// The client's own name for the request.
    pub request_id: Option<String>,
    /// What outputs are held to.
    pub structure: Option<Structure>,
    /// Lower runs first.
    pub priority: i32,
    /// Outputs are searched for, not drawn.
    pub beam: Option<BeamFields>,
    /// Prompts that are too long are cut.
    pub truncation: Option<Truncation>,
    /// What counts as a loop that ends an output.
    pub repetition: Option<RepetitionRule>,
    /// Tokens behind which thoughts are ended; none: they end by themselves.
    pub thinking_budget: Option<u32>,
    /// Tokens whose log-probabilities are asked for by name.
    pub scoring: ScoringFields,
    /// How tokens are handed over.
    pub delivery: Delivery,
}

/// Fields of features that come later: each is accepted only where it changes nothing.
const NOT_SUPPORTED: &[Neutral] = &[
    Neutral { name: "logits_processors", feature: "code from clients", changes_nothing: is_empty },
    Neutral { name: "watermarking", feature: "watermarking", changes_nothing: is_false },
    Neutral { name: "kv_transfer_params", feature: "transfer of KV blocks", changes_nothing: is_empty },
    Neutral { name: "vllm_xargs", feature: "an extension of another server", changes_nothing: is_empty },
];

/// What only choices can tell: refused where an answer has none.
pub const OF_CHOICES: [Neutral; 3] = [
    Neutral { name: "detokenize", feature: "an answer of token ids at this address", changes_nothing: is_true },
    Neutral {
        name: "logprob_token_ids",
        feature: "scoring of given tokens at this address",
        changes_nothing: is_empty,
    },
    Neutral {
        name: "prompt_logprob_token_ids",
        feature: "scoring of given tokens at this address",
        changes_nothing: is_empty,
    },
];

impl Options {
    /// Takes the fields that chat and completions share, all but `logprobs`, which the two spell differently.
    pub fn take(fields: &mut Fields, logprobs: Option<u32>) -> Result<Self, ApiError> {
        for field in NOT_SUPPORTED {
            fields.neutral(field)?;
        }
        let (num_choices, best_of) = take_counts(fields)?;
        let scoring = ScoringFields::take(fields)?;
        let options = Self {
            num_choices,
            best_of,
            sampling: SamplingFields::take(fields)?,
            edits: EditFields::take(fields)?,
            stops: take_stops(fields)?,
            include_stop: fields.flag("include_stop_str_in_output", false)?,
            stop_token_ids: take_token_ids(fields, "stop_token_ids")?,
            ignore_eos: fields.flag("ignore_eos", false)?,
            logprobs: logprobs.or((!scoring.tokens.is_empty()).then_some(0)),
            prompt_logprobs: take_logprob_count(fields, "prompt_logprobs")?,
            skip_special_tokens: fields.flag("skip_special_tokens", true)?,
            add_special_tokens: fields.boolean("add_special_tokens")?,
            return_token_ids: fields.flag("return_token_ids", false)?,
            tokens_as_ids: fields.flag("return_tokens_as_token_ids", false)?,
            stream: take_stream(fields)?,
            request_id: take_request_id(fields)?,
            structure: structured::take(fields)?,
            priority: take_priority(fields)?,
            beam: BeamFields::take(fields)?,
            truncation: Truncation::take(fields)?,
            repetition: RepetitionRule::take(fields)?,
            thinking_budget: take_thinking_budget(fields)?,
            scoring,
            delivery: Delivery::take(fields)?,
        };
        // Tokenizers of this kind put no spaces of their own between special tokens: both values mean the same.
        fields.boolean("spaces_between_special_tokens")?;
        options.check_combinations()?;
        Ok(options)
    }

    fn check_combinations(&self) -> Result<(), ApiError> {
        if self.beam.is_some() {
            self.check_beam()?;
        }
        if !self.delivery.detokenize && !self.stops.is_empty() {
            let rule = "stop strings are found in text: stop needs detokenize to be true";
            return Err(ApiError::Conflict { param: "stop", rule });
        }
        self.scoring.check(self.stream.is_some())?;
        if self.stream.is_some() && self.prompt_logprobs.is_some() {
            let rule = "prompt_logprobs cannot be streamed; set stream to false";
            return Err(ApiError::Conflict { param: "prompt_logprobs", rule });
        }
        if self.stream.is_some() && self.best_of > self.num_choices {
            let rule = "best_of above n cannot be streamed: the best is known only at the end";
            return Err(ApiError::Conflict { param: "best_of", rule });
        }
        Ok(())
    }

    /// What a search cannot do: its outputs are known at its end only, and it takes log-probabilities as the model gives them.
    fn check_beam(&self) -> Result<(), ApiError> {
        const RULE: &str = "this cannot be combined with use_beam_search";
        if self.best_of.get() > beam::WIDTH_MAX {
            let expected = format!("at most {} with use_beam_search", beam::WIDTH_MAX);
            let param = if self.best_of > self.num_choices { "best_of" } else { "n" };
            return Err(ApiError::OutOfRange { param: param.into(), value: self.best_of.to_string(), expected });
        }
        let asked = [
            (self.stream.is_some(), "stream"),
            (!self.stops.is_empty(), "stop"),
            (self.prompt_logprobs.is_some(), "prompt_logprobs"),
            (self.repetition.is_some(), "repetition_detection"),
            (self.thinking_budget.is_some(), "thinking_token_budget"),
            (!self.scoring.tokens.is_empty(), "logprob_token_ids"),
            (self.scoring.prompt.is_some(), "prompt_logprob_token_ids"),
        ];
        let asked = asked.into_iter().find(|(is_asked, _)| *is_asked).map(|(_, param)| param);
        match asked.or(self.edits.asked()).or(self.structure.as_ref().map(|structure| structure.param)) {
            Some("stream") => {
                let rule = "a beam search cannot be streamed: its outputs are known only at the end";
                Err(ApiError::Conflict { param: "stream", rule })
            }
            Some(param) => Err(ApiError::Conflict { param, rule: RULE }),
            None => Ok(()),
        }
    }

    /// Whether answers tell token ids: where that is asked for, and where there is nothing else to tell.
    pub fn tells_token_ids(&self) -> bool {
        self.return_token_ids || !self.delivery.detokenize
    }

    /// How answers name tokens.
    pub fn token_names<'a>(&self, text: Option<&'a TextModel>) -> TokenNames<'a> {
        TokenNames { text: text.filter(|_| self.delivery.detokenize), as_ids: self.tokens_as_ids }
    }

    /// Outputs of each prompt from which the best are chosen once they are there.
    pub fn num_made(&self) -> usize {
        if self.beam.is_some() { self.num_choices.get() as usize } else { self.best_of.get() as usize }
    }

    /// The fields that were given and have no effect on a search, beside those that nobody took.
    pub fn without_effect(&self, mut untaken: Vec<String>) -> Vec<String> {
        if self.beam.is_some() {
            untaken.extend(self.sampling.given().map(str::to_owned));
        }
        untaken
    }

    /// Log-probabilities that the engine must report: those asked for, or what the choice of the best needs.
    pub fn engine_logprobs(&self) -> Option<u32> {
        // Named tokens take the place of the best ones.
        let asked = self.logprobs.map(|num_top| if self.scoring.tokens.is_empty() { num_top } else { 0 });
        asked.or((self.best_of > self.num_choices).then_some(0))
    }

    /// The sampling of output `choice` of a prompt: request, then the model's defaults, then OpenAI's.
    ///
    /// # Errors
    /// Several outputs of a greedy request would be equal: refused as bad `n`.
    pub fn sampling(&self, defaults: &GenerationDefaults) -> Result<SamplingParams, ApiError> {
        let own = &self.sampling;
        let mut params = SamplingParams {
            temperature: own.temperature.or(defaults.temperature).unwrap_or(1.0),
            top_k: own.top_k.or(defaults.top_k).unwrap_or(0),
            top_p: own.top_p.or(defaults.top_p).unwrap_or(1.0),
            min_p: own.min_p.or(defaults.min_p).unwrap_or(0.0),
            seed: own.seed.map_or_else(random_seed, |seed| seed as u64),
            logprobs: self.engine_logprobs(),
            prompt_logprobs: self.prompt_logprobs.or(self.scoring.prompt.as_ref().map(|_| 0)),
            pooling: None,
            edits: None,
        };
        if params.temperature < TEMPERATURE_GREEDY {
            params = SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..params };
        } else {
            params.temperature = params.temperature.max(TEMPERATURE_MIN);
        }
        if params.temperature == 0.0 && self.best_of.get() > 1 && self.beam.is_none() {
            let rule = "n and best_of must be 1 at temperature 0: all outputs would be the same";
            return Err(ApiError::Conflict { param: "n", rule });
        }
        Ok(params)
    }
}

impl SamplingFields {
    fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        Ok(Self {
            temperature: fields.number("temperature", TEMPERATURE)?,
            top_k: fields.integer("top_k", -1, i64::from(i32::MAX))?.map(|k| k.max(0) as u32),
            top_p: fields.number("top_p", TOP_P)?,
            min_p: fields.number("min_p", MIN_P)?,
            seed: fields.integer("seed", i64::MIN, i64::MAX)?.filter(|seed| *seed != -1),
        })
    }
}

impl SamplingFields {
    /// The names of the fields that the request has.
    fn given(&self) -> impl Iterator<Item = &'static str> {
        let given = [
            ("temperature", self.temperature.is_some()),
            ("top_k", self.top_k.is_some()),
            ("top_p", self.top_p.is_some()),
            ("min_p", self.min_p.is_some()),
            ("seed", self.seed.is_some()),
        ];
        given.into_iter().filter(|(_, is_given)| *is_given).map(|(name, _)| name)
    }
}

/// Its place among other requests; lower runs first.
///
/// # Errors
/// It is no such number.
pub fn take_priority(fields: &mut Fields) -> Result<i32, ApiError> {
    Ok(fields.integer("priority", i32::MIN.into(), i32::MAX.into())?.unwrap_or(0) as i32)
}

/// A name that is fit for logs and headers; an empty one is none.
///
/// # Errors
/// It is no text, or too long.
pub fn take_request_id(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let Some(id) = fields.text("request_id")?.filter(|id| !id.is_empty()) else { return Ok(None) };
    let num_chars = id.chars().count();
    if num_chars > REQUEST_ID_CHARS_MAX {
        let expected = format!("at most {REQUEST_ID_CHARS_MAX} characters long");
        let value = format!("{num_chars} characters long");
        return Err(ApiError::OutOfRange { param: "request_id".into(), value, expected });
    }
    Ok(Some(id))
}

/// A seed for a request that names none.
fn random_seed() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().1
}

fn take_counts(fields: &mut Fields) -> Result<(NonZeroU32, NonZeroU32), ApiError> {
    let count = |value: Option<i64>| value.and_then(|n| NonZeroU32::new(n as u32));
    let num_choices = count(fields.integer("n", 1, NUM_CHOICES_MAX)?).unwrap_or(NonZeroU32::MIN);
    let best_of = count(fields.integer("best_of", 1, NUM_CHOICES_MAX)?).unwrap_or(num_choices);
    if best_of < num_choices {
        return Err(ApiError::Conflict { param: "best_of", rule: "best_of must be at least n" });
    }
    Ok((num_choices, best_of))
}

/// Takes a number of alternatives, 0 to [`NUM_LOGPROBS_MAX`]; -1 is the whole vocabulary, which is always more than that.
pub fn take_logprob_count(fields: &mut Fields, name: &str) -> Result<Option<u32>, ApiError> {
    match fields.integer(name, i64::MIN, i64::MAX)? {
        None => Ok(None),
        Some(count) if (0..=NUM_LOGPROBS_MAX).contains(&count) => Ok(Some(count as u32)),
        Some(count) => {
            let whole = if count == -1 { ", which the whole vocabulary is above" } else { "" };
            let expected = format!("an integer between 0 and {NUM_LOGPROBS_MAX}{whole}");
            Err(ApiError::OutOfRange { param: name.into(), value: count.to_string(), expected })
        }
    }
}

/// Tokens of thoughts; -1 is no bound.
fn take_thinking_budget(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let budget = fields.integer("thinking_token_budget", -1, u32::MAX.into())?;
    Ok(budget.and_then(|tokens| u32::try_from(tokens).ok()))
}

/// Takes a token limit of at least `min`.
pub fn take_max_tokens(fields: &mut Fields, name: &str, min: i64) -> Result<Option<u32>, ApiError> {
    let limit = fields.integer(name, min, i64::MAX)?;
    Ok(limit.map(|tokens| u32::try_from(tokens).unwrap_or(u32::MAX)))
}

fn take_stops(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let param = |index: usize| format!("stop[{index}]");
    let stops = match fields.take("stop") {
        None => Vec::new(),
        Some(Value::String(stop)) => vec![stop],
        Some(Value::Array(items)) => {
            let text = |(index, item): (usize, Value)| match item {
                Value::String(stop) => Ok(stop),
                other => {
                    Err(ApiError::WrongType { param: param(index), expected: "a string", found: type_name(&other) })
                }
            };
            items.into_iter().enumerate().map(text).collect::<Result<_, _>>()?
        }
        Some(other) => {
            return Err(ApiError::WrongType {
                param: "stop".into(),
                expected: "a string or a list of strings",
                found: type_name(&other),
            });
        }
    };
    if stops.len() > NUM_STOPS_MAX {
        let expected = format!("at most {NUM_STOPS_MAX} strings");
        return Err(ApiError::OutOfRange { param: "stop".into(), value: stops.len().to_string(), expected });
    }
    if stops.iter().any(String::is_empty) {
        let expected = "without empty strings".into();
        return Err(ApiError::OutOfRange { param: "stop".into(), value: "\"\"".into(), expected });
    }
    Ok(stops)
}

/// Takes a list of token ids; the vocabulary is checked where the model is known.
pub fn take_token_ids(fields: &mut Fields, name: &str) -> Result<Vec<TokenId>, ApiError> {
    let items = fields.list(name)?.unwrap_or_default();
    items.iter().enumerate().map(|(index, item)| token_id(item, || format!("{name}[{index}]"))).collect()
}

/// The same where the list must be there.
pub fn required_token_ids(fields: &mut Fields, name: &str) -> Result<Vec<TokenId>, ApiError> {
    let items = fields.list(name)?.ok_or_else(|| ApiError::Missing { param: name.into() })?;
    items.iter().enumerate().map(|(index, item)| token_id(item, || format!("{name}[{index}]"))).collect()
}

/// One token id.
pub fn token_id(item: &Value, param: impl Fn() -> String) -> Result<TokenId, ApiError> {
    if !item.is_number() {
        return Err(ApiError::WrongType { param: param(), expected: "a token id", found: type_name(item) });
    }
    let whole =
        item.as_u64().or_else(|| item.as_f64().filter(|id| id.fract() == 0.0 && *id >= 0.0).map(|id| id as u64));
    whole.and_then(|id| u32::try_from(id).ok()).map(TokenId).ok_or_else(|| ApiError::OutOfRange {
        param: param(),
        value: item.to_string(),
        expected: "a token id".into(),
    })
}

fn take_stream(fields: &mut Fields) -> Result<Option<StreamOptions>, ApiError> {
    let streams = fields.flag("stream", false)?;
    let Some(mut given) = fields.object("stream_options", "stream_options.")? else {
        return Ok(streams.then(StreamOptions::default));
    };
    let options = StreamOptions {
        include_usage: given.flag("include_usage", false)?,
        continuous_usage: given.flag("continuous_usage_stats", false)?,
    };
    if !streams {
        let rule = "stream_options needs stream to be true";
        return Err(ApiError::Conflict { param: "stream_options", rule });
    }
    Ok(Some(options))
}

/// Never neutral.
pub fn never(_: &Value) -> bool {
    false
}

/// 1.
pub fn is_one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

/// `true`.
fn is_true(value: &Value) -> bool {
    value == &Value::Bool(true)
}

/// `false`.
pub fn is_false(value: &Value) -> bool {
    value == &Value::Bool(false)
}

/// An empty list, object or string.
pub fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(members) => members.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}
