//! Whole models through real processes and HTTP, at several tensor-parallel sizes, against transformers.

use harness::{
    Cluster, Golden, Precision, check_agreement, check_edited, check_model, edited_answers, edited_requests, golden,
    goldens, smollm2, smollm2_bf16,
};

/// Every size from 1 to 4, in float32.
fn check_sizes(cluster: &Cluster, model: &Golden, precision: Precision) {
    for size in ["1", "2", "3", "4"] {
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
