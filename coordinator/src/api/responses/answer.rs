//! The response object, and the events that build it up.
//!
//! **Invariant:** sequence numbers have no gaps; an item that was added is done before the next one is added, and before its response is.
//! **Invariant:** a whole response is made of the same items as the last event of its stream: both ways run through [`EventWriter::tell`].

use futures::StreamExt;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};

use super::super::chat::Answer;
use super::super::choice::{self, Choice, Delta, EndReason};
use super::super::error::ApiError;
use super::super::logprobs::{ChatLogprobs, ChatToken};
use super::super::message::{MessageParser, MessagePart};
use super::super::sse::{Frames, WriteFrames};
use super::super::usage::Usage;
use super::request::Echo;

/// Writes a response.
pub struct EventWriter {
    answer: Answer,
    echo: Echo,
    usage: Usage,
    parser: MessageParser,
    sequence_number: u64,
    is_open: bool,
    items: Vec<Item>,
    /// Log-probabilities of tokens whose text is not certain yet.
    logprobs: Vec<ChatToken>,
    end: Option<EndReason>,
}

/// One item as it grows; the last one is open.
#[derive(Debug)]
struct Item {
    kind: ItemKind,
    /// Its thoughts, its text or its arguments.
    text: String,
    logprobs: Vec<ChatToken>,
}

#[derive(Debug, PartialEq, Eq)]
enum ItemKind {
    Reasoning,
    Message,
    Call { call_id: String, name: String },
}

/// A response, at its beginning or at its end.
#[derive(Serialize, JsonSchema)]
pub struct ResponseObject<'a> {
    id: &'a str,
    object: &'static str,
    created_at: u64,
    status: &'static str,
    background: bool,
    error: Option<Failure>,
    incomplete_details: Option<Incomplete>,
    instructions: &'a Value,
    max_output_tokens: &'a Value,
    max_tool_calls: &'a Value,
    model: &'a str,
    output: Vec<OutputItem<'a>>,
    parallel_tool_calls: bool,
    previous_response_id: Option<&'a str>,
    reasoning: Value,
    service_tier: &'static str,
    store: bool,
    temperature: f64,
    text: &'a Value,
    tool_choice: &'a Value,
    tools: &'a Value,
    top_logprobs: &'a Value,
    top_p: f64,
    truncation: &'static str,
    usage: Option<ResponseUsage>,
    user: &'a Value,
    metadata: &'a Value,
}

#[derive(Serialize, JsonSchema)]
struct Failure {
    code: &'static str,
    message: String,
}

#[derive(Serialize, JsonSchema)]
struct Incomplete {
    reason: &'static str,
}

/// One item of an output.
#[derive(Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
enum OutputItem<'a> {
    Reasoning { id: String, status: &'static str, summary: [(); 0], content: Vec<ContentPart<'a>> },
    Message { id: String, status: &'static str, role: &'static str, content: Vec<ContentPart<'a>> },
    FunctionCall { id: String, status: &'static str, call_id: &'a str, name: &'a str, arguments: &'a str },
}

/// One part of a message or of thoughts.
#[derive(Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ContentPart<'a> {
    OutputText { annotations: [(); 0], logprobs: &'a [ChatToken], text: &'a str },
    ReasoningText { text: &'a str },
}

#[derive(Serialize, JsonSchema)]
struct ResponseUsage {
    input_tokens: u64,
    input_tokens_details: InputDetails,
    output_tokens: u64,
    output_tokens_details: OutputDetails,
    total_tokens: u64,
}

#[derive(Serialize, JsonSchema)]
struct InputDetails {
    cached_tokens: u64,
    cache_write_tokens: u64,
}

#[derive(Serialize, JsonSchema)]
struct OutputDetails {
    reasoning_tokens: u64,
}

impl Item {
    fn new(kind: ItemKind) -> Self {
        Self { kind, text: String::new(), logprobs: Vec::new() }
    }

    /// What begins its name.
    fn prefix(&self) -> &'static str {
        match self.kind {
            ItemKind::Reasoning => "rs",
            ItemKind::Message => "msg",
            ItemKind::Call { .. } => "fc",
        }
    }

    /// Its part; a call has none.
    fn part(&self) -> Option<ContentPart<'_>> {
        match self.kind {
            ItemKind::Reasoning => Some(ContentPart::ReasoningText { text: &self.text }),
            ItemKind::Message => {
                Some(ContentPart::OutputText { annotations: [], logprobs: &self.logprobs, text: &self.text })
            }
            ItemKind::Call { .. } => None,
        }
    }

    fn output(&self, id: String, status: &'static str) -> OutputItem<'_> {
        // An item that was only added has no part yet.
        let content = self.part().filter(|_| status != IN_PROGRESS).into_iter().collect();
        match &self.kind {
            ItemKind::Reasoning => OutputItem::Reasoning { id, status, summary: [], content },
            ItemKind::Message => OutputItem::Message { id, status, role: "assistant", content },
            ItemKind::Call { call_id, name } => {
                OutputItem::FunctionCall { id, status, call_id, name, arguments: &self.text }
            }
        }
    }
}

const IN_PROGRESS: &str = "in_progress";

impl EventWriter {
    /// Nothing was written yet.
    pub fn new(answer: Answer, echo: Echo, usage: Usage) -> Self {
        let parser = MessageParser::new(&answer.rules);
        let (items, logprobs) = (Vec::new(), Vec::new());
        Self { answer, echo, usage, parser, sequence_number: 0, is_open: false, items, logprobs, end: None }
    }

    /// Waits for the output; its events are seen by nobody.
    ///
    /// # Errors
    /// The output fails.
    pub async fn whole(&mut self, choices: Vec<Choice>) -> Result<ResponseObject<'_>, ApiError> {
        let mut deltas = choice::merged(choices);
        while let Some(delta) = deltas.next().await {
            self.delta(delta?, &mut Frames::default());
        }
        self.close(&mut Frames::default());
        Ok(self.finished())
    }

    /// The response once it has ended.
    fn finished(&self) -> ResponseObject<'_> {
        let status = self.last_status();
        let is_whole = status == "completed";
        let last = self.items.len().saturating_sub(1);
        let item_status = |at: usize| if at == last { status } else { "completed" };
        let items = self.items.iter().enumerate();
        ResponseObject {
            incomplete_details: (!is_whole).then_some(Incomplete { reason: "max_output_tokens" }),
            output: items.map(|(at, item)| item.output(self.item_id(at), item_status(at))).collect(),
            usage: Some(self.usage()),
            ..self.response(status)
        }
    }

    /// How the last item and the response end.
    fn last_status(&self) -> &'static str {
        if matches!(self.end, Some(EndReason::Length)) { "incomplete" } else { "completed" }
    }

    fn response(&self, status: &'static str) -> ResponseObject<'_> {
        let (accepted, echo) = (&self.answer.accepted, &self.echo);
        let defaults = &accepted.model.defaults;
        let or = |given: &Value, default: Option<f32>| given.as_f64().unwrap_or_else(|| default.map_or(1.0, f64::from));
        ResponseObject {
            id: &accepted.id,
            object: "response",
            created_at: accepted.created,
            status,
            background: false,
            error: None,
            incomplete_details: None,
            instructions: &echo.instructions,
            max_output_tokens: &echo.max_output_tokens,
            max_tool_calls: &echo.max_tool_calls,
            model: &accepted.model.name,
            output: Vec::new(),
            parallel_tool_calls: echo.parallel_tool_calls.as_bool().unwrap_or(true),
            previous_response_id: None,
            reasoning: if echo.reasoning.is_null() {
                json!({"effort": null, "summary": null})
            } else {
                echo.reasoning.clone()
            },
            service_tier: "default",
            store: false,
            temperature: or(&echo.temperature, defaults.temperature),
            text: &echo.text,
            tool_choice: &echo.tool_choice,
            tools: &echo.tools,
            top_logprobs: &echo.top_logprobs,
            top_p: or(&echo.top_p, defaults.top_p),
            truncation: "disabled",
            usage: None,
            user: &echo.user,
            metadata: &echo.metadata,
        }
    }

    fn usage(&self) -> ResponseUsage {
        let (input_tokens, output_tokens) = (self.usage.prompt_tokens(), self.usage.completion_tokens());
        let cached_tokens = self.usage.cached_tokens();
        ResponseUsage {
            input_tokens,
            input_tokens_details: InputDetails { cached_tokens, cache_write_tokens: 0 },
            output_tokens,
            output_tokens_details: OutputDetails { reasoning_tokens: self.parser.num_reasoning_tokens().unwrap_or(0) },
            total_tokens: input_tokens + output_tokens,
        }
    }

    fn item_id(&self, at: usize) -> String {
        let prefix = self.items.get(at).map_or("item", Item::prefix);
        let id = self.answer.accepted.id.replacen("resp", prefix, 1);
        if at == 0 { id } else { format!("{id}_{at}") }
    }

    /// Sends an event of this kind with these members.
    fn push(&mut self, kind: &'static str, members: Value, frames: &mut Frames) {
        let mut event = json!({"type": kind, "sequence_number": self.sequence_number});
        if let (Value::Object(event), Value::Object(members)) = (&mut event, members) {
            event.extend(members);
        }
        self.sequence_number += 1;
        frames.push_event(kind, &event);
    }

    /// The events before the first item.
    fn open(&mut self, frames: &mut Frames) {
        if std::mem::replace(&mut self.is_open, true) {
            return;
        }
        for kind in ["response.created", "response.in_progress"] {
            let members = json!({"response": self.response(IN_PROGRESS)});
            self.push(kind, members, frames);
        }
    }

    /// Sends an event about a part of the last item.
    fn push_part(&mut self, kind: &'static str, name: &str, value: Value, frames: &mut Frames) {
        let at = self.items.len().saturating_sub(1);
        let mut members = json!({"item_id": self.item_id(at), "output_index": at});
        if self.items.last().is_some_and(|item| item.part().is_some()) {
            members["content_index"] = 0.into();
        }
        members[name] = value;
        if kind.starts_with("response.output_text.") {
            members["logprobs"] = json!(self.items.last().map(|item| &item.logprobs));
        }
        self.push(kind, members, frames);
    }

    /// Adds an item; the one before it is done.
    fn add(&mut self, kind: ItemKind, frames: &mut Frames) {
        self.finish_item("completed", frames);
        self.items.push(Item::new(kind));
        let at = self.items.len() - 1;
        let Some(item) = self.items.last() else { return };
        let (output, part) = (json!(item.output(self.item_id(at), IN_PROGRESS)), json!(item.part()));
        self.push("response.output_item.added", json!({"output_index": at, "item": output}), frames);
        if !part.is_null() {
            self.push_part("response.content_part.added", "part", part, frames);
        }
    }

    /// Tells what became of the last item.
    fn finish_item(&mut self, status: &'static str, frames: &mut Frames) {
        let Some(item) = self.items.last() else { return };
        let at = self.items.len() - 1;
        let (kind, member) = match item.kind {
            ItemKind::Reasoning => ("response.reasoning_text.done", "text"),
            ItemKind::Message => ("response.output_text.done", "text"),
            ItemKind::Call { .. } => ("response.function_call_arguments.done", "arguments"),
        };
        let (text, part) = (item.text.clone(), json!(item.part()));
        let output = json!(item.output(self.item_id(at), status));
        self.push_part(kind, member, text.into(), frames);
        if !part.is_null() {
            self.push_part("response.content_part.done", "part", part, frames);
        }
        self.push("response.output_item.done", json!({"output_index": at, "item": output}), frames);
    }

    /// Adds a part of the message to the items.
    fn tell(&mut self, part: MessagePart, frames: &mut Frames) {
        let (kind, text) = match part {
            MessagePart::Thoughts(text) => (ItemKind::Reasoning, text),
            MessagePart::Content(text) => (ItemKind::Message, text),
            MessagePart::Call { id, name } => {
                self.logprobs.clear();
                return self.add(ItemKind::Call { call_id: id, name }, frames);
            }
            MessagePart::Arguments(text) => {
                self.grow(text, frames);
                return;
            }
        };
        if self.items.last().is_none_or(|item| item.kind != kind) {
            self.add(kind, frames);
        }
        self.grow(text, frames);
    }

    /// Adds to the last item. Log-probabilities that wait are those of its tokens where it is a message.
    fn grow(&mut self, text: String, frames: &mut Frames) {
        let waiting = std::mem::take(&mut self.logprobs);
        let Some(item) = self.items.last_mut() else { return };
        item.text.push_str(&text);
        match item.kind {
            ItemKind::Reasoning => self.push_part("response.reasoning_text.delta", "delta", text.into(), frames),
            ItemKind::Call { .. } => {
                self.push_part("response.function_call_arguments.delta", "delta", text.into(), frames);
            }
            ItemKind::Message => {
                // The event tells what is new; the item keeps all.
                let before = std::mem::replace(&mut item.logprobs, waiting);
                self.push_part("response.output_text.delta", "delta", text.into(), frames);
                if let Some(item) = self.items.last_mut() {
                    let new = std::mem::replace(&mut item.logprobs, before);
                    item.logprobs.extend(new);
                }
            }
        }
    }

    /// The events behind the last delta, but for the response's own. An output of nothing is an empty message.
    fn close(&mut self, frames: &mut Frames) {
        self.open(frames);
        if self.items.is_empty() {
            self.add(ItemKind::Message, frames);
        }
        let in_message = self.items.last().is_some_and(|item| item.kind == ItemKind::Message);
        if in_message && !self.logprobs.is_empty() {
            self.grow(String::new(), frames);
        }
        self.finish_item(self.last_status(), frames);
    }
}

impl WriteFrames for EventWriter {
    const DONE: bool = false;

    fn delta(&mut self, delta: Delta, frames: &mut Frames) {
        self.open(frames);
        self.usage.add_delta(&delta);
        self.parser.count(&delta.tokens);
        if self.answer.options.logprobs.is_some() {
            self.logprobs.extend(ChatLogprobs::new(&delta.logprobs, self.answer.names()).into_tokens());
        }
        let piece = self.parser.push(&delta.text, delta.end.is_some());
        for part in piece.into_parts() {
            self.tell(part, frames);
        }
        self.end = delta.end.map(|end| end.reason).or(self.end.take());
    }

    fn end(&mut self, frames: &mut Frames) {
        self.close(frames);
        let kind = if self.last_status() == "completed" { "response.completed" } else { "response.incomplete" };
        self.push(kind, json!({"response": self.finished()}), frames);
    }

    fn error(&mut self, error: &ApiError, frames: &mut Frames) {
        let code = error.code().unwrap_or("server_error");
        let members = json!({"code": code, "message": error.to_string(), "param": error.param()});
        self.push("error", members, frames);
        let failure = Some(Failure { code: "server_error", message: error.to_string() });
        let failed = ResponseObject { error: failure, usage: Some(self.usage()), ..self.response("failed") };
        let members = json!({"response": failed});
        self.push("response.failed", members, frames);
    }
}
