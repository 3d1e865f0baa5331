//! A cluster of two machines under load whose processes are killed and frozen at random, whose network is cut, and whose head is
//! killed, for as long as it is told to; before that, where asked for, all cells of the fault matrix.
//!
//! Every answer must be the one that the request gets alone. Says each minute, and in the end, what was sent, what came back, how
//! much memory each process holds and how many blocks are free. Not part of the tests: `cargo xtask soak --minutes 60` runs it.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a program for engineers")]

#[path = "soak/chaos.rs"]
mod chaos;
mod faults;
#[path = "soak/load.rs"]
mod load;
#[path = "soak/record.rs"]
mod record;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use chaos::Chaos;
use harness::wait_for;
use load::Load;
use record::Record;

/// Time between two lines.
const LINE_INTERVAL: Duration = Duration::from_secs(60);

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().expect("minutes, seed, matrix or no-matrix, file");
    let minutes: f64 = next().parse().expect("minutes");
    let seed: u64 = next().parse().expect("a seed");
    let with_matrix = next() == "matrix";
    let file = PathBuf::from(next());
    if with_matrix {
        let cells = faults::cells();
        let faults::Outcome { num_right, num_left_out, num_wrong } = faults::run(&cells);
        println!("fault matrix: {num_right} cells as expected, {num_left_out} left out, {num_wrong} wrong");
        assert_eq!(num_wrong, 0, "every cell goes as expected");
    }
    if minutes > 0.0 {
        soak(minutes, seed, &file);
    }
}

fn soak(minutes: f64, seed: u64, file: &std::path::Path) {
    let mut chaos = Chaos::start(seed);
    let load = Load::start(&chaos.lasting.cluster.http);
    let mut record = Record::new(seed, minutes);
    let (started, length) = (Instant::now(), Duration::from_secs_f64(minutes * 60.0));
    let mut next_line = LINE_INTERVAL.min(length / 3);
    while started.elapsed() < length {
        chaos.next_fault(length.saturating_sub(started.elapsed()));
        if started.elapsed() >= next_line {
            next_line = started.elapsed() + LINE_INTERVAL.min(length / 3);
            println!("{}", record.note(started.elapsed(), &chaos, load.tally()));
        }
    }
    chaos.repair_all();
    let num_clients_hung = load.stop();
    wait_for("the deployment to be ready", || (chaos.lasting.cluster.deployment_state("m") == "ready").then_some(()));
    wait_for("all blocks to be free", || {
        let now = chaos.lasting.cluster.status().deployments.remove(0);
        (now.running == 0 && now.num_blocks_free == now.num_blocks).then_some(())
    });
    println!("{}", record.note(started.elapsed(), &chaos, load.tally()));
    record.finish(&chaos, load.tally(), num_clients_hung, file);
}
