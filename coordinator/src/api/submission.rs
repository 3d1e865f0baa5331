//! From a validated request to sequences in an engine.
//!
//! Owns the way from names and text to token ids and outputs; the same for all endpoints.
//!
//! **Invariant:** a request enters the engine whole or not at all: if one of its sequences is refused, the others are dropped.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use phalanx_proto::{DeploymentStatus, TokenId};

use super::ApiState;
use super::admission::Entry;
use super::caller::Caller;
use super::choice::{Choice, OutputText, Pace, StopTokens};
use super::error::ApiError;
use super::meter::RequestMeter;
use super::options::Options;
use super::patience::Patience;
use super::repetition::LoopDetector;
use super::request_span::RequestFacts;
use super::served_models::ServedModel;
use crate::constraint::ThoughtBudget;
use crate::engine::block_manager::BlockHash;
use crate::engine::policy::Policy;
use crate::engine::{Constraint, ConstraintError, EngineError, GenerateRequest};
use crate::heavy;
use crate::text::{TextError, TextModel, ThoughtParser};

/// A request with its name and its model.
pub struct Accepted {
    /// `chatcmpl-...` or `cmpl-...`.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// Who asks, and since when.
    pub caller: Caller,
    /// Who answers.
    pub model: Arc<ServedModel>,
    /// Its place until it is in the engine; none where it needs none.
    entry: Option<Entry>,
}

impl Accepted {
    /// Names a request and finds its model.
    ///
    /// # Errors
    /// No model of that name, or its queue is full: decided before any work is spent.
    pub fn new(state: &ApiState, asked: Option<&str>, id: String, caller: Caller) -> Result<Self, ApiError> {
        let accepted = Self::without_place(state, asked, id, caller)?;
        let entry = Some(accepted.model.admission.enter(&accepted.model.engine)?);
        Ok(Self { entry, ..accepted })
    }

    /// The same for a request that never enters the engine.
    ///
    /// # Errors
    /// No model of that name.
    pub fn without_place(state: &ApiState, asked: Option<&str>, id: String, caller: Caller) -> Result<Self, ApiError> {
        let model = find_model(state, asked)?;
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Ok(Self { id, created, caller, model, entry: None })
    }

    /// It is in the engine, which counts it from now on.
    pub(super) fn leave(&self) {
        if let Some(entry) = &self.entry {
            entry.leave();
        }
    }

    /// The tokenizer side of the model, for a field that needs one.
    pub fn text(&self, param: &'static str) -> Result<&Arc<TextModel>, ApiError> {
        let missing = || ApiError::NoTokenizer { param, model: self.model.name.clone() };
        self.model.text.as_ref().ok_or_else(missing)
    }
}

/// The model of a name; without a name, the first that is served.
///
/// # Errors
/// No such model, or one that does not answer now.
pub fn find_model(state: &ApiState, asked: Option<&str>) -> Result<Arc<ServedModel>, ApiError> {
    let found = match asked {
        Some(name) => state.models.lookup(name),
        None => state.models.list().into_iter().next(),
    };
    found.ok_or_else(|| absent(state, asked))
}

/// Why a name has no model: its deployment is on its way, in or out, or there is none.
fn absent(state: &ApiState, asked: Option<&str>) -> ApiError {
    let is_asked = |deployment: &DeploymentStatus| {
        asked.is_none_or(|name| [&deployment.name, &deployment.model].contains(&&name.to_owned()))
    };
    match ((state.status)().deployments.into_iter().find(is_asked), asked) {
        (Some(deployment), _) => {
            ApiError::NotReady { model: deployment.name, state: deployment.state, reason: deployment.reason }
        }
        (None, Some(name)) => ApiError::UnknownModel { model: name.to_owned() },
        (None, None) => ApiError::NothingServed,
    }
}

/// Runs text work: in place for short bodies, on a thread that gives way for long ones.
///
/// # Errors
/// The work's own, named by `param`.
pub async fn with_text<T: Send + 'static>(
    text: &Arc<TextModel>,
    num_bytes: usize,
    param: &'static str,
    work: impl FnOnce(&TextModel) -> Result<T, TextError> + Send + 'static,
) -> Result<T, ApiError> {
    let text = Arc::clone(text);
    heavy::run(num_bytes, move || work(&text)).await?.map_err(|source| ApiError::Text { param, source })
}

/// A priority is asked for where nothing looks at it.
///
/// # Errors
/// That.
pub fn check_priority(priority: i32, policy: Policy) -> Result<(), ApiError> {
    if priority != 0 && !policy.reads_priority() {
        let rule = "this model is served with --scheduling-policy fcfs: priority must be 0";
        return Err(ApiError::Conflict { param: "priority", rule });
    }
    Ok(())
}

/// Prompts as token ids, with what an endpoint adds to the options.
pub struct Submission<'a> {
    /// One entry a prompt.
    pub prompts: &'a [Vec<TokenId>],
    /// The field that held them.
    pub param: &'static str,
    /// Most output tokens; `None`: what the context leaves.
    pub max_tokens: Option<NonZeroU32>,
    /// Log-probabilities of prompt tokens that the endpoint itself needs.
    pub echo_logprobs: Option<u32>,
    /// Holds each output to a grammar.
    pub constraint: Option<Constraint>,
    /// Control tokens stay in the text, whatever the options say: they mark calls.
    pub keeps_special: bool,
    /// The rest.
    pub options: &'a Options,
}

impl Submission<'_> {
    /// Starts all outputs of all prompts: output `i` of prompt `p` has index `p * best_of + i`.
    ///
    /// # Errors
    /// A prompt is empty or too long, an option does not fit the model, or the engine refuses.
    pub fn submit(&self, request: &Accepted) -> Result<Vec<Choice>, ApiError> {
        let model = &request.model;
        self.check(model)?;
        let stop_tokens = Arc::new(self.stop_tokens(model));
        let edits = self.options.edits.resolve(model, stop_tokens.all())?;
        let meter = RequestMeter::new(&model.name, &request.caller, self.facts(model)?);
        let made = self.options.best_of.get() as usize;
        let mut choices = Vec::with_capacity(self.prompts.len() * made);
        for prompt in self.prompts {
            let mut first = self.generate_request(model, prompt, &stop_tokens)?;
            let vocab_size = model.engine.limits().vocab_size;
            first.sampling.edits = self.options.scoring.add_to(edits.clone(), prompt.len(), vocab_size)?;
            for output in 0..made {
                let index = choices.len();
                let mut generate = first.clone();
                generate.request_id =
                    if self.prompts.len() * made == 1 { request.id.clone() } else { format!("{}-{index}", request.id) };
                generate.sampling.seed = first.sampling.seed.wrapping_add(output as u64);
                let stream = model.engine.submit(generate)?;
                if output == 0 {
                    meter.prompt(prompt.len());
                }
                choices.push(Choice {
                    index,
                    stream: Some(stream),
                    text: self.output_text(model),
                    stop_tokens: Arc::clone(&stop_tokens),
                    include_stop: self.options.include_stop,
                    min_tokens: self.options.edits.min_tokens,
                    num_tokens: 0,
                    loops: self.options.repetition.map(LoopDetector::new),
                    pace: Pace::new(self.options.stream.and(self.options.delivery.stream_interval)),
                    patience: Patience::new(model.queue_timeout, request.caller.deadline),
                    meter: meter.output(),
                });
            }
        }
        request.leave();
        Ok(choices)
    }

    /// What is told of the request.
    ///
    /// # Errors
    /// `n` does not fit the sampling.
    pub(super) fn facts(&self, model: &ServedModel) -> Result<RequestFacts, ApiError> {
        let sampling = self.options.sampling(&model.defaults)?;
        Ok(RequestFacts {
            num_choices: Some(self.options.num_choices.get()),
            max_tokens: self.max_tokens.map(NonZeroU32::get),
            temperature: Some(sampling.temperature),
            top_p: Some(sampling.top_p),
        })
    }

    /// What can only be checked against the model.
    ///
    /// # Errors
    /// An option that does not fit it.
    pub(super) fn check(&self, model: &ServedModel) -> Result<(), ApiError> {
        if model.text.is_none() && !self.options.stops.is_empty() {
            return Err(ApiError::NoTokenizer { param: "stop", model: model.name.clone() });
        }
        let limits = model.engine.limits();
        let outside = |token: &&TokenId| token.0 >= limits.vocab_size;
        if let Some(token) = self.options.stop_token_ids.iter().find(outside) {
            let expected = format!("within the vocabulary of {}", limits.vocab_size);
            let value = token.to_string();
            return Err(ApiError::OutOfRange { param: "stop_token_ids".into(), value, expected });
        }
        check_priority(self.options.priority, limits.policy)?;
        let min_tokens = self.options.edits.min_tokens;
        if self.max_tokens.is_some_and(|max| min_tokens > max.get()) {
            return Err(ApiError::Conflict { param: "min_tokens", rule: "min_tokens must not be above max_tokens" });
        }
        let outputs = self.prompts.len() as u64 * u64::from(self.options.best_of.get());
        let room = u64::from(limits.max_queue) + u64::from(limits.max_num_seqs);
        if outputs > room {
            let expected = format!("such that all prompts together have at most {room} outputs");
            return Err(ApiError::OutOfRange { param: "n".into(), value: outputs.to_string(), expected });
        }
        Ok(())
    }

    /// The tokens that end an output.
    pub(super) fn stop_tokens(&self, model: &ServedModel) -> StopTokens {
        let own = if self.options.ignore_eos { Vec::new() } else { model.end_token_ids.clone() };
        StopTokens { model: own, request: self.options.stop_token_ids.clone() }
    }

    /// What the engine is asked behind a prompt, with no name yet.
    ///
    /// # Errors
    /// The prompt is empty or too long, or `n` does not fit the sampling.
    pub(super) fn generate_request(
        &self,
        model: &ServedModel,
        prompt: &[TokenId],
        stop_tokens: &StopTokens,
    ) -> Result<GenerateRequest, ApiError> {
        if prompt.is_empty() {
            let expected = "at least one token long".into();
            return Err(ApiError::OutOfRange { param: self.param.into(), value: "empty".into(), expected });
        }
        let room = u64::from(model.max_model_len).saturating_sub(prompt.len() as u64);
        let room = NonZeroU32::new(room as u32).ok_or(ApiError::ContextLength {
            param: self.param,
            prompt_tokens: prompt.len() as u64,
            max_model_len: model.max_model_len,
        })?;
        let mut sampling = self.options.sampling(&model.defaults)?;
        sampling.prompt_logprobs = sampling.prompt_logprobs.max(self.echo_logprobs);
        Ok(GenerateRequest {
            request_id: String::new(),
            prompt: prompt.to_vec(),
            sampling,
            max_tokens: self.max_tokens.unwrap_or(room).min(room),
            stop_token_ids: stop_tokens.all(),
            constraint: self.held(model, prompt)?,
            priority: self.options.priority,
            cache_salt: self.options.delivery.cache_salt.as_deref().map(BlockHash::of_salt),
        })
    }

    /// What holds an output behind a prompt: the request's grammar, and the budget of its thoughts.
    ///
    /// # Errors
    /// A budget for a model that does not think, or on a device that cannot hold it.
    fn held(&self, model: &ServedModel, prompt: &[TokenId]) -> Result<Option<Constraint>, ApiError> {
        const PARAM: &str = "thinking_token_budget";
        let Some(budget) = self.options.thinking_budget else { return Ok(self.constraint.clone()) };
        let limits = model.engine.limits();
        let unsupported = |feature| ApiError::Unsupported { param: PARAM.into(), feature };
        if !limits.features.masks {
            return Err(unsupported("a budget for thoughts on this device"));
        }
        let marks = model.text.as_ref().filter(|text| text.thinks()).map(|text| {
            let (start, end) = ThoughtParser::marks();
            (text.token_id(start), text.token_id(end))
        });
        let Some((start, Some(end))) = marks else {
            return Err(unsupported("a budget for the thoughts of a model that marks none"));
        };
        let held = ThoughtBudget::new(start, end, budget, prompt).hold(self.constraint.clone(), limits.vocab_size);
        let refused = |error: ConstraintError| ApiError::Engine(EngineError::Constraint { reason: error.reason });
        held.map(Some).map_err(refused)
    }

    /// Cuts prompts as the request allows.
    ///
    /// # Errors
    /// It asks for more than the model's context leaves beside its answer.
    pub fn cut(
        options: &Options,
        request: &Accepted,
        max_tokens: Option<NonZeroU32>,
        prompts: &mut [Vec<TokenId>],
    ) -> Result<(), ApiError> {
        let Some(truncation) = options.truncation else { return Ok(()) };
        let room = request.model.max_model_len.saturating_sub(max_tokens.map_or(1, NonZeroU32::get)).max(1);
        prompts.iter_mut().try_for_each(|prompt| truncation.cut(prompt, room))
    }

    /// Makes the text of one output; none without a tokenizer.
    pub(super) fn output_text(&self, model: &ServedModel) -> Option<OutputText> {
        let text = model.text.as_ref().filter(|_| self.options.delivery.detokenize)?;
        let detokenizer = text.detokenizer(self.options.skip_special_tokens && !self.keeps_special);
        Some(OutputText::new(detokenizer, &self.options.stops, self.options.include_stop))
    }
}
