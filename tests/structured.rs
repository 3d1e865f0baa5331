//! Outputs that are held to grammars and schemas, by real ranks: whatever a random model would like to say.

#![expect(clippy::expect_used, clippy::panic, reason = "helpers of tests are test code too")]

use std::thread;

use harness::{Cluster, golden, smollm2};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "days"],
        "additionalProperties": false,
    })
}

fn check_schema(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
    let object = value.as_object().expect("an object");
    assert!(object["city"].as_str().is_some_and(|city| city.chars().count() <= 8), "{text}");
    assert!(object["days"].as_i64().is_some_and(|days| (1..=14).contains(&days)), "{text}");
    assert!(object.get("unit").is_none_or(|unit| unit == "celsius" || unit == "fahrenheit"), "{text}");
    assert!(object.keys().all(|key| ["city", "days", "unit"].contains(&key.as_str())), "{text}");
}

fn body(seed: u64, rest: Value) -> Value {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": 2.0, "n": 10,
        "seed": seed, "max_tokens": 150});
    for (name, value) in rest.as_object().expect("an object") {
        body[name.as_str()] = value.clone();
    }
    body
}

fn tools() -> Value {
    let parameters = json!({"type": "object", "properties": {}, "additionalProperties": false});
    json!([
        {"type": "function", "function": {"name": "forecast", "parameters": schema(), "strict": true}},
        {"type": "function", "function": {"name": "now", "parameters": parameters}},
    ])
}

/// The calls of all choices that came to an end, each with the reason of its end.
fn calls(answer: &Value) -> Vec<(String, Vec<Value>)> {
    let choices = answer["choices"].as_array().expect("choices").iter();
    let ended = choices.filter(|choice| choice["finish_reason"] != "length");
    let calls = |choice: &Value| choice["message"]["tool_calls"].as_array().cloned().unwrap_or_default();
    ended.map(|choice| (choice["finish_reason"].as_str().expect("a reason").to_owned(), calls(choice))).collect()
}

fn check_call(call: &Value) {
    let arguments = call["function"]["arguments"].as_str().expect("arguments are text");
    match call["function"]["name"].as_str() {
        Some("forecast") => check_schema(arguments),
        Some("now") => assert_eq!(serde_json::from_str::<Value>(arguments).expect("JSON"), json!({})),
        other => panic!("{other:?}"),
    }
}

fn check_forms(cluster: &Cluster) {
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema()}});
    let (mut num_ended, mut num_calls) = (0, 0);
    for seed in 0..4 {
        let answer = cluster.http.ask(CHAT, &body(seed, json!({"response_format": format})));
        for choice in answer["choices"].as_array().expect("choices") {
            let text = choice["message"]["content"].as_str().expect("text");
            assert!(text.starts_with('{') || text.starts_with([' ', '\n']), "{text:?}");
            if choice["finish_reason"] == "stop" {
                num_ended += 1;
                check_schema(text);
            }
        }
        let answer = cluster.http.ask(CHAT, &body(seed, json!({"guided_choice": ["yes", "no"]})));
        let said = |choice: &Value| choice["message"]["content"] == "yes" || choice["message"]["content"] == "no";
        assert!(answer["choices"].as_array().expect("choices").iter().all(said), "{answer}");
        let required = json!({"tools": tools(), "tool_choice": "required", "parallel_tool_calls": false});
        for (reason, calls) in calls(&cluster.http.ask(CHAT, &body(seed, required))) {
            assert_eq!((reason.as_str(), calls.len()), ("tool_calls", 1));
            calls.iter().for_each(check_call);
            num_calls += 1;
        }
        let named = json!({"tools": tools(), "tool_choice": {"type": "function", "function": {"name": "forecast"}}});
        for (reason, calls) in calls(&cluster.http.ask(CHAT, &body(seed, named))) {
            assert_eq!((reason.as_str(), calls.len()), ("stop", 1));
            assert_eq!(calls[0]["function"]["name"], "forecast");
            calls.iter().for_each(check_call);
            num_calls += 1;
        }
    }
    assert!(num_ended > 20 && num_calls > 40, "{num_ended} texts and {num_calls} calls came to an end");
}

#[test]
fn outputs_meet_their_schema_at_any_temperature() {
    let cluster = Cluster::start(2);
    let folder = golden("tiny-llama").folder;
    let served = cluster.serve(&folder, "m", &["--dtype", "float32", "--tensor-parallel-size", "2"]);
    assert_eq!(served.code, 0, "{served:?}");
    check_forms(&cluster);
}

#[test]
fn constrained_and_free_requests_share_steps() {
    let cluster = Cluster::start(1);
    let served = cluster.serve(&golden("tiny-llama").folder, "m", &["--dtype", "float32"]);
    assert_eq!(served.code, 0, "{served:?}");
    let free = json!({"model": "m", "prompt": "Hi", "temperature": 0, "max_tokens": 100, "ignore_eos": true});
    let alone = cluster.http.ask("/v1/completions", &free)["choices"][0]["text"].clone();
    let bad = json!({"guided_regex": "("});
    thread::scope(|scope| {
        let constrained = scope.spawn(|| check_forms(&cluster));
        for _ in 0..10 {
            assert_eq!(cluster.http.ask("/v1/completions", &free)["choices"][0]["text"], alone);
            assert_eq!(cluster.http.post(CHAT, &body(1, bad.clone())).status, 400);
        }
        constrained.join().expect("constrained requests");
    });
    let streamed = json!({"model": "m", "prompt": "x", "temperature": 2.0, "seed": 5, "stream": true,
        "guided_regex": "[0-9]{3}-[0-9]{2}"});
    let mut stream = cluster.http.stream("/v1/completions", &streamed);
    stream.finish();
    assert_eq!(stream.text.len(), 6, "{}", stream.text);
    // What was drawn within a grammar is scored by the raw logits.
    let scored = json!({"model": "m", "prompt": "x", "guided_choice": ["yes"], "logprobs": 1});
    let answer = cluster.http.ask("/v1/completions", &scored);
    let logprobs = answer["choices"][0]["logprobs"]["token_logprobs"].as_array().expect("log-probabilities").clone();
    assert!(logprobs.iter().all(|logprob| logprob.as_f64().is_some_and(|p| p < -0.01)), "{answer}");
}

/// A model that was never taught tools is told about them, and calls the one that it has to.
#[test]
fn smollm2_calls_the_tool_that_is_asked_for() {
    let Some(model) = smollm2() else { return };
    let cluster = Cluster::start(1);
    let served = cluster.serve(&model.folder, "m", &["--max-model-len", "2048"]);
    assert_eq!(served.code, 0, "{served:?}");
    for (choice, reason) in
        [(json!("required"), "tool_calls"), (json!({"type": "function", "function": {"name": "forecast"}}), "stop")]
    {
        let body = json!({"model": "m", "temperature": 0, "tools": tools(), "tool_choice": choice,
            "messages": [{"role": "user", "content": "What will the weather be in Paris in the next 3 days?"}]});
        let answer = cluster.http.ask(CHAT, &body);
        for (found, calls) in calls(&answer) {
            assert_eq!(found, reason, "{answer}");
            assert!(!calls.is_empty());
            calls.iter().for_each(check_call);
        }
        let mut streamed = body.clone();
        streamed["stream"] = true.into();
        let mut stream = cluster.http.stream(CHAT, &streamed);
        let mut arguments = String::new();
        while let Ok(event) = stream.step() {
            for call in event["choices"][0]["delta"]["tool_calls"].as_array().into_iter().flatten() {
                arguments.push_str(call["function"]["arguments"].as_str().expect("arguments"));
            }
        }
        let whole = answer["choices"][0]["message"]["tool_calls"].as_array().expect("calls").iter();
        let whole: String = whole.map(|call| call["function"]["arguments"].as_str().expect("arguments")).collect();
        assert_eq!(arguments, whole);
    }
}
