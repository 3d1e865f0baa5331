//! A request for a message, rewritten as one of chat.
//!
//! **Invariant:** every field is passed on, refused by name or left for the list of ignored ones.

use serde_json::{Map, Value, json};

use super::super::error::ApiError;
use super::super::fields::{Fields, Neutral, type_name};
use super::super::options;

/// Fields of what this server does not do.
const NOT_SUPPORTED: &[Neutral] = &[
    Neutral { name: "container", feature: "a container", changes_nothing: options::never },
    Neutral { name: "mcp_servers", feature: "tools of other servers", changes_nothing: options::is_empty },
    Neutral { name: "n", feature: "several outputs", changes_nothing: options::never },
    Neutral { name: "best_of", feature: "several outputs", changes_nothing: options::never },
];

/// Rewrites a request for a message.
///
/// # Errors
/// A field that is wrong, missing or cannot be obeyed.
pub fn to_chat(mut fields: Fields) -> Result<Fields, ApiError> {
    let limit = options::take_max_tokens(&mut fields, "max_tokens", 1)?;
    let limit = limit.ok_or_else(|| ApiError::Missing { param: "max_tokens".into() })?;
    let mut chat = rewritten(fields)?.into_members();
    chat.insert("max_completion_tokens".into(), limit.into());
    Ok(Fields::new(chat))
}

/// Rewrites everything but the limit of tokens.
///
/// # Errors
/// A field that is wrong or cannot be obeyed.
pub fn rewritten(mut fields: Fields) -> Result<Fields, ApiError> {
    for field in NOT_SUPPORTED.iter().chain(&options::OF_CHOICES) {
        fields.neutral(field)?;
    }
    let mut chat = Map::new();
    let mut messages = Vec::new();
    if let Some(system) = fields.take("system") {
        messages.push(json!({"role": "system", "content": text_of("system", system)?}));
    }
    let given = fields.list("messages")?.ok_or_else(|| ApiError::Missing { param: "messages".into() })?;
    for (at, message) in given.into_iter().enumerate() {
        push_message(&mut messages, at, message)?;
    }
    let is_begun =
        |last: &Value| last["role"] == "assistant" && last["content"].as_str().is_some_and(|text| !text.is_empty());
    if messages.last().is_some_and(|last| is_begun(last) && last.get("tool_calls").is_none()) {
        // The beginning of the answer is given.
        chat.insert("continue_final_message".into(), true.into());
    }
    chat.insert("messages".into(), messages.into());
    if let Some(stops) = fields.take("stop_sequences") {
        chat.insert("stop".into(), stops);
    }
    take_tools(&mut fields, &mut chat)?;
    take_thinking(&mut fields, &mut chat)?;
    take_format(&mut fields, &mut chat)?;
    for name in ["metadata", "service_tier", "cache_control"] {
        fields.take(name);
    }
    for (name, value) in fields.into_members() {
        chat.entry(name).or_insert(value);
    }
    Ok(Fields::new(chat))
}

fn wrong(param: impl Into<String>, expected: &'static str, value: &Value) -> ApiError {
    ApiError::WrongType { param: param.into(), expected, found: type_name(value) }
}

/// A text, or blocks of text, as one text.
fn text_of(param: &str, value: Value) -> Result<String, ApiError> {
    let blocks = match value {
        Value::String(text) => return Ok(text),
        Value::Array(blocks) => blocks,
        other => return Err(wrong(param, "a string or a list of blocks", &other)),
    };
    let mut texts = Vec::with_capacity(blocks.len());
    for (at, block) in blocks.into_iter().enumerate() {
        texts.push(block_text(&format!("{param}[{at}]"), block)?);
    }
    Ok(texts.join("\n"))
}

fn block_text(param: &str, block: Value) -> Result<String, ApiError> {
    let Value::Object(mut block) = block else { return Err(wrong(param, "an object", &block)) };
    if block.get("type").and_then(Value::as_str) != Some("text") {
        return Err(ApiError::Unsupported { param: format!("{param}.type"), feature: "anything but text" });
    }
    match block.shift_remove("text") {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(wrong(format!("{param}.text"), "a string", &other)),
        None => Err(ApiError::Missing { param: format!("{param}.text") }),
    }
}

/// One message becomes several where it holds results of tools beside text.
fn push_message(messages: &mut Vec<Value>, at: usize, message: Value) -> Result<(), ApiError> {
    let param = |field: &str| format!("messages[{at}]{field}");
    let Value::Object(mut message) = message else { return Err(wrong(param(""), "an object", &message)) };
    let role = match message.shift_remove("role") {
        Some(Value::String(role)) if matches!(role.as_str(), "user" | "assistant" | "system") => role,
        Some(Value::String(role)) => {
            let expected = "user or assistant".into();
            return Err(ApiError::OutOfRange { param: param(".role"), value: role, expected });
        }
        Some(other) => return Err(wrong(param(".role"), "a string", &other)),
        None => return Err(ApiError::Missing { param: param(".role") }),
    };
    let blocks = match message.shift_remove("content") {
        None | Some(Value::Null) => return Err(ApiError::Missing { param: param(".content") }),
        Some(Value::String(text)) => {
            messages.push(json!({"role": role, "content": text}));
            return Ok(());
        }
        Some(Value::Array(blocks)) => blocks,
        Some(other) => return Err(wrong(param(".content"), "a string or a list of blocks", &other)),
    };
    let (mut texts, mut calls) = (Vec::new(), Vec::new());
    for (number, block) in blocks.into_iter().enumerate() {
        let place = param(&format!(".content[{number}]"));
        match block.get("type").and_then(Value::as_str) {
            Some("tool_use") => calls.push(call(&place, &block)?),
            Some("tool_result") => messages.push(result(&place, block)?),
            // Earlier thoughts are not shown to the model again.
            Some("thinking" | "redacted_thinking") => {}
            _ => texts.push(block_text(&place, block)?),
        }
    }
    let content = if texts.is_empty() { Value::Null } else { texts.join("\n").into() };
    if !calls.is_empty() {
        messages.push(json!({"role": role, "content": content, "tool_calls": calls}));
    } else if !content.is_null() {
        messages.push(json!({"role": role, "content": content}));
    }
    Ok(())
}

fn call(place: &str, block: &Value) -> Result<Value, ApiError> {
    let text = |name: &str| {
        let value = block.get(name).ok_or_else(|| ApiError::Missing { param: format!("{place}.{name}") })?;
        value.as_str().ok_or_else(|| wrong(format!("{place}.{name}"), "a string", value))
    };
    let arguments = block.get("input").cloned().unwrap_or_else(|| json!({})).to_string();
    Ok(json!({"id": text("id")?, "type": "function", "function": {"name": text("name")?, "arguments": arguments}}))
}

fn result(place: &str, block: Value) -> Result<Value, ApiError> {
    let Value::Object(mut block) = block else { return Err(wrong(place, "an object", &block)) };
    let id = match block.shift_remove("tool_use_id") {
        Some(Value::String(id)) => id,
        Some(other) => return Err(wrong(format!("{place}.tool_use_id"), "a string", &other)),
        None => return Err(ApiError::Missing { param: format!("{place}.tool_use_id") }),
    };
    let content = match block.shift_remove("content") {
        None | Some(Value::Null) => String::new(),
        Some(content) => text_of(&format!("{place}.content"), content)?,
    };
    Ok(json!({"role": "tool", "tool_call_id": id, "content": content}))
}

fn take_tools(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let mut tools = Vec::new();
    for (at, tool) in fields.list("tools")?.unwrap_or_default().into_iter().enumerate() {
        let Value::Object(mut tool) = tool else { return Err(wrong(format!("tools[{at}]"), "an object", &tool)) };
        if tool.get("type").and_then(Value::as_str).is_some_and(|kind| kind != "custom") {
            return Err(ApiError::Unsupported { param: format!("tools[{at}].type"), feature: "a tool of the server" });
        }
        let mut function = Map::new();
        for (theirs, ours) in
            [("name", "name"), ("description", "description"), ("input_schema", "parameters"), ("strict", "strict")]
        {
            function.extend(tool.shift_remove(theirs).map(|value| (ours.to_owned(), value)));
        }
        tools.push(json!({"type": "function", "function": function}));
    }
    if !tools.is_empty() {
        chat.insert("tools".into(), tools.into());
    }
    let Some(mut choice) = fields.object("tool_choice", "tool_choice.")? else { return Ok(()) };
    if choice.flag("disable_parallel_tool_use", false)? {
        chat.insert("parallel_tool_calls".into(), false.into());
    }
    let kind = choice.text("type")?.ok_or_else(|| ApiError::Missing { param: "tool_choice.type".into() })?;
    let chosen = match kind.as_str() {
        "auto" | "none" => kind.into(),
        "any" => "required".into(),
        "tool" => {
            let name = choice.text("name")?.ok_or_else(|| ApiError::Missing { param: "tool_choice.name".into() })?;
            json!({"type": "function", "function": {"name": name}})
        }
        _ => {
            let expected = "auto, any, tool or none".into();
            return Err(ApiError::OutOfRange { param: "tool_choice.type".into(), value: kind, expected });
        }
    };
    chat.insert("tool_choice".into(), chosen);
    Ok(())
}

/// Templates of models that think have a switch for it.
fn take_thinking(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let Some(mut thinking) = fields.object("thinking", "thinking.")? else { return Ok(()) };
    let kind = thinking.text("type")?.ok_or_else(|| ApiError::Missing { param: "thinking.type".into() })?;
    let is_on = match kind.as_str() {
        "enabled" | "adaptive" => true,
        "disabled" => false,
        _ => {
            let expected = "enabled, adaptive or disabled".into();
            return Err(ApiError::OutOfRange { param: "thinking.type".into(), value: kind, expected });
        }
    };
    chat.insert("chat_template_kwargs".into(), json!({"enable_thinking": is_on}));
    Ok(())
}

fn take_format(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let Some(mut config) = fields.object("output_config", "output_config.")? else { return Ok(()) };
    config.take("effort");
    let Some(format) = config.take("format") else { return Ok(()) };
    if format.get("type").and_then(Value::as_str) != Some("json_schema") {
        let feature = "a format that is no JSON schema";
        return Err(ApiError::Unsupported { param: "output_config.format.type".into(), feature });
    }
    let schema = json!({"name": "output", "schema": format.get("schema"), "strict": true});
    chat.insert("response_format".into(), json!({"type": "json_schema", "json_schema": schema}));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The request of chat, or why there is none.
    #[track_caller]
    fn check(body: &str, expected: &str) {
        let Value::Object(members) = serde_json::from_str(body).unwrap() else { panic!("not an object") };
        let told = match to_chat(Fields::new(members)) {
            Ok(fields) => Value::Object(fields.into_members()).to_string(),
            Err(error) => error.to_string(),
        };
        assert_eq!(told, expected, "{body}");
    }

    #[test]
    fn requests_become_those_of_chat() {
        check(
            r#"{"max_tokens":5,"system":[{"type":"text","text":"be"}],"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}],"stop_sequences":["x"],"top_k":3}"#,
            r#"{"messages":[{"role":"system","content":"be"},{"role":"user","content":"a\nb"}],"stop":["x"],"top_k":3,"max_completion_tokens":5}"#,
        );
        check(
            r#"{"max_tokens":5,"messages":[{"role":"assistant","content":[{"type":"tool_use","id":"c","name":"f","input":{"a":1}}]},{"role":"user","content":[{"type":"tool_result","tool_use_id":"c","content":"1"},{"type":"text","text":"so?"}]}],"tools":[{"name":"f","input_schema":{}}],"tool_choice":{"type":"any"}}"#,
            r#"{"messages":[{"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":"{\"a\":1}"}}]},{"role":"tool","tool_call_id":"c","content":"1"},{"role":"user","content":"so?"}],"tools":[{"type":"function","function":{"name":"f","parameters":{}}}],"tool_choice":"required","max_completion_tokens":5}"#,
        );
        check(
            r#"{"max_tokens":5,"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"Sure"}]}"#,
            r#"{"continue_final_message":true,"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"Sure"}],"max_completion_tokens":5}"#,
        );
    }

    #[test]
    fn what_cannot_be_obeyed_is_named() {
        check(r#"{"messages":[]}"#, "max_tokens is required");
        check(r#"{"max_tokens":1}"#, "messages is required");
        check(
            r#"{"max_tokens":1,"messages":[{"role":"tool","content":"x"}]}"#,
            "messages[0].role must be user or assistant; it is tool",
        );
        check(
            r#"{"max_tokens":1,"messages":[{"role":"user","content":[{"type":"image"}]}]}"#,
            "messages[0].content[0].type: anything but text is not supported by this server; leave the field out",
        );
    }
}
