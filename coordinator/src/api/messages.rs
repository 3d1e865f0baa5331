//! The conversation of a chat request, made ready for the model's template.
//!
//! **Invariant:** every message that leaves here is an object with a string `role` and a `content` that is text or null.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields::{Fields, type_name};
use crate::text::ChatPrompt;

/// Most messages in one request.
const NUM_MESSAGES_MAX: usize = 10_000;

/// Takes `messages` and the fields that say how they are rendered.
///
/// # Errors
/// A message without role, a content that is neither text nor parts of text, or flags that contradict each other.
pub fn take_prompt(fields: &mut Fields) -> Result<ChatPrompt, ApiError> {
    let messages = fields.list("messages")?.ok_or_else(|| ApiError::Missing { param: "messages".into() })?;
    if messages.is_empty() || messages.len() > NUM_MESSAGES_MAX {
        let expected = format!("a list of 1 to {NUM_MESSAGES_MAX} messages");
        return Err(ApiError::OutOfRange { param: "messages".into(), value: messages.len().to_string(), expected });
    }
    let continue_final_message = fields.flag("continue_final_message", false)?;
    let add_generation_prompt = fields.flag("add_generation_prompt", !continue_final_message)?;
    if continue_final_message && add_generation_prompt {
        let rule = "continue_final_message and add_generation_prompt cannot both be true";
        return Err(ApiError::Conflict { param: "continue_final_message", rule });
    }
    let kwargs = match fields.take("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(kwargs)) => kwargs,
        Some(other) => return Err(wrong("chat_template_kwargs".into(), "an object", &other)),
    };
    Ok(ChatPrompt {
        messages: messages
            .into_iter()
            .enumerate()
            .map(|(at, message)| checked(at, message))
            .collect::<Result<_, _>>()?,
        tools: None,
        add_generation_prompt,
        continue_final_message,
        kwargs,
    })
}

fn wrong(param: String, expected: &'static str, value: &Value) -> ApiError {
    ApiError::WrongType { param, expected, found: type_name(value) }
}

fn checked(at: usize, message: Value) -> Result<Value, ApiError> {
    let Value::Object(mut message) = message else {
        return Err(wrong(format!("messages[{at}]"), "an object", &message));
    };
    match message.get("role") {
        None => return Err(ApiError::Missing { param: format!("messages[{at}].role") }),
        // Templates know the older word.
        Some(Value::String(role)) if role == "developer" => {
            message.insert("role".into(), "system".into());
        }
        Some(Value::String(_)) => {}
        Some(other) => return Err(wrong(format!("messages[{at}].role"), "a string", other)),
    }
    if let Some(calls) = message.get("tool_calls").filter(|calls| !calls.is_null()) {
        check_calls(at, calls)?;
    }
    let content = match message.shift_remove("content") {
        None | Some(Value::Null) if message.contains_key("tool_calls") => Value::Null,
        None | Some(Value::Null) => return Err(ApiError::Missing { param: format!("messages[{at}].content") }),
        Some(Value::String(text)) => Value::String(text),
        Some(Value::Array(parts)) => Value::String(joined(at, parts)?),
        Some(other) => return Err(wrong(format!("messages[{at}].content"), "a string or a list of parts", &other)),
    };
    message.insert("content".into(), content);
    Ok(Value::Object(message))
}

/// Calls name their function and have arguments, as a text or as an object.
fn check_calls(at: usize, calls: &Value) -> Result<(), ApiError> {
    let param = |field: &str| format!("messages[{at}].tool_calls{field}");
    let Value::Array(calls) = calls else { return Err(wrong(param(""), "a list", calls)) };
    for (number, call) in calls.iter().enumerate() {
        let param = |field: &str| param(&format!("[{number}]{field}"));
        let function = call.get("function").ok_or_else(|| ApiError::Missing { param: param(".function") })?;
        let Value::Object(function) = function else { return Err(wrong(param(".function"), "an object", function)) };
        for (name, takes_objects) in [("name", false), ("arguments", true)] {
            let param = || param(&format!(".function.{name}"));
            match function.get(name).ok_or_else(|| ApiError::Missing { param: param() })? {
                Value::String(_) => {}
                Value::Object(_) if takes_objects => {}
                other => return Err(wrong(param(), "a string", other)),
            }
        }
    }
    Ok(())
}

/// Parts of text, one below the other.
fn joined(at: usize, parts: Vec<Value>) -> Result<String, ApiError> {
    let mut texts = Vec::with_capacity(parts.len());
    for (number, part) in parts.into_iter().enumerate() {
        let param = |field: &str| format!("messages[{at}].content[{number}]{field}");
        match part {
            Value::String(text) => texts.push(text),
            Value::Object(mut part) => {
                let kind = part.get("type").and_then(Value::as_str).unwrap_or_default();
                if !matches!(kind, "text" | "input_text" | "output_text" | "refusal") {
                    return Err(ApiError::Unsupported { param: param(".type"), feature: "anything but text" });
                }
                let field = if kind == "refusal" { "refusal" } else { "text" };
                match part.shift_remove(field) {
                    Some(Value::String(text)) => texts.push(text),
                    Some(other) => return Err(wrong(param(".text"), "a string", &other)),
                    None => return Err(ApiError::Missing { param: param(".text") }),
                }
            }
            other => return Err(wrong(param(""), "an object", &other)),
        }
    }
    Ok(texts.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The messages as the template sees them, or why they are refused.
    fn check(body: &str, expected: &str) {
        let Value::Object(members) = serde_json::from_str(body).unwrap() else { panic!("not an object") };
        let told = match take_prompt(&mut Fields::new(members)) {
            Ok(prompt) => format!(
                "{} {} {}",
                Value::Array(prompt.messages),
                prompt.add_generation_prompt,
                prompt.continue_final_message
            ),
            Err(error) => error.to_string(),
        };
        assert_eq!(told, expected, "{body}");
    }

    #[test]
    fn messages_are_checked_and_made_plain() {
        let plain = r#"[{"role":"user","content":"hi"}]"#;
        check(&format!(r#"{{"messages":{plain}}}"#), &format!("{plain} true false"));
        check(&format!(r#"{{"messages":{plain},"continue_final_message":true}}"#), &format!("{plain} false true"));
        check(
            &format!(r#"{{"messages":{plain},"continue_final_message":true,"add_generation_prompt":true}}"#),
            "continue_final_message and add_generation_prompt cannot both be true",
        );
        check(
            r#"{"messages":[{"role":"developer","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}]}"#,
            "[{\"role\":\"system\",\"content\":\"a\\nb\"}] true false",
        );
        check(
            r#"{"messages":[{"role":"assistant","content":null,"tool_calls":[]}]}"#,
            r#"[{"role":"assistant","tool_calls":[],"content":null}] true false"#,
        );
    }

    #[test]
    fn bad_messages_are_named() {
        check("{}", "messages is required");
        check(r#"{"messages":"hi"}"#, "messages must be a list; it is a string");
        check(r#"{"messages":[]}"#, "messages must be a list of 1 to 10000 messages; it is 0");
        check(r#"{"messages":["hi"]}"#, "messages[0] must be an object; it is a string");
        check(r#"{"messages":[{"content":"hi"}]}"#, "messages[0].role is required");
        check(r#"{"messages":[{"role":7,"content":"hi"}]}"#, "messages[0].role must be a string; it is a number");
        check(r#"{"messages":[{"role":"user"}]}"#, "messages[0].content is required");
        check(
            r#"{"messages":[{"role":"user","content":7}]}"#,
            "messages[0].content must be a string or a list of parts; it is a number",
        );
        let calls = |calls: &str| format!(r#"{{"messages":[{{"role":"assistant","tool_calls":{calls}}}]}}"#);
        check(&calls("7"), "messages[0].tool_calls must be a list; it is a number");
        check(&calls("[{}]"), "messages[0].tool_calls[0].function is required");
        check(
            &calls(r#"[{"function":{"name":"f","arguments":[]}}]"#),
            "messages[0].tool_calls[0].function.arguments must be a string; it is a list",
        );
        check(
            r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#,
            "messages[0].content[0].type: anything but text is not supported by this server; leave the field out",
        );
        check(
            r#"{"messages":[{"role":"user","content":[{"type":"text"}]}]}"#,
            "messages[0].content[0].text is required",
        );
        check(
            r#"{"messages":[{"role":"user","content":"x"}],"chat_template_kwargs":[]}"#,
            "chat_template_kwargs must be an object; it is a list",
        );
    }
}
