//! What happens when something dies, freezes or goes away, with real processes and real streams.

#![expect(clippy::expect_used, reason = "helpers of tests are test code too")]

use std::time::{Duration, Instant};

use harness::{Cluster, Lasting, Node, Processes, Random, Stream, StreamEnd, Work, golden, wait_for};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Kills of a head in one test; about one in three comes in the middle of a plan.
const KILLS: u32 = 6;

fn served(size: &str) -> Cluster {
    let cluster = Cluster::start(2);
    serve_tiny(&cluster, size);
    cluster
}

fn serve_tiny(cluster: &Cluster, size: &str) {
    cluster.serve(&golden("tiny-llama").folder, "m", &["--tensor-parallel-size", size, "--dtype", "float32"]);
}

fn long_request() -> Value {
    json!({"model": "m", "prompt": golden("tiny-llama").prompts[1].ids, "max_tokens": 900, "temperature": 0, "ignore_eos": true})
}

/// A stream that has begun.
fn running(cluster: &Cluster) -> Stream {
    let mut stream = cluster.http.stream("/v1/completions", &long_request());
    stream.step().expect("a first event");
    stream
}

fn wait_ready(cluster: &Cluster, epoch: u64) {
    wait_for("the deployment to be ready in a new epoch", || {
        let deployment = cluster.status().deployments.remove(0);
        (deployment.state == "ready" && deployment.epoch > epoch).then_some(())
    });
}

#[test]
fn a_killed_rank_is_a_pause_and_no_lost_text() {
    let cluster = served("2");
    let before = cluster.ranks("m");
    let company = Work::ask_alone(&cluster.http, 16, 200, 200).start(&cluster.http);
    wait_for("all streams to run", || (cluster.status().queue.running >= 12).then_some(()));
    Processes::kill(before[1].pid);
    let status = wait_for("the deployment to say so", || {
        let status = cluster.status();
        (status.deployments[0].state == "recovering").then_some(status)
    });
    assert!(status.deployments[0].reason.contains("rank 1"), "{}", status.deployments[0].reason);
    let longest = company.check();
    println!("longest pause of 16 streams: {longest:?}");
    assert!(longest < Duration::from_secs(20), "{longest:?}");
    wait_ready(&cluster, 1);
    let after = cluster.ranks("m");
    assert!(after.iter().all(|rank| rank.state == "ready" && before.iter().all(|other| other.pid != rank.pid)));
    Processes::wait_gone(&before.iter().map(|rank| rank.pid).collect::<Vec<_>>());
    let (_, metrics) = cluster.http.get("/metrics");
    assert!(metrics.contains("phalanx_rank_steps_total{deployment=\"m\",replica=\"0\",rank=\"1\"}"), "{metrics}");
}

#[test]
fn a_frozen_rank_is_seen_by_health_and_replaced() {
    let cluster = served("2");
    let before = cluster.ranks("m");
    let company = Work::ask_alone(&cluster.http, 4, 200, 300).start(&cluster.http);
    wait_for("all streams to run", || (cluster.status().queue.running == 4).then_some(()));
    Processes::signal(before[0].pid, Signal::SIGSTOP);
    let frozen = Instant::now();
    wait_for("health to say so", || (cluster.http.get("/health").0 == 503).then_some(()));
    assert!(frozen.elapsed() < Duration::from_secs(10), "it took {:?}", frozen.elapsed());
    println!("longest pause of 4 streams: {:?}", company.check());
    wait_ready(&cluster, 1);
    assert_eq!(cluster.http.get("/health").0, 200);
    Processes::wait_gone(&before.iter().map(|rank| rank.pid).collect::<Vec<_>>());
}

#[test]
fn a_killed_head_without_grace_takes_agent_and_ranks_with_it() {
    let cluster = Cluster::start_with(2, &["--head-grace", "0s"]);
    serve_tiny(&cluster, "2");
    let status = cluster.status();
    let others: Vec<u32> = status.ranks.iter().map(|r| r.pid).chain(status.nodes.iter().map(|n| n.pid)).collect();
    let mut stream = running(&cluster);
    Processes::kill(status.head.pid);
    assert_ne!(stream.finish(), StreamEnd::Done);
    let took = Processes::wait_gone(&others);
    assert!(took < Duration::from_secs(5), "it took {took:?}");
}

#[test]
fn a_head_that_is_started_again_finds_ranks_and_weights_where_they_were() {
    let lasting = Lasting::start(2);
    serve_tiny(&lasting.cluster, "2");
    let before = lasting.pids();
    lasting.kill_head();
    std::thread::sleep(Duration::from_secs(1));
    assert!(before.iter().all(|pid| Processes::alive(*pid)), "agent and ranks wait for their head");
    let took = lasting.restart_head();
    println!("ready {took:?} after the head was started again");
    assert!(took < Duration::from_secs(3), "it took {took:?}");
    assert_eq!(lasting.pids(), before, "nothing was started again");
    let deployment = lasting.cluster.status().deployments.remove(0);
    assert_eq!((deployment.incarnation, deployment.epoch), (1, 2));
    check_text(&lasting.cluster);
    assert_eq!(lasting.cluster.node.run("coordinator", &["undeploy", "m"]).code, 0);
    lasting.kill_head();
    lasting.start_head();
    assert!(lasting.cluster.status().deployments.is_empty(), "what was removed stays away");
}

/// A head that dies while it sends a plan leaves one rank with it and the other without, which share a collective.
#[test]
fn a_head_that_is_killed_under_load_finds_ranks_and_weights_each_time() {
    let lasting = Lasting::start(2);
    serve_tiny(&lasting.cluster, "2");
    let before = lasting.pids();
    for round in 0..KILLS {
        let streams: Vec<_> = (0..8)
            .map(|_| {
                let http = lasting.cluster.http.clone();
                std::thread::spawn(move || http.stream("/v1/completions", &long_request()).finish())
            })
            .collect();
        wait_for("all streams to run", || (lasting.cluster.status().queue.running == 8).then_some(()));
        lasting.kill_head();
        let killed = Instant::now();
        for stream in streams {
            assert_eq!(stream.join().expect("a stream"), StreamEnd::Cut);
        }
        assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());
        let took = lasting.restart_head();
        println!("kill {round} under load: ready {took:?} after the start");
        assert!(took < Duration::from_secs(3), "it took {took:?}");
        assert_eq!(lasting.pids(), before, "nothing was started again");
        check_text(&lasting.cluster);
    }
    let logs = lasting.cluster.node.logs();
    println!("plans that were passed on: {}", logs.matches("it is passed on").count());
}

fn check_text(cluster: &Cluster) {
    let prompt = &golden("tiny-llama").prompts[1];
    let body = json!({"model": "m", "prompt": prompt.ids, "max_tokens": 8, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    assert_eq!(cluster.http.ask("/v1/completions", &body)["choices"][0]["token_ids"], json!(prompt.greedy[..8]));
}

#[test]
fn a_killed_agent_takes_its_ranks_with_it_and_the_head_says_so() {
    let cluster = served("2");
    let status = cluster.status();
    let mut stream = running(&cluster);
    Processes::kill(status.nodes[0].pid);
    let took = Processes::wait_gone(&status.ranks.iter().map(|rank| rank.pid).collect::<Vec<_>>());
    assert!(took < Duration::from_secs(1), "it took {took:?}");
    let end = stream.finish();
    assert!(matches!(end, StreamEnd::Error(_)), "{end:?}");
    wait_for("the head to call the node dead", || (cluster.status().nodes[0].state == "dead").then_some(()));
    let deployment = &cluster.status().deployments[0];
    assert_ne!(deployment.state, "ready");
    assert!(!deployment.reason.is_empty());
}

/// A rank dies whenever the request runs: it is replayed four times and then ends, and the deployment goes on without it.
#[test]
fn a_request_that_breaks_group_after_group_ends_with_an_error() {
    let cluster = served("2");
    let http = cluster.http.clone();
    let stream = std::thread::spawn(move || http.stream("/v1/completions", &long_request()).finish());
    let mut num_kills = 0;
    while !stream.is_finished() {
        assert!(num_kills < 6, "the request must have ended");
        let status = cluster.status();
        let deployment = &status.deployments[0];
        let epoch = num_kills + 1;
        if (deployment.state.as_str(), deployment.epoch) == ("ready", epoch) && deployment.running == 1 {
            Processes::kill(cluster.ranks("m")[1].pid);
            num_kills += 1;
        }
    }
    let end = stream.join().expect("a stream");
    assert!(matches!(end, StreamEnd::Error(_)), "{end:?}");
    assert_eq!(num_kills, 5, "the first run and four replays");
    wait_ready(&cluster, num_kills);
    check_text(&cluster);
}

/// Each machine has room for one replica: when one is gone, its streams have only the other replica to go on in.
#[test]
fn streams_of_a_replica_whose_machine_is_gone_go_on_in_the_other_replica() {
    let cluster = Cluster::start(2);
    let other = Node::new().with_token_of(&cluster.node);
    let joined = other.run("worker", &["join", "--address", &cluster.address, "--num-gpus", "2"]);
    assert_eq!(joined.code, 0, "{joined:?}");
    let flags = ["--tensor-parallel-size", "2", "--replicas", "2", "--dtype", "float32", "--placement-strategy"];
    cluster.serve(&golden("tiny-llama").folder, "m", &[&flags[..], &["strict-pack"]].concat());
    let agent = other.agent_pid().expect("an agent");
    let company = Work::ask_alone(&cluster.http, 8, 100, 600).start(&cluster.http);
    wait_for("streams to run", || (cluster.status().queue.running == 8).then_some(()));
    Processes::kill(agent);
    let longest = company.check();
    println!("longest pause of 8 streams, some of which moved: {longest:?}");
    assert!(longest < Duration::from_secs(10), "{longest:?}");
    let logs = cluster.node.logs();
    assert!(logs.contains("go on in other replicas"), "some have moved");
    wait_for("no request to be left", || {
        let queue = cluster.status().queue;
        (queue.running + queue.waiting == 0).then_some(())
    });
    check_text(&cluster);
}

#[test]
fn a_client_that_goes_away_frees_its_blocks() {
    let cluster = served("1");
    let mut stream = running(&cluster);
    let deployment = || cluster.status().deployments[0].clone();
    assert_eq!(deployment().running, 1);
    stream.step().expect("an event");
    drop(stream);
    wait_for("the blocks to be free", || {
        let now = deployment();
        (now.running == 0 && now.num_blocks_free == now.num_blocks).then_some(())
    });
}

/// 32 streams with prompts of 1 to 600 tokens, half of them cancelled: the rest give the text that they give alone.
#[test]
fn streams_give_the_same_text_in_any_company() {
    let cluster = Cluster::start(2);
    cluster.serve(
        &golden("tiny-llama").folder,
        "m",
        &["--tensor-parallel-size", "2", "--num-gpu-blocks-override", "400"],
    );
    check_company(&cluster, 500, 48);
}

#[test]
fn smollm2_gives_the_same_text_in_any_company() {
    let Some(model) = harness::smollm2() else { return };
    let cluster = Cluster::start(2);
    for dtype in ["auto", "float32"] {
        cluster.serve(
            &model.folder,
            "m",
            &["--tensor-parallel-size", "2", "--dtype", dtype, "--max-model-len", "1024"],
        );
        check_company(&cluster, 40_000, 16);
        assert_eq!(cluster.node.run("coordinator", &["undeploy", "m"]).code, 0);
    }
}

fn check_company(cluster: &Cluster, vocabulary: u64, max_tokens: u32) {
    let mut random = Random(7);
    let requests: Vec<Value> = (0..32)
        .map(|_| {
            let length = 1 + random.below(600);
            let prompt: Vec<u64> = (0..length).map(|_| random.below(vocabulary)).collect();
            json!({"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true, "return_token_ids": true})
        })
        .collect();
    let kept: Vec<bool> = (0..32).map(|index| index % 2 == 0).collect();
    let streams: Vec<_> = requests
        .iter()
        .zip(&kept)
        .map(|(request, kept)| {
            let (http, request, kept, cancel_after) = (cluster.http.clone(), request.clone(), *kept, random.below(12));
            std::thread::spawn(move || {
                let mut stream = http.stream("/v1/completions", &request);
                if kept {
                    assert_eq!(stream.finish(), StreamEnd::Done);
                    return Some(stream.token_ids);
                }
                for _ in 0..cancel_after {
                    if stream.step().is_err() {
                        break;
                    }
                }
                None
            })
        })
        .collect();
    let together: Vec<Option<Vec<u32>>> = streams.into_iter().map(|stream| stream.join().expect("a stream")).collect();
    for ((request, together), kept) in requests.iter().zip(together).zip(kept) {
        if !kept {
            continue;
        }
        let alone = cluster.http.ask("/v1/completions", request);
        assert_eq!(alone["choices"][0]["token_ids"], json!(together), "{}", request["prompt"]);
    }
    wait_for("all blocks to be free", || {
        let now = cluster.status().deployments[0].clone();
        (now.running == 0 && now.num_blocks_free == now.num_blocks).then_some(())
    });
    let (_, metrics) = cluster.http.get("/metrics");
    let value = |name: &str| {
        metrics
            .lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
    };
    assert_eq!(value("phalanx_kv_blocks_free"), value("phalanx_kv_blocks{"), "{metrics}");
}
