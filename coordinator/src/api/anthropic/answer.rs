//! The message object, and the events that build it up.
//!
//! **Invariant:** a block that was started is stopped before the message is.

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};

use super::super::chat::Answer;
use super::super::choice::{Delta, EndReason, StopCause};
use super::super::error::ApiError;
use super::super::sse::{Frames, WriteFrames};
use super::super::usage::Usage;
use super::ErrorBody;

/// Writes a message.
pub struct EventWriter {
    answer: Answer,
    usage: Usage,
    is_open: bool,
    text: String,
    end: Option<EndReason>,
}

/// A message, at its beginning or at its end.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "AnthropicAnswer")]
pub struct Message<'a> {
    id: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    role: &'static str,
    model: &'a str,
    content: Vec<Block<'a>>,
    stop_reason: Option<&'static str>,
    stop_sequence: Option<&'a str>,
    usage: MessageUsage,
}

/// One block of a message.
#[derive(Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Block<'a> {
    Text { text: &'a str },
}

#[derive(Serialize, JsonSchema)]
struct MessageUsage {
    /// Tokens of the prompt that the prefix cache had not.
    input_tokens: u64,
    cache_creation_input_tokens: u64,
    cache_read_input_tokens: u64,
    output_tokens: u64,
}

impl EventWriter {
    /// Nothing was written yet.
    pub fn new(answer: Answer, usage: Usage) -> Self {
        Self { answer, usage, is_open: false, text: String::new(), end: None }
    }

    /// Takes in what came, without an event.
    pub fn take(&mut self, delta: Delta) {
        self.usage.add_delta(&delta);
        self.text.push_str(&delta.text);
        self.end = delta.end.map(|end| end.reason).or(self.end.take());
    }

    /// The message once it has ended.
    pub fn finished(&self) -> Message<'_> {
        let (stop_reason, stop_sequence) = self.stop();
        Message { content: vec![Block::Text { text: &self.text }], stop_reason, stop_sequence, ..self.message() }
    }

    fn message(&self) -> Message<'_> {
        let accepted = &self.answer.accepted;
        Message {
            id: &accepted.id,
            kind: "message",
            role: "assistant",
            model: &accepted.model.name,
            content: Vec::new(),
            stop_reason: None,
            stop_sequence: None,
            usage: self.usage(),
        }
    }

    fn usage(&self) -> MessageUsage {
        let cache_read_input_tokens = self.usage.cached_tokens();
        MessageUsage {
            input_tokens: self.usage.prompt_tokens().saturating_sub(cache_read_input_tokens),
            cache_creation_input_tokens: 0,
            cache_read_input_tokens,
            output_tokens: self.usage.completion_tokens(),
        }
    }

    fn stop(&self) -> (Option<&'static str>, Option<&str>) {
        match &self.end {
            Some(EndReason::Stop(StopCause::Text(text))) => (Some("stop_sequence"), Some(text)),
            Some(EndReason::Stop(_) | EndReason::Abort) => (Some("end_turn"), None),
            Some(EndReason::Length) => (Some("max_tokens"), None),
            None => (None, None),
        }
    }

    fn open(&mut self, frames: &mut Frames) {
        if std::mem::replace(&mut self.is_open, true) {
            return;
        }
        push("message_start", json!({"message": self.message()}), frames);
        push("content_block_start", json!({"index": 0, "content_block": Block::Text { text: "" }}), frames);
    }
}

fn push(kind: &'static str, members: Value, frames: &mut Frames) {
    let mut event = json!({"type": kind});
    if let (Value::Object(event), Value::Object(members)) = (&mut event, members) {
        event.extend(members);
    }
    frames.push_event(kind, &event);
}

impl WriteFrames for EventWriter {
    const DONE: bool = false;

    fn delta(&mut self, delta: Delta, frames: &mut Frames) {
        self.open(frames);
        if !delta.text.is_empty() {
            let text = json!({"type": "text_delta", "text": delta.text});
            push("content_block_delta", json!({"index": 0, "delta": text}), frames);
        }
        self.take(delta);
    }

    fn end(&mut self, frames: &mut Frames) {
        self.open(frames);
        push("content_block_stop", json!({"index": 0}), frames);
        let (stop_reason, stop_sequence) = self.stop();
        let delta = json!({"stop_reason": stop_reason, "stop_sequence": stop_sequence});
        push("message_delta", json!({"delta": delta, "usage": self.usage()}), frames);
        push("message_stop", json!({}), frames);
    }

    fn error(&mut self, error: &ApiError, frames: &mut Frames) {
        frames.push_event("error", &ErrorBody::new(error));
    }
}
