//! A cluster under load whose processes are killed and frozen at random, for as long as it is told to.
//!
//! Every answer must be the one that the request gets alone. Says in the end what was sent, what came back, and how much memory
//! head and ranks hold. Not part of the tests: `cargo xtask soak --minutes 60` runs it.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a program for engineers")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use harness::{Lasting, Processes, Random, StreamEnd, Work, golden, wait_for};
use nix::sys::signal::Signal;
use serde_json::json;

/// Streams at a time.
const NUM_CLIENTS: usize = 16;
/// Longest pause between two faults, milliseconds.
const PAUSE_MAX_MS: u64 = 8_000;
/// One in so many faults ends the head.
const HEAD_SHARE: u64 = 8;

#[derive(Default)]
struct Tally {
    sent: AtomicU64,
    right: AtomicU64,
    wrong: AtomicU64,
    failed: AtomicU64,
    cut: AtomicU64,
}

fn main() {
    let minutes: f64 = std::env::args().nth(1).map_or(1.0, |text| text.parse().expect("minutes"));
    let seed: u64 = std::env::args().nth(2).map_or(1, |text| text.parse().expect("a seed"));
    let lasting = Lasting::start(2);
    let flags = ["--tensor-parallel-size", "2", "--dtype", "float32"];
    lasting.cluster.serve(&golden("tiny-llama").folder, "m", &flags);
    let work = Work::ask_alone(&lasting.cluster.http, 32, 300, 120);
    let (tally, stop) = (Arc::new(Tally::default()), Arc::new(AtomicBool::new(false)));
    let clients: Vec<_> = (0..NUM_CLIENTS)
        .map(|client| {
            let (http, work, tally, stop) = (lasting.cluster.http.clone(), work.clone(), tally.clone(), stop.clone());
            std::thread::spawn(move || ask_on(&http, &work, &tally, &stop, client as u64))
        })
        .collect();
    let ends = Instant::now() + Duration::from_secs_f64(minutes * 60.0);
    let mut random = Random(seed);
    let (mut num_killed, mut num_frozen, mut num_heads) = (0, 0, 0);
    while Instant::now() < ends {
        std::thread::sleep(Duration::from_millis(random.below(PAUSE_MAX_MS)));
        if random.below(HEAD_SHARE) == 0 {
            lasting.kill_head();
            lasting.restart_head();
            num_heads += 1;
            continue;
        }
        let ranks = lasting.cluster.ranks("m");
        let Some(rank) = ranks.get(random.below(2) as usize).filter(|rank| Processes::alive(rank.pid)) else {
            continue;
        };
        let freezes = random.below(6) == 0;
        Processes::signal(rank.pid, if freezes { Signal::SIGSTOP } else { Signal::SIGKILL });
        (num_killed, num_frozen) = if freezes { (num_killed, num_frozen + 1) } else { (num_killed + 1, num_frozen) };
    }
    stop.store(true, Ordering::Relaxed);
    let hung = clients.into_iter().map(|client| client.join().is_err()).filter(|hung| *hung).count();
    wait_for("the deployment to be ready", || (lasting.cluster.deployment_state("m") == "ready").then_some(()));
    wait_for("all blocks to be free", || {
        let now = lasting.cluster.status().deployments.remove(0);
        (now.running == 0 && now.num_blocks_free == now.num_blocks).then_some(())
    });
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!("faults: {num_killed} ranks killed, {num_frozen} frozen, {num_heads} heads killed (seed {seed})");
    println!(
        "requests: {} sent, {} right, {} wrong, {} ended with an error, {} cut with their head, {hung} clients hung",
        count(&tally.sent),
        count(&tally.right),
        count(&tally.wrong),
        count(&tally.failed),
        count(&tally.cut)
    );
    println!("resident: head {} MiB", resident_mib(lasting.cluster.status().head.pid));
    assert_eq!(count(&tally.wrong) + hung as u64, 0, "no answer is wrong, and none hangs");
}

/// One client: asks, reads to the end, compares.
fn ask_on(http: &harness::Http, work: &Work, tally: &Tally, stop: &AtomicBool, seed: u64) {
    let mut random = Random(1000 + seed);
    while !stop.load(Ordering::Relaxed) {
        let index = random.below(work.bodies.len() as u64) as usize;
        let Some(mut stream) = http.try_stream("/v1/completions", &work.bodies[index]) else {
            // The head is being started again.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        tally.sent.fetch_add(1, Ordering::Relaxed);
        let end = stream.finish();
        let expected = work.expected[index].as_array().expect("token ids");
        let got = &stream.token_ids;
        let is_prefix = got.len() <= expected.len() && json!(got) == json!(expected[..got.len()]);
        let counter = match end {
            StreamEnd::Done if is_prefix && got.len() == expected.len() => &tally.right,
            StreamEnd::Cut if is_prefix => &tally.cut,
            StreamEnd::Error(_) if is_prefix => &tally.failed,
            _ => &tally.wrong,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

fn resident_mib(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) / 1024
}
