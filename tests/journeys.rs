//! What the first users do, from end to end.

use std::fs;

use harness::{Cluster, Node, TwoHosts, golden, wait_for};
use phalanx_proto::StatusSnapshot;
use serde_json::{Value, json};

/// A head on one host with one slot, a worker on another with one, a model spread over both.
#[test]
fn two_hosts_share_a_model() {
    let model = golden("tiny-llama");
    let folder = model.folder.to_str().expect("a path");
    let (hosts, head, worker, head_address, worker_address) = match TwoHosts::new() {
        Some(hosts) => {
            let (head, worker) = (Node::inside(hosts.name(0)), Node::inside(hosts.name(1)));
            let addresses = (hosts.address(0), hosts.address(1));
            (Some(hosts), head, worker, addresses.0, addresses.1)
        }
        None => {
            eprintln!("no network namespaces here: two homes on loopback stand in");
            (None, Node::new(), Node::new(), "127.0.0.1".into(), "127.0.0.1".into())
        }
    };
    let arguments = ["start", "--head", "--num-gpus", "1", "--json", "--cluster-host", &head_address];
    let ports = ["--port", "0", "--http-port", "0", "--dashboard-port", "0"];
    let started = head.run("coordinator", &[&arguments[..], &ports[..]].concat());
    assert_eq!(started.code, 0, "{started:?}");
    let line: Value = serde_json::from_str(started.stdout.trim()).expect("one object");
    let address = line["address"].as_str().expect("an address");
    assert!(address.starts_with(&head_address), "{address}");
    let worker = worker.with_token_of(&head);
    let joined = worker.run("worker", &["join", "--address", address, "--num-gpus", "1"]);
    assert_eq!(joined.code, 0, "{joined:?} {}", worker.logs());
    let serve = ["serve", folder, "--served-model-name", "m", "--tensor-parallel-size", "2", "--dtype", "float32"];
    let spread = ["--placement-strategy", "spread"];
    let served = head.run("coordinator", &[&serve[..], &spread[..]].concat());
    assert_eq!(served.code, 0, "{served:?} {} {}", head.logs(), worker.logs());
    let status = head.run("coordinator", &["status", "--json"]);
    let status: StatusSnapshot = serde_json::from_str(&status.stdout).expect("a snapshot");
    let nodes: std::collections::BTreeSet<_> = status.ranks.iter().map(|rank| rank.node.clone()).collect();
    assert_eq!(nodes.len(), 2, "{status:?}");
    let worker_node = &status.nodes[1];
    assert!(worker_node.address.starts_with(&worker_address), "{worker_node:?}");
    let prompts = head.home().join("prompts.jsonl");
    let prompt = &model.prompts[1];
    let request =
        json!({"prompt": prompt.ids, "max_tokens": 8, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    fs::write(&prompts, format!("{request}\n")).expect("a file");
    let generated = head.run("coordinator", &["generate", "m", "--prompts", prompts.to_str().expect("a path")]);
    assert_eq!(generated.code, 0, "{generated:?}");
    let line: Value = serde_json::from_str(generated.stdout.trim()).expect("one object");
    assert!(line.to_string().contains(&json!(prompt.greedy[..8]).to_string()), "{line}");
    drop(worker);
    drop(head);
    drop(hosts);
}

/// Journey 4: the model is named by its path with a trailing slash, and by its last part.
#[test]
fn a_model_answers_to_its_path() {
    let cluster = Cluster::start(1);
    let folder = golden("tiny-qwen2").folder;
    let path = format!("{}/", folder.display());
    let served = cluster.node.run("coordinator", &["serve", &path]);
    assert_eq!(served.code, 0, "{served:?}");
    let messages = json!([
        {"role": "system", "content": "你是一个很有帮助的AI助手"},
        {"role": "user", "content": "2018年世界杯冠军是哪个国家?"},
        {"role": "assistant", "content": "法国。"},
        {"role": "user", "content": "决赛在哪里踢的？"},
    ]);
    for model in [path.as_str(), path.trim_end_matches('/'), "tiny-qwen2"] {
        let body = json!({"model": model, "messages": messages, "max_tokens": 16});
        let answer = cluster.http.ask("/v1/chat/completions", &body);
        assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
    }
    let unknown = cluster.http.post("/v1/chat/completions", &json!({"model": "other", "messages": messages}));
    assert_eq!(unknown.status, 404);
    assert_eq!(unknown.body["error"]["code"], "model_not_found");
}

/// Journey 1: five prompts in a file, with the fields that older clients send.
#[test]
fn prompts_in_a_file_are_answered_in_order() {
    let node = Node::new();
    let prompts = node.home().join("prompts.jsonl");
    let texts = [
        "你好，",
        "Hello, my name is",
        "The president of the United States is",
        "The capital of France is",
        "The future of AI is",
    ];
    let lines: Vec<String> = texts
        .iter()
        .map(|text| {
            json!({
                "prompt": text, "n": 1, "best_of": 1, "temperature": 1, "top_k": 50, "top_p": 0.9, "seed": 7,
                "stop_token_ids": [511], "max_tokens": 24, "use_beam_search": false,
            })
            .to_string()
        })
        .collect();
    fs::write(&prompts, lines.join("\n")).expect("a file");
    let folder = golden("tiny-qwen2").folder;
    let arguments = ["generate", folder.to_str().expect("a path"), "--prompts", prompts.to_str().expect("a path")];
    let run = || {
        let generated = node.run("coordinator", &arguments);
        assert_eq!(generated.code, 0, "{generated:?}");
        generated.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect::<Vec<Value>>()
    };
    let (first, second) = (run(), run());
    assert_eq!(first.len(), texts.len());
    for (a, b) in first.iter().zip(&second) {
        assert_eq!(a["choices"], b["choices"], "the same seed gives the same text");
    }
    wait_for("the head that generate started to be gone", || {
        (node.run("coordinator", &["status"]).code == 4).then_some(())
    });
}
