//! `tools` and `tool_choice` of a chat request.
//!
//! **Invariant:** a request that must call a tool names at least one that exists.

use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::{Fields, type_name};
use crate::text::tools::{Tool, Tools};

/// Most tools of one request.
const NUM_TOOLS_MAX: usize = 128;
/// Longest text of all tools of one request: they are copied, and their schemas become one grammar.
const TOOLS_BYTES_MAX: usize = 1 << 20;
/// Longest name of a tool.
const NAME_BYTES_MAX: usize = 64;

/// Whether and what the model calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    /// Nothing.
    None,
    /// What it wants.
    Auto,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

/// The tools of a request.
#[derive(Debug, Clone)]
pub struct ToolUse {
    /// What may be called.
    pub tools: Tools,
    /// The same as the client wrote them, for the template.
    pub raw: Vec<Value>,
    /// Whether to call.
    pub choice: ToolChoice,
    /// Several calls in one answer.
    pub is_parallel: bool,
}

impl ToolUse {
    /// Takes the fields. None where no tools are given.
    ///
    /// # Errors
    /// A tool without name, names that are no names or are given twice, or a choice of a tool that is not there.
    pub fn take(fields: &mut Fields) -> Result<Option<Self>, ApiError> {
        let mut raw = fields.list("tools")?.unwrap_or_default();
        let mut choice = fields.take("tool_choice");
        let mut param = "tools";
        if let (true, Some(functions)) = (raw.is_empty(), fields.list("functions")?) {
            param = "functions";
            raw = functions.into_iter().map(|function| json!({"type": "function", "function": function})).collect();
        }
        if let Some(older) = fields.take("function_call") {
            choice = choice.or(Some(match older {
                Value::Object(named) => json!({"type": "function", "function": named}),
                other => other,
            }));
        }
        let is_parallel = fields.flag("parallel_tool_calls", true)?;
        if raw.len() > NUM_TOOLS_MAX {
            let expected = format!("a list of at most {NUM_TOOLS_MAX} tools");
            return Err(ApiError::OutOfRange { param: param.into(), value: raw.len().to_string(), expected });
        }
        if raw.iter().try_fold(TOOLS_BYTES_MAX, |left, tool| left.checked_sub(bytes(tool, left)?)).is_none() {
            let (value, expected) = ("longer".into(), format!("at most {TOOLS_BYTES_MAX} bytes in all"));
            return Err(ApiError::OutOfRange { param: param.into(), value, expected });
        }
        let mut tools: Vec<Tool> = Vec::with_capacity(raw.len());
        for (at, tool) in raw.iter().enumerate() {
            let tool = read_tool(tool, &format!("{param}[{at}]"))?;
            if tools.iter().any(|other| other.name == tool.name) {
                let expected = "a name that no other tool has".into();
                return Err(ApiError::OutOfRange { param: format!("{param}[{at}]"), value: tool.name, expected });
            }
            tools.push(tool);
        }
        let choice = read_choice(choice, &tools)?;
        if tools.is_empty() {
            return Ok(None);
        }
        Ok(Some(Self { tools: tools.into(), raw, choice, is_parallel }))
    }

    /// True where the answer has to be a call.
    pub fn is_forced(&self) -> bool {
        matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_))
    }

    /// Calls that come out of one answer at the most.
    pub fn calls_max(&self) -> usize {
        match (&self.choice, self.is_parallel) {
            (ToolChoice::None, _) => 0,
            (ToolChoice::Named(_), _) | (_, false) => 1,
            _ => usize::MAX,
        }
    }

    /// The tools that a forced call may name.
    pub fn callable(&self) -> Vec<&Tool> {
        let may = |tool: &&Tool| !matches!(&self.choice, ToolChoice::Named(name) if *name != tool.name);
        self.tools.iter().filter(may).collect()
    }
}

/// About the bytes that a value takes as text; none where they are more than `max`, which is noticed on the way.
fn bytes(value: &Value, max: usize) -> Option<usize> {
    let sum = match value {
        Value::String(text) => text.len() + 2,
        Value::Array(items) => {
            items.iter().try_fold(2_usize, |sum, item| Some(sum + 1 + bytes(item, max.checked_sub(sum)?)?))?
        }
        Value::Object(members) => members.iter().try_fold(2_usize, |sum, (key, member)| {
            Some(sum + key.len() + 4 + bytes(member, max.checked_sub(sum)?)?)
        })?,
        Value::Null | Value::Bool(_) | Value::Number(_) => 4,
    };
    (sum <= max).then_some(sum)
}

fn wrong(param: String, expected: &'static str, value: &Value) -> ApiError {
    ApiError::WrongType { param, expected, found: type_name(value) }
}

fn read_tool(tool: &Value, param: &str) -> Result<Tool, ApiError> {
    let Value::Object(tool) = tool else { return Err(wrong(param.into(), "an object", tool)) };
    if tool.get("type").is_some_and(|kind| kind != "function") {
        return Err(ApiError::Unsupported { param: format!("{param}.type"), feature: "anything but a function" });
    }
    let function = match tool.get("function") {
        Some(Value::Object(function)) => function,
        Some(other) => return Err(wrong(format!("{param}.function"), "an object", other)),
        None => return Err(ApiError::Missing { param: format!("{param}.function") }),
    };
    let param = format!("{param}.function");
    let name = match function.get("name") {
        Some(Value::String(name)) => name.clone(),
        Some(other) => return Err(wrong(format!("{param}.name"), "a string", other)),
        None => return Err(ApiError::Missing { param: format!("{param}.name") }),
    };
    let is_name = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(is_name) {
        let expected = format!("a name of letters, digits, _, - and . of at most {NAME_BYTES_MAX} bytes");
        return Err(ApiError::OutOfRange { param: format!("{param}.name"), value: name, expected });
    }
    let parameters = match function.get("parameters") {
        None | Some(Value::Null) => json!({"type": "object", "properties": {}}),
        Some(schema @ Value::Object(_)) => schema.clone(),
        Some(other) => return Err(wrong(format!("{param}.parameters"), "an object", other)),
    };
    let description = match function.get("description") {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => Some(text.clone()),
        Some(other) => return Err(wrong(format!("{param}.description"), "a string", other)),
    };
    let strict = match function.get("strict") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(strict)) => *strict,
        Some(other) => return Err(wrong(format!("{param}.strict"), "a boolean", other)),
    };
    Ok(Tool { name, description, parameters, strict })
}

fn read_choice(choice: Option<Value>, tools: &[Tool]) -> Result<ToolChoice, ApiError> {
    const PARAM: &str = "tool_choice";
    let choice = match choice {
        None => return Ok(ToolChoice::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "none" => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            _ => {
                let expected = "none, auto, required or a function".into();
                return Err(ApiError::OutOfRange { param: PARAM.into(), value: word, expected });
            }
        },
        Some(Value::Object(choice)) => {
            let name = choice.get("function").and_then(|function| function.get("name")).or_else(|| choice.get("name"));
            let name = name.and_then(Value::as_str);
            let missing = || ApiError::Missing { param: "tool_choice.function.name".into() };
            ToolChoice::Named(name.ok_or_else(missing)?.to_owned())
        }
        Some(other) => return Err(wrong(PARAM.into(), "a string or an object", &other)),
    };
    match &choice {
        ToolChoice::Named(name) if tools.iter().all(|tool| tool.name != *name) => {
            let expected = "the name of one of the tools".into();
            Err(ApiError::OutOfRange { param: "tool_choice.function.name".into(), value: name.clone(), expected })
        }
        ToolChoice::Required if tools.is_empty() => {
            Err(ApiError::Conflict { param: PARAM, rule: "tool_choice required needs tools" })
        }
        _ => Ok(choice),
    }
}
