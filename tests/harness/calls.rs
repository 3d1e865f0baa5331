//! Tool calls of a model that says anything: random weights at temperature 2, held to bounded schemas, in every format.
//!
//! **Invariant:** what a run says is judged by [`fit`](crate::fit) alone, which shares nothing with the server.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{Cluster, Fit, fit, golden};

/// Formats, the marks that their models have as tokens, and whether those are control tokens.
const FORMATS: [(&str, &[&str], bool); 6] = [
    ("hermes", &["<tool_call>", "</tool_call>"], false),
    ("qwen3_coder", &["<tool_call>", "</tool_call>"], false),
    ("mistral", &["[TOOL_CALLS]"], true),
    ("internlm", &["<|action_start|>", "<|plugin|>", "<|action_end|>"], true),
    ("llama3_json", &[], true),
    ("pythonic", &[], true),
];
/// The first row of logits that no token of the tiny model uses.
const FIRST_FREE_ID: u32 = 512;
/// The tiny model's end token.
const END: u32 = 511;

/// How a request asks for a call.
const KINDS: [&str; 3] = ["required", "named", "strict"];

/// What came of the runs of one format and kind.
#[derive(Debug, Default, Clone, Copy)]
pub struct CallFigures {
    /// Answers.
    pub runs: usize,
    /// Answers that came to their end.
    pub ended: usize,
    /// Calls whose arguments are whole.
    pub calls: usize,
    /// Calls that were cut by the length of the answer, and can be continued.
    pub cut: usize,
}

/// Schemas by the name of their function.
fn schemas() -> BTreeMap<&'static str, Value> {
    let forecast = json!({"type": "object", "additionalProperties": false, "required": ["city", "days"], "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    }});
    let plan = json!({"type": "object", "additionalProperties": false, "required": ["place", "tags"], "properties": {
        "place": {"type": "object", "additionalProperties": false, "required": ["at"], "properties": {
            "at": {"type": "object", "additionalProperties": false, "required": ["lat", "sure"], "properties": {
                "lat": {"type": "integer", "minimum": -90, "maximum": 90}, "sure": {"type": "boolean"}}},
            "name": {"type": "string", "minLength": 1, "maxLength": 5}}},
        "tags": {"type": "array", "maxItems": 3, "items": {"enum": ["a", "b\"c", "déjà"]}},
        "note": {"type": "string", "minLength": 1, "maxLength": 6},
    }});
    let now = json!({"type": "object", "additionalProperties": false, "properties": {}});
    BTreeMap::from([("forecast", forecast), ("plan", plan), ("now", now)])
}

fn body(kind: &str, format: &(&str, &[&str], bool), seed: u64, num_choices: usize) -> Value {
    let tool = |(name, schema): (&&str, &Value)| json!({"type": "function", "function": {"name": name, "parameters": schema, "strict": kind == "strict"}});
    let tools: Vec<Value> = schemas().iter().map(tool).collect();
    // Some have no room to end.
    let max_tokens = if seed.is_multiple_of(3) { 40 } else { 260 };
    let mut body = json!({"model": format.0, "messages": [{"role": "user", "content": "Hi"}], "temperature": 2.0,
        "n": num_choices, "seed": seed * 1000, "max_tokens": max_tokens, "tools": tools,
        "parallel_tool_calls": seed.is_multiple_of(2)});
    match kind {
        "required" => body["tool_choice"] = "required".into(),
        "named" => {
            let name = if seed.is_multiple_of(2) { "plan" } else { "forecast" };
            body["tool_choice"] = json!({"type": "function", "function": {"name": name}});
        }
        _ => {
            // The model is free to call; it would not think of it by itself, nor of ending. Its calls are one at a time, since
            // it would go on for ever.
            body["parallel_tool_calls"] = false.into();
            let mark = match format.0 {
                "llama3_json" => leading("{"),
                "pythonic" => leading("["),
                _ => FIRST_FREE_ID,
            };
            body["logit_bias"] = json!({mark.to_string(): 24, END.to_string(): 18});
        }
    }
    body
}

/// The token of a character.
fn leading(c: &str) -> u32 {
    let path = golden("tiny-llama").folder.join("tokenizer.json");
    let tokenizer: Value = serde_json::from_slice(&fs::read(path).expect("a tokenizer")).expect("JSON");
    u32::try_from(tokenizer["model"]["vocab"][c].as_u64().expect("a token")).expect("an id")
}

/// The tiny model with the marks of a format among its tokens.
fn model(marks: &[&str], special: bool) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for entry in fs::read_dir(golden("tiny-llama").folder).expect("the tiny model").flatten() {
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("a copy");
    }
    let added = (FIRST_FREE_ID..).zip(marks).map(|(id, mark)| {
        json!({"id": id, "content": mark, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": special})
    });
    rewrite(&folder.path().join("tokenizer.json"), |tokenizer| {
        tokenizer["added_tokens"].as_array_mut().expect("a list").extend(added);
    });
    folder
}

fn rewrite(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON");
    change(&mut value);
    fs::remove_file(path).and_then(|()| fs::write(path, value.to_string())).expect("a file");
}

/// Serves the tiny model in every format, and asks for calls in every way: `num_requests` requests of `num_choices` answers
/// each. Every call is told to `tell`: the schema, the arguments, and whether they are whole.
///
/// # Panics
/// If an answer breaks its schema.
pub fn check_calls(
    cluster: &Cluster,
    num_requests: u64,
    num_choices: usize,
    tell: &mut dyn FnMut(&Value, &str, bool),
) -> Vec<(String, CallFigures)> {
    let mut all = Vec::new();
    for format in &FORMATS {
        let folder = model(format.1, format.2);
        let flags = ["--dtype", "float32", "--tool-call-parser", format.0];
        cluster.serve(folder.path(), format.0, &flags);
        for kind in KINDS {
            let mut figures = CallFigures::default();
            for seed in 0..num_requests {
                let answer = cluster.http.ask("/v1/chat/completions", &body(kind, format, seed, num_choices));
                for choice in answer["choices"].as_array().expect("choices") {
                    judge(&format!("{} {kind}, seed {seed}", format.0), kind, choice, &mut figures, tell);
                }
            }
            all.push((format!("{} {kind}", format.0), figures));
        }
        assert_eq!(cluster.node.run("coordinator", &["undeploy", format.0]).code, 0);
    }
    all
}

fn judge(label: &str, kind: &str, choice: &Value, figures: &mut CallFigures, tell: &mut dyn FnMut(&Value, &str, bool)) {
    let schemas = schemas();
    let reason = choice["finish_reason"].as_str().expect("a reason");
    let calls = choice["message"]["tool_calls"].as_array().cloned().unwrap_or_default();
    let content = choice["message"]["content"].as_str().unwrap_or_default();
    figures.runs += 1;
    figures.ended += usize::from(reason != "length");
    for (index, call) in calls.iter().enumerate() {
        let name = call["function"]["name"].as_str().expect("a name");
        let arguments = call["function"]["arguments"].as_str().expect("arguments are text");
        let schema = schemas.get(name).unwrap_or_else(|| panic!("{label}: {name} is no tool"));
        let found = fit(schema, arguments).unwrap_or_else(|wrong| panic!("{label}: {wrong}"));
        tell(schema, arguments, found == Fit::Whole);
        match found {
            Fit::Whole => figures.calls += 1,
            Fit::Prefix => {
                let is_last = index + 1 == calls.len();
                assert!(reason == "length" && is_last, "{label}: {reason} after {arguments:?}");
                figures.cut += 1;
            }
        }
    }
    let expected = match kind {
        "named" => "stop",
        "required" => "tool_calls",
        _ if calls.is_empty() => "stop",
        _ => "tool_calls",
    };
    assert!(reason == expected || reason == "length", "{label}: {reason} with {calls:?}");
    if kind != "strict" {
        assert!(reason == "length" || content.is_empty() && !calls.is_empty(), "{label}: {choice}");
        assert!(is_head(content), "{label}: {content:?} is no beginning of a call");
    }
}

/// True for what may stand before the name of a call is known: a piece of what every call begins with.
fn is_head(content: &str) -> bool {
    let content = content.trim();
    let written = [
        "<tool_call>\n{\"name\": \"",
        "<tool_call>\n<function=",
        "[TOOL_CALLS][{\"name\": \"",
        "<|action_start|><|plugin|>\n{\"name\": \"",
        "; {\"name\": \"",
        ", {\"name\": \"",
        "[",
        ", ",
    ];
    let names = schemas();
    written.iter().any(|head| names.keys().any(|name| format!("{head}{name}").contains(content)))
}
