//! What an output may be held to, and its form for the grammar library.

use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

use super::declared::closed;

/// White space between the parts of JSON: one space, or a line with its indent. Without a bound a model that likes spaces
/// would never come to an end.
const JSON_SPACE: &str = r"[ ]|\n[ \t]{0,32}";

/// What an output is held to.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON of a schema.
    JsonSchema(Value),
    /// A regular expression, matched as a whole.
    Regex(String),
    /// One of some strings.
    Choice(Vec<String>),
    /// A grammar in Lark's notation with the rule `start`.
    Lark(String),
}

impl Grammar {
    /// What it is called in messages.
    pub(super) fn what(&self) -> &'static str {
        match self {
            Self::JsonObject | Self::JsonSchema(_) => "schema",
            Self::Regex(_) => "regular expression",
            Self::Choice(_) => "choice",
            Self::Lark(_) => "grammar",
        }
    }

    /// What tells it from others.
    pub(super) fn key(&self) -> String {
        match self {
            Self::JsonObject => "object".into(),
            Self::JsonSchema(schema) => format!("schema {schema}"),
            Self::Regex(text) => format!("regex {text}"),
            Self::Choice(choices) => format!("choice {}", json!(choices)),
            Self::Lark(text) => format!("lark {text}"),
        }
    }

    pub(super) fn to_library(&self) -> TopLevelGrammar {
        match self {
            Self::JsonObject => TopLevelGrammar::from_json_schema(with_options(json!({"type": "object"}))),
            Self::JsonSchema(schema) => TopLevelGrammar::from_json_schema(with_options(closed(schema))),
            Self::Regex(text) => TopLevelGrammar::from_regex(text),
            Self::Choice(choices) => {
                let choices: Vec<String> = choices.iter().map(|choice| lark_string(choice)).collect();
                TopLevelGrammar::from_lark(format!("start: {}", choices.join(" | ")))
            }
            Self::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        }
    }

    /// A schema as part of a grammar in Lark's notation.
    pub(super) fn lark_json(schema: &Value) -> String {
        format!("%json {}", with_options(closed(schema)))
    }
}

/// A literal in Lark's notation. Its strings are those of JSON, but for characters that are written as code points.
pub(super) fn lark_string(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// How JSON is written, beside what the schema says.
fn with_options(schema: Value) -> Value {
    let options = json!({"whitespace_pattern": JSON_SPACE, "whitespace_flexible": true, "coerce_one_of": true,
        "item_separator": ",", "key_separator": ":"});
    match schema {
        Value::Object(mut members) => {
            members.insert("x-guidance".into(), options);
            Value::Object(members)
        }
        Value::Bool(true) => json!({"x-guidance": options}),
        other => other,
    }
}
