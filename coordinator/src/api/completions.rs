//! `/v1/completions`.
//!
//! Owns the fields of a completion request (prompts as text or token ids, `echo`) and the shapes of its answers.

use std::num::NonZeroU32;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use phalanx_proto::{TokenId, TokenLogprobs};
use schemars::JsonSchema;
use serde::Serialize;

use super::body::Body;
use super::caller::Caller;
use super::choice::{self, Delta, End, EndReason, Output};
use super::error::ApiError;
use super::fields::{Fields, Neutral};
use super::finish::{FinishWord, StopReason};
use super::logprobs::{CompletionLogprobs, PromptLogprobs, TokenNames};
use super::options::{self, Options, StreamOptions};
use super::prompts::Prompts;
use super::sse::{self, Frames, WriteFrames};
use super::structured;
use super::submission::{Accepted, Submission};
use super::usage::Usage;
use super::{ApiState, SYSTEM_FINGERPRINT, body, reply};
use crate::engine::Constraint;

/// Tokens of an answer where the request does not say.
const MAX_TOKENS_DEFAULT: NonZeroU32 = NonZeroU32::MIN.saturating_add(15);

/// The route.
pub fn routes() -> Router<ApiState> {
    Router::new().route("/v1/completions", routing::post(create))
}

/// Fields of completions alone that come later.
const NOT_SUPPORTED: &[Neutral] = &[
    Neutral { name: "suffix", feature: "a suffix", changes_nothing: options::is_empty },
    Neutral { name: "prompt_embeds", feature: "embeddings as a prompt", changes_nothing: options::never },
];

/// A validated request.
#[derive(Debug)]
struct CompletionRequest {
    model: Option<String>,
    prompts: Prompts,
    /// Zero asks for an echo alone.
    max_tokens: Option<u32>,
    echo: bool,
    options: Options,
    ignored: Vec<String>,
}

impl CompletionRequest {
    fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        let model = fields.text("model")?;
        let prompts = Prompts::take(&mut fields, "prompt")?;
        let echo = fields.flag("echo", false)?;
        let max_tokens = options::take_max_tokens(&mut fields, "max_tokens", if echo { 0 } else { 1 })?;
        for field in NOT_SUPPORTED {
            fields.neutral(field)?;
        }
        let logprobs = options::take_logprob_count(&mut fields, "logprobs")?;
        let options = Options::take(&mut fields, logprobs)?;
        if echo && options.beam.is_some() {
            let rule = "echo cannot be combined with use_beam_search";
            return Err(ApiError::Conflict { param: "echo", rule });
        }
        if options.thinking_budget.is_some() && options.structure.is_some() {
            // A grammar holds from the first token on here, so it would forbid the mark that the budget demands.
            let rule = "thinking_token_budget goes with a grammar in chat only";
            return Err(ApiError::Conflict { param: "thinking_token_budget", rule });
        }
        let ignored = options.without_effect(fields.into_ignored());
        Ok(Self { model, prompts, max_tokens, echo, options, ignored })
    }

    /// Most tokens that the engine is asked for: an echo alone needs one to be described.
    fn limit(&self) -> NonZeroU32 {
        self.max_tokens.map_or(MAX_TOKENS_DEFAULT, |limit| NonZeroU32::new(limit).unwrap_or(NonZeroU32::MIN))
    }

    fn submission<'a>(&'a self, prompts: &'a [Vec<TokenId>], constraint: Option<Constraint>) -> Submission<'a> {
        Submission {
            prompts,
            param: "prompt",
            max_tokens: Some(self.limit()),
            echo_logprobs: self.options.logprobs.filter(|_| self.echo),
            constraint,
            keeps_special: false,
            options: &self.options,
        }
    }
}

async fn create(State(state): State<ApiState>, request: Request) -> Result<Response, ApiError> {
    let caller = Caller::of(&request);
    let Body { fields, num_bytes, room } = body::read(request, state.limits.body).await?;
    let mut completion = CompletionRequest::parse(fields)?;
    let id = format!("cmpl-{}", completion.options.request_id.as_ref().unwrap_or(&caller.request_id));
    let accepted = Accepted::new(&state, completion.model.as_deref(), id, caller)?;
    let add_special = completion.options.add_special_tokens.unwrap_or(true);
    let asked = std::mem::take(&mut completion.prompts);
    let mut prompts = asked.tokenize(&accepted, "prompt", add_special, num_bytes).await?;
    drop(room);
    Submission::cut(&completion.options, &accepted, Some(completion.limit()), &mut prompts)?;
    let constraint = structured::compile(completion.options.structure.as_ref(), &accepted, None).await?;
    let usage = Usage::of_prompts(&prompts);
    let ignored = std::mem::take(&mut completion.ignored);
    if let Some(beam) = completion.options.beam {
        let outputs = completion.submission(&prompts, constraint).search(&accepted, beam)?.run().await?;
        let answer = Answer { accepted, prompts, request: completion };
        return Ok(reply::with_ignored(answer.whole(outputs, usage), &ignored));
    }
    let choices = completion.submission(&prompts, constraint).submit(&accepted)?;
    let answer = Answer { accepted, prompts, request: completion };
    let response = match answer.request.options.stream {
        Some(stream) => {
            let writer = ChunkWriter::new(answer, stream, usage, choices.len());
            sse::respond(choice::merged(choices), writer, state.limits.sse_keep_alive).await?
        }
        None => answer.whole(choice::collect(choices).await?, usage),
    };
    Ok(reply::with_ignored(response, &ignored))
}

/// What an answer is made from, beside its outputs.
struct Answer {
    accepted: Accepted,
    prompts: Vec<Vec<TokenId>>,
    request: CompletionRequest,
}

/// The whole answer, or a chunk of it.
#[derive(Serialize, JsonSchema)]
pub struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [CompletionChoice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_fingerprint: Option<&'static str>,
}

/// A choice of a whole answer or of a chunk.
#[derive(Serialize, JsonSchema)]
struct CompletionChoice<'a> {
    index: usize,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<FinishWord>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<u32>>")]
    token_ids: Option<Vec<TokenId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<u32>>")]
    prompt_token_ids: Option<&'a [TokenId]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
    /// Of the tokens that `prompt_logprob_token_ids` names, a list for each place.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_id_logprobs: Option<Vec<Vec<Option<f32>>>>,
}

impl Answer {
    fn names(&self) -> TokenNames<'_> {
        self.request.options.token_names(self.accepted.model.text.as_deref())
    }

    /// True where the output itself is not wanted, only the echo.
    fn echoes_only(&self) -> bool {
        self.request.echo && self.request.max_tokens == Some(0)
    }

    /// The end of an output that is not wanted.
    fn echo_end(&self, end: Option<End>) -> Option<End> {
        end.map(|end| End { reason: EndReason::Length, ..end })
    }

    /// The prompt of an output; `per_prompt` outputs belong to each.
    fn prompt_of(&self, index: usize, per_prompt: NonZeroU32) -> &[TokenId] {
        self.prompts.get(index / per_prompt.get() as usize).map(Vec::as_slice).unwrap_or_default()
    }

    fn prompt_text(&self, prompt: &[TokenId]) -> String {
        let skip_special = self.request.options.skip_special_tokens;
        let text = self.accepted.model.text.as_ref().filter(|_| self.request.options.delivery.detokenize);
        text.map(|text| text.decode(prompt, skip_special)).unwrap_or_default()
    }

    /// The columns of log-probabilities of an echoed prompt.
    fn echo_logprobs(&self, prompt: &[TokenId], entries: &[TokenLogprobs], offset: &mut usize) -> CompletionLogprobs {
        let mut columns = CompletionLogprobs::default();
        if let Some(first) = prompt.first() {
            columns.push_first(*first, self.names(), offset);
        }
        columns.extend(entries, self.names(), offset);
        columns
    }

    fn whole(&self, mut outputs: Vec<Output>, mut usage: Usage) -> Response {
        if self.echoes_only() {
            for output in &mut outputs {
                let (prompt_logprobs, end) = (output.prompt_logprobs.take(), self.echo_end(output.end.take()));
                *output = Output { prompt_logprobs, end, ..Output::default() };
            }
        }
        usage.add_outputs(&outputs);
        let options = &self.request.options;
        let outputs = choice::keep_best(outputs, options.num_made(), options.num_choices.get() as usize);
        let choices: Vec<_> =
            outputs.into_iter().enumerate().map(|(at, output)| self.whole_choice(at, output)).collect();
        Json(Completion {
            id: &self.accepted.id,
            object: "text_completion",
            created: self.accepted.created,
            model: &self.accepted.model.name,
            choices: &choices,
            usage: Some(usage),
            system_fingerprint: Some(SYSTEM_FINGERPRINT),
        })
        .into_response()
    }

    fn whole_choice(&self, index: usize, output: Output) -> CompletionChoice<'_> {
        let options = &self.request.options;
        let prompt = self.prompt_of(index, options.num_choices);
        let mut entries = output.prompt_logprobs.unwrap_or_default();
        let prompt_token_id_logprobs = options.scoring.split(&mut entries);
        let mut offset = 0;
        let logprobs = options.logprobs.map(|_| {
            let mut columns = match self.request.echo {
                true => self.echo_logprobs(prompt, &entries, &mut offset),
                false => CompletionLogprobs::default(),
            };
            columns.extend(&output.logprobs, self.names(), &mut offset);
            columns
        });
        let text = if self.request.echo { self.prompt_text(prompt) + &output.text } else { output.text };
        let reason = output.end.map(|end| end.reason);
        CompletionChoice {
            index,
            text,
            logprobs,
            finish_reason: reason.as_ref().map(FinishWord::from),
            stop_reason: reason.and_then(StopReason::new),
            token_ids: options.tells_token_ids().then_some(output.tokens),
            prompt_token_ids: options.tells_token_ids().then_some(prompt),
            prompt_logprobs: options.prompt_logprobs.map(|best| PromptLogprobs::new(&entries, best, self.names())),
            prompt_token_id_logprobs,
        }
    }
}

/// Writes the chunks of a streamed answer.
struct ChunkWriter {
    answer: Answer,
    stream: StreamOptions,
    usage: Usage,
    outputs: Vec<OutputState>,
}

/// What was sent of an output.
#[derive(Debug, Clone, Default)]
struct OutputState {
    opened: bool,
    /// Characters of text that log-probabilities have described.
    offset: usize,
}

impl ChunkWriter {
    fn new(answer: Answer, stream: StreamOptions, usage: Usage, num_choices: usize) -> Self {
        Self { answer, stream, usage, outputs: vec![OutputState::default(); num_choices] }
    }

    fn push(&self, choices: &[CompletionChoice<'_>], usage: Option<Usage>, frames: &mut Frames) {
        let ends = choices.iter().any(|choice| choice.finish_reason.is_some());
        let accepted = &self.answer.accepted;
        frames.push(&Completion {
            id: &accepted.id,
            object: "text_completion",
            created: accepted.created,
            model: &accepted.model.name,
            choices,
            usage: usage.or(self.stream.continuous_usage.then_some(self.usage)),
            system_fingerprint: ends.then_some(SYSTEM_FINGERPRINT),
        });
    }

    /// The chunk that repeats the prompt of an output.
    fn push_echo(&mut self, index: usize, entries: &[TokenLogprobs], frames: &mut Frames) {
        let prompt = self.answer.prompt_of(index, self.answer.request.options.num_choices);
        let options = &self.answer.request.options;
        let mut offset = 0;
        let logprobs = options.logprobs.map(|_| self.answer.echo_logprobs(prompt, entries, &mut offset));
        let choice = CompletionChoice {
            text: self.answer.prompt_text(prompt),
            logprobs,
            prompt_token_ids: options.tells_token_ids().then_some(prompt),
            ..CompletionChoice::empty(index)
        };
        self.push(&[choice], None, frames);
        if let Some(state) = self.outputs.get_mut(index) {
            state.offset = offset;
        }
    }
}

impl CompletionChoice<'_> {
    fn empty(index: usize) -> Self {
        Self {
            index,
            text: String::new(),
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            token_ids: None,
            prompt_token_ids: None,
            prompt_logprobs: None,
            prompt_token_id_logprobs: None,
        }
    }
}

impl WriteFrames for ChunkWriter {
    fn delta(&mut self, mut delta: Delta, frames: &mut Frames) {
        let index = delta.index;
        let Some(state) = self.outputs.get_mut(index) else { return };
        let first = !std::mem::replace(&mut state.opened, true);
        let echo = self.answer.request.echo;
        if first && echo {
            self.push_echo(index, &delta.prompt_logprobs.take().unwrap_or_default(), frames);
        }
        if self.answer.echoes_only() {
            delta = Delta { index, end: self.answer.echo_end(delta.end), ..Delta::default() };
        }
        self.usage.add_delta(&delta);
        let options = &self.answer.request.options;
        let tokens_wanted = options.tells_token_ids() && !delta.tokens.is_empty();
        let logprobs_wanted = options.logprobs.is_some() && !delta.logprobs.is_empty();
        if delta.text.is_empty() && delta.end.is_none() && !tokens_wanted && !logprobs_wanted {
            return;
        }
        let mut offset = self.outputs.get(index).map(|state| state.offset).unwrap_or_default();
        let logprobs = logprobs_wanted.then(|| {
            let mut columns = CompletionLogprobs::default();
            columns.extend(&delta.logprobs, self.answer.names(), &mut offset);
            columns
        });
        let reason = delta.end.map(|end| end.reason);
        let prompt_ids = first && !echo && options.tells_token_ids();
        let choice = CompletionChoice {
            text: delta.text,
            logprobs,
            finish_reason: reason.as_ref().map(FinishWord::from),
            stop_reason: reason.and_then(StopReason::new),
            token_ids: options.tells_token_ids().then_some(delta.tokens),
            prompt_token_ids: prompt_ids.then(|| self.answer.prompt_of(index, options.num_choices)),
            ..CompletionChoice::empty(index)
        };
        self.push(&[choice], None, frames);
        if let Some(state) = self.outputs.get_mut(index) {
            state.offset = offset;
        }
    }

    fn end(&mut self, frames: &mut Frames) {
        if self.stream.include_usage {
            self.push(&[], Some(self.usage), frames);
        }
    }
}
