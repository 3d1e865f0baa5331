//! Placement, joining, leaving and the command line, with real processes.

#![expect(clippy::expect_used, reason = "helpers of tests are test code too")]

use std::path::PathBuf;
use std::time::Duration;

use harness::{Cluster, Node, Processes, golden, wait_for};
use serde_json::json;

fn tiny() -> PathBuf {
    golden("tiny-llama").folder
}

fn tiny_str() -> String {
    tiny().to_str().expect("a path").to_owned()
}

#[test]
fn what_can_never_be_placed_is_refused_at_once_with_the_arithmetic() {
    let cluster = Cluster::start(2);
    let refused = cluster.node.run("coordinator", &["serve", &tiny_str(), "--tensor-parallel-size", "4"]);
    assert_eq!(refused.code, 3, "{refused:?}");
    assert!(refused.elapsed < Duration::from_secs(1), "it took {:?}", refused.elapsed);
    assert!(refused.stderr.contains('4') && refused.stderr.contains('2'), "{}", refused.stderr);
    assert!(refused.stderr.contains("--tensor-parallel-size 2"), "says what to do: {}", refused.stderr);
}

#[test]
fn a_deployment_waits_for_machines_and_spans_two_nodes() {
    let cluster = Cluster::start(2);
    let model = tiny_str();
    let flags = ["serve", &model, "--served-model-name", "m", "--tensor-parallel-size", "4"];
    let wait = ["--placement-strategy", "pack", "--wait", "60s", "--dtype", "float32"];
    let mut serve = cluster.node.spawn("coordinator", &[&flags[..], &wait[..]].concat());
    wait_for("the deployment to be pending", || (cluster.deployment_state("m") == "pending").then_some(()));
    let reason = cluster.status().deployments[0].reason.clone();
    assert!(reason.contains('4') && reason.contains('2'), "{reason}");
    let other = Node::new();
    let joined = other.run("worker", &["join", "--address", &cluster.address, "--num-gpus", "2", "--json"]);
    assert_eq!(joined.code, 0, "{joined:?}");
    wait_for("the deployment to be ready", || (cluster.deployment_state("m") == "ready").then_some(()));
    assert!(serve.wait().expect("serve ends").success());
    let ranks = cluster.ranks("m");
    assert_eq!(ranks.len(), 4);
    let nodes: std::collections::BTreeSet<_> = ranks.iter().map(|rank| rank.node.clone()).collect();
    assert_eq!(nodes.len(), 2, "{ranks:?}");
    let prompt = &golden("tiny-llama").prompts[1];
    let body = json!({"model": "m", "prompt": prompt.ids, "max_tokens": 8, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    let answer = cluster.http.ask("/v1/completions", &body);
    assert_eq!(answer["choices"][0]["token_ids"], json!(prompt.greedy[..8]));
}

#[test]
fn one_node_for_all_ranks_is_waited_for_by_default() {
    let cluster = Cluster::start(2);
    let model = tiny_str();
    let flags = ["serve", &model, "--served-model-name", "m", "--tensor-parallel-size", "4", "--wait", "60s"];
    let mut serve = cluster.node.spawn("coordinator", &flags);
    wait_for("the deployment to be pending", || (cluster.deployment_state("m") == "pending").then_some(()));
    let small = Node::new();
    let joined = small.run("worker", &["join", "--address", &cluster.address, "--num-gpus", "2"]);
    assert_eq!(joined.code, 0, "{joined:?}");
    wait_for("two nodes", || (cluster.status().nodes.len() == 2).then_some(()));
    assert_eq!(cluster.deployment_state("m"), "pending");
    let reason = cluster.status().deployments[0].reason.clone();
    assert!(reason.contains('4') && reason.contains('2'), "{reason}");
    let large = Node::new();
    let joined = large.run("worker", &["join", "--address", &cluster.address, "--num-gpus", "4"]);
    assert_eq!(joined.code, 0, "{joined:?}");
    wait_for("the deployment to be ready", || (cluster.deployment_state("m") == "ready").then_some(()));
    assert!(serve.wait().expect("serve ends").success());
    let nodes: std::collections::BTreeSet<_> = cluster.ranks("m").into_iter().map(|rank| rank.node).collect();
    assert_eq!(nodes.len(), 1);
}

#[test]
fn a_worker_may_start_before_the_head() {
    let early = Node::new();
    // A port that is free now; the head takes it later.
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
    let address = format!("127.0.0.1:{port}");
    let mut join = early.spawn("worker", &["join", "--address", &address, "--num-gpus", "2", "--block"]);
    wait_for("the worker to say that it waits", || early.logs().contains(&address).then_some(()));
    let cluster = Cluster::start_with(1, &["--port", &port.to_string()]);
    wait_for("both nodes", || {
        (cluster.status().nodes.iter().filter(|n| n.state == "alive").count() == 2).then_some(())
    });
    let left = early.run("worker", &["leave"]);
    assert_eq!(left.code, 0, "{left:?}");
    wait_for("the worker to end", || join.try_wait().expect("a child").map(|_| ()));
    wait_for("the head to know", || cluster.status().nodes.iter().any(|node| node.state == "left").then_some(()));
}

#[test]
fn a_taken_port_is_named_with_its_holder_and_flag() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port().to_string();
    let node = Node::new();
    let arguments =
        ["start", "--head", "--num-gpus", "1", "--port", "0", "--dashboard-port", "0", "--http-port", &port];
    let refused = node.run("coordinator", &arguments);
    assert_eq!(refused.code, 1, "{refused:?}");
    for expected in [port.as_str(), "--http-port", &std::process::id().to_string()] {
        assert!(refused.stderr.contains(expected), "{expected} is not in: {}", refused.stderr);
    }
}

#[test]
fn models_that_cannot_be_used_are_named_and_nothing_else_suffers() {
    let cluster = Cluster::start(1);
    let folder = tempfile::tempdir().expect("a folder");
    let config = std::fs::read_to_string(tiny().join("config.json")).expect("a config");
    let check = |name: &str, path: &std::path::Path, words: &[&str]| {
        let refused = cluster.node.run("coordinator", &["serve", path.to_str().expect("a path")]);
        assert_eq!(refused.code, 1, "{name}: {refused:?}");
        for word in words {
            assert!(refused.stderr.contains(word), "{name}: {word} is not in: {}", refused.stderr);
        }
    };
    check("nothing", &folder.path().join("nowhere"), &["nowhere"]);
    let empty = folder.path().join("empty");
    std::fs::create_dir(&empty).expect("a folder");
    check("not a model", &empty, &["config.json"]);
    let unknown = folder.path().join("unknown");
    std::fs::create_dir(&unknown).expect("a folder");
    std::fs::write(
        unknown.join("config.json"),
        config.replace("LlamaForCausalLM", "MambaForCausalLM").replace("\"llama\"", "\"mamba\""),
    )
    .expect("a file");
    check("unknown architecture", &unknown, &["Llama", "Qwen2"]);
    let cut = folder.path().join("cut");
    std::fs::create_dir(&cut).expect("a folder");
    std::fs::write(cut.join("config.json"), &config).expect("a file");
    let weights = std::fs::read(tiny().join("model.safetensors")).expect("weights");
    std::fs::write(cut.join("model.safetensors"), &weights[..weights.len() / 2]).expect("a file");
    check("truncated", &cut, &["model.safetensors"]);
    let gguf = folder.path().join("lying.gguf");
    std::fs::write(
        &gguf,
        [b"GGUF".as_slice(), &3u32.to_le_bytes(), &u64::MAX.to_le_bytes(), &u64::MAX.to_le_bytes()].concat(),
    )
    .expect("a file");
    check("lying", &gguf, &["lying.gguf"]);
    assert_eq!(cluster.node.run("coordinator", &["status"]).code, 0);
}

/// The head's own agent must not depend on a name that only other machines can resolve.
#[test]
fn a_head_may_be_advertised_under_a_name_unknown_here() {
    let flags = ["--cluster-host", "0.0.0.0", "--advertise-address", "head.invalid:8001"];
    let cluster = Cluster::start_with(1, &flags);
    assert_eq!(cluster.address, "head.invalid:8001");
    assert_eq!(cluster.status().nodes[0].state, "alive");
}

#[test]
fn stop_leaves_nothing_behind() {
    let cluster = Cluster::start(2);
    cluster.serve(&tiny(), "m", &["--tensor-parallel-size", "2"]);
    let status = cluster.status();
    let pids: Vec<u32> = status
        .ranks
        .iter()
        .map(|rank| rank.pid)
        .chain(status.nodes.iter().map(|n| n.pid))
        .chain([status.head.pid])
        .collect();
    assert_eq!(pids.len(), 4);
    assert!(pids.iter().all(|pid| Processes::alive(*pid)), "{pids:?}");
    let stopped = cluster.node.run("coordinator", &["stop"]);
    assert_eq!(stopped.code, 0, "{stopped:?}");
    assert!(pids.iter().all(|pid| !Processes::alive(*pid)), "stop returns when the processes have ended");
    assert_eq!(cluster.node.run("coordinator", &["status", "--address", &cluster.address]).code, 4);
}
