//! Beam searches by real ranks against those of transformers and of vLLM's definition; see `tests/goldens`.

#![expect(clippy::expect_used, reason = "helpers of tests are test code too")]

use std::thread;

use harness::{Cluster, Http, golden, reference};
use serde_json::{Value, json};

/// Scores of float32 in any order of summation.
const TOLERANCE: f64 = 1e-3;

/// A search with what it should find: sequences with a sum of log-probabilities or a score.
struct Case {
    fields: Value,
    length_penalty: f64,
    expected: Vec<Value>,
}

fn cases(record: &Value) -> Vec<Case> {
    let eos = &record["eos_token_id"];
    let list = |value: &Value| value.as_array().expect("a list").clone();
    let mut cases = Vec::new();
    for variant in list(&record["transformers"]) {
        let fields = json!({"early_stopping": variant["early_stopping"], "stop_token_ids": [eos]});
        cases.push((fields, variant["length_penalty"].clone(), list(&variant["sequences"])));
    }
    for variant in list(&record["cumulative_2x_candidates"]) {
        let fields = json!({"stop_token_ids": [eos]});
        cases.push((fields, variant["length_penalty"].clone(), list(&variant["sequences"])));
    }
    cases.push((json!({"early_stopping": false}), 1.0.into(), list(&record["no_eos"])));
    let case = |(fields, length_penalty, expected): (Value, Value, _)| Case {
        fields,
        length_penalty: length_penalty.as_f64().expect("a number"),
        expected,
    };
    cases.into_iter().map(case).collect()
}

fn check(http: &Http, model: &str, prompt: &Value, case: &Case) {
    let mut body = json!({"model": model, "prompt": prompt, "use_beam_search": true, "n": 4, "max_tokens": 16,
        "length_penalty": case.length_penalty, "ignore_eos": true, "logprobs": 0, "return_token_ids": true});
    for (name, value) in case.fields.as_object().expect("an object") {
        body[name.as_str()] = value.clone();
    }
    let answer = http.ask("/v1/completions", &body);
    let choices = answer["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), case.expected.len());
    for (choice, expected) in choices.iter().zip(&case.expected) {
        assert_eq!(choice["token_ids"], expected["ids"], "{model} {body}");
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().expect("log-probabilities");
        let sum: f64 = logprobs.iter().filter_map(Value::as_f64).sum();
        let (found, wanted) = match expected["cum_logprob"].as_f64() {
            Some(wanted) => (sum, wanted),
            None => {
                (sum / (logprobs.len() as f64).powf(case.length_penalty), expected["score"].as_f64().expect("a score"))
            }
        };
        assert!((found - wanted).abs() < TOLERANCE, "{found} for {wanted}: {model} {body}");
        let ends = choice["stop_reason"] != Value::Null;
        assert_eq!(choice["finish_reason"], if ends { "stop" } else { "length" });
    }
}

fn check_all(tensor_parallel_size: u32) {
    let models = ["tiny-llama", "tiny-qwen2"];
    let cluster = Cluster::start(models.len() as u32 * tensor_parallel_size);
    for name in models {
        let size = tensor_parallel_size.to_string();
        let flags = ["--dtype", "float32", "--tensor-parallel-size", &size];
        let served = cluster.serve(&golden(name).folder, name, &flags);
        assert_eq!(served.code, 0, "{served:?}");
        let references = reference(&format!("decoding/beam-{name}.json"));
        for record in references["records"].as_array().expect("records") {
            let cases = cases(record);
            assert_eq!(cases.len(), 12);
            thread::scope(|scope| {
                for case in &cases {
                    scope.spawn(|| check(&cluster.http, name, &record["prompt_ids"], case));
                }
            });
        }
    }
}

#[test]
fn searches_find_what_the_references_find() {
    check_all(1);
}

#[test]
fn two_ranks_find_the_same() {
    check_all(2);
}
