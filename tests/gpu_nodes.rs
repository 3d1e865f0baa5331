//! Ranks of several nodes, which exchange through NCCL: two nodes are two folders and two devices of one machine.
//!
//! Not part of `cargo test`: it needs two devices, and says so where one is visible. `cargo xtask gpu-test` runs it.

#![expect(clippy::panic, reason = "helpers of tests are test code too")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use harness::{Cluster, Node, Precision, Processes, StreamEnd, check_model, golden, model_config, token_ids, wait_for};
use phalanx_kernels::cuda::devices;
use serde_json::{Value, json};

/// Ranks that reach each other's memory would not need NCCL, be their nodes two or one.
const SPREAD: [&str; 5] =
    ["--tensor-parallel-size", "2", "--placement-strategy", "spread", "--disable-custom-all-reduce"];
/// Longest pause of a stream whose rank was killed.
const PAUSE_MAX: Duration = Duration::from_secs(20);
/// Tokens of the timed answer.
const NUM_TIMED: u32 = 128;

/// How NCCL sees the two nodes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Hosts {
    /// As what they are: it finds the way between two devices of one machine.
    One,
    /// As two machines: it goes over the network.
    Two,
}

/// A head with one device, and a second node with another.
struct Nodes {
    cluster: Cluster,
    other: Node,
}

impl Nodes {
    /// `None` where two devices are missing.
    fn start(hosts: Hosts) -> Option<Self> {
        let found = devices().unwrap_or_else(|e| panic!("these tests need an NVIDIA device: {e}"));
        if found.len() < 2 {
            println!("NOT RUN: two nodes need two devices, and {} is visible", found.len());
            return None;
        }
        let node = |index: usize| {
            let node = Node::new().with_env("CUDA_VISIBLE_DEVICES", found[index].uuid.clone());
            let log = node.home().join("nccl-%p.log").to_string_lossy().into_owned();
            let node = node.with_env("NCCL_DEBUG", "INFO").with_env("NCCL_DEBUG_FILE", log);
            if hosts == Hosts::Two { node.with_env("NCCL_HOSTID", format!("host-{index}")) } else { node }
        };
        let cluster = Cluster::start_on(node(0), 1, &["--device", "cuda"]);
        let other = node(1);
        let join = ["join", "--address", &cluster.address, "--num-gpus", "1", "--device", "cuda", "--json"];
        let joined = other.run("worker", &join);
        assert_eq!(joined.code, 0, "{joined:?}\n{}", other.logs());
        Some(Self { cluster, other })
    }

    fn serve(&self, model: &std::path::Path, flags: &[&str]) {
        self.cluster.serve(model, "m", &[&SPREAD[..], flags].concat());
        let nodes: BTreeSet<_> = self.cluster.ranks("m").into_iter().map(|rank| rank.node).collect();
        assert_eq!(nodes.len(), 2, "{nodes:?}");
    }

    fn remove(&self) {
        let removed = self.cluster.node.run("coordinator", &["undeploy", "m"]);
        assert_eq!(removed.code, 0, "{removed:?}");
    }

    /// NCCL's own words about the way between the ranks.
    fn ways(&self) -> BTreeSet<String> {
        let logs = self.cluster.node.logs() + &self.other.logs();
        let way = |line: &str| Some(line.split_once(" via ")?.1.split_whitespace().next()?.to_owned());
        logs.lines().filter(|line| line.contains("NCCL INFO Channel")).filter_map(way).collect()
    }

    /// Leaves nothing behind.
    fn end(self) {
        let status = self.cluster.status();
        let ranks = status.ranks.iter().map(|rank| rank.pid);
        let all: Vec<u32> = ranks.chain(status.nodes.iter().map(|node| node.pid)).collect();
        assert_eq!(self.other.run("worker", &["leave"]).code, 0);
        assert_eq!(self.cluster.node.run("coordinator", &["stop"]).code, 0);
        Processes::wait_gone(&all);
    }
}

fn each_kind_of_hosts(check: impl Fn(&Nodes)) {
    for hosts in [Hosts::One, Hosts::Two] {
        let Some(nodes) = Nodes::start(hosts) else { return };
        check(&nodes);
        let ways = nodes.ways();
        println!("{hosts:?} host(s): the ranks exchanged via {ways:?}");
        assert!(!ways.is_empty(), "NCCL took no part");
        assert_eq!(ways.iter().all(|way| way.starts_with("NET/")), hosts == Hosts::Two, "{ways:?}");
        nodes.end();
    }
}

/// Tokens of greedy and seeded requests.
fn answers(nodes: &Nodes) -> Vec<Vec<u32>> {
    let prompts = golden("tiny-llama").prompts;
    let kinds = [json!({"temperature": 0}), json!({"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 11})];
    let ask = |prompt: &[u32], kind: &Value| {
        let mut request = kind.clone();
        for (key, value) in [("model", json!("m")), ("prompt", json!(prompt)), ("max_tokens", json!(40))] {
            request[key] = value;
        }
        request["ignore_eos"] = true.into();
        request["return_token_ids"] = true.into();
        token_ids(&nodes.cluster.http.ask("/v1/completions", &request)["choices"][0])
    };
    prompts.iter().flat_map(|prompt| kinds.iter().map(|kind| ask(&prompt.ids, kind)).collect::<Vec<_>>()).collect()
}

#[test]
fn two_nodes_compute_what_transformers_computes() {
    each_kind_of_hosts(|nodes| {
        for eager in [false, true] {
            let mode: &[&str] = if eager { &["--enforce-eager"] } else { &[] };
            let flags = [&SPREAD[..], &["--dtype", "float32", "--max-num-seqs", "16"], mode].concat();
            check_model(&nodes.cluster, &golden("tiny-llama"), &flags, Precision::TINY);
        }
    });
}

#[test]
fn two_nodes_give_the_same_tokens_recorded_and_eager() {
    each_kind_of_hosts(|nodes| {
        for dtype in ["float32", "bfloat16"] {
            let flags = ["--dtype", dtype, "--max-num-seqs", "8"];
            let model = golden("tiny-llama").folder;
            nodes.serve(&model, &flags);
            let recorded = answers(nodes);
            nodes.remove();
            nodes.serve(&model, &[&flags[..], &["--enforce-eager"]].concat());
            assert_eq!(recorded, answers(nodes), "{dtype}");
            nodes.remove();
            println!("{dtype}: {} answers are equal", recorded.len());
        }
    });
}

/// A rank of the other node dies in the middle of a decode: the survivor, whose device waits inside NCCL, ends too.
#[test]
fn a_killed_rank_of_another_node_is_a_pause() {
    each_kind_of_hosts(|nodes| {
        nodes.serve(&golden("tiny-llama").folder, &["--dtype", "float32"]);
        let before = nodes.cluster.ranks("m");
        let prompt = &golden("tiny-llama").prompts[1].ids;
        let body = json!({"model": "m", "prompt": prompt, "max_tokens": 400, "temperature": 0, "ignore_eos": true,
                          "return_token_ids": true});
        let expected = token_ids(&nodes.cluster.http.ask("/v1/completions", &body)["choices"][0]);
        let mut stream = nodes.cluster.http.stream("/v1/completions", &body);
        stream.step().expect("a first event");
        let killed = Instant::now();
        Processes::kill(before[1].pid);
        let gone = Processes::wait_gone(&before.iter().map(|rank| rank.pid).collect::<Vec<_>>());
        assert_eq!(stream.finish(), StreamEnd::Done);
        // The replay computes in one step what came in many: two tokens that are near may change places.
        let same = stream.token_ids.iter().zip(&expected).take_while(|(now, then)| now == then).count();
        println!(
            "both ranks gone {gone:.1?} after the kill, pause {:.1?}, {same} of {} tokens the same",
            stream.longest_gap,
            expected.len()
        );
        assert_eq!(stream.token_ids.len(), expected.len());
        assert!(stream.longest_gap < PAUSE_MAX, "{:?}", killed.elapsed());
        wait_for("the group to be ready", || (nodes.cluster.deployment_state("m") == "ready").then_some(()));
    });
}

/// Milliseconds of a token of Llama-3-8B, batch 1.
fn time_8b(cluster: &Cluster, flags: &[&str]) -> f64 {
    let dummy = ["--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "8"];
    cluster.serve(&model_config("llama-3-8b"), "m", &[&dummy[..], flags].concat());
    let time = |max_tokens: u32, seed: u32| {
        let prompt: Vec<u32> = (0..128).map(|index| 10 + (index * 7919 + seed * 104_729) % 100_000).collect();
        let body =
            json!({"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true});
        let started = Instant::now();
        cluster.http.ask("/v1/completions", &body);
        started.elapsed().as_secs_f64() * 1e3
    };
    time(8, 0);
    let mut steps: Vec<f64> =
        (1..=3).map(|seed| (time(1 + NUM_TIMED, seed) - time(1, 10 + seed)) / f64::from(NUM_TIMED)).collect();
    steps.sort_unstable_by(f64::total_cmp);
    assert_eq!(cluster.node.run("coordinator", &["undeploy", "m"]).code, 0);
    steps[1]
}

/// What a token takes by each way between two devices. A figure, not a bound.
#[test]
fn figures_of_8b_by_every_way() {
    let two = ["--tensor-parallel-size", "2"];
    if devices().map_or(0, |found| found.len()) >= 2 {
        let cluster = Cluster::start_with(2, &["--device", "cuda"]);
        println!("8B TP 2, own kernels: {:.2} ms a token", time_8b(&cluster, &two));
        let nccl = [&two[..], &["--disable-custom-all-reduce"]].concat();
        println!("8B TP 2, NCCL: {:.2} ms a token", time_8b(&cluster, &nccl));
        let eager = [&nccl[..], &["--enforce-eager"]].concat();
        println!("8B TP 2, NCCL, eager: {:.2} ms a token", time_8b(&cluster, &eager));
    }
    if let Some(nodes) = Nodes::start(Hosts::Two) {
        println!("8B TP 2, NCCL over the network: {:.2} ms a token", time_8b(&nodes.cluster, &SPREAD));
        println!("the ranks exchanged via {:?}", nodes.ways());
        nodes.end();
    }
}
