//! Requests whose logits are edited or held to a grammar before a token is drawn, and the comparison of their answers.

use serde_json::{Value, json};

use crate::client::Http;
use crate::judge::token_ids;

/// Largest difference of a log-probability between two ways of computing in float32.
const LOGPROB_SLACK: f64 = 2e-3;

/// Every kind of edit and mask, alone and together, greedy and drawn, for model `m`.
pub fn edited_requests() -> Vec<Value> {
    let schema = json!({"type": "object", "additionalProperties": false, "required": ["city", "days"], "properties":
        {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 1, "maximum": 14}}});
    let few: Vec<u32> = (20..60).collect();
    let kinds = [
        json!({"repetition_penalty": 1.3, "logprobs": 2}),
        json!({"presence_penalty": 1.0, "frequency_penalty": 0.7}),
        json!({"presence_penalty": -1.0, "frequency_penalty": -0.5, "temperature": 0.8, "seed": 2}),
        json!({"repetition_penalty": 1.2, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 3}),
        json!({"logit_bias": {"37": 9.5, "39": 9, "41": -100}, "frequency_penalty": 1.5, "logprobs": 2}),
        json!({"allowed_token_ids": few, "frequency_penalty": 0.5}),
        json!({"allowed_token_ids": few, "temperature": 1, "min_p": 0.01, "seed": 4}),
        json!({"bad_words": ["a", "e", "the", "in", "on a"], "temperature": 1.2, "seed": 5}),
        json!({"allowed_token_ids": [30, 31, 32, 33], "bad_words": [], "stop_token_ids": [30, 31, 32], "min_tokens": 9,
               "temperature": 1, "seed": 6}),
        json!({"guided_regex": "[0-9]{3}-[a-f]{2,9}", "temperature": 1.5, "seed": 7}),
        json!({"guided_json": schema, "temperature": 1, "seed": 8}),
        json!({"guided_json": schema, "temperature": 1, "frequency_penalty": 0.5, "top_k": 9, "seed": 9}),
        json!({"guided_choice": ["yes", "no"], "repetition_penalty": 1.5, "logprobs": 2}),
    ];
    let request = |prompt: &str, kind: &Value| {
        let mut request = json!({"model": "m", "prompt": prompt, "max_tokens": 40, "temperature": 0,
            "return_token_ids": true});
        for (field, value) in kind.as_object().into_iter().flatten() {
            request[field.as_str()] = value.clone();
        }
        request
    };
    let of = |prompt: &'static str| kinds.iter().map(move |kind| request(prompt, kind)).collect::<Vec<Value>>();
    [of("Hi"), of("The weather in Paris will be fine, said the man in the house on a hill.")].concat()
}

/// The answers' only choices: one after the other, or all at once.
pub fn edited_answers(http: &Http, requests: &[Value], together: bool) -> Vec<Value> {
    let ask = |request: &Value| http.ask("/v1/completions", request)["choices"][0].clone();
    if !together {
        return requests.iter().map(ask).collect();
    }
    std::thread::scope(|scope| {
        let asked: Vec<_> = requests.iter().map(|request| scope.spawn(move || ask(request))).collect();
        asked.into_iter().map(|answer| answer.join().expect("an answer")).collect()
    })
}

/// Tokens, text and ends are the same, and log-probabilities are near each other.
pub fn check_edited(label: &str, requests: &[Value], got: &[Value], expected: &[Value]) {
    let mut different = Vec::new();
    for ((request, got), expected) in requests.iter().zip(got).zip(expected) {
        let logprobs = |choice: &Value| {
            let list = choice["logprobs"]["token_logprobs"].as_array().cloned().unwrap_or_default();
            list.iter().filter_map(Value::as_f64).collect::<Vec<f64>>()
        };
        let (a, b) = (logprobs(got), logprobs(expected));
        let near = a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| (a - b).abs() < LOGPROB_SLACK);
        let same = ["token_ids", "text", "finish_reason"].iter().all(|field| got[field] == expected[field]);
        if !near || !same {
            different.push(format!("{request}\n  got {got}\n  not {expected}"));
        }
        assert!(!token_ids(got).is_empty(), "{label}: {request}: {got}");
    }
    assert!(different.is_empty(), "{label}: {} of {}:\n{}", different.len(), got.len(), different.join("\n"));
    println!("{label}: {} answers are equal", got.len());
}
