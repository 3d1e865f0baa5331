//! The chunks of a streamed chat answer.
//!
//! Knows no request: what an answer is made from comes from its parent.
//!
//! **Invariant:** the first chunk of a choice brings its role, its last one a finish reason.

use phalanx_proto::TokenId;
use serde::Serialize;

use super::super::SYSTEM_FINGERPRINT;
use super::super::choice::{Delta, EndReason};
use super::super::finish::{FinishWord, StopReason};
use super::super::logprobs::ChatLogprobs;
use super::super::message::{CallPiece, MessageParser, MessagePiece};
use super::super::options::StreamOptions;
use super::super::sse::{Frames, WriteFrames};
use super::super::usage::Usage;
use super::Answer;

/// Writes the chunks of a streamed answer.
pub(super) struct ChunkWriter {
    answer: Answer,
    stream: StreamOptions,
    usage: Usage,
    /// Per choice: whether its role was sent.
    opened: Vec<bool>,
    /// Per choice: what became of its text.
    parsers: Vec<MessageParser>,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<&'a str>,
    /// The older name of the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    tool_calls: &'a [CallPiece],
}

impl<'a> MessageDelta<'a> {
    /// The delta of a piece. One that brings nothing else has an empty content, unless it ends the choice.
    fn of(piece: &'a MessagePiece, is_last: bool) -> Self {
        let filled = |text: &'a String| (!text.is_empty()).then_some(text.as_str());
        let says_nothing = piece.is_empty() && !is_last;
        Self {
            role: None,
            content: filled(&piece.content).or(says_nothing.then_some("")),
            reasoning: filled(&piece.reasoning),
            reasoning_content: filled(&piece.reasoning),
            tool_calls: &piece.calls,
        }
    }
}

impl ChunkWriter {
    pub(super) fn new(answer: Answer, stream: StreamOptions, usage: Usage, num_choices: usize) -> Self {
        let parsers = (0..num_choices).map(|_| MessageParser::new(&answer.rules)).collect();
        Self { answer, stream, usage, opened: vec![false; num_choices], parsers, prompt_sent: false }
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
            prompt_token_ids: (first && self.answer.options.tells_token_ids()).then_some(&self.answer.prompt),
        });
    }

    /// The first chunk of a choice: its role, once something of it is there.
    fn open(&mut self, index: usize, frames: &mut Frames) {
        match self.opened.get_mut(index) {
            Some(opened) if !*opened => *opened = true,
            _ => return,
        }
        let first = !std::mem::replace(&mut self.prompt_sent, true);
        let delta = MessageDelta { role: Some("assistant"), content: Some(""), ..MessageDelta::default() };
        let choice =
            ChunkChoice { index, delta, logprobs: None, finish_reason: None, stop_reason: None, token_ids: None };
        self.push(&[choice], None, first, frames);
    }
}

impl WriteFrames for ChunkWriter {
    fn delta(&mut self, delta: Delta, frames: &mut Frames) {
        self.open(delta.index, frames);
        self.usage.add_delta(&delta);
        let Some(parser) = self.parsers.get_mut(delta.index) else { return };
        parser.count(&delta.tokens);
        let piece = parser.push(&delta.text, delta.end.is_some());
        let reason: Option<EndReason> = delta.end.map(|end| end.reason);
        let finish_reason = reason.as_ref().map(|reason| parser.finish_word(reason));
        self.usage.set_reasoning(self.parsers.iter().map(MessageParser::num_reasoning_tokens).sum());
        let options = &self.answer.options;
        let tokens_wanted = options.tells_token_ids() && !delta.tokens.is_empty();
        let logprobs_wanted = options.logprobs.is_some() && !delta.logprobs.is_empty();
        if piece.is_empty() && reason.is_none() && !tokens_wanted && !logprobs_wanted {
            return;
        }
        let choice = ChunkChoice {
            index: delta.index,
            delta: MessageDelta::of(&piece, reason.is_some()),
            logprobs: logprobs_wanted.then(|| ChatLogprobs::new(&delta.logprobs, self.answer.names())),
            finish_reason,
            stop_reason: reason.and_then(StopReason::new),
            token_ids: options.tells_token_ids().then_some(&delta.tokens),
        };
        self.push(&[choice], None, false, frames);
    }

    fn end(&mut self, frames: &mut Frames) {
        if self.stream.include_usage {
            self.push(&[], Some(self.usage), false, frames);
        }
    }
}
