//! The message object, and the events that build it up.
//!
//! **Invariant:** a block that was started is stopped before the next one starts, and before the message is.

use futures::StreamExt;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};

use super::super::chat::Answer;
use super::super::choice::{self, Choice, Delta, EndReason, StopCause};
use super::super::error::ApiError;
use super::super::message::{MessageParser, MessagePart};
use super::super::sse::{Frames, WriteFrames};
use super::super::usage::Usage;
use super::ErrorBody;

/// Writes a message.
pub struct EventWriter {
    answer: Answer,
    usage: Usage,
    parser: MessageParser,
    is_open: bool,
    blocks: Vec<Grown>,
    end: Option<EndReason>,
}

/// One block as it grows; the last one is open.
#[derive(Debug)]
enum Grown {
    Thinking(String),
    Text(String),
    Call { id: String, name: String, arguments: String },
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
    Thinking { thinking: &'a str, signature: &'static str },
    Text { text: &'a str },
    ToolUse { id: &'a str, name: &'a str, input: Value },
}

#[derive(Serialize, JsonSchema)]
struct MessageUsage {
    /// Tokens of the prompt that the prefix cache had not.
    input_tokens: u64,
    cache_creation_input_tokens: u64,
    cache_read_input_tokens: u64,
    output_tokens: u64,
}

impl Grown {
    fn block(&self) -> Block<'_> {
        match self {
            Self::Thinking(thinking) => Block::Thinking { thinking, signature: "" },
            Self::Text(text) => Block::Text { text },
            // Arguments that were cut are no JSON: then the stop reason tells why they are missing.
            Self::Call { id, name, arguments } => {
                Block::ToolUse { id, name, input: serde_json::from_str(arguments).unwrap_or_else(|_| json!({})) }
            }
        }
    }
}

impl EventWriter {
    /// Nothing was written yet.
    pub fn new(answer: Answer, usage: Usage) -> Self {
        let parser = MessageParser::new(&answer.rules);
        Self { answer, usage, parser, is_open: false, blocks: Vec::new(), end: None }
    }

    /// Waits for the output; its events are seen by nobody.
    ///
    /// # Errors
    /// The output fails.
    pub async fn whole(&mut self, choices: Vec<Choice>) -> Result<Message<'_>, ApiError> {
        let mut deltas = choice::merged(choices);
        while let Some(delta) = deltas.next().await {
            self.delta(delta?, &mut Frames::default());
        }
        self.close(&mut Frames::default());
        let (stop_reason, stop_sequence) = self.stop();
        let content = self.blocks.iter().map(Grown::block).collect();
        Ok(Message { content, stop_reason, stop_sequence, ..self.message() })
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
            Some(EndReason::Stop(_)) if self.parser.calls() => (Some("tool_use"), None),
            Some(EndReason::Stop(_) | EndReason::Repetition | EndReason::Abort) => (Some("end_turn"), None),
            Some(EndReason::Length) => (Some("max_tokens"), None),
            None => (None, None),
        }
    }

    fn open(&mut self, frames: &mut Frames) {
        if std::mem::replace(&mut self.is_open, true) {
            return;
        }
        push("message_start", json!({"message": self.message()}), frames);
    }

    /// Starts a block; the one before it stops.
    fn add(&mut self, block: Grown, frames: &mut Frames) {
        self.stop_block(frames);
        push("content_block_start", json!({"index": self.blocks.len(), "content_block": block.block()}), frames);
        self.blocks.push(block);
    }

    fn stop_block(&self, frames: &mut Frames) {
        if let Some(index) = self.blocks.len().checked_sub(1) {
            push("content_block_stop", json!({"index": index}), frames);
        }
    }

    /// Adds a part of the message to the blocks.
    fn tell(&mut self, part: MessagePart, frames: &mut Frames) {
        match (&part, self.blocks.last()) {
            (MessagePart::Thoughts(_), Some(Grown::Thinking(_)))
            | (MessagePart::Content(_), Some(Grown::Text(_)))
            | (MessagePart::Arguments(_), _) => {}
            (MessagePart::Thoughts(_), _) => self.add(Grown::Thinking(String::new()), frames),
            (MessagePart::Content(_), _) => self.add(Grown::Text(String::new()), frames),
            (MessagePart::Call { id, name }, _) => {
                let (id, name) = (id.clone(), name.clone());
                self.add(Grown::Call { id, name, arguments: String::new() }, frames);
            }
        }
        let delta = match (part, self.blocks.last_mut()) {
            (MessagePart::Thoughts(more), Some(Grown::Thinking(text))) => {
                text.push_str(&more);
                json!({"type": "thinking_delta", "thinking": more})
            }
            (MessagePart::Content(more), Some(Grown::Text(text))) => {
                text.push_str(&more);
                json!({"type": "text_delta", "text": more})
            }
            (MessagePart::Arguments(more), Some(Grown::Call { arguments, .. })) => {
                arguments.push_str(&more);
                json!({"type": "input_json_delta", "partial_json": more})
            }
            _ => return,
        };
        push("content_block_delta", json!({"index": self.blocks.len() - 1, "delta": delta}), frames);
    }

    /// The events behind the last delta, but for the message's own. An output of nothing is an empty text.
    fn close(&mut self, frames: &mut Frames) {
        self.open(frames);
        if self.blocks.is_empty() {
            self.add(Grown::Text(String::new()), frames);
        }
        self.stop_block(frames);
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
        self.usage.add_delta(&delta);
        let piece = self.parser.push(&delta.text, delta.end.is_some());
        for part in piece.into_parts() {
            self.tell(part, frames);
        }
        self.end = delta.end.map(|end| end.reason).or(self.end.take());
    }

    fn end(&mut self, frames: &mut Frames) {
        self.close(frames);
        let (stop_reason, stop_sequence) = self.stop();
        let delta = json!({"stop_reason": stop_reason, "stop_sequence": stop_sequence});
        push("message_delta", json!({"delta": delta, "usage": self.usage()}), frames);
        push("message_stop", json!({}), frames);
    }

    fn error(&mut self, error: &ApiError, frames: &mut Frames) {
        frames.push_event("error", &ErrorBody::new(error));
    }
}
