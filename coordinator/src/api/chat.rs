//! `/v1/chat/completions`.
//!
//! Owns the fields of a chat request and the shapes of its answers. Sampling, sequences and streams are shared with
//! completions.

use std::num::NonZeroU32;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use phalanx_proto::TokenId;
use schemars::JsonSchema;
use serde::Serialize;

use super::body::Body;
use super::caller::Caller;
use super::choice::{self, Choice, Delta, EndReason, Output};
use super::error::ApiError;
use super::fields::{Fields, Neutral};
use super::finish::{FinishWord, StopReason};
use super::logprobs::{ChatLogprobs, PromptLogprobs, TokenNames};
use super::messages;
use super::options::{self, Options, StreamOptions};
use super::sse::{self, Frames, WriteFrames};
use super::submission::{Accepted, Submission, with_text};
use super::usage::Usage;
use super::{ApiState, SYSTEM_FINGERPRINT, body, reply};
use crate::text::ChatPrompt;

/// The route.
pub fn routes() -> Router<ApiState> {
    Router::new().route("/v1/chat/completions", routing::post(create))
}

/// Fields of chat alone that come later.
const NOT_SUPPORTED: &[Neutral] = &[
    Neutral { name: "tools", feature: "tool calling", changes_nothing: options::is_empty },
    Neutral { name: "tool_choice", feature: "tool calling", changes_nothing: is_no_choice },
    Neutral { name: "functions", feature: "tool calling", changes_nothing: options::is_empty },
    Neutral { name: "function_call", feature: "tool calling", changes_nothing: is_no_choice },
    Neutral { name: "modalities", feature: "anything but text", changes_nothing: is_text_only },
    Neutral { name: "audio", feature: "audio", changes_nothing: options::never },
    Neutral { name: "prediction", feature: "a predicted output", changes_nothing: options::never },
    Neutral { name: "web_search_options", feature: "search", changes_nothing: options::never },
    Neutral { name: "chat_template", feature: "a template from the client", changes_nothing: options::never },
    Neutral { name: "documents", feature: "documents", changes_nothing: options::is_empty },
    Neutral { name: "echo", feature: "echo in chat", changes_nothing: options::is_false },
    Neutral { name: "mm_processor_kwargs", feature: "anything but text", changes_nothing: options::is_empty },
    Neutral { name: "media_io_kwargs", feature: "anything but text", changes_nothing: options::is_empty },
    Neutral { name: "return_prompt_text", feature: "the prompt's text", changes_nothing: options::is_false },
];

/// Without tools these words change nothing.
fn is_no_choice(value: &serde_json::Value) -> bool {
    value == "none" || value == "auto"
}

fn is_text_only(value: &serde_json::Value) -> bool {
    value.as_array().is_some_and(|kinds| kinds.len() == 1 && kinds[0] == "text")
}

/// A validated request.
#[derive(Debug)]
pub(super) struct ChatRequest {
    model: Option<String>,
    prompt: ChatPrompt,
    max_tokens: Option<NonZeroU32>,
    options: Options,
    ignored: Vec<String>,
}

impl ChatRequest {
    /// Parses the members of a body.
    pub(super) fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        let model = fields.text("model")?;
        let prompt = messages::take_prompt(&mut fields)?;
        let limit = options::take_max_tokens(&mut fields, "max_completion_tokens", 1)?;
        let older_limit = options::take_max_tokens(&mut fields, "max_tokens", 1)?;
        for field in NOT_SUPPORTED {
            fields.neutral(field)?;
        }
        let logprobs = take_logprobs(&mut fields)?;
        let options = Options::take(&mut fields, logprobs)?;
        let max_tokens = limit.or(older_limit).and_then(NonZeroU32::new);
        Ok(Self { model, prompt, max_tokens, options, ignored: fields.into_ignored() })
    }
}

/// `logprobs` is a switch here, and `top_logprobs` the number of alternatives.
fn take_logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let on = fields.flag("logprobs", false)?;
    let top = options::take_logprob_count(fields, "top_logprobs")?;
    if !on && top.is_some_and(|count| count > 0) {
        return Err(ApiError::Conflict { param: "top_logprobs", rule: "top_logprobs needs logprobs to be true" });
    }
    Ok(on.then(|| top.unwrap_or(0)))
}

async fn create(State(state): State<ApiState>, request: Request) -> Result<Response, ApiError> {
    let caller = Caller::of(&request);
    let body = body::read(request, state.limits.body).await?;
    let Begun { answer, choices, usage, ignored } = begin(&state, caller, body, "chatcmpl-").await?;
    let response = match answer.options.stream {
        Some(stream) => {
            let writer = ChunkWriter::new(answer, stream, usage, choices.len());
            sse::respond(choice::merged(choices), writer, state.limits.sse_keep_alive).await?
        }
        None => answer.whole(choice::collect(choices).await?, usage),
    };
    Ok(reply::with_ignored(response, &ignored))
}

/// A conversation whose outputs are on their way.
pub(super) struct Begun {
    pub(super) answer: Answer,
    pub(super) choices: Vec<Choice>,
    pub(super) usage: Usage,
    pub(super) ignored: Vec<String>,
}

/// Parses, admits, renders and submits a conversation: the same for every endpoint that answers one. Names begin with `prefix`.
///
/// # Errors
/// A field that cannot be obeyed, a model that does not answer, or an engine that refuses.
pub(super) async fn begin(state: &ApiState, caller: Caller, body: Body, prefix: &str) -> Result<Begun, ApiError> {
    let chat = ChatRequest::parse(body.fields)?;
    let id = format!("{prefix}{}", chat.options.request_id.as_ref().unwrap_or(&caller.request_id));
    let accepted = Accepted::new(state, chat.model.as_deref(), id, caller)?;
    let prompts = [tokenize(&accepted, chat.prompt, &chat.options, body.num_bytes).await?];
    let submission = Submission {
        prompts: &prompts,
        param: "messages",
        max_tokens: chat.max_tokens,
        echo_logprobs: None,
        options: &chat.options,
    };
    let choices = submission.submit(&accepted)?;
    let usage = Usage::of_prompts(&prompts);
    let [prompt] = prompts;
    let answer = Answer { accepted, prompt, options: chat.options };
    Ok(Begun { answer, choices, usage, ignored: chat.ignored })
}

/// Tokens of a conversation, which is not answered.
///
/// # Errors
/// As of [`begin`], but for the engine's.
pub(super) async fn count(state: &ApiState, caller: Caller, body: Body) -> Result<usize, ApiError> {
    let chat = ChatRequest::parse(body.fields)?;
    let id = caller.request_id.clone();
    let accepted = Accepted::without_place(state, chat.model.as_deref(), id, caller)?;
    Ok(tokenize(&accepted, chat.prompt, &chat.options, body.num_bytes).await?.len())
}

/// Renders and tokenizes a conversation.
///
/// # Errors
/// The model has no tokenizer or no template, or the template refuses the messages.
pub(super) async fn tokenize(
    accepted: &Accepted,
    prompt: ChatPrompt,
    options: &Options,
    num_bytes: usize,
) -> Result<Vec<TokenId>, ApiError> {
    let text = accepted.text("messages")?;
    if !text.has_chat_template() {
        return Err(ApiError::NoChatTemplate { model: accepted.model.name.clone() });
    }
    let add_special = options.add_special_tokens.unwrap_or(false);
    let work = move |text: &crate::text::TextModel| text.encode(&text.render_chat(&prompt)?, add_special);
    with_text(text, num_bytes, "messages", work).await
}

/// What an answer is made from, beside its outputs.
pub(super) struct Answer {
    pub(super) accepted: Accepted,
    pub(super) prompt: Vec<TokenId>,
    pub(super) options: Options,
}

/// The whole answer.
#[derive(Serialize, JsonSchema)]
pub struct ChatCompletion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<WholeChoice>,
    usage: Usage,
    system_fingerprint: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<u32>>")]
    prompt_token_ids: Option<&'a [TokenId]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
}

#[derive(Serialize, JsonSchema)]
struct WholeChoice {
    index: usize,
    message: Message,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<FinishWord>,
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<u32>>")]
    token_ids: Option<Vec<TokenId>>,
}

#[derive(Serialize, JsonSchema)]
struct Message {
    role: &'static str,
    content: String,
}

impl Answer {
    pub(super) fn names(&self) -> TokenNames<'_> {
        TokenNames { text: self.accepted.model.text.as_deref(), as_ids: self.options.tokens_as_ids }
    }

    fn whole(&self, outputs: Vec<Output>, mut usage: Usage) -> Response {
        usage.add_outputs(&outputs);
        let (made, kept) = (self.options.best_of.get() as usize, self.options.num_choices.get() as usize);
        let mut outputs = choice::keep_best(outputs, made, kept);
        let prompt_logprobs = self.options.prompt_logprobs.map(|best| {
            let entries = outputs.first_mut().and_then(|output| output.prompt_logprobs.take()).unwrap_or_default();
            PromptLogprobs::new(&entries, best, self.names())
        });
        let choices = outputs.into_iter().enumerate().map(|(index, output)| self.whole_choice(index, output));
        Json(ChatCompletion {
            id: &self.accepted.id,
            object: "chat.completion",
            created: self.accepted.created,
            model: &self.accepted.model.name,
            choices: choices.collect(),
            usage,
            system_fingerprint: SYSTEM_FINGERPRINT,
            prompt_token_ids: self.options.return_token_ids.then_some(&self.prompt),
            prompt_logprobs,
        })
        .into_response()
    }

    fn whole_choice(&self, index: usize, output: Output) -> WholeChoice {
        let reason = output.end.map(|end| end.reason);
        WholeChoice {
            index,
            message: Message { role: "assistant", content: output.text },
            logprobs: self.options.logprobs.map(|_| ChatLogprobs::new(&output.logprobs, self.names())),
            finish_reason: reason.as_ref().map(FinishWord::from),
            stop_reason: reason.and_then(StopReason::new),
            token_ids: self.options.return_token_ids.then_some(output.tokens),
        }
    }
}

/// Writes the chunks of a streamed answer.
struct ChunkWriter {
    answer: Answer,
    stream: StreamOptions,
    usage: Usage,
    /// Per choice: whether its role was sent.
    opened: Vec<bool>,
    prompt_sent: bool,
}

#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [ChunkChoice<'a>],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_fingerprint: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [TokenId]>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: usize,
    delta: MessageDelta<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<FinishWord>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<&'a [TokenId]>,
}

#[derive(Default, Serialize)]
struct MessageDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

impl ChunkWriter {
    fn new(answer: Answer, stream: StreamOptions, usage: Usage, num_choices: usize) -> Self {
        Self { answer, stream, usage, opened: vec![false; num_choices], prompt_sent: false }
    }

    fn push(&self, choices: &[ChunkChoice<'_>], usage: Option<Usage>, first: bool, frames: &mut Frames) {
        let ends = choices.iter().any(|choice| choice.finish_reason.is_some());
        frames.push(&Chunk {
            id: &self.answer.accepted.id,
            object: "chat.completion.chunk",
            created: self.answer.accepted.created,
            model: &self.answer.accepted.model.name,
            choices,
            usage: usage.or(self.stream.continuous_usage.then_some(self.usage)),
            system_fingerprint: ends.then_some(SYSTEM_FINGERPRINT),
            prompt_token_ids: (first && self.answer.options.return_token_ids).then_some(&self.answer.prompt),
        });
    }

    /// The first chunk of a choice: its role, once something of it is there.
    fn open(&mut self, index: usize, frames: &mut Frames) {
        match self.opened.get_mut(index) {
            Some(opened) if !*opened => *opened = true,
            _ => return,
        }
        let first = !std::mem::replace(&mut self.prompt_sent, true);
        let delta = MessageDelta { role: Some("assistant"), content: Some("") };
        let choice =
            ChunkChoice { index, delta, logprobs: None, finish_reason: None, stop_reason: None, token_ids: None };
        self.push(&[choice], None, first, frames);
    }
}

impl WriteFrames for ChunkWriter {
    fn delta(&mut self, delta: Delta, frames: &mut Frames) {
        self.open(delta.index, frames);
        self.usage.add_delta(&delta);
        let options = &self.answer.options;
        let tokens_wanted = options.return_token_ids && !delta.tokens.is_empty();
        let logprobs_wanted = options.logprobs.is_some() && !delta.logprobs.is_empty();
        if delta.text.is_empty() && delta.end.is_none() && !tokens_wanted && !logprobs_wanted {
            return;
        }
        let reason: Option<EndReason> = delta.end.map(|end| end.reason);
        let silent = delta.text.is_empty() && reason.is_some();
        let choice = ChunkChoice {
            index: delta.index,
            delta: MessageDelta { role: None, content: (!silent).then_some(&delta.text) },
            logprobs: logprobs_wanted.then(|| ChatLogprobs::new(&delta.logprobs, self.answer.names())),
            finish_reason: reason.as_ref().map(FinishWord::from),
            stop_reason: reason.and_then(StopReason::new),
            token_ids: options.return_token_ids.then_some(&delta.tokens),
        };
        self.push(&[choice], None, false, frames);
    }

    fn end(&mut self, frames: &mut Frames) {
        if self.stream.include_usage {
            self.push(&[], Some(self.usage), false, frames);
        }
    }
}
