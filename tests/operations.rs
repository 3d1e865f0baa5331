//! What a person asks of a running cluster: bundles by hand, drain, restart, events and logs, with real processes.

#![expect(clippy::expect_used, reason = "helpers of tests are test code too")]

use std::time::Duration;

use harness::{Cluster, Finished, Node, Processes, Work, golden, wait_for};
use phalanx_proto::EventRecord;
use serde_json::{Value, json};

fn tiny() -> String {
    golden("tiny-llama").folder.to_str().expect("a path").to_owned()
}

fn run(cluster: &Cluster, line: &str) -> Finished {
    cluster.node.run("coordinator", &line.split(' ').collect::<Vec<_>>())
}

/// A command that must succeed.
fn done(cluster: &Cluster, line: &str) -> String {
    let Finished { code, stdout, stderr, .. } = run(cluster, line);
    assert_eq!(code, 0, "{line}: {stderr}");
    stdout
}

fn group(cluster: &Cluster, name: &str) -> Value {
    serde_json::from_str(&done(cluster, &format!("placement-group show {name} --json"))).expect("one object")
}

fn events(cluster: &Cluster, deployment: &str) -> Vec<EventRecord> {
    let lines = done(cluster, &format!("events --json --deployment {deployment}"));
    lines.lines().map(|line| serde_json::from_str(line).expect("an event a line")).collect()
}

#[test]
fn bundles_by_hand_are_refused_waited_for_used_and_given_back() {
    let cluster = Cluster::start_with(2, &["--label", "zone=a"]);
    let bundles = |count: usize| " --bundle cpu=1,gpu=1".repeat(count);
    let never = run(&cluster, &format!("placement-group create --name never{} --strategy STRICT_PACK", bundles(4)));
    assert_eq!(never.code, 3, "{never:?}");
    assert!(never.elapsed < Duration::from_secs(1), "it took {:?}", never.elapsed);
    assert!(never.stderr.contains("needs 4 bundles of cpu=1,gpu=1 on one node"), "{}", never.stderr);
    assert!(never.stderr.contains("at most 2 of these bundles"), "{}", never.stderr);

    done(
        &cluster,
        &format!("placement-group create --name pair{} --strategy strict-pack --selector zone=a", bundles(2)),
    );
    done(&cluster, "placement-group wait pair --timeout 30s");
    done(&cluster, "placement-group create --name next --bundle gpu=1");
    let late = run(&cluster, "placement-group wait next --timeout 200ms --json");
    assert_eq!(late.code, 3, "{late:?}");
    assert!(late.stderr.contains("held by placement group pair since"), "{}", late.stderr);

    let inside = ["--placement-group", "pair", "--tensor-parallel-size", "2", "--dtype", "float32", "--env", "A=b"];
    cluster.serve(&golden("tiny-llama").folder, "m", &inside);
    let prompt = &golden("tiny-llama").prompts[1];
    let body = json!({"model": "m", "prompt": prompt.ids, "max_tokens": 8, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    let answer = cluster.http.ask("/v1/completions", &body);
    assert_eq!(answer["choices"][0]["token_ids"], json!(prompt.greedy[..8]));
    let pid = cluster.ranks("m")[0].pid;
    let environment = std::fs::read_to_string(format!("/proc/{pid}/environ")).expect("readable");
    assert!(environment.split('\0').any(|pair| pair == "A=b"), "--env reaches the ranks");

    let busy = run(&cluster, &format!("serve {} --served-model-name n", tiny()));
    assert_eq!(busy.code, 3, "{busy:?}");
    assert!(busy.stderr.contains("2 on ") && busy.stderr.contains("held by placement group pair"), "{}", busy.stderr);

    // The head dies and comes back: the group is as it was.
    let head = cluster.status().head.pid;
    Processes::kill(head);
    Processes::wait_gone(&[head]);
    let again = ["start", "--head", "--num-gpus", "2", "--port", "0", "--http-port", "0", "--dashboard-port", "0"];
    let started = cluster.node.run("coordinator", &again);
    assert_eq!(started.code, 0, "{started:?}");
    assert_eq!(cluster.status().head.address, cluster.address, "ports that were picked are picked again");
    wait_for("the deployment", || (cluster.deployment_state("m") == "ready").then_some(()));
    assert_eq!(cluster.ranks("m")[0].pid, pid, "nothing was started again");
    let pair = group(&cluster, "pair");
    assert_eq!((pair["state"].as_str(), &pair["deployments"]), (Some("created"), &json!(["m"])));
    assert_eq!(group(&cluster, "next")["state"], "pending");

    assert_eq!(run(&cluster, "placement-group remove pair").code, 1, "in use");
    done(&cluster, "placement-group remove pair --force");
    done(&cluster, "placement-group wait next --timeout 10s");
    assert!(cluster.status().deployments.is_empty());
}

#[test]
fn restart_and_drain_lose_no_request() {
    let cluster = Cluster::start(2);
    cluster.serve(&golden("tiny-llama").folder, "m", &["--replicas", "2", "--dtype", "float32"]);
    let before = cluster.ranks("m");
    let work = Work::ask_alone(&cluster.http, 8, 100, 600);
    let company = work.start(&cluster.http);
    wait_for("streams to run", || (cluster.status().queue.running >= 2).then_some(()));
    done(&cluster, "restart m");
    println!("longest pause of 8 streams in a rolling restart: {:?}", company.check());
    let after = cluster.ranks("m");
    assert!(after.iter().all(|rank| rank.state == "ready" && before.iter().all(|old| old.pid != rank.pid)));

    done(&cluster, "undeploy m");
    let other = Node::new();
    let joined = other.run("worker", &["join", "--address", &cluster.address, "--num-gpus", "2", "--json"]);
    assert_eq!(joined.code, 0, "{joined:?}");
    let on_both = ["--tensor-parallel-size", "2", "--replicas", "2", "--dtype", "float32"];
    cluster.serve(&golden("tiny-llama").folder, "m", &on_both);
    let company = work.start(&cluster.http);
    wait_for("streams to run", || (cluster.status().queue.running >= 2).then_some(()));
    // Nothing is left for the second replica: what does not end in time is replayed by the first, or when a machine comes.
    let replacement = Node::new();
    let joined = replacement.run("worker", &["join", "--address", &cluster.address, "--num-gpus", "2", "--json"]);
    assert_eq!(joined.code, 0, "{joined:?}");
    let left = other.run("worker", &["leave", "--drain"]);
    assert_eq!(left.code, 0, "{left:?}");
    println!("longest pause of 8 streams in a drain: {:?}", company.check());
    wait_for("all to serve", || (cluster.deployment_state("m") == "ready").then_some(()));
    let story: Vec<String> = events(&cluster, "m").into_iter().map(|event| event.kind).collect();
    assert!(
        story.iter().any(|kind| kind == "group_ends") && !story.iter().any(|kind| kind == "group_broke"),
        "{story:?}"
    );
}

#[test]
fn events_and_logs_tell_what_happened() {
    let cluster = Cluster::start(2);
    cluster.serve(&golden("tiny-llama").folder, "m", &["--tensor-parallel-size", "2", "--dtype", "float32"]);
    let rank = cluster.ranks("m").remove(1);
    Processes::kill(rank.pid);
    wait_for("a new epoch", || {
        let deployment = cluster.status().deployments.remove(0);
        (deployment.state == "ready" && deployment.epoch > 1).then_some(())
    });
    let story = events(&cluster, "m");
    let again = story.iter().find(|event| event.kind == "starts_again").expect("told");
    assert!(again.text.contains("SIGKILL") && again.text.contains(&rank.pid.to_string()), "{}", again.text);
    assert_eq!((again.rank, again.epoch, again.node.as_deref()), (Some(1), Some(1), Some(rank.node.as_str())));
    let text = done(&cluster, "events");
    assert!(
        text.contains("head: head") && text.contains("joined with 2 slots") && text.contains("ready after"),
        "{text}"
    );

    for target in ["m/0/1", "1", rank.node.as_str(), "head"] {
        let log = done(&cluster, &format!("logs {target} --tail 3"));
        assert!((1..=3).contains(&log.lines().count()), "{target}: {log}");
    }
    let unknown = run(&cluster, "logs m/0/9");
    assert_eq!(unknown.code, 1);
    assert!(unknown.stderr.contains("m/0/1"), "{}", unknown.stderr);
}

#[test]
fn stop_ends_an_agent_that_waits_for_a_dead_head() {
    let cluster = Cluster::start(1);
    let status = cluster.status();
    let agent = status.nodes[0].pid;
    Processes::kill(status.head.pid);
    Processes::wait_gone(&[status.head.pid]);
    assert!(Processes::alive(agent));
    done(&cluster, "stop");
    Processes::wait_gone(&[agent]);
}
