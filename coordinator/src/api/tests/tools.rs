//! Tools, calls and thoughts.

use serde_json::{Value, json};

use super::*;

const PATH: &str = "/v1/chat/completions";
const CALLS: &str = "I look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Köln\", \"deep\": {\"a\": {}}}}\n\
                     </tool_call>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
const THINKER: &str = "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking is defined and not \
                       enable_thinking %}<think></think>{% endif %}";
const OPENED: &str = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n";

/// A server whose context has room for tools.
fn server(template: Option<&'static str>, says: impl FnMut(usize) -> Says + Send + 'static) -> Server {
    let limits = EngineLimits { num_blocks: 256, max_model_len: 2048, max_queue: 100, ..limits() };
    Server::with(Setup { template, limits, ..Setup::default() }, says)
}

fn tool(name: &str) -> Value {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}});
    json!({"type": "function", "function": {"name": name, "parameters": parameters}})
}

fn body(rest: Value) -> Value {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}],
        "tools": [tool("weather"), tool("now")]});
    for (name, value) in rest.as_object().unwrap() {
        body[name.as_str()] = value.clone();
    }
    body
}

/// The message of a choice, with calls as name and arguments, and why it ended.
fn whole(answer: &Answer) -> Value {
    assert_eq!(answer.status, 200, "{}", answer.body);
    let choice = &answer.json()["choices"][0];
    let mut message = choice["message"].clone();
    for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        assert!(call["id"].as_str().unwrap().starts_with("call_") && call["type"] == "function", "{call}");
        *call = call["function"].clone();
    }
    message["finish_reason"] = choice["finish_reason"].clone();
    message
}

/// The same from a stream, as clients put deltas together.
fn folded(answer: &Answer) -> Value {
    assert_eq!(answer.status, 200, "{}", answer.body);
    let mut message = json!({"role": "assistant", "content": null});
    let mut calls: Vec<Value> = Vec::new();
    for frame in answer.frames() {
        let Ok(chunk) = serde_json::from_str::<Value>(frame) else { continue };
        let Some(choice) = chunk["choices"].get(0) else { continue };
        for (name, piece) in choice["delta"].as_object().unwrap() {
            match piece {
                Value::Array(pieces) => pieces.iter().for_each(|piece| add_call(&mut calls, piece)),
                Value::String(text) if name != "role" && !text.is_empty() => {
                    let before = message[name].as_str().unwrap_or_default().to_owned();
                    message[name] = (before + text).into();
                }
                _ => {}
            }
        }
        message["finish_reason"] = choice["finish_reason"].clone();
    }
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    } else if message["content"].is_null() {
        message["content"] = "".into();
    }
    message
}

fn add_call(calls: &mut Vec<Value>, piece: &Value) {
    let index = piece["index"].as_u64().unwrap() as usize;
    if index == calls.len() {
        assert!(piece["id"].is_string() && piece["type"] == "function", "{piece}");
        calls.push(piece["function"].clone());
    } else {
        assert!(index + 1 == calls.len() && piece.get("id").is_none(), "{piece}");
        let before = calls[index]["arguments"].as_str().unwrap().to_owned();
        calls[index]["arguments"] = (before + piece["function"]["arguments"].as_str().unwrap()).into();
    }
}

/// Asks whole and streamed; both must come to the same.
async fn check(server: &Server, rest: Value, expected: Value) {
    let answer = server.post(PATH, &body(rest.clone()).to_string()).await;
    assert_eq!(whole(&answer), expected, "{rest}");
    let mut streamed = body(rest.clone());
    streamed["stream"] = true.into();
    let answer = server.post(PATH, &streamed.to_string()).await;
    assert_eq!(folded(&answer), expected, "{rest} streamed: {}", answer.body);
}

fn weather() -> Value {
    json!({"name": "weather", "arguments": "{\"city\": \"Köln\", \"deep\": {\"a\": {}}}"})
}

#[tokio::test]
async fn calls_are_found_without_any_flag() {
    let server = server(None, |_| Says::stop(CALLS));
    let now = json!({"name": "now", "arguments": "{}"});
    let calls = json!({"role": "assistant", "content": "I look.", "tool_calls": [weather(), now],
        "finish_reason": "tool_calls"});
    check(&server, json!({}), calls.clone()).await;
    check(&server, json!({"tool_choice": "auto"}), calls.clone()).await;
    let mut one = calls.clone();
    one["tool_calls"] = json!([weather()]);
    check(&server, json!({"parallel_tool_calls": false}), one).await;
    let text = json!({"role": "assistant", "content": CALLS, "finish_reason": "stop"});
    check(&server, json!({"tool_choice": "none"}), text.clone()).await;
    check(&server, json!({"tools": []}), text).await;
}

#[tokio::test]
async fn forced_calls_end_as_clients_expect() {
    let server = server(None, |_| Says::stop(CALLS.strip_prefix("I look.\n").unwrap()));
    let now = json!({"name": "now", "arguments": "{}"});
    let required = json!({"role": "assistant", "content": null, "tool_calls": [weather(), now],
        "finish_reason": "tool_calls"});
    check(&server, json!({"tool_choice": "required"}), required).await;
    let named = json!({"role": "assistant", "content": null, "tool_calls": [weather()], "finish_reason": "stop"});
    let choice = json!({"type": "function", "function": {"name": "weather"}});
    check(&server, json!({"tool_choice": choice}), named.clone()).await;
    let functions = json!([tool("weather")["function"]]);
    let older = json!({"tools": null, "functions": functions, "function_call": {"name": "weather"}});
    check(&server, older, named).await;
}

#[tokio::test]
async fn a_call_that_is_cut_off_keeps_its_text_and_its_reason() {
    let server = server(None, |_| Says::length("<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"K"));
    let cut = json!({"role": "assistant", "content": null,
        "tool_calls": [{"name": "weather", "arguments": "{\"city\": \"K"}], "finish_reason": "length"});
    check(&server, json!({}), cut).await;
}

#[tokio::test]
async fn bad_tools_are_refused_by_name() {
    let server = server(None, |_| Says::stop("x"));
    let nested = (0..70).fold(json!({"type": "string"}), |inner, _| json!({"type": "array", "items": inner}));
    let deep = json!({"type": "function", "function": {"name": "f",
        "parameters": {"type": "object", "properties": {"x": nested}}}});
    for (rest, param) in [
        (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
        (json!({"tools": [{"type": "function", "function": {}}]}), "tools[0].function.name"),
        (json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}), "tools[0].function.name"),
        (json!({"tools": [tool("a"), tool("a")]}), "tools[1]"),
        (
            json!({"tools": [tool("a"), {"type": "function", "function": {"name": "b", "description": "x".repeat(1 << 20)}}]}),
            "tools",
        ),
        (json!({"tools": "x"}), "tools"),
        (json!({"tools": null, "tool_choice": "required"}), "tool_choice"),
        (json!({"tool_choice": "sometimes"}), "tool_choice"),
        (json!({"tool_choice": 7}), "tool_choice"),
        (json!({"tool_choice": {"type": "function", "function": {"name": "x"}}}), "tool_choice.function.name"),
        (json!({"tool_choice": "required", "response_format": {"type": "json_object"}}), "response_format"),
        (json!({"tools": [deep], "tool_choice": "required"}), "tools"),
        (json!({"reasoning_effort": "huge"}), "reasoning_effort"),
    ] {
        let answer = server.post(PATH, &body(rest.clone()).to_string()).await;
        assert_eq!((answer.status, answer.json()["error"]["param"].as_str()), (400, Some(param)), "{}", answer.body);
    }
}

#[tokio::test]
async fn thoughts_are_no_content() {
    let says = |_| Says::stop("<think>\nhm, {\"x\"}\n</think>\n\nFour.");
    let server = server(Some(THINKER), says);
    let plain = json!({"tools": null});
    let expected = json!({"role": "assistant", "content": "Four.", "reasoning": "hm, {\"x\"}",
        "reasoning_content": "hm, {\"x\"}", "finish_reason": "stop"});
    check(&server, plain.clone(), expected.clone()).await;
    check(&server, json!({}), expected).await;
    let hidden = json!({"role": "assistant", "content": "Four.", "finish_reason": "stop"});
    check(&server, json!({"tools": null, "include_reasoning": false}), hidden).await;
    let answer = server.post(PATH, &body(json!({"tools": null, "reasoning_effort": "high"})).to_string()).await;
    assert_eq!(answer.headers.get("x-phalanx-ignored"), None, "the template takes it");
}

#[tokio::test]
async fn thoughts_that_the_prompt_opened_are_found_and_counted() {
    let server = server(Some(OPENED), |_| Says::stop("hm</think>Four."));
    let expected = json!({"role": "assistant", "content": "Four.", "reasoning": "hm", "reasoning_content": "hm",
        "finish_reason": "stop"});
    check(&server, json!({"tools": null}), expected).await;
    let answer = server.post(PATH, &body(json!({"tools": null, "reasoning_effort": "high"})).to_string()).await;
    assert_eq!(answer.headers["x-phalanx-ignored"], "reasoning_effort");
    assert!(
        answer.json()["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64() > Some(0),
        "{}",
        answer.body
    );
}
