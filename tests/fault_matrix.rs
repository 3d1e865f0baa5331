//! Every fault against every process at every moment, with real processes and real streams. The expected result stands beside
//! each cell: with a rank or a machine gone every stream ends with the right text, as long as there is something to run on.

#![expect(clippy::expect_used, reason = "helpers of tests are test code too")]

use std::time::Duration;

use harness::{Cluster, Node, Processes, Random, Work, golden, wait_for};
use nix::sys::signal::Signal;

/// What the deployment is at when the fault comes.
#[derive(Debug, Clone, Copy)]
enum Moment {
    Idle,
    Prefill,
    Decode,
    /// A group that broke is being started again.
    Starting,
}

/// Two nodes' worth of work on one: long prompts, and long answers.
struct Bench {
    cluster: Cluster,
    prefill: Work,
    decode: Work,
}

impl Bench {
    fn start() -> Self {
        let cluster = Cluster::start(2);
        let step = ["--max-num-batched-tokens", "64", "--max-num-seqs", "16"];
        let flags = [&["--tensor-parallel-size", "2", "--dtype", "float32"], &step[..]].concat();
        cluster.serve(&golden("tiny-llama").folder, "m", &flags);
        let prefill = Work::ask_alone(&cluster.http, 12, 800, 4);
        let decode = Work::ask_alone(&cluster.http, 8, 40, 150);
        Self { cluster, prefill, decode }
    }

    fn epoch(&self) -> u64 {
        self.cluster.status().deployments[0].epoch
    }

    /// One cell: every stream has the right text, the deployment is ready again, and nothing of the old group is left.
    fn check(&self, signal: Signal, rank: usize, moment: Moment) {
        let cluster = &self.cluster;
        let (epoch, before) = (self.epoch(), cluster.ranks("m"));
        let company = match moment {
            Moment::Idle => None,
            Moment::Prefill => Some(self.prefill.start(&cluster.http)),
            Moment::Decode | Moment::Starting => Some(self.decode.start(&cluster.http)),
        };
        if company.is_some() {
            wait_for("streams to run", || (cluster.status().queue.running > 0).then_some(()));
        }
        Processes::signal(before[rank].pid, signal);
        if matches!(moment, Moment::Starting) {
            let next = wait_for("the next group to start", || {
                let pid = cluster.ranks("m").get(rank)?.pid;
                (pid != 0 && pid != before[rank].pid).then_some(pid)
            });
            Processes::signal(next, signal);
        }
        let pause = company.map(harness::Company::check).unwrap_or_default();
        wait_for("the deployment to be ready again", || {
            let deployment = cluster.status().deployments.remove(0);
            (deployment.state == "ready" && deployment.epoch > epoch).then_some(())
        });
        Processes::wait_gone(&before.iter().map(|rank| rank.pid).collect::<Vec<_>>());
        println!("{signal} of rank {rank}, {moment:?}: longest pause {pause:?}");
    }
}

#[test]
fn killed_ranks() {
    let bench = Bench::start();
    for (rank, moment) in [
        (0, Moment::Idle),
        (1, Moment::Prefill),
        (0, Moment::Decode),
        (1, Moment::Decode),
        (1, Moment::Starting),
        (0, Moment::Prefill),
    ] {
        bench.check(Signal::SIGKILL, rank, moment);
    }
}

#[test]
fn frozen_ranks() {
    let bench = Bench::start();
    bench.check(Signal::SIGSTOP, 1, Moment::Decode);
    bench.check(Signal::SIGSTOP, 0, Moment::Idle);
}

#[test]
fn ranks_that_end_by_themselves() {
    let bench = Bench::start();
    bench.check(Signal::SIGTERM, 1, Moment::Decode);
    bench.check(Signal::SIGABRT, 0, Moment::Decode);
}

/// A machine that dies, or freezes: its group moves to another one, with its streams.
fn lose_machine(signal: Signal) -> Duration {
    let bench = Bench::start();
    let other = Node::new();
    let joined = other.run("worker", &["join", "--address", &bench.cluster.address, "--num-gpus", "2"]);
    assert_eq!(joined.code, 0, "{joined:?}");
    let status = bench.cluster.status();
    let node = status.nodes.iter().find(|node| node.id == status.ranks[0].node).expect("a node");
    let company = bench.decode.start(&bench.cluster.http);
    wait_for("streams to run", || (bench.cluster.status().queue.running > 0).then_some(()));
    Processes::signal(node.pid, signal);
    let pause = company.check();
    wait_for("the deployment to be ready on the other machine", || {
        let now = bench.cluster.status();
        let moved = now.ranks.iter().all(|rank| rank.node != node.id && rank.state == "ready");
        (moved && now.deployments[0].state == "ready").then_some(())
    });
    Processes::wait_gone(&status.ranks.iter().map(|rank| rank.pid).collect::<Vec<_>>());
    pause
}

#[test]
fn a_machine_that_dies_hands_its_streams_to_another() {
    println!("longest pause {:?}", lose_machine(Signal::SIGKILL));
}

/// Kills at random moments, one after the other, under streams that never stop.
#[test]
fn kills_at_random() {
    let bench = Bench::start();
    let mut random = Random(5);
    for _ in 0..4 {
        let company = bench.decode.start(&bench.cluster.http);
        std::thread::sleep(Duration::from_millis(random.below(400)));
        let ranks = bench.cluster.ranks("m");
        if let Some(rank) = ranks.get(random.below(2) as usize).filter(|rank| rank.state == "ready") {
            Processes::kill(rank.pid);
        }
        company.check();
    }
}
