//! Embeddings through real processes and HTTP, against hidden states that numpy computed (`tests/reference/embeddings.py`).

#![expect(clippy::expect_used, clippy::panic, reason = "helpers of tests are test code too")]

use std::fs;
use std::path::Path;
use std::thread;

use base64::Engine;
use harness::{Cluster, golden, reference};
use serde_json::{Value, json};
use tempfile::TempDir;

const PATH: &str = "/v1/embeddings";
/// Largest difference of a number of a vector of length 1.
const SLACK: f64 = 5e-4;

/// A tiny model whose files say how its embeddings are made: `last` as a causal model has it, `mean` as sentence-transformers does.
fn model(name: &str, pooling: &str) -> TempDir {
    let folder = TempDir::new().expect("a folder");
    for entry in fs::read_dir(golden(name).folder).expect("a model").flatten() {
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("a copy");
    }
    let write = |path: &str, value: Value| fs::write(folder.path().join(path), value.to_string()).expect("a file");
    if pooling == "mean" {
        let kind = |name: &str| format!("sentence_transformers.models.{name}");
        fs::create_dir(folder.path().join("1_Pooling")).expect("a folder");
        write("1_Pooling/config.json", json!({"pooling_mode_mean_tokens": true, "pooling_mode_lasttoken": false}));
        write(
            "modules.json",
            json!([
                {"idx": 0, "name": "0", "path": "", "type": kind("Transformer")},
                {"idx": 1, "name": "1", "path": "1_Pooling", "type": kind("Pooling")},
                {"idx": 2, "name": "2", "path": "2_Normalize", "type": kind("Normalize")},
            ]),
        );
        let config = fs::read(folder.path().join("config.json")).expect("a configuration");
        let mut config: Value = serde_json::from_slice(&config).expect("JSON");
        config["matryoshka_dimensions"] = json!([16, 64]);
        write("config.json", config);
    }
    folder
}

fn numbers(embedding: &Value) -> Vec<f64> {
    if let Some(text) = embedding.as_str() {
        let bytes = base64::engine::general_purpose::STANDARD.decode(text).expect("base64");
        return bytes.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value).into()).collect();
    }
    embedding
        .as_array()
        .expect("numbers")
        .iter()
        .filter_map(Value::as_f64)
        .map(|value| f64::from(value as f32))
        .collect()
}

fn vectors(cluster: &Cluster, body: &Value) -> Vec<Vec<f64>> {
    let answer = cluster.http.ask(PATH, body);
    let data = answer["data"].as_array().expect("vectors");
    assert!(data.iter().enumerate().all(|(at, entry)| entry["index"] == at), "{answer}");
    data.iter().map(|entry| numbers(&entry["embedding"])).collect()
}

fn check_near(what: &str, got: &[Vec<f64>], expected: &[Vec<f64>]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (got, expected) in got.iter().zip(expected) {
        assert_eq!(got.len(), expected.len(), "{what}");
        let most = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(most < SLACK, "{what}: off by {most}");
    }
}

/// Alone, together, twice, in both encodings, and beside requests that generate.
fn check_vectors(cluster: &Cluster, what: &str, prompts: &Value, expected: &[Vec<f64>]) {
    let all = vectors(cluster, &json!({"model": "m", "input": prompts}));
    check_near(what, &all, expected);
    let encoded = vectors(cluster, &json!({"model": "m", "input": prompts, "encoding_format": "base64"}));
    assert_eq!(encoded, all, "{what}: again, from the prefix cache where that is used, as base64");
    let generate = json!({"model": "m", "prompt": [5, 6, 7], "temperature": 0, "max_tokens": 60, "ignore_eos": true});
    let alone = cluster.http.ask("/v1/completions", &generate)["choices"][0]["text"].clone();
    thread::scope(|scope| {
        let texts = [(); 3].map(|()| scope.spawn(|| cluster.http.ask("/v1/completions", &generate)));
        for (prompt, expected) in prompts.as_array().expect("prompts").iter().zip(&all) {
            let got = vectors(cluster, &json!({"model": "m", "input": prompt}));
            assert_eq!(got, std::slice::from_ref(expected), "{what}: alone, beside others that generate");
        }
        for text in texts {
            assert_eq!(text.join().expect("an answer")["choices"][0]["text"], alone, "{what}");
        }
    });
}

/// Widths that the model's files allow, and no others; texts; limits.
fn check_fields(cluster: &Cluster, pooling: &str) {
    let cut = json!({"model": "m", "input": "A cat", "dimensions": 16});
    if pooling == "mean" {
        let [vector] = &vectors(cluster, &cut)[..] else { panic!("one vector") };
        assert!(vector.len() == 16 && (vector.iter().map(|value| value * value).sum::<f64>() - 1.0).abs() < 1e-5);
    } else {
        let refused = cluster.http.post(PATH, &cut);
        assert_eq!((refused.status, &refused.body["error"]["param"]), (400, &json!("dimensions")));
    }
    let full = json!({"model": "m", "input": vec![3; 256]});
    assert_eq!(vectors(cluster, &full).len(), 1, "as long as the context");
    let long = json!({"model": "m", "input": vec![3; 257]});
    let refused = cluster.http.post(PATH, &long);
    assert_eq!((refused.status, &refused.body["error"]["code"]), (400, &json!("context_length_exceeded")));
    let many: Vec<Vec<u32>> = (0..100).map(|at| vec![at + 1]).collect();
    let all = vectors(cluster, &json!({"model": "m", "input": many}));
    assert_eq!(all[77..78], vectors(cluster, &json!({"model": "m", "input": many[77]})), "more than a step takes");
}

fn serve(cluster: &Cluster, folder: &Path, size: &str) {
    // Steps are short, so that the longest prompt comes in chunks.
    let flags = ["--dtype", "float32", "--tensor-parallel-size", size, "--max-num-batched-tokens", "48"];
    let flags = [&flags[..], &["--max-model-len", "256", "--max-num-seqs", "40"]].concat();
    let served = cluster.serve(folder, "m", &flags);
    assert_eq!(served.code, 0, "{served:?}");
}

#[test]
fn embeddings_are_the_hidden_states_that_numpy_computes() {
    let expected = reference("embeddings/tiny.json");
    let cluster = Cluster::start(2);
    for name in ["tiny-llama", "tiny-qwen2"] {
        for (pooling, size) in [("last", "1"), ("mean", "2"), ("last", "2"), ("mean", "1")] {
            let folder = model(name, pooling);
            serve(&cluster, folder.path(), size);
            let lists = expected["models"][name][pooling].as_array().expect("vectors");
            let lists: Vec<Vec<f64>> = lists.iter().map(numbers).collect();
            check_vectors(&cluster, &format!("{name} {pooling} at size {size}"), &expected["prompts"], &lists);
            if name == "tiny-llama" {
                check_fields(&cluster, pooling);
            }
            assert_eq!(cluster.node.run("coordinator", &["undeploy", "m"]).code, 0);
        }
    }
}
