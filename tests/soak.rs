//! A cluster of two machines under load whose processes are killed and frozen at random, whose network is cut, and whose head is
//! killed, for as long as it is told to; before that, where asked for, all cells of the fault matrix.
//!
//! Every answer must be the one that the request gets alone. Says each minute, and whenever the load rests, what was sent, what came
//! back, how much memory and how many files each process holds and how many blocks are free; fails if these are not level. Not part of the tests: `cargo xtask soak --minutes 60` runs it.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a program for engineers")]

#[path = "soak/chaos.rs"]
mod chaos;
mod faults;
#[path = "soak/load.rs"]
mod load;
#[path = "soak/matrix.rs"]
mod matrix;
#[path = "soak/record.rs"]
mod record;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use chaos::Chaos;
use faults::Verdict;
use harness::wait_for;
use load::Load;
use record::{Look, Record};
use serde_json::{Value, json};

/// Time between two lines.
const LINE_INTERVAL: Duration = Duration::from_secs(60);
/// The load rests so often: what is held then must be the same each time.
const NUM_PARTS: u32 = 10;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().expect("minutes, seed, matrix or no-matrix, file, words of cells");
    let minutes: f64 = next().parse().expect("minutes");
    let seed: u64 = next().parse().expect("a seed");
    let with_matrix = next() == "matrix";
    let file = PathBuf::from(next());
    let mut all = json!({});
    if with_matrix {
        play_matrix(&next(), &mut all, &file);
    }
    if minutes > 0.0 {
        soak(minutes, seed, &mut all, &file);
    }
}

/// Plays the cells that have these words in their names; the file has those that were played at any time.
fn play_matrix(names: &str, all: &mut Value, file: &Path) {
    let cells = faults::cells_named(names);
    assert!(!cells.is_empty(), "no cell is called {names:?}; one is called {:?}", faults::cells()[0].name());
    let report = faults::run(&cells, |report| {
        all["matrix"] = matrix::to_json(report);
        write(all, file);
    });
    println!("{report}\nall of it: {}", file.display());
    assert_eq!(report.count(Verdict::Wrong), 0, "every cell goes as expected");
}

/// Writes what is known for machines.
fn write(all: &Value, file: &Path) {
    std::fs::write(file, serde_json::to_vec_pretty(all).expect("JSON")).expect("the file can be written");
}

fn soak(minutes: f64, seed: u64, all: &mut Value, file: &Path) {
    let mut chaos = Chaos::start(seed);
    let load = Load::start(&chaos.lasting.cluster.http);
    let (started, length) = (Instant::now(), Duration::from_secs_f64(minutes * 60.0));
    let mut record = Record::new(seed, minutes);
    println!("{}", Record::heading());
    println!("{}", record.note(started.elapsed(), &chaos, load.tally(), Look::AtRest));
    for part in 1..=NUM_PARTS {
        let until = length * part / NUM_PARTS;
        let mut next_line = started.elapsed() + LINE_INTERVAL;
        while started.elapsed() < until {
            chaos.next_fault(until.saturating_sub(started.elapsed()), part > NUM_PARTS / 2);
            if started.elapsed() >= next_line {
                next_line = started.elapsed() + LINE_INTERVAL;
                println!("{}", record.note(started.elapsed(), &chaos, load.tally(), Look::UnderLoad));
            }
        }
        chaos.repair_all();
        if !load.rest() {
            break;
        }
        come_to_rest(&chaos);
        println!("{}", record.note(started.elapsed(), &chaos, load.tally(), Look::AtRest));
        load.go_on();
    }
    let num_clients_hung = load.stop();
    all["soak"] = record.finish(&chaos, load.tally(), num_clients_hung);
    write(all, file);
    println!("all of it: {}", file.display());
    let faults = record.judge(load.tally(), num_clients_hung);
    assert!(faults.is_empty(), "not as it must be:\n  {}", faults.join("\n  "));
    println!("none wrong, none hung, memory, files and blocks level");
}

/// Waits until nothing runs; blocks must then all be free.
fn come_to_rest(chaos: &Chaos) {
    wait_for("the deployment to be ready", || (chaos.lasting.cluster.deployment_state("m") == "ready").then_some(()));
    wait_for("all blocks to be free", || {
        let now = chaos.lasting.cluster.status().deployments.remove(0);
        let is_idle = now.running + now.waiting == 0;
        (is_idle && now.num_blocks > 0 && now.num_blocks_free == now.num_blocks).then_some(())
    });
}
