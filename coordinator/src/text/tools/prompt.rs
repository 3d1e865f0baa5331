//! Tools and calls in the prompt: as the template wants them, or in plain words where it knows none.

use serde_json::{Value, json};

use super::{Body, Tool, ToolFormat};

/// Conversations as templates that know tools expect them: arguments are objects there, and text in requests.
pub fn arguments_as_objects(messages: &mut [Value]) {
    for message in messages {
        for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
            let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
            let read = arguments.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
            if let Some(object @ Value::Object(_)) = read {
                *arguments = object;
            }
        }
    }
}

/// Conversations for a template that knows no tools: they are told in the system message, calls and their results stand in
/// the text.
pub fn without_tools(format: &ToolFormat, tools: &[Tool], messages: Vec<Value>) -> Vec<Value> {
    let mut plain: Vec<Value> = Vec::with_capacity(messages.len() + 1);
    for message in messages {
        let told = plain_message(format, message);
        match (plain.last_mut(), told.1) {
            // Results of one turn come as one message: templates want roles to take turns.
            (Some(last), true) if last["role"] == "user" && is_result(last) => append(last, &text_of(&told.0)),
            _ => plain.push(told.0),
        }
    }
    if !tools.is_empty() {
        let text = system_text(format, tools);
        match plain.first_mut() {
            Some(first) if first["role"] == "system" => append(first, &text),
            _ => plain.insert(0, json!({"role": "system", "content": text})),
        }
    }
    plain
}

fn text_of(message: &Value) -> String {
    message["content"].as_str().unwrap_or_default().to_owned()
}

fn append(message: &mut Value, text: &str) {
    let content = text_of(message);
    let gap = if content.is_empty() { "" } else { "\n\n" };
    message["content"] = format!("{content}{gap}{text}").into();
}

fn is_result(message: &Value) -> bool {
    message["content"].as_str().is_some_and(|text| text.starts_with("<tool_response>"))
}

/// A message without tools, and whether it was a result.
fn plain_message(format: &ToolFormat, mut message: Value) -> (Value, bool) {
    if message["role"] == "tool" || message["role"] == "function" {
        let text = format!("<tool_response>\n{}\n</tool_response>", text_of(&message));
        return (json!({"role": "user", "content": text}), true);
    }
    let calls = message.as_object_mut().and_then(|members| members.shift_remove("tool_calls"));
    let calls: Vec<String> =
        calls.iter().filter_map(Value::as_array).flatten().filter_map(|call| written(format, call)).collect();
    if !calls.is_empty() {
        let text = if format.each {
            let each: Vec<String> = calls.iter().map(|call| format!("{}{call}{}", format.open, format.close)).collect();
            each.join(format.between)
        } else {
            format!("{}{}{}", format.open, calls.join(format.between), format.close)
        };
        append(&mut message, &text);
    }
    if message["content"].is_null() {
        message["content"] = "".into();
    }
    (message, false)
}

/// A call as the format writes it, without what stands around it.
fn written(format: &ToolFormat, call: &Value) -> Option<String> {
    let name = call.pointer("/function/name")?.as_str()?;
    let arguments = match call.pointer("/function/arguments") {
        Some(Value::String(text)) => serde_json::from_str(text).unwrap_or_else(|_| Value::from(text.as_str())),
        Some(other) => other.clone(),
        None => json!({}),
    };
    Some(call_text(format, name, &arguments))
}

fn call_text(format: &ToolFormat, name: &str, arguments: &Value) -> String {
    let members = || arguments.as_object().into_iter().flatten();
    match format.body {
        Body::Json => format!("{{\"name\": {}, \"{}\": {arguments}}}", Value::from(name), format.arguments_key),
        Body::Xml => {
            let bare = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let parameters =
                members().map(|(key, value)| format!("<parameter={key}>\n{}\n</parameter>\n", bare(value)));
            format!("<function={name}>\n{}</function>", parameters.collect::<String>())
        }
        Body::Python => {
            let arguments: Vec<String> = members().map(|(key, value)| format!("{key}={value}")).collect();
            format!("{name}({})", arguments.join(", "))
        }
    }
}

/// What a model is told that was never taught a template with tools.
fn system_text(format: &ToolFormat, tools: &[Tool]) -> String {
    let mut list = String::new();
    for tool in tools {
        let mut function = json!({"name": tool.name});
        if let Some(description) = &tool.description {
            function["description"] = description.as_str().into();
        }
        function["parameters"] = tool.parameters.clone();
        list.push_str(&format!("{function}\n"));
    }
    let example = call_text(format, "function-name", &json!({"argument-name": "value"}));
    let (open, close) = (format.open, format.close);
    format!(
        "You may call functions to help with the request. Each line below describes one, with the JSON schema of its \
         arguments:\n{list}To call a function, answer with its name and arguments in exactly this form:\n\
         {open}{example}{close}\nThe results will follow. Answer in plain words where no function is needed."
    )
}

#[cfg(test)]
mod tests {
    use super::super::hermes;
    use super::*;

    #[test]
    fn calls_and_results_become_text() {
        let call = |city: &str| json!({"id": "x", "type": "function", "function": {"name": "w", "arguments": format!("{{\"city\":\"{city}\"}}")}});
        let messages = vec![
            json!({"role": "user", "content": "weather?"}),
            json!({"role": "assistant", "content": null, "tool_calls": [call("A"), call("B")]}),
            json!({"role": "tool", "tool_call_id": "x", "content": "sun"}),
            json!({"role": "tool", "tool_call_id": "y", "content": "rain"}),
        ];
        let tool = Tool { name: "w".into(), description: None, parameters: json!({"type": "object"}), strict: false };
        let plain = without_tools(&hermes::FORMAT, &[tool], messages);
        let roles: Vec<&str> = plain.iter().map(|message| message["role"].as_str().unwrap()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "user"]);
        assert!(plain[0]["content"].as_str().unwrap().contains(r#"{"name":"w","parameters":{"type":"object"}}"#));
        let a = r#"<tool_call>
{"name": "w", "arguments": {"city":"A"}}
</tool_call>"#;
        assert_eq!(plain[2]["content"], format!("{a}\n{}", a.replace('A', "B")));
        assert_eq!(
            plain[3]["content"],
            "<tool_response>\nsun\n</tool_response>\n\n<tool_response>\nrain\n</tool_response>"
        );
    }

    #[test]
    fn arguments_become_objects_where_they_are_objects() {
        let mut messages = vec![json!({"tool_calls": [
            {"function": {"arguments": "{\"a\": 1}"}}, {"function": {"arguments": "oops"}}]})];
        arguments_as_objects(&mut messages);
        assert_eq!(messages[0].pointer("/tool_calls/0/function/arguments"), Some(&json!({"a": 1})));
        assert_eq!(messages[0].pointer("/tool_calls/1/function/arguments"), Some(&json!("oops")));
    }
}
