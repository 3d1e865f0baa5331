//! The message of an answer as it grows: text in; thoughts, content and calls out.
//!
//! **Invariant:** a whole message is the fold of its pieces: both ways run through [`MessageParser`].

use phalanx_proto::TokenId;
use schemars::JsonSchema;
use serde::Serialize;

use super::choice::EndReason;
use super::finish::FinishWord;
use crate::constraint::Thoughts;
use crate::text::ThoughtParser;
use crate::text::tools::{ToolEvent, ToolFormat, ToolParser, Tools};

/// What an answer may hold beside text.
#[derive(Debug, Clone, Default)]
pub struct MessageRules {
    /// How calls are found; none where there are no tools.
    pub calls: Option<CallRules>,
    /// How thoughts are found; none where the model has none.
    pub thoughts: Option<ThoughtRules>,
}

/// How calls are found.
#[derive(Debug, Clone)]
pub struct CallRules {
    /// How the model writes them.
    pub format: &'static ToolFormat,
    /// What may be called.
    pub tools: Tools,
    /// Calls at the most.
    pub calls_max: usize,
    /// The client named the function: then a call is no reason to finish.
    pub is_named: bool,
}

/// How thoughts are found.
#[derive(Debug, Clone, Copy)]
pub struct ThoughtRules {
    /// The prompt has opened them.
    pub is_inside: bool,
    /// They are shown.
    pub is_shown: bool,
    /// The tokens that open and close them, where they are tokens.
    pub marks: (Option<TokenId>, Option<TokenId>),
}

impl ThoughtRules {
    /// The tokens around the thoughts; none where they are no tokens, so that nothing can be told from them.
    pub fn as_tokens(self) -> Option<Thoughts> {
        let (start, end) = self.marks;
        match (self.is_inside, start, end) {
            (true, _, Some(end)) => Some(Thoughts { start: None, end }),
            (false, Some(start), Some(end)) => Some(Thoughts { start: Some(start), end }),
            _ => None,
        }
    }
}

/// What a piece of text made of a message.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MessagePiece {
    /// More of the thoughts.
    pub reasoning: String,
    /// More of the content.
    pub content: String,
    /// Calls that begin or go on.
    pub calls: Vec<CallPiece>,
}

impl MessagePiece {
    /// True where there is nothing to tell.
    pub fn is_empty(&self) -> bool {
        self.reasoning.is_empty() && self.content.is_empty() && self.calls.is_empty()
    }
}

/// A part of a message for answers that tell its parts one after the other: each part belongs to the last one of its kind, or opens one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MessagePart {
    /// More of the thoughts.
    Thoughts(String),
    /// More of the content.
    Content(String),
    /// A call begins.
    Call {
        /// Its name, for the answer to it.
        id: String,
        /// The function.
        name: String,
    },
    /// More of the arguments of the last call.
    Arguments(String),
}

impl MessagePiece {
    /// Its parts in the order in which they are told.
    pub fn into_parts(self) -> Vec<MessagePart> {
        let mut parts = vec![MessagePart::Thoughts(self.reasoning), MessagePart::Content(self.content)];
        for call in self.calls {
            if let (Some(id), Some(name)) = (call.id, call.function.name) {
                parts.push(MessagePart::Call { id, name });
            }
            parts.push(MessagePart::Arguments(call.function.arguments));
        }
        parts.retain(|part| match part {
            MessagePart::Thoughts(text) | MessagePart::Content(text) | MessagePart::Arguments(text) => !text.is_empty(),
            MessagePart::Call { .. } => true,
        });
        parts
    }
}

/// A part of a call as a chunk carries it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CallPiece {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: FunctionPiece,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct FunctionPiece {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

/// A whole call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Call {
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    function: Function,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
struct Function {
    name: String,
    arguments: String,
}

/// A whole message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Message {
    role: &'static str,
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<String>,
    /// The older name of the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Call>,
}

impl Message {
    /// The fold of a message's pieces.
    pub fn of(pieces: impl IntoIterator<Item = MessagePiece>) -> Self {
        let (mut content, mut reasoning) = (String::new(), String::new());
        let mut tool_calls: Vec<Call> = Vec::new();
        for piece in pieces {
            content.push_str(&piece.content);
            reasoning.push_str(&piece.reasoning);
            for call in piece.calls {
                if let (Some(id), Some(name)) = (call.id, call.function.name) {
                    let function = Function { name, arguments: String::new() };
                    tool_calls.push(Call { id, kind: "function", function });
                }
                if let Some(last) = tool_calls.last_mut() {
                    last.function.arguments.push_str(&call.function.arguments);
                }
            }
        }
        let reasoning = (!reasoning.is_empty()).then_some(reasoning);
        let content = (tool_calls.is_empty() || !content.is_empty()).then_some(content);
        Self { role: "assistant", content, reasoning_content: reasoning.clone(), reasoning, tool_calls }
    }
}

/// Turns the text of one output into the pieces of its message.
#[derive(Debug)]
pub struct MessageParser {
    thoughts: Option<(ThoughtRules, ThoughtParser)>,
    calls: Option<(CallRules, ToolParser)>,
    /// Tokens so far, and those of them that are thoughts; the latter grows until the thoughts end.
    num_tokens: u64,
    num_thoughts: u64,
    thinks: bool,
}

impl MessageParser {
    /// A parser of one output.
    pub fn new(rules: &MessageRules) -> Self {
        let calls = rules.calls.clone().map(|rules| {
            let parser = ToolParser::new(rules.format, rules.tools.clone(), rules.calls_max);
            (rules, parser)
        });
        let thoughts = rules.thoughts.map(|rules| (rules, ThoughtParser::new(rules.is_inside)));
        let thinks = rules.thoughts.is_some_and(|rules| rules.is_inside);
        Self { thoughts, calls, num_tokens: 0, num_thoughts: 0, thinks }
    }

    /// Counts tokens; what counts as a thought ends with the token that closes them.
    pub fn count(&mut self, tokens: &[TokenId]) {
        let Some((rules, _)) = &self.thoughts else { return };
        let (start, end) = rules.marks;
        for token in tokens {
            self.thinks |= self.num_tokens == 0 && Some(*token) == start;
            self.num_tokens += 1;
            self.num_thoughts += u64::from(self.thinks);
            self.thinks &= Some(*token) != end;
        }
    }

    /// Tokens of thoughts so far; none for a model that has none.
    pub fn num_reasoning_tokens(&self) -> Option<u64> {
        self.thoughts.as_ref().map(|_| self.num_thoughts)
    }

    /// True once a call has begun.
    pub fn calls(&self) -> bool {
        self.calls.as_ref().is_some_and(|(_, parser)| parser.num_calls() > 0)
    }

    /// Takes more text; `is_last` where none follows.
    pub fn push(&mut self, text: &str, is_last: bool) -> MessagePiece {
        let mut piece = MessagePiece::default();
        let mut answer = text.to_owned();
        if let Some((rules, parser)) = &mut self.thoughts {
            let mut split = parser.push(text);
            if is_last {
                let rest = parser.finish();
                split.thoughts.push_str(&rest.thoughts);
                split.answer.push_str(&rest.answer);
            }
            if rules.is_shown {
                piece.reasoning = split.thoughts;
            }
            answer = split.answer;
        }
        match &mut self.calls {
            None => piece.content = answer,
            Some((rules, parser)) => {
                let mut events = parser.push(&answer);
                if is_last {
                    events.extend(parser.finish());
                }
                for event in events {
                    piece.add(event, rules.format);
                }
            }
        }
        piece
    }

    /// The word for an end: calls are a reason of their own, unless the client asked for that very call.
    pub fn finish_word(&self, reason: &EndReason) -> FinishWord {
        let calls = self.calls.as_ref().filter(|(rules, parser)| parser.num_calls() > 0 && !rules.is_named);
        match (calls, reason) {
            (Some(_), EndReason::Stop(_)) => FinishWord::ToolCalls,
            _ => FinishWord::from(reason),
        }
    }
}

impl MessagePiece {
    fn add(&mut self, event: ToolEvent, format: &ToolFormat) {
        let (index, name, arguments) = match event {
            ToolEvent::Text(text) => return self.content.push_str(&text),
            ToolEvent::Call { index, name } => (index, Some(name), String::new()),
            ToolEvent::Arguments { index, text } => (index, None, text),
        };
        match self.calls.last_mut() {
            Some(last) if last.index == index => last.function.arguments.push_str(&arguments),
            _ => {
                let id = name.is_some().then(|| call_id(format));
                let kind = name.is_some().then_some("function");
                self.calls.push(CallPiece { index, id, kind, function: FunctionPiece { name, arguments } });
            }
        }
    }
}

/// A name for a call. Templates of some models take nine characters and no more.
fn call_id(format: &ToolFormat) -> String {
    let random = uuid::Uuid::new_v4().simple().to_string();
    if format.name == "mistral" { random[..9].to_owned() } else { format!("call_{}", &random[..24]) }
}
