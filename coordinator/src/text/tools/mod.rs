//! Tool calls in a model's text: one table entry and file for each format, one incremental parser for all.
//!
//! Owns how models write calls, how tools are told to a model whose template knows none, and the shape of calls that a
//! grammar enforces. Knows no HTTP: tools are names with schemas here.
//!
//! **Invariant:** what comes out of a [`ToolParser`] depends on the text alone, never on how it was cut into pieces: a whole
//! answer is the fold of its stream.
//! **Invariant:** no character of a call's arguments is lost, and text that only looks like a call comes out as text.

mod hermes;
mod internlm;
mod json_call;
mod literal;
mod llama3_json;
mod mistral;
mod parser;
mod prompt;
mod pythonic;
mod qwen3_coder;
#[cfg(test)]
mod split_tests;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde_json::Value;

pub use parser::ToolParser;
pub use prompt::{arguments_as_objects, without_tools};

/// A function that a model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// The schema of its arguments; an object.
    pub parameters: Value,
    /// The arguments must meet the schema whatever the model says.
    pub strict: bool,
}

/// What a piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolEvent {
    /// Text of the answer.
    Text(String),
    /// A call begins; calls count from 0.
    Call {
        /// Which call.
        index: usize,
        /// The function.
        name: String,
    },
    /// More of the arguments of the last call, which are JSON when joined.
    Arguments {
        /// Which call.
        index: usize,
        /// The piece.
        text: String,
    },
}

/// How the inside of a call is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Body {
    /// `{"name": ..., "arguments": {...}}`.
    Json,
    /// `<function=name><parameter=key>value</parameter></function>`.
    Xml,
    /// `name(key=value)`.
    Python,
}

/// How a family of models writes calls.
#[derive(Debug, PartialEq, Eq)]
pub struct ToolFormat {
    /// The name that `--tool-call-parser` knows.
    pub name: &'static str,
    /// Names that habits from elsewhere give it.
    pub(crate) also: &'static [&'static str],
    /// Texts that only a chat template has that writes calls so.
    pub(crate) marks: &'static [&'static str],
    /// A token that shows it where no template does.
    pub(crate) token: Option<&'static str>,
    /// Texts that open calls, the form that is written first.
    pub(crate) starts: &'static [&'static str],
    /// Texts that close them.
    pub(crate) ends: &'static [&'static str],
    /// An answer that begins with this character may be a call without any opening text.
    pub(crate) leading: Option<char>,
    pub(crate) body: Body,
    /// Whether a name may stand before its arguments, outside of them.
    pub(crate) bare_names: bool,
    /// The member that holds the arguments, where calls are JSON.
    pub(crate) arguments_key: &'static str,
    /// What is written around each call, or around all of them.
    pub(crate) open: &'static str,
    pub(crate) close: &'static str,
    /// What is written between two calls.
    pub(crate) between: &'static str,
    /// Whether `open` and `close` stand around each call.
    pub(crate) each: bool,
    /// The opening texts are control tokens, which would otherwise be left out of the text.
    pub keeps_special: bool,
}

/// All formats, in the order in which a template is searched for their marks.
const FORMATS: [&ToolFormat; 6] = [
    &qwen3_coder::FORMAT,
    &hermes::FORMAT,
    &mistral::FORMAT,
    &pythonic::FORMAT,
    &llama3_json::FORMAT,
    &internlm::FORMAT,
];

impl ToolFormat {
    /// The format of a name, as `--tool-call-parser` and its habits from elsewhere give it.
    pub fn named(name: &str) -> Option<&'static Self> {
        FORMATS.into_iter().find(|format| format.name == name || format.also.contains(&name))
    }

    /// The names of all formats.
    pub fn names() -> Vec<&'static str> {
        FORMATS.iter().map(|format| format.name).collect()
    }

    /// The format that a chat template writes, or that the tokens of a vocabulary show; hermes where neither tells.
    pub fn of_model(template: Option<&str>, has_token: impl Fn(&str) -> bool) -> &'static Self {
        let template = template.unwrap_or_default();
        let writes = |format: &&ToolFormat| {
            format.marks.iter().any(|mark| template.contains(mark)) || format.token.is_some_and(&has_token)
        };
        FORMATS.into_iter().find(writes).unwrap_or(&hermes::FORMAT)
    }
}

/// True where a chat template tells tools to the model itself.
pub fn knows_tools(template: &str) -> bool {
    template.match_indices("tools").any(|(at, _)| {
        let before = template[..at].chars().next_back();
        let after = template[at + "tools".len()..].chars().next();
        let is_name = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        !is_name(before) && !is_name(after) && in_tag(&template[..at])
    })
}

/// True where text ends inside `{% ... %}` or `{{ ... }}`.
fn in_tag(before: &str) -> bool {
    let opened = before.rfind("{%").max(before.rfind("{{"));
    let closed = before.rfind("%}").max(before.rfind("}}"));
    opened > closed
}

/// The tools of one request.
pub type Tools = Arc<[Tool]>;
