//! `/v1/chat/completions`.
//!
//! Owns the fields of a chat request and the shapes of its answers. Sampling, sequences and streams are shared with
//! completions.

mod chunks;

use std::num::NonZeroU32;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use phalanx_proto::TokenId;
use schemars::JsonSchema;
use serde::Serialize;

use self::chunks::ChunkWriter;
use super::body::Body;
use super::caller::Caller;
use super::choice::{self, Choice, Output};
use super::error::ApiError;
use super::fields::{Fields, Neutral};
use super::finish::{FinishWord, StopReason};
use super::logprobs::{ChatLogprobs, PromptLogprobs, TokenNames};
use super::message::{CallRules, Message, MessageParser, MessageRules, ThoughtRules};
use super::messages;
use super::options::{self, Options};
use super::sse;
use super::structured::{self, Structure};
use super::submission::{Accepted, Submission, with_text};
use super::tools::{ToolChoice, ToolUse};
use super::usage::Usage;
use super::{ApiState, SYSTEM_FINGERPRINT, body, reply};
use crate::constraint::{call_grammar, free_grammar};
use crate::engine::Constraint;
use crate::text::tools::{self, Tool};
use crate::text::{ChatPrompt, TextModel, ThoughtParser};

/// The route.
pub fn routes() -> Router<ApiState> {
    Router::new().route("/v1/chat/completions", routing::post(create))
}

/// Fields of chat alone that come later.
const NOT_SUPPORTED: &[Neutral] = &[
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

fn is_text_only(value: &serde_json::Value) -> bool {
    value.as_array().is_some_and(|kinds| kinds.len() == 1 && kinds[0] == "text")
}

/// A validated request.
#[derive(Debug)]
pub(super) struct ChatRequest {
    model: Option<String>,
    prompt: ChatPrompt,
    max_tokens: Option<NonZeroU32>,
    tools: Option<ToolUse>,
    /// How much the model should think, in the client's word.
    effort: Option<String>,
    include_reasoning: bool,
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
        let tools = ToolUse::take(&mut fields)?;
        let effort = take_effort(&mut fields)?;
        let include_reasoning = fields.flag("include_reasoning", true)?;
        for field in NOT_SUPPORTED {
            fields.neutral(field)?;
        }
        let logprobs = take_logprobs(&mut fields)?;
        let options = Options::take(&mut fields, logprobs)?;
        if let (Some(structure), true) = (&options.structure, tools.as_ref().is_some_and(ToolUse::is_forced)) {
            let rule = "an answer that has to call a tool cannot be held to another grammar";
            return Err(ApiError::Conflict { param: structure.param, rule });
        }
        if !options.delivery.detokenize && tools.as_ref().is_some_and(|tools| tools.choice != ToolChoice::None) {
            let rule = "calls are found in text: tools need detokenize to be true";
            return Err(ApiError::Conflict { param: "detokenize", rule });
        }
        let max_tokens = limit.or(older_limit).and_then(NonZeroU32::new);
        let ignored = options.without_effect(fields.into_ignored());
        Ok(Self { model, prompt, max_tokens, tools, effort, include_reasoning, options, ignored })
    }

    /// Tells the template how much to think; a template that takes no such word leaves the field without effect.
    fn apply_effort(&mut self, text: &TextModel) {
        let Some(effort) = &self.effort else { return };
        let variables = text.effort_variables(effort);
        if variables.is_empty() && effort != "none" {
            self.ignored.push("reasoning_effort".into());
        }
        for (name, value) in variables {
            self.prompt.kwargs.entry(name).or_insert(value);
        }
    }

    /// The tools that this answer may call.
    fn callable(&self) -> Option<&ToolUse> {
        self.tools.as_ref().filter(|tools| tools.choice != ToolChoice::None)
    }

    /// What the answer may hold beside text.
    fn rules(&self, text: &TextModel, opens_thoughts: bool) -> MessageRules {
        let (start, end) = ThoughtParser::marks();
        MessageRules {
            calls: self.callable().map(|tools| CallRules {
                format: text.tool_format(),
                tools: tools.tools.clone(),
                calls_max: tools.calls_max(),
                is_named: matches!(tools.choice, ToolChoice::Named(_)),
            }),
            thoughts: text.thinks().then(|| ThoughtRules {
                is_inside: opens_thoughts,
                is_shown: self.include_reasoning,
                marks: (text.token_id(start), text.token_id(end)),
            }),
        }
    }

    /// What the answer is held to: calls that it has to make, the client's own grammar, or strict tools.
    fn structure(&self, text: &TextModel) -> Option<Structure> {
        match self.tools.as_ref().filter(|tools| tools.is_forced()) {
            Some(tools) => {
                let grammar = call_grammar(text, &tools.callable(), tools.calls_max() > 1);
                Some(Structure { param: "tools", grammar })
            }
            None => self.options.structure.clone().or_else(|| {
                let tools = self.callable()?;
                let grammar = free_grammar(text, &tools.tools, tools.is_parallel)?;
                Some(Structure { param: "tools", grammar })
            }),
        }
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

const EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

fn take_effort(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let effort = fields.text("reasoning_effort")?;
    match effort {
        Some(effort) if !EFFORTS.contains(&effort.as_str()) => {
            let expected = format!("one of {}", EFFORTS.join(", "));
            Err(ApiError::OutOfRange { param: "reasoning_effort".into(), value: effort, expected })
        }
        other => Ok(other),
    }
}

async fn create(State(state): State<ApiState>, request: Request) -> Result<Response, ApiError> {
    let caller = Caller::of(&request);
    let body = body::read(request, state.limits.body).await?;
    let prepared = Prepared::new(&state, caller, body, "chatcmpl-").await?;
    if let Some(beam) = prepared.chat.options.beam {
        let outputs = prepared.submission().search(&prepared.accepted, beam)?.run().await?;
        let (answer, usage, ignored) = prepared.into_answer();
        return Ok(reply::with_ignored(answer.whole(outputs, usage), &ignored));
    }
    let Begun { answer, choices, usage, ignored } = prepared.submit()?;
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
    let prepared = Prepared::new(state, caller, body, prefix).await?;
    if prepared.chat.options.beam.is_some() {
        return Err(ApiError::Unsupported { param: "use_beam_search".into(), feature: "beam search at this address" });
    }
    prepared.submit()
}

/// A conversation that was let in, as tokens.
struct Prepared {
    chat: ChatRequest,
    accepted: Accepted,
    prompts: [Vec<TokenId>; 1],
    rules: MessageRules,
    constraint: Option<Constraint>,
}

impl Prepared {
    async fn new(state: &ApiState, caller: Caller, body: Body, prefix: &str) -> Result<Self, ApiError> {
        let mut chat = ChatRequest::parse(body.fields)?;
        let id = format!("{prefix}{}", chat.options.request_id.as_ref().unwrap_or(&caller.request_id));
        let accepted = Accepted::new(state, chat.model.as_deref(), id, caller)?;
        let text = Arc::clone(accepted.text("messages")?);
        let rendered = chat.render(&accepted, body.num_bytes).await?;
        let mut prompts = [rendered.tokens];
        Submission::cut(&chat.options, &accepted, chat.max_tokens, &mut prompts)?;
        let rules = chat.rules(&text, rendered.opens_thoughts);
        let structure = chat.structure(&text);
        let thoughts = rules.thoughts.and_then(ThoughtRules::as_tokens);
        let constraint = structured::compile(structure.as_ref(), &accepted, thoughts).await?;
        Ok(Self { chat, accepted, prompts, rules, constraint })
    }

    fn submission(&self) -> Submission<'_> {
        Submission {
            prompts: &self.prompts,
            param: "messages",
            max_tokens: self.chat.max_tokens,
            echo_logprobs: None,
            constraint: self.constraint.clone(),
            keeps_special: self.rules.calls.as_ref().is_some_and(|calls| calls.format.keeps_special),
            options: &self.chat.options,
        }
    }

    fn submit(self) -> Result<Begun, ApiError> {
        let choices = self.submission().submit(&self.accepted)?;
        let (answer, usage, ignored) = self.into_answer();
        Ok(Begun { answer, choices, usage, ignored })
    }

    fn into_answer(self) -> (Answer, Usage, Vec<String>) {
        let usage = Usage::of_prompts(&self.prompts);
        let [prompt] = self.prompts;
        let answer = Answer { accepted: self.accepted, prompt, rules: self.rules, options: self.chat.options };
        (answer, usage, self.chat.ignored)
    }
}

/// Tokens of a conversation, which is not answered.
///
/// # Errors
/// As of [`begin`], but for the engine's.
pub(super) async fn count(state: &ApiState, caller: Caller, body: Body) -> Result<usize, ApiError> {
    let mut chat = ChatRequest::parse(body.fields)?;
    let id = caller.request_id.clone();
    let accepted = Accepted::without_place(state, chat.model.as_deref(), id, caller)?;
    Ok(chat.render(&accepted, body.num_bytes).await?.tokens.len())
}

/// A conversation as the model reads it.
pub(super) struct Rendered {
    /// Its tokens.
    pub(super) tokens: Vec<TokenId>,
    /// It ends inside of thoughts.
    opens_thoughts: bool,
}

impl ChatRequest {
    /// Renders and tokenizes the conversation.
    ///
    /// # Errors
    /// The model has no tokenizer or no template, or the template refuses the messages.
    pub(super) async fn render(&mut self, accepted: &Accepted, num_bytes: usize) -> Result<Rendered, ApiError> {
        let text = accepted.text("messages")?;
        if !text.has_chat_template() {
            return Err(ApiError::NoChatTemplate { model: accepted.model.name.clone() });
        }
        self.apply_effort(text);
        let add_special = self.options.add_special_tokens.unwrap_or(false);
        let prompt = std::mem::take(&mut self.prompt);
        let tools = self.callable().cloned();
        let work = move |text: &TextModel| {
            let rendered = text.render_chat(&with_tools(text, prompt, tools.as_ref()))?;
            let opens_thoughts = text.thinks() && ThoughtParser::is_opened_by(&rendered);
            Ok(Rendered { tokens: text.encode(&rendered, add_special)?, opens_thoughts })
        };
        with_text(text, num_bytes, "messages", work).await
    }
}

/// Puts tools and calls into the form that the model's template takes.
pub(super) fn with_tools(text: &TextModel, mut prompt: ChatPrompt, tools: Option<&ToolUse>) -> ChatPrompt {
    let tools = tools.filter(|tools| tools.choice != ToolChoice::None);
    if text.knows_tools() {
        tools::arguments_as_objects(&mut prompt.messages);
        prompt.tools = tools.map(|tools| tools.raw.clone());
    } else {
        let told: &[Tool] = tools.map_or(&[], |tools| &tools.tools);
        prompt.messages = tools::without_tools(text.tool_format(), told, prompt.messages);
    }
    prompt
}

/// What an answer is made from, beside its outputs.
pub(super) struct Answer {
    pub(super) accepted: Accepted,
    pub(super) prompt: Vec<TokenId>,
    pub(super) rules: MessageRules,
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
    /// Of the tokens that `prompt_logprob_token_ids` names, a list for each place.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_id_logprobs: Option<Vec<Vec<Option<f32>>>>,
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

impl Answer {
    pub(super) fn names(&self) -> TokenNames<'_> {
        self.options.token_names(self.accepted.model.text.as_deref())
    }

    fn whole(&self, outputs: Vec<Output>, mut usage: Usage) -> Response {
        usage.add_outputs(&outputs);
        let parsers = outputs.iter().map(|output| {
            let mut parser = MessageParser::new(&self.rules);
            parser.count(&output.tokens);
            parser.num_reasoning_tokens()
        });
        usage.set_reasoning(parsers.sum());
        let (made, kept) = (self.options.num_made(), self.options.num_choices.get() as usize);
        let mut outputs = choice::keep_best(outputs, made, kept);
        let mut entries = outputs.first_mut().and_then(|output| output.prompt_logprobs.take()).unwrap_or_default();
        let prompt_token_id_logprobs = self.options.scoring.split(&mut entries);
        let prompt_logprobs =
            self.options.prompt_logprobs.map(|best| PromptLogprobs::new(&entries, best, self.names()));
        let choices = outputs.into_iter().enumerate().map(|(index, output)| self.whole_choice(index, output));
        Json(ChatCompletion {
            id: &self.accepted.id,
            object: "chat.completion",
            created: self.accepted.created,
            model: &self.accepted.model.name,
            choices: choices.collect(),
            usage,
            system_fingerprint: SYSTEM_FINGERPRINT,
            prompt_token_ids: self.options.tells_token_ids().then_some(&self.prompt),
            prompt_logprobs,
            prompt_token_id_logprobs,
        })
        .into_response()
    }

    fn whole_choice(&self, index: usize, output: Output) -> WholeChoice {
        let reason = output.end.map(|end| end.reason);
        let mut parser = MessageParser::new(&self.rules);
        let message = Message::of([parser.push(&output.text, true)]);
        WholeChoice {
            index,
            message,
            logprobs: self.options.logprobs.map(|_| ChatLogprobs::new(&output.logprobs, self.names())),
            finish_reason: reason.as_ref().map(|reason| parser.finish_word(reason)),
            stop_reason: reason.and_then(StopReason::new),
            token_ids: self.options.tells_token_ids().then_some(output.tokens),
        }
    }
}
