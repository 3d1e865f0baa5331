//! How an answer says why an output ended.

use phalanx_proto::TokenId;
use schemars::JsonSchema;
use serde::Serialize;

use super::choice::{EndReason, StopCause};

/// `finish_reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishWord {
    /// It stopped.
    Stop,
    /// It is as long as it may be.
    Length,
    /// It calls tools.
    ToolCalls,
    /// It repeats itself.
    Repetition,
    /// The engine dropped it.
    Abort,
}

impl From<&EndReason> for FinishWord {
    fn from(reason: &EndReason) -> Self {
        match reason {
            EndReason::Stop(_) => Self::Stop,
            EndReason::Length => Self::Length,
            EndReason::Repetition => Self::Repetition,
            EndReason::Abort => Self::Abort,
        }
    }
}

/// `stop_reason`: what the request had named and the output came to; nothing for the model's own end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum StopReason {
    /// A stop string.
    Text(String),
    /// A stop token.
    Token(#[schemars(with = "u32")] TokenId),
}

impl StopReason {
    /// What there is to tell of an end.
    pub fn new(reason: EndReason) -> Option<Self> {
        match reason {
            EndReason::Stop(StopCause::Text(text)) => Some(Self::Text(text)),
            EndReason::Stop(StopCause::Token(token)) => Some(Self::Token(token)),
            EndReason::Stop(StopCause::EndOfText) | EndReason::Length | EndReason::Repetition | EndReason::Abort => {
                None
            }
        }
    }
}
