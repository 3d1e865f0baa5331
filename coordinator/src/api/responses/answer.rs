//! The response object, and the events that build it up.
//!
//! **Invariant:** sequence numbers have no gaps; an item that was added is done before its response is.

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};

use super::super::chat::Answer;
use super::super::choice::{Delta, EndReason};
use super::super::error::ApiError;
use super::super::logprobs::{ChatLogprobs, ChatToken};
use super::super::sse::{Frames, WriteFrames};
use super::super::usage::Usage;
use super::request::Echo;

/// Writes a response.
pub struct EventWriter {
    answer: Answer,
    echo: Echo,
    usage: Usage,
    sequence_number: u64,
    is_open: bool,
    text: String,
    logprobs: Vec<ChatToken>,
    end: Option<EndReason>,
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
    Message { id: String, status: &'static str, role: &'static str, content: Vec<ContentPart<'a>> },
}

/// One part of a message.
#[derive(Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ContentPart<'a> {
    OutputText { annotations: [(); 0], logprobs: &'a [ChatToken], text: &'a str },
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

impl EventWriter {
    /// Nothing was written yet.
    pub fn new(answer: Answer, echo: Echo, usage: Usage) -> Self {
        let (text, logprobs) = (String::new(), Vec::new());
        Self { answer, echo, usage, sequence_number: 0, is_open: false, text, logprobs, end: None }
    }

    /// Takes in what came, without an event.
    pub fn take(&mut self, delta: Delta) {
        self.usage.add_delta(&delta);
        if self.answer.options.logprobs.is_some() {
            self.logprobs.extend(ChatLogprobs::new(&delta.logprobs, self.answer.names()).into_tokens());
        }
        self.text.push_str(&delta.text);
        self.end = delta.end.map(|end| end.reason).or(self.end.take());
    }

    /// The response once it has ended.
    pub fn finished(&self) -> ResponseObject<'_> {
        let is_whole = !matches!(self.end, Some(EndReason::Length));
        let status = if is_whole { "completed" } else { "incomplete" };
        ResponseObject {
            incomplete_details: (!is_whole).then_some(Incomplete { reason: "max_output_tokens" }),
            output: vec![self.item(status, vec![self.part()])],
            usage: Some(self.usage()),
            ..self.response(status)
        }
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
            output_tokens_details: OutputDetails { reasoning_tokens: 0 },
            total_tokens: input_tokens + output_tokens,
        }
    }

    fn item_id(&self) -> String {
        self.answer.accepted.id.replacen("resp", "msg", 1)
    }

    fn item<'a>(&self, status: &'static str, content: Vec<ContentPart<'a>>) -> OutputItem<'a> {
        OutputItem::Message { id: self.item_id(), status, role: "assistant", content }
    }

    fn part(&self) -> ContentPart<'_> {
        ContentPart::OutputText { annotations: [], logprobs: &self.logprobs, text: &self.text }
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

    /// The events before the first text.
    fn open(&mut self, frames: &mut Frames) {
        if std::mem::replace(&mut self.is_open, true) {
            return;
        }
        for kind in ["response.created", "response.in_progress"] {
            let members = json!({"response": self.response("in_progress")});
            self.push(kind, members, frames);
        }
        let members = json!({"output_index": 0, "item": self.item("in_progress", Vec::new())});
        self.push("response.output_item.added", members, frames);
        let part = json!({"type": "output_text", "annotations": [], "logprobs": [], "text": ""});
        let members = json!({"item_id": self.item_id(), "output_index": 0, "content_index": 0, "part": part});
        self.push("response.content_part.added", members, frames);
    }
}

impl WriteFrames for EventWriter {
    const DONE: bool = false;

    fn delta(&mut self, delta: Delta, frames: &mut Frames) {
        self.open(frames);
        let (text, first) = (delta.text.clone(), self.logprobs.len());
        self.take(delta);
        if text.is_empty() && self.logprobs.len() == first {
            return;
        }
        let logprobs = self.logprobs.get(first..).unwrap_or_default();
        let members = json!({
            "item_id": self.item_id(), "output_index": 0, "content_index": 0, "delta": text, "logprobs": logprobs,
        });
        self.push("response.output_text.delta", members, frames);
    }

    fn end(&mut self, frames: &mut Frames) {
        self.open(frames);
        let place = json!({"item_id": self.item_id(), "output_index": 0, "content_index": 0});
        let with = |name: &str, value: Value| {
            let mut members = place.clone();
            members[name] = value;
            members
        };
        let mut members = with("text", self.text.clone().into());
        members["logprobs"] = json!(self.logprobs);
        self.push("response.output_text.done", members, frames);
        let members = with("part", json!(self.part()));
        self.push("response.content_part.done", members, frames);
        let finished = json!(self.finished());
        let members = json!({"output_index": 0, "item": finished["output"][0]});
        self.push("response.output_item.done", members, frames);
        let kind = if finished["status"] == "completed" { "response.completed" } else { "response.incomplete" };
        self.push(kind, json!({"response": finished}), frames);
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
