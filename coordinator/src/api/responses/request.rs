//! A request for a response, rewritten as one of chat.
//!
//! **Invariant:** every field is passed on, echoed, refused by name or left for the list of ignored ones.

use serde_json::{Map, Value, json};

use super::super::error::ApiError;
use super::super::fields::{Fields, Neutral, type_name};
use super::super::options;

/// What a response repeats of its request.
#[derive(Debug, Clone, Default)]
pub struct Echo {
    pub(super) instructions: Value,
    pub(super) max_output_tokens: Value,
    pub(super) max_tool_calls: Value,
    pub(super) metadata: Value,
    pub(super) parallel_tool_calls: Value,
    pub(super) reasoning: Value,
    pub(super) temperature: Value,
    pub(super) text: Value,
    pub(super) tool_choice: Value,
    pub(super) tools: Value,
    pub(super) top_logprobs: Value,
    pub(super) top_p: Value,
    pub(super) user: Value,
}

/// Fields that need what this server does not keep or do.
const NOT_SUPPORTED: &[Neutral] = &[
    Neutral { name: "previous_response_id", feature: "a stored response", changes_nothing: options::never },
    Neutral { name: "conversation", feature: "a stored conversation", changes_nothing: options::never },
    Neutral { name: "prompt", feature: "a stored prompt", changes_nothing: options::never },
    Neutral { name: "background", feature: "work in the background", changes_nothing: options::is_false },
    Neutral { name: "truncation", feature: "truncation of the input", changes_nothing: is_disabled },
    Neutral { name: "context_management", feature: "truncation of the input", changes_nothing: options::is_empty },
    Neutral { name: "n", feature: "several outputs", changes_nothing: is_one },
    Neutral { name: "best_of", feature: "several outputs", changes_nothing: is_one },
];

fn is_disabled(value: &Value) -> bool {
    value == "disabled"
}

fn is_one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

/// Errors of the conversation name the field that held it.
pub fn renamed(error: ApiError) -> ApiError {
    match error {
        ApiError::ContextLength { prompt_tokens, max_model_len, .. } => {
            ApiError::ContextLength { param: "input", prompt_tokens, max_model_len }
        }
        ApiError::Text { source, .. } => ApiError::Text { param: "input", source },
        ApiError::NoTokenizer { model, .. } => ApiError::NoTokenizer { param: "input", model },
        other => other,
    }
}

/// Rewrites a request; what is repeated in the response comes along.
///
/// # Errors
/// A field that is wrong or cannot be obeyed.
pub fn to_chat(mut fields: Fields) -> Result<(Fields, Echo), ApiError> {
    for field in NOT_SUPPORTED.iter().chain(&options::OF_CHOICES) {
        fields.neutral(field)?;
    }
    let mut chat = Map::new();
    let mut echo = Echo::default();
    let instructions = fields.text("instructions")?;
    chat.insert("messages".into(), messages(&mut fields, instructions.as_deref())?.into());
    echo.instructions = instructions.into();
    for name in ["temperature", "top_p", "user", "parallel_tool_calls"] {
        let Some(value) = fields.take(name) else { continue };
        *echo.field(name) = value.clone();
        if name != "user" {
            chat.insert(name.into(), value);
        }
    }
    if let Some(limit) = options::take_max_tokens(&mut fields, "max_output_tokens", 1)? {
        echo.max_output_tokens = limit.into();
        chat.insert("max_completion_tokens".into(), limit.into());
    }
    echo.max_tool_calls = fields.integer("max_tool_calls", 1, i64::MAX)?.into();
    echo.metadata = metadata(&mut fields)?;
    take_logprobs(&mut fields, &mut chat, &mut echo)?;
    take_text(&mut fields, &mut chat, &mut echo)?;
    take_tools(&mut fields, &mut chat, &mut echo)?;
    if let Some(mut reasoning) = fields.object("reasoning", "reasoning.")? {
        let effort = reasoning.text("effort")?;
        echo.reasoning = json!({"effort": effort, "summary": null});
        chat.extend(effort.map(|effort| ("reasoning_effort".to_owned(), effort.into())));
    }
    // What is kept nowhere needs no key and no place; padding of frames is not made.
    for name in ["store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"] {
        fields.take(name);
    }
    fields.object("stream_options", "stream_options.")?;
    for (name, value) in fields.into_members() {
        chat.entry(name).or_insert(value);
    }
    Ok((Fields::new(chat), echo))
}

impl Echo {
    fn field(&mut self, name: &str) -> &mut Value {
        match name {
            "temperature" => &mut self.temperature,
            "top_p" => &mut self.top_p,
            "parallel_tool_calls" => &mut self.parallel_tool_calls,
            _ => &mut self.user,
        }
    }
}

fn wrong(param: impl Into<String>, expected: &'static str, value: &Value) -> ApiError {
    ApiError::WrongType { param: param.into(), expected, found: type_name(value) }
}

fn metadata(fields: &mut Fields) -> Result<Value, ApiError> {
    match fields.take("metadata") {
        None => Ok(json!({})),
        Some(value @ Value::Object(_)) => Ok(value),
        Some(other) => Err(wrong("metadata", "an object", &other)),
    }
}

/// `top_logprobs` counts alternatives; `include` asks for log-probabilities at all.
fn take_logprobs(fields: &mut Fields, chat: &mut Map<String, Value>, echo: &mut Echo) -> Result<(), ApiError> {
    const INCLUDED: &str = "message.output_text.logprobs";
    let count = options::take_logprob_count(fields, "top_logprobs")?;
    let include = fields.list("include")?.unwrap_or_default();
    for (at, name) in include.iter().enumerate() {
        if !name.is_string() {
            return Err(wrong(format!("include[{at}]"), "a string", name));
        }
    }
    echo.top_logprobs = count.unwrap_or(0).into();
    if count.is_some_and(|count| count > 0) || include.iter().any(|name| name == INCLUDED) {
        chat.insert("logprobs".into(), true.into());
        chat.insert("top_logprobs".into(), count.unwrap_or(0).into());
    }
    Ok(())
}

/// `text.format` is chat's `response_format`, flat.
fn take_text(fields: &mut Fields, chat: &mut Map<String, Value>, echo: &mut Echo) -> Result<(), ApiError> {
    let mut format = json!({"type": "text"});
    if let Some(mut text) = fields.object("text", "text.")? {
        text.text("verbosity")?;
        format = text.take("format").unwrap_or(format);
    }
    let Value::Object(members) = &format else { return Err(wrong("text.format", "an object", &format)) };
    let kind = members.get("type").and_then(Value::as_str).unwrap_or_default();
    match kind {
        "text" => {}
        "json_schema" => {
            let mut schema = members.clone();
            schema.shift_remove("type");
            chat.insert("response_format".into(), json!({"type": "json_schema", "json_schema": schema}));
        }
        _ => drop(chat.insert("response_format".into(), format.clone())),
    }
    echo.text = json!({"format": format});
    Ok(())
}

/// Functions are flat here and nested in chat.
fn take_tools(fields: &mut Fields, chat: &mut Map<String, Value>, echo: &mut Echo) -> Result<(), ApiError> {
    let tools = fields.list("tools")?.unwrap_or_default();
    let mut nested = Vec::with_capacity(tools.len());
    for (at, tool) in tools.iter().enumerate() {
        let Value::Object(members) = tool else { return Err(wrong(format!("tools[{at}]"), "an object", tool)) };
        if members.get("type").and_then(Value::as_str) != Some("function") {
            return Err(ApiError::Unsupported { param: format!("tools[{at}].type"), feature: "a tool of the server" });
        }
        let mut function = members.clone();
        function.shift_remove("type");
        nested.push(json!({"type": "function", "function": function}));
    }
    if !nested.is_empty() {
        chat.insert("tools".into(), nested.into());
    }
    echo.tools = tools.into();
    echo.tool_choice = "auto".into();
    if let Some(choice) = fields.take("tool_choice") {
        let chosen = match choice.get("name") {
            Some(name) => json!({"type": "function", "function": {"name": name}}),
            None => choice.clone(),
        };
        chat.insert("tool_choice".into(), chosen);
        echo.tool_choice = choice;
    }
    Ok(())
}

/// The items of `input` as messages.
fn messages(fields: &mut Fields, instructions: Option<&str>) -> Result<Vec<Value>, ApiError> {
    let mut messages: Vec<Value> =
        instructions.map(|text| json!({"role": "system", "content": text})).into_iter().collect();
    match fields.take("input") {
        None => return Err(ApiError::Missing { param: "input".into() }),
        Some(Value::String(text)) => messages.push(json!({"role": "user", "content": text})),
        Some(Value::Array(items)) => {
            for (at, item) in items.into_iter().enumerate() {
                push_item(&mut messages, at, item)?;
            }
        }
        Some(other) => return Err(wrong("input", "a string or a list of items", &other)),
    }
    if messages.is_empty() {
        let expected = "a text or at least one item".into();
        return Err(ApiError::OutOfRange { param: "input".into(), value: "[]".into(), expected });
    }
    Ok(messages)
}

fn push_item(messages: &mut Vec<Value>, at: usize, item: Value) -> Result<(), ApiError> {
    let param = |field: &str| format!("input[{at}]{field}");
    let Value::Object(mut item) = item else { return Err(wrong(param(""), "an object", &item)) };
    let mut text = |name: &str| match item.shift_remove(name) {
        Some(Value::String(text)) => Ok(text),
        None | Some(Value::Null) => Err(ApiError::Missing { param: param(&format!(".{name}")) }),
        Some(other) => Err(wrong(param(&format!(".{name}")), "a string", &other)),
    };
    let kind = text("type").or_else(|error| match error {
        ApiError::Missing { .. } => Ok("message".to_owned()),
        other => Err(other),
    })?;
    match kind.as_str() {
        "message" => {
            let role = text("role")?;
            let content = item.shift_remove("content").unwrap_or_default();
            messages.push(json!({"role": role, "content": content}));
        }
        "function_call" => {
            let (id, name, arguments) = (text("call_id")?, text("name")?, text("arguments")?);
            push_call(
                messages,
                json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}),
            );
        }
        "function_call_output" => {
            let id = text("call_id")?;
            let content = item.shift_remove("output").unwrap_or_default();
            messages.push(json!({"role": "tool", "tool_call_id": id, "content": content}));
        }
        // Earlier thoughts are not shown to the model again.
        "reasoning" => {}
        _ => return Err(ApiError::Unsupported { param: param(".type"), feature: "an item of this kind" }),
    }
    Ok(())
}

/// Calls of one turn stand in one message.
fn push_call(messages: &mut Vec<Value>, call: Value) {
    if let Some(last) = messages.last_mut().filter(|last| last["role"] == "assistant") {
        match last.get_mut("tool_calls").and_then(Value::as_array_mut) {
            Some(calls) => calls.push(call),
            None => last["tool_calls"] = json!([call]),
        }
    } else {
        messages.push(json!({"role": "assistant", "content": null, "tool_calls": [call]}));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The request of chat, or why there is none.
    #[track_caller]
    fn check(body: &str, expected: &str) {
        let Value::Object(members) = serde_json::from_str(body).unwrap() else { panic!("not an object") };
        let told = match to_chat(Fields::new(members)) {
            Ok((fields, _)) => Value::Object(fields.into_members()).to_string(),
            Err(error) => error.to_string(),
        };
        assert_eq!(told, expected, "{body}");
    }

    #[test]
    fn requests_become_those_of_chat() {
        check(r#"{"input":"hi","model":"m"}"#, r#"{"messages":[{"role":"user","content":"hi"}],"model":"m"}"#);
        check(
            r#"{"input":[{"role":"user","content":[{"type":"input_text","text":"a"}]}],"instructions":"be","max_output_tokens":5,"top_k":3}"#,
            r#"{"messages":[{"role":"system","content":"be"},{"role":"user","content":[{"type":"input_text","text":"a"}]}],"max_completion_tokens":5,"top_k":3}"#,
        );
        check(
            r#"{"input":[{"type":"function_call","call_id":"c","name":"f","arguments":"{}"},{"type":"function_call","call_id":"d","name":"g","arguments":"{}"},{"type":"function_call_output","call_id":"c","output":"1"}]}"#,
            r#"{"messages":[{"role":"assistant","content":null,"tool_calls":[{"id":"c","type":"function","function":{"name":"f","arguments":"{}"}},{"id":"d","type":"function","function":{"name":"g","arguments":"{}"}}]},{"role":"tool","tool_call_id":"c","content":"1"}]}"#,
        );
        check(
            r#"{"input":"x","text":{"format":{"type":"json_schema","name":"n","schema":{}}},"tools":[{"type":"function","name":"f","parameters":{}}],"tool_choice":{"type":"function","name":"f"}}"#,
            r#"{"messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{}}},"tools":[{"type":"function","function":{"name":"f","parameters":{}}}],"tool_choice":{"type":"function","function":{"name":"f"}}}"#,
        );
    }

    #[test]
    fn what_cannot_be_obeyed_is_named() {
        check("{}", "input is required");
        check(r#"{"input":7}"#, "input must be a string or a list of items; it is a number");
        check(r#"{"input":[]}"#, "input must be a text or at least one item; it is []");
        check(r#"{"input":[{"content":"x"}]}"#, "input[0].role is required");
        check(
            r#"{"input":"x","previous_response_id":"resp_1"}"#,
            "previous_response_id: a stored response is not supported by this server; leave the field out",
        );
        check(
            r#"{"input":[{"type":"item_reference","id":"x"}]}"#,
            "input[0].type: an item of this kind is not supported by this server; leave the field out",
        );
    }
}
