//! What was seen during a soak: a line now and then, a table in the end, and a file for machines.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use harness::Processes;
use serde_json::{Value, json};

use super::chaos::Chaos;
use super::load::Tally;

/// All lines so far.
pub struct Record {
    seed: u64,
    minutes: f64,
    samples: Vec<Value>,
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn mib(bytes: u64) -> f64 {
    (bytes as f64 / f64::from(1 << 20) * 10.0).round() / 10.0
}

fn requests(tally: &Tally) -> Value {
    json!({
        "sent": get(&tally.sent), "right": get(&tally.right), "wrong": get(&tally.wrong), "failed": get(&tally.failed),
        "cut": get(&tally.cut), "hung": get(&tally.hung), "refused": get(&tally.refused),
        "longest_pause_ms": get(&tally.pause_max_ms),
    })
}

impl Record {
    /// Nothing was seen yet.
    pub fn new(seed: u64, minutes: f64) -> Self {
        Self { seed, minutes, samples: Vec::new() }
    }

    /// Looks at everything; gives a line about it.
    pub fn note(&mut self, at: Duration, chaos: &Chaos, tally: &Tally) -> String {
        let status = chaos.lasting.cluster.status();
        let agents = status.nodes.iter().map(|node| (format!("agent {}", node.id), node.pid));
        let ranks = status.ranks.iter().map(|rank| (format!("rank {}", rank.rank), rank.pid));
        let all: Vec<(String, u32)> =
            [("head".to_owned(), status.head.pid)].into_iter().chain(agents).chain(ranks).collect();
        let process = |(role, pid): &(String, u32)| {
            let resident_mib = mib(Processes::resident_bytes(*pid));
            json!({"role": role, "pid": pid, "resident_mib": resident_mib, "files": Processes::num_files(*pid)})
        };
        let processes: Vec<Value> = all.iter().map(process).collect();
        let deployment = &status.deployments[0];
        let sizes: Vec<String> = processes
            .iter()
            .map(|process| format!("{} {}", process["role"].as_str().unwrap_or("?"), process["resident_mib"]))
            .collect();
        let line = format!(
            "{:>5.1} min: {} sent, {} right, {} wrong, {} failed, {} cut, {} hung; {}, epoch {}, {}/{} blocks free, {} running; MiB: {}",
            at.as_secs_f64() / 60.0,
            get(&tally.sent),
            get(&tally.right),
            get(&tally.wrong),
            get(&tally.failed),
            get(&tally.cut),
            get(&tally.hung),
            deployment.state,
            deployment.epoch,
            deployment.num_blocks_free,
            deployment.num_blocks,
            deployment.running,
            sizes.join(", ")
        );
        self.samples.push(json!({
            "seconds": at.as_secs(), "requests": requests(tally), "state": deployment.state, "epoch": deployment.epoch,
            "blocks": deployment.num_blocks, "blocks_free": deployment.num_blocks_free, "running": deployment.running,
            "processes": processes,
        }));
        line
    }

    /// Prints the table, writes the file, and judges.
    ///
    /// # Panics
    /// If an answer was wrong, or one hung, or a request is unaccounted for.
    pub fn finish(&self, chaos: &Chaos, tally: &Tally, num_clients_hung: usize, file: &Path) {
        println!("\nfaults (seed {}):", self.seed);
        for (what, count) in &chaos.counts {
            println!("  {what:<20} {count:>7}");
        }
        println!("requests:");
        let requests = requests(tally);
        for (what, count) in requests.as_object().expect("an object") {
            println!("  {what:<20} {count:>7}");
        }
        println!("  {:<20} {num_clients_hung:>7}", "clients that hang");
        println!("resident MiB (open files), first and last look:");
        let look = |sample: &Value| {
            let words = |process: &Value| {
                format!(
                    "{} {} ({})",
                    process["role"].as_str().unwrap_or("?"),
                    process["resident_mib"],
                    process["files"]
                )
            };
            sample["processes"].as_array().into_iter().flatten().map(words).collect::<Vec<_>>().join(", ")
        };
        for sample in self.samples.first().into_iter().chain(self.samples.last()) {
            println!("  {:>5} s: {}", sample["seconds"], look(sample));
        }
        let all = json!({
            "seed": self.seed, "minutes": self.minutes, "faults": chaos.counts, "requests": requests,
            "clients_hung": num_clients_hung, "samples": self.samples,
        });
        std::fs::write(file, serde_json::to_vec_pretty(&all).expect("JSON")).expect("the file can be written");
        println!("all of it: {}", file.display());
        assert_eq!(get(&tally.wrong) + get(&tally.hung) + num_clients_hung as u64, 0, "none is wrong, and none hangs");
        let ended = get(&tally.right) + get(&tally.failed) + get(&tally.cut);
        assert_eq!(ended, get(&tally.sent), "every request has one end");
    }
}
