//! Whole models through real processes and HTTP, at several tensor-parallel sizes, against transformers.

use std::sync::Barrier;
use std::thread;

use harness::{
    Cluster, Golden, Precision, StreamEnd, check_agreement, check_edited, check_model, edited_answers, edited_requests,
    golden, goldens, smollm2, smollm2_bf16,
};
use serde_json::{Value, json};

/// Every size from 1 to 4 that has a head for each rank, in float32.
fn check_sizes(cluster: &Cluster, model: &Golden, precision: Precision) {
    for size in ["1", "2", "3", "4"].into_iter().filter(|size| model.splits_into(size)) {
        check_model(cluster, model, &["--dtype", "float32", "--tensor-parallel-size", size], precision);
    }
}

#[test]
fn tiny_models_compute_what_transformers_computes_at_every_size() {
    let cluster = Cluster::start(4);
    for model in goldens() {
        check_sizes(&cluster, &model, Precision::TINY);
    }
}

#[test]
fn smollm2_computes_what_transformers_computes_at_every_size() {
    let Some(model) = smollm2() else { return };
    check_sizes(&Cluster::start(4), &model, Precision::SMOLLM2);
}

#[test]
fn smollm2_in_bfloat16_computes_what_transformers_computes_at_every_size() {
    let Some(model) = smollm2_bf16() else { return };
    check_sizes(&Cluster::start(4), &model, Precision::SMOLLM2);
}

/// With `--dtype auto` activations are quantised.
#[test]
fn smollm2_with_quantised_activations_stays_close() {
    let Some(model) = smollm2() else { return };
    let cluster = Cluster::start(2);
    for size in ["1", "2"] {
        check_agreement(&cluster, &model, &["--tensor-parallel-size", size]);
    }
}

/// Masks and edits change every rank's part of the logits: the tokens are those of one rank.
#[test]
fn edited_requests_get_the_same_tokens_at_every_size() {
    let cluster = Cluster::start(2);
    let requests = edited_requests();
    let [one, two] = ["1", "2"].map(|size| {
        let flags = ["--dtype", "float32", "--tensor-parallel-size", size, "--max-num-seqs", "16"];
        cluster.serve(&golden("tiny-llama").folder, "m", &flags);
        let answers = edited_answers(&cluster.http, &requests, size == "2");
        assert_eq!(cluster.node.run("coordinator", &["undeploy", "m"]).code, 0);
        answers
    });
    check_edited("two ranks, and all at once", &requests, &two, &one);
}

/// Requests that draw in every way, each with a seed of its own.
fn seeded(number: u64) -> Value {
    let prompt: Vec<u64> = (0..=number % 7).map(|at| (number * 31 + at * 17) % 500).collect();
    let mut body = json!({"prompt": prompt, "max_tokens": 120, "ignore_eos": true, "return_token_ids": true,
        "seed": 1000 + number, "temperature": 0.7 + 0.1 * (number % 8) as f64});
    match number % 4 {
        1 => body["top_k"] = 20.into(),
        2 => body["top_p"] = 0.9.into(),
        3 => {
            body["min_p"] = 0.02.into();
            body["frequency_penalty"] = 0.5.into();
        }
        _ => {}
    }
    body
}

#[test]
fn a_seed_gives_the_same_text_alone_and_in_a_batch_of_32_at_size_1_and_2() {
    const NUM_REQUESTS: u64 = 32;
    let cluster = Cluster::start(3);
    let folder = golden("tiny-llama").folder;
    for size in ["1", "2"] {
        let flags = ["--dtype", "float32", "--no-enable-prefix-caching", "--tensor-parallel-size", size];
        cluster.serve(&folder, size, &flags);
    }
    let ask = |model: &str, number| {
        let mut body = seeded(number);
        body["model"] = model.into();
        let mut stream = cluster.http.stream("/v1/completions", &body);
        assert_eq!(stream.finish(), StreamEnd::Done);
        stream.token_ids
    };
    let alone: Vec<Vec<u32>> = (0..NUM_REQUESTS).map(|number| ask("1", number)).collect();
    assert!(alone.iter().all(|tokens| tokens.len() == 120));
    for model in ["1", "2"] {
        let barrier = Barrier::new(NUM_REQUESTS as usize);
        thread::scope(|scope| {
            let start = |number: u64| {
                let (ask, barrier) = (&ask, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    ask(model, number)
                })
            };
            let together: Vec<_> = (0..NUM_REQUESTS).map(start).collect();
            for (number, (tokens, alone)) in together.into_iter().zip(&alone).enumerate() {
                let tokens = tokens.join().expect("a stream");
                assert_eq!(tokens, *alone, "request {number} in a batch, size {model}");
            }
        });
    }
    assert_eq!(ask("2", 5), alone[5], "alone, size 2");
}
