//! Whole models through real processes and HTTP, at several tensor-parallel sizes, against transformers.

#![expect(clippy::expect_used, clippy::unwrap_used, reason = "helpers of tests are test code too")]

use harness::{Cluster, Golden, GoldenPrompt, goldens, smollm2, smollm2_bf16};
use serde_json::{Value, json};

/// Largest difference of ln p with float32: sums in another order differ by less, and a wrong term by more.
const TINY_TOLERANCE: f64 = 5e-4;
const SMOLLM2_TOLERANCE: f64 = 1e-3;
/// Two best logits nearer than this may change places.
const TINY_MARGIN: f64 = 4e-4;
const SMOLLM2_MARGIN: f64 = 0.005;

struct Served<'a> {
    cluster: &'a Cluster,
    model: &'a Golden,
    tolerance: f64,
    margin: f64,
    label: String,
}

impl Served<'_> {
    fn complete(&self, body: Value) -> Value {
        let mut body = body;
        body["model"] = self.model.name.clone().into();
        self.cluster.http.ask("/v1/completions", &body)
    }

    /// ln p of the prompt, and of the best tokens behind it.
    fn check_prompt(&self, prompt: &GoldenPrompt) {
        let label = format!("{} {}", self.label, prompt.name);
        // With one more token the last entry tells what stands behind the prompt.
        let ids: Vec<u32> = prompt.ids.iter().chain(prompt.greedy.first()).copied().collect();
        let answer = self.complete(json!({"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 20}));
        let entries = answer["choices"][0]["prompt_logprobs"].as_array().expect("prompt_logprobs");
        assert_eq!(entries.len(), ids.len(), "{label}");
        assert!(entries[0].is_null(), "{label}");
        for (at, expected) in prompt.prompt_logprobs.iter().enumerate().skip(1) {
            let found = entries[at][prompt.ids[at].to_string()]["logprob"].as_f64().expect("the actual token");
            let expected = expected.expect("a value behind the first");
            assert!((found - expected).abs() <= self.tolerance, "{label} position {at}: {found}, not {expected}");
        }
        let last = &entries[prompt.ids.len()];
        for (id, expected) in &prompt.last_top {
            // A token at the edge of the 20 best may have changed places with the next one.
            let Some(found) = last[id.to_string()]["logprob"].as_f64() else { continue };
            assert!((found - expected).abs() <= self.tolerance, "{label} last, token {id}: {found}, not {expected}");
        }
    }

    fn check_greedy(&self, prompt: &GoldenPrompt) {
        let label = format!("{} {}", self.label, prompt.name);
        let count = prompt.greedy.len();
        let answer = self.complete(json!({
            "prompt": prompt.ids, "max_tokens": count, "temperature": 0, "ignore_eos": true, "logprobs": 1,
            "return_token_ids": true,
        }));
        let choice = &answer["choices"][0];
        let ids: Vec<u32> =
            choice["token_ids"].as_array().expect("ids").iter().map(|i| i.as_u64().unwrap() as u32).collect();
        assert_eq!(ids.len(), count, "{label}");
        for (step, (found, expected)) in ids.iter().zip(&prompt.greedy).enumerate() {
            if found != expected {
                let margin = prompt.margins[step];
                assert!(margin <= self.margin, "{label} step {step}: {found}, not {expected}, at a margin of {margin}");
                return;
            }
            let logprob = choice["logprobs"]["token_logprobs"][step].as_f64().expect("a logprob");
            let wanted = prompt.greedy_logprobs[step];
            assert!((logprob - wanted).abs() <= self.tolerance, "{label} step {step}: {logprob}, not {wanted}");
        }
    }
}

fn check_model(cluster: &Cluster, model: &Golden, size: u32, tolerance: f64, margin: f64) {
    let size = size.to_string();
    let flags = ["--tensor-parallel-size", &size, "--dtype", "float32", "--max-model-len", "1024"];
    cluster.serve(&model.folder, &model.name, &flags);
    let served = Served { cluster, model, tolerance, margin, label: format!("{} TP {size}", model.name) };
    for prompt in &model.prompts {
        served.check_prompt(prompt);
        served.check_greedy(prompt);
    }
    let removed = cluster.node.run("coordinator", &["undeploy", &model.name]);
    assert_eq!(removed.code, 0, "{}", removed.stderr);
}

#[test]
fn tiny_models_compute_what_transformers_computes_at_every_size() {
    let cluster = Cluster::start(4);
    for model in goldens() {
        for size in 1..=4 {
            check_model(&cluster, &model, size, TINY_TOLERANCE, TINY_MARGIN);
        }
    }
}

#[test]
fn smollm2_computes_what_transformers_computes_at_every_size() {
    let Some(model) = smollm2() else { return };
    let cluster = Cluster::start(4);
    for size in 1..=4 {
        check_model(&cluster, &model, size, SMOLLM2_TOLERANCE, SMOLLM2_MARGIN);
    }
}

#[test]
fn smollm2_in_bfloat16_computes_what_transformers_computes_at_every_size() {
    let Some(model) = smollm2_bf16() else { return };
    let cluster = Cluster::start(4);
    for size in 1..=4 {
        check_model(&cluster, &model, size, SMOLLM2_TOLERANCE, SMOLLM2_MARGIN);
    }
}

/// With `--dtype auto` activations are quantised: the best token is the same wherever it leads clearly.
#[test]
fn smollm2_with_quantised_activations_stays_close() {
    let Some(model) = smollm2() else { return };
    let cluster = Cluster::start(2);
    for size in ["1", "2"] {
        cluster.serve(&model.folder, &model.name, &["--tensor-parallel-size", size, "--max-model-len", "1024"]);
        let (mut differences, mut count) = (0.0, 0.0);
        for prompt in &model.prompts {
            let body = json!({
                "model": model.name, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1,
                "prompt": prompt.ids.iter().chain(&prompt.greedy).collect::<Vec<_>>(),
            });
            let answer = cluster.http.ask("/v1/completions", &body);
            let entries = answer["choices"][0]["prompt_logprobs"].as_array().expect("prompt_logprobs");
            for (step, id) in prompt.greedy.iter().enumerate() {
                let entry = &entries[prompt.ids.len() + step][id.to_string()];
                let logprob = entry["logprob"].as_f64().expect("the actual token");
                differences += (logprob - prompt.greedy_logprobs[step]).abs();
                count += 1.0;
                if prompt.margins[step] > 0.4 {
                    assert_eq!(
                        entry["rank"], 1,
                        "TP {size} {} step {step}: margin {}",
                        prompt.name, prompt.margins[step]
                    );
                }
            }
        }
        let mean = differences / count;
        println!("TP {size}: mean difference of ln p {mean:.4} over {count} steps");
        assert!(mean < 0.15, "TP {size}: mean difference of ln p {mean}");
        assert_eq!(cluster.node.run("coordinator", &["undeploy", &model.name]).code, 0);
    }
}
