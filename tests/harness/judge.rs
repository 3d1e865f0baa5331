//! Judges a served model by reference values: how far ln p may be away, and which tokens must be the same.

use serde_json::{Value, json};

use crate::{Cluster, Golden, GoldenPrompt};

/// How near a computation comes to float32; `tests/goldens/README.md` has the figures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Precision {
    /// Largest difference of ln p.
    pub tolerance: f64,
    /// Two best logits nearer than this may change places.
    pub margin: f64,
}

impl Precision {
    /// float32, on the tiny models: sums in another order differ by less, and a wrong term by more.
    pub const TINY: Self = Self { tolerance: 5e-4, margin: 4e-4 };
    /// float32, on SmolLM2.
    pub const SMOLLM2: Self = Self { tolerance: 1e-3, margin: 0.005 };
    /// Weights and activations in float16, sums in float32.
    pub const FLOAT16: Self = Self { tolerance: 0.1, margin: 0.2 };
    /// The same in bfloat16, which has eight times the rounding.
    pub const BFLOAT16: Self = Self { tolerance: 0.5, margin: 0.5 };
}

/// Serves a model with these flags, compares it with its reference, and removes it.
pub fn check_model(cluster: &Cluster, model: &Golden, flags: &[&str], precision: Precision) {
    let _served = served(cluster, model, flags);
    let label = format!("{} {}", model.name, flags.join(" "));
    for prompt in &model.prompts {
        check_prompt(cluster, model, prompt, precision, &label);
        check_greedy(cluster, model, prompt, precision, &label);
    }
}

/// Serves a model whose activations are rounded or quantised: the best token is the same wherever it leads clearly, and ln p
/// is near the reference on the whole.
pub fn check_agreement(cluster: &Cluster, model: &Golden, flags: &[&str]) {
    let _served = served(cluster, model, flags);
    let label = format!("{} {}", model.name, flags.join(" "));
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
                assert_eq!(entry["rank"], 1, "{label} {} step {step}: margin {}", prompt.name, prompt.margins[step]);
            }
        }
    }
    let mean = differences / count;
    println!("{label}: mean difference of ln p {mean:.4} over {count} steps");
    assert!(mean < 0.15, "{label}: mean difference of ln p {mean}");
}

/// A deployment that is removed with its value.
struct Served<'a> {
    cluster: &'a Cluster,
    model: &'a Golden,
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        let removed = self.cluster.node.run("coordinator", &["undeploy", &self.model.name]);
        assert!(std::thread::panicking() || removed.code == 0, "{}", removed.stderr);
    }
}

fn served<'a>(cluster: &'a Cluster, model: &'a Golden, flags: &[&str]) -> Served<'a> {
    cluster.serve(&model.folder, &model.name, &[&["--max-model-len", "1024"], flags].concat());
    Served { cluster, model }
}

fn complete(cluster: &Cluster, model: &Golden, body: Value) -> Value {
    let mut body = body;
    body["model"] = model.name.clone().into();
    cluster.http.ask("/v1/completions", &body)
}

/// ln p of the prompt, and of the best tokens behind it.
fn check_prompt(cluster: &Cluster, model: &Golden, prompt: &GoldenPrompt, precision: Precision, label: &str) {
    let (label, tolerance) = (format!("{label} {}", prompt.name), precision.tolerance);
    // With one more token the last entry tells what stands behind the prompt.
    let ids: Vec<u32> = prompt.ids.iter().chain(prompt.greedy.first()).copied().collect();
    let body = json!({"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 20});
    let answer = complete(cluster, model, body);
    let entries = answer["choices"][0]["prompt_logprobs"].as_array().expect("prompt_logprobs");
    assert_eq!(entries.len(), ids.len(), "{label}");
    assert!(entries[0].is_null(), "{label}");
    for (at, expected) in prompt.prompt_logprobs.iter().enumerate().skip(1) {
        let found = entries[at][prompt.ids[at].to_string()]["logprob"].as_f64().expect("the actual token");
        let expected = expected.expect("a value behind the first");
        assert!((found - expected).abs() <= tolerance, "{label} position {at}: {found}, not {expected}");
    }
    let last = &entries[prompt.ids.len()];
    for (id, expected) in &prompt.last_top {
        // A token at the edge of the 20 best may have changed places with the next one.
        let Some(found) = last[id.to_string()]["logprob"].as_f64() else { continue };
        assert!((found - expected).abs() <= tolerance, "{label} last, token {id}: {found}, not {expected}");
    }
}

fn check_greedy(cluster: &Cluster, model: &Golden, prompt: &GoldenPrompt, precision: Precision, label: &str) {
    let label = format!("{label} {}", prompt.name);
    let count = prompt.greedy.len();
    let body = json!({
        "prompt": prompt.ids, "max_tokens": count, "temperature": 0, "ignore_eos": true, "logprobs": 1,
        "return_token_ids": true,
    });
    let answer = complete(cluster, model, body);
    let choice = &answer["choices"][0];
    let ids = token_ids(choice);
    assert_eq!(ids.len(), count, "{label}");
    for (step, (found, expected)) in ids.iter().zip(&prompt.greedy).enumerate() {
        if found != expected {
            let margin = prompt.margins[step];
            assert!(
                margin <= precision.margin,
                "{label} step {step}: {found}, not {expected}, at a margin of {margin}"
            );
            return;
        }
        let logprob = choice["logprobs"]["token_logprobs"][step].as_f64().expect("a logprob");
        let wanted = prompt.greedy_logprobs[step];
        assert!((logprob - wanted).abs() <= precision.tolerance, "{label} step {step}: {logprob}, not {wanted}");
    }
}

/// The ids of a choice that was asked for them.
pub fn token_ids(choice: &Value) -> Vec<u32> {
    let ids = choice["token_ids"].as_array().expect("token_ids");
    ids.iter().map(|id| u32::try_from(id.as_u64().expect("an id")).expect("an id")).collect()
}
