//! Embeddings through real processes and HTTP, against hidden states that numpy computed (`tests/reference/embeddings.py`).

#![expect(clippy::expect_used, clippy::panic, reason = "helpers of tests are test code too")]

use std::path::Path;
use std::thread;

use harness::{Cluster, EMBEDDINGS, check_near, embedding_model, embedding_reference, vectors};
use serde_json::{Value, json};

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
        let refused = cluster.http.post(EMBEDDINGS, &cut);
        assert_eq!((refused.status, &refused.body["error"]["param"]), (400, &json!("dimensions")));
    }
    let full = json!({"model": "m", "input": vec![3; 256]});
    assert_eq!(vectors(cluster, &full).len(), 1, "as long as the context");
    let long = json!({"model": "m", "input": vec![3; 257]});
    let refused = cluster.http.post(EMBEDDINGS, &long);
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
    let cluster = Cluster::start(2);
    for name in ["tiny-llama", "tiny-qwen2"] {
        for (pooling, size) in [("last", "1"), ("mean", "2"), ("last", "2"), ("mean", "1")] {
            let folder = embedding_model(name, pooling);
            let (prompts, lists) = embedding_reference(name, pooling);
            serve(&cluster, folder.path(), size);
            check_vectors(&cluster, &format!("{name} {pooling} at size {size}"), &prompts, &lists);
            if name == "tiny-llama" {
                check_fields(&cluster, pooling);
            }
            assert_eq!(cluster.node.run("coordinator", &["undeploy", "m"]).code, 0);
        }
    }
}
