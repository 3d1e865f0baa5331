//! `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`: Qwen3-Coder.
//!
//! Values are bare text; the schema says which of them are strings.

use serde_json::Value;

use super::{Body, Tool, ToolFormat};

pub(super) const FORMAT: ToolFormat = ToolFormat {
    name: "qwen3_coder",
    also: &["qwen3_xml"],
    marks: &["<function="],
    token: None,
    starts: &["<tool_call>", "<function="],
    ends: &["</tool_call>"],
    leading: None,
    body: Body::Xml,
    bare_names: false,
    arguments_key: "",
    open: "<tool_call>\n",
    close: "\n</tool_call>",
    between: "\n",
    each: true,
    keeps_special: false,
};

pub(super) const FUNCTION: &str = "<function=";
pub(super) const FUNCTION_END: &str = "</function>";
pub(super) const PARAMETER: &str = "<parameter=";
pub(super) const PARAMETER_END: &str = "</parameter>";

/// A bare value as JSON: a string where the schema allows one and the text is nothing else that it allows.
pub(super) fn to_json(tool: Option<&Tool>, key: &str, text: &str) -> String {
    let text = text.strip_prefix('\n').unwrap_or(text);
    let text = text.strip_suffix('\n').unwrap_or(text);
    let schema = tool.and_then(|tool| tool.parameters.get("properties")).and_then(|properties| properties.get(key));
    let as_text = || Value::String(text.to_owned()).to_string();
    if schema.is_some_and(is_only_text) {
        return as_text();
    }
    let literal = match text.trim() {
        "True" => "true",
        "False" => "false",
        "None" => "null",
        other => other,
    };
    match serde_json::from_str::<Value>(literal) {
        Ok(value) if schema.is_some() || !value.is_string() => literal.to_owned(),
        _ => as_text(),
    }
}

/// True where a schema allows strings and nothing else.
pub(super) fn is_only_text(schema: &Value) -> bool {
    let kind = &schema["type"];
    let all_text = |values: &Value| values.as_array().is_some_and(|all| all.iter().all(Value::is_string));
    kind == "string" || kind.is_null() && all_text(&schema["enum"])
}
