//! Beam search for a request: the search itself is in `engine`, the steps go through the served path.
//!
//! Each step asks the engine for one token behind each beam, with the best alternatives; what the beams share comes from the prefix cache.
//!
//! **Invariant:** a search keeps its places in the engine from its beginning to its end, and no more sequences run for it at once.
//! **Invariant:** dropping it ends what runs of it.

use std::num::NonZeroU32;
use std::time::Instant;

use futures::future::try_join_all;
use phalanx_proto::{SamplingParams, TokenId, TokenLogprobs};
use serde_json::Value;

use super::choice::{End, EndReason, Output, OutputText, StopTokens};
use super::error::ApiError;
use super::fields::{Bounds, Fields, Neutral};
use super::meter::{OutputMeter, RequestMeter};
use super::options::{self, NUM_LOGPROBS_MAX};
use super::patience::Patience;
use super::submission::{Accepted, Submission};
use crate::engine::beam::{Beam, BeamRule, BeamSearch, BeamSettings};
use crate::engine::{GenerateRequest, Reservation, TokenEvent, TokenStream};

/// Most beams: each step needs twice as many alternatives beside a token.
pub const WIDTH_MAX: u32 = NUM_LOGPROBS_MAX as u32 / 2;

const LENGTH_PENALTY: Bounds =
    Bounds { min: f32::MIN as f64, above_min: false, max: f32::MAX as f64, words: "a finite number" };
const WITHOUT_BEAMS: [Neutral; 2] = [
    Neutral {
        name: "length_penalty",
        feature: "a length penalty without use_beam_search",
        changes_nothing: options::is_one,
    },
    Neutral {
        name: "early_stopping",
        feature: "early stopping without use_beam_search",
        changes_nothing: options::is_false,
    },
];

/// What a request asks of its search.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BeamFields {
    length_penalty: f64,
    rule: BeamRule,
}

impl BeamFields {
    /// Takes the fields; none where no search is asked for.
    ///
    /// # Errors
    /// A wrong type or range, or fields of a search without one.
    pub fn take(fields: &mut Fields) -> Result<Option<Self>, ApiError> {
        if !fields.flag("use_beam_search", false)? {
            for field in &WITHOUT_BEAMS {
                fields.neutral(field)?;
            }
            return Ok(None);
        }
        let length_penalty = fields.number("length_penalty", LENGTH_PENALTY)?.map_or(1.0, f64::from);
        Ok(Some(Self { length_penalty, rule: take_rule(fields)? }))
    }
}

/// The end of a search: by `early_stopping` where it is given, else all steps are made.
fn take_rule(fields: &mut Fields) -> Result<BeamRule, ApiError> {
    match fields.take("early_stopping") {
        None => Ok(BeamRule::Exhaustive),
        Some(Value::Bool(true)) => Ok(BeamRule::FirstFull),
        Some(Value::Bool(false)) => Ok(BeamRule::Estimate),
        Some(Value::String(word)) if word == "never" => Ok(BeamRule::Bound),
        Some(other) => Err(ApiError::OutOfRange {
            param: "early_stopping".into(),
            value: other.to_string(),
            expected: "true, false or \"never\"".into(),
        }),
    }
}

/// The searches of a request, one for each prompt.
pub struct Searches(Vec<Search>);

/// The search behind one prompt.
struct Search {
    reservation: Reservation,
    search: BeamSearch,
    /// What is asked at each step, without the tokens of a beam.
    step: GenerateRequest,
    patience: Patience,
    later: Patience,
    meters: Vec<OutputMeter>,
    texts: Vec<Option<OutputText>>,
    stop_tokens: StopTokens,
    include_stop: bool,
    cached_tokens: Option<u32>,
}

impl Submission<'_> {
    /// Takes the places of a search for each prompt; nothing runs before [`Searches::run`].
    ///
    /// # Errors
    /// A prompt is empty or too long, an option does not fit the model or a search, or the engine refuses.
    pub fn search(&self, request: &Accepted, beam: BeamFields) -> Result<Searches, ApiError> {
        self.check(&request.model)?;
        if self.constraint.is_some() {
            let rule =
                "the outputs of a beam search cannot be held to a grammar: leave tools out or set tool_choice to none";
            return Err(ApiError::Conflict { param: "tools", rule });
        }
        let meter = RequestMeter::new(&request.model.name, &request.caller, self.facts(&request.model)?);
        let search = |prompt: &Vec<TokenId>| self.search_behind(prompt, request, beam, &meter);
        let searches = self.prompts.iter().map(search).collect::<Result<_, _>>()?;
        request.leave();
        Ok(Searches(searches))
    }

    fn search_behind(
        &self,
        prompt: &[TokenId],
        request: &Accepted,
        beam: BeamFields,
        meter: &RequestMeter,
    ) -> Result<Search, ApiError> {
        let (model, options) = (&request.model, self.options);
        let stop_tokens = self.stop_tokens(model);
        let mut step = self.generate_request(model, prompt, &stop_tokens)?;
        let reservation = model.engine.reserve(options.best_of.get())?;
        let limits = reservation.limits();
        let room = limits.context().saturating_sub(prompt.len() as u32).max(1);
        let settings = BeamSettings {
            width: options.best_of.get() as usize,
            max_tokens: step.max_tokens.get().min(room),
            num_prompt_tokens: prompt.len() as u32,
            end_tokens: stop_tokens.all(),
            length_penalty: beam.length_penalty,
            rule: beam.rule,
            num_top: options.logprobs.map(|num_top| num_top as usize),
        };
        let num_top = settings.num_candidates().max(settings.num_top.unwrap_or(0)).min(NUM_LOGPROBS_MAX as usize);
        step.request_id.clone_from(&request.id);
        step.sampling =
            SamplingParams { temperature: 0.0, logprobs: Some(num_top as u32), ..SamplingParams::default() };
        step.max_tokens = NonZeroU32::MIN;
        step.stop_token_ids = Vec::new();
        let kept = options.num_choices.get();
        meter.prompt(prompt.len());
        Ok(Search {
            search: BeamSearch::new(settings),
            step,
            patience: Patience::new(model.queue_timeout, request.caller.deadline),
            later: Patience::new(None, request.caller.deadline),
            meters: (0..kept).map(|_| meter.output()).collect(),
            texts: (0..kept).map(|_| self.output_text(model)).collect(),
            include_stop: options.include_stop,
            cached_tokens: None,
            reservation,
            stop_tokens,
        })
    }
}

impl Searches {
    /// Runs all of them at once; outputs come in order of prompts, the best of each first.
    ///
    /// # Errors
    /// The first error of any; the others end.
    pub async fn run(self) -> Result<Vec<Output>, ApiError> {
        let outputs = try_join_all(self.0.into_iter().map(Search::run)).await?;
        Ok(outputs.into_iter().flatten().collect())
    }
}

impl Search {
    async fn run(mut self) -> Result<Vec<Output>, ApiError> {
        while !self.search.live().is_empty() {
            let next = match self.step().await {
                Ok(next) => next,
                Err(error) => {
                    self.meters.iter_mut().for_each(|meter| meter.end("error"));
                    return Err(error);
                }
            };
            self.meters.iter_mut().for_each(|meter| meter.token(Instant::now()));
            self.search.advance(&next);
        }
        Ok(self.outputs())
    }

    /// The best tokens behind each live beam.
    async fn step(&mut self) -> Result<Vec<TokenLogprobs>, ApiError> {
        let mut streams = Vec::with_capacity(self.search.live().len());
        for beam in self.search.live() {
            let mut request = self.step.clone();
            request.prompt.extend(&beam.tokens);
            streams.push(self.reservation.submit(request)?);
        }
        let patience = self.patience;
        let scored = try_join_all(streams.into_iter().map(|stream| read(stream, patience))).await?;
        // Only the first step has waited in the queue as a new request does.
        self.patience = self.later;
        self.cached_tokens = self.cached_tokens.or_else(|| scored.first().map(|(_, cached_tokens)| *cached_tokens));
        Ok(scored.into_iter().map(|(next, _)| next).collect())
    }

    fn outputs(self) -> Vec<Output> {
        let (stop_tokens, include_stop, cached_tokens) = (self.stop_tokens, self.include_stop, self.cached_tokens);
        let beams = self.search.finish().into_iter().zip(self.texts).zip(self.meters);
        let output = |((beam, text), mut meter): ((Beam, Option<OutputText>), OutputMeter)| {
            meter.end(if beam.end.is_some() { "stop" } else { "length" });
            let silent = beam.end.is_some() && !include_stop;
            let reason = beam.end.map_or(EndReason::Length, |token| EndReason::Stop(stop_tokens.cause(token)));
            let end = End { reason, completion_tokens: beam.tokens.len() as u32, cached_tokens };
            let shown = beam.tokens.len() - usize::from(silent);
            let text = text.map(|text| text.whole(beam.tokens.get(..shown).unwrap_or_default())).unwrap_or_default();
            Output { text, tokens: beam.tokens, logprobs: beam.logprobs, prompt_logprobs: None, end: Some(end) }
        };
        beams.map(output).collect()
    }
}

/// What one step says behind one beam, and how much of it the prefix cache had.
async fn read(mut stream: TokenStream, mut patience: Patience) -> Result<(TokenLogprobs, u32), ApiError> {
    let mut next = None;
    loop {
        match patience.next(&mut stream).await? {
            Some(TokenEvent::Token { logprobs, .. }) => next = logprobs,
            Some(TokenEvent::PromptLogprobs(_) | TokenEvent::Pooled(_)) => {}
            Some(TokenEvent::Finished { usage, .. }) => {
                return Ok((next.ok_or(ApiError::EngineGone)?, usage.cached_tokens));
            }
            Some(TokenEvent::Failed(error)) => return Err(error.into()),
            None => return Err(ApiError::EngineGone),
        }
    }
}
