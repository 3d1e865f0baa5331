//! Embeddings against hidden states that numpy computed (`tests/reference/embeddings.py`).

use std::fs;

use base64::Engine;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{Cluster, golden, reference};

/// Where embeddings are asked for.
pub const EMBEDDINGS: &str = "/v1/embeddings";
/// Largest difference of a number of a vector of length 1.
const SLACK: f64 = 5e-4;

/// A tiny model whose files say how its embeddings are made: `last` as a causal model has it, `mean` as sentence-transformers does.
pub fn embedding_model(name: &str, pooling: &str) -> TempDir {
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

/// The vectors of an answer.
pub fn vectors(cluster: &Cluster, body: &Value) -> Vec<Vec<f64>> {
    let answer = cluster.http.ask(EMBEDDINGS, body);
    let data = answer["data"].as_array().expect("vectors");
    assert!(data.iter().enumerate().all(|(at, entry)| entry["index"] == at), "{answer}");
    data.iter().map(|entry| numbers(&entry["embedding"])).collect()
}

/// Every number is near the expected one.
pub fn check_near(what: &str, got: &[Vec<f64>], expected: &[Vec<f64>]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (got, expected) in got.iter().zip(expected) {
        assert_eq!(got.len(), expected.len(), "{what}");
        let most = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(most < SLACK, "{what}: off by {most}");
    }
}

/// The prompts that have a reference, and the vectors of a model for them.
pub fn embedding_reference(name: &str, pooling: &str) -> (Value, Vec<Vec<f64>>) {
    let expected = reference("embeddings/tiny.json");
    let lists = expected["models"][name][pooling].as_array().expect("vectors");
    (expected["prompts"].clone(), lists.iter().map(numbers).collect())
}
