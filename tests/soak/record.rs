//! What was seen during a soak: a line now and then, a table in the end, a judgement, and the same for machines.
//!
//! **Invariant:** what is judged to be level was seen while nothing ran.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use harness::Processes;
use serde_json::{Value, json};

use super::chaos::Chaos;
use super::load::Tally;

/// What a process may hold more at the end of the second half than at its beginning: a part of what it held, and bytes.
const GROWTH_MAX: (f64, u64) = (0.1, 8 << 20);
/// The same for open files.
const FILES_GROWTH_MAX: usize = 8;

/// What runs while something is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Streams.
    UnderLoad,
    /// Nothing.
    AtRest,
}

/// A process as it was.
struct Seen {
    role: String,
    pid: u32,
    resident_bytes: u64,
    num_files: usize,
}

impl Seen {
    fn to_json(&self) -> Value {
        json!({
            "role": self.role, "pid": self.pid, "resident_bytes": self.resident_bytes, "files": self.num_files,
        })
    }
}

/// Everything as it was.
struct Sample {
    at: Duration,
    look: Look,
    requests: Value,
    state: String,
    epoch: u64,
    num_blocks: u32,
    num_blocks_free: u32,
    running: u32,
    processes: Vec<Seen>,
}

/// All that was seen so far.
pub struct Record {
    seed: u64,
    minutes: f64,
    samples: Vec<Sample>,
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn requests(tally: &Tally) -> Value {
    json!({
        "sent": get(&tally.sent), "completed": get(&tally.right), "wrong": get(&tally.wrong), "hung": get(&tally.hung),
        "failed": get(&tally.failed), "cut": get(&tally.cut), "refused": get(&tally.refused),
        "longest_pause_ms": get(&tally.pause_max_ms),
    })
}

impl Record {
    /// Nothing was seen yet.
    pub fn new(seed: u64, minutes: f64) -> Self {
        Self { seed, minutes, samples: Vec::new() }
    }

    /// What stands above the lines.
    pub fn heading() -> String {
        "  min       sent completed wrong hung  failed    cut epoch  blocks free running  resident MiB (open files)"
            .into()
    }

    /// Looks at everything; gives a line about it.
    pub fn note(&mut self, at: Duration, chaos: &Chaos, tally: &Tally, look: Look) -> String {
        let status = chaos.lasting.cluster.status();
        let machines = [("agent 1", chaos.lasting.cluster.node.agent_pid()), ("agent 2", chaos.other.agent_pid())];
        let agents = machines.into_iter().filter_map(|(role, pid)| Some((role.to_owned(), pid?)));
        let ranks = status.ranks.iter().map(|rank| (format!("rank {}", rank.rank), rank.pid));
        let all = [("head".to_owned(), status.head.pid)].into_iter().chain(agents).chain(ranks);
        let processes = all.filter(|(_, pid)| Processes::alive(*pid)).map(|(role, pid)| Seen {
            role,
            pid,
            resident_bytes: Processes::resident_bytes(pid),
            num_files: Processes::num_files(pid),
        });
        let deployment = &status.deployments[0];
        let sample = Sample {
            at,
            look,
            requests: requests(tally),
            state: deployment.state.clone(),
            epoch: deployment.epoch,
            num_blocks: deployment.num_blocks,
            num_blocks_free: deployment.num_blocks_free,
            running: deployment.running,
            processes: processes.collect(),
        };
        let line = sample.line();
        self.samples.push(sample);
        line
    }

    /// Prints the table; gives all of it for machines.
    pub fn finish(&self, chaos: &Chaos, tally: &Tally, num_clients_hung: usize) -> Value {
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
        let reasons = tally.reasons.lock().expect("nobody panics with it").clone();
        if !reasons.is_empty() {
            println!("what the failed were told:");
        }
        for (reason, count) in &reasons {
            println!("  {count:>7} x {reason}");
        }
        json!({
            "seed": self.seed, "minutes": self.minutes, "faults": chaos.counts, "requests": requests, "reasons": reasons,
            "clients_hung": num_clients_hung, "samples": self.samples.iter().map(Sample::to_json).collect::<Vec<_>>(),
        })
    }

    /// What is not as it must be.
    pub fn judge(&self, tally: &Tally, num_clients_hung: usize) -> Vec<String> {
        let mut faults = Vec::new();
        let mut demand = |holds: bool, words: String| {
            if !holds {
                faults.push(words);
            }
        };
        demand(get(&tally.wrong) == 0, format!("{} answers are wrong", get(&tally.wrong)));
        demand(get(&tally.hung) == 0, format!("{} requests hung", get(&tally.hung)));
        demand(num_clients_hung == 0, format!("{num_clients_hung} clients hang"));
        demand(get(&tally.right) > 0, "no request was completed".into());
        let ended = get(&tally.right) + get(&tally.wrong) + get(&tally.hung) + get(&tally.failed) + get(&tally.cut);
        let sent = get(&tally.sent);
        demand(ended == sent, format!("{sent} requests were sent, {ended} have ended"));
        let rests: Vec<&Sample> = self.samples.iter().filter(|sample| sample.look == Look::AtRest).collect();
        for sample in &rests {
            let Sample { num_blocks, num_blocks_free, .. } = sample;
            let is_free = num_blocks_free == num_blocks && *num_blocks == rests[0].num_blocks;
            demand(is_free, format!("{} min: {num_blocks_free} of {num_blocks} blocks are free", sample.minutes()));
        }
        let steady = &rests[rests.len() / 2..];
        if let [first, .., last] = steady {
            for now in &last.processes {
                let Some(then) = first.processes.iter().find(|then| then.role == now.role) else { continue };
                let bytes_max = (then.resident_bytes as f64 * (1.0 + GROWTH_MAX.0)) as u64 + GROWTH_MAX.1;
                let Seen { role, resident_bytes, num_files, .. } = now;
                let words =
                    format!("{role} grew from {:.1} to {:.1} MiB", mib(then.resident_bytes), mib(*resident_bytes));
                demand(*resident_bytes <= bytes_max, words);
                let words = format!("{role} has {num_files} open files, and had {}", then.num_files);
                demand(*num_files <= then.num_files + FILES_GROWTH_MAX, words);
            }
        }
        let left: Vec<u32> = self.left_over();
        demand(left.is_empty(), format!("processes that nobody knows any more are still there: {left:?}"));
        faults
    }

    /// Processes that were part of the cluster once, are not any more, and live.
    fn left_over(&self) -> Vec<u32> {
        let pids = |sample: &Sample| sample.processes.iter().map(|seen| seen.pid).collect::<BTreeSet<u32>>();
        let known = self.samples.last().map(pids).unwrap_or_default();
        let ever: BTreeSet<u32> = self.samples.iter().flat_map(pids).collect();
        ever.difference(&known).copied().filter(|pid| Processes::alive(*pid)).collect()
    }
}

impl Sample {
    fn minutes(&self) -> String {
        format!("{:.1}", self.at.as_secs_f64() / 60.0)
    }

    fn line(&self) -> String {
        let count = |name: &str| self.requests[name].as_u64().unwrap_or(0);
        let process = |seen: &Seen| format!("{} {:.1} ({})", seen.role, mib(seen.resident_bytes), seen.num_files);
        let processes: Vec<String> = self.processes.iter().map(process).collect();
        format!(
            "{:>5} {:>10} {:>9} {:>5} {:>4} {:>7} {:>6} {:>5} {:>12} {:>7}  {}{}",
            self.minutes(),
            count("sent"),
            count("completed"),
            count("wrong"),
            count("hung"),
            count("failed"),
            count("cut"),
            self.epoch,
            format!("{}/{}", self.num_blocks_free, self.num_blocks),
            self.running,
            processes.join(", "),
            if self.look == Look::AtRest { "; at rest" } else { "" }
        )
    }

    fn to_json(&self) -> Value {
        json!({
            "seconds": self.at.as_secs(), "at_rest": self.look == Look::AtRest, "requests": self.requests, "state": self.state,
            "epoch": self.epoch, "blocks": self.num_blocks, "blocks_free": self.num_blocks_free, "running": self.running,
            "processes": self.processes.iter().map(Seen::to_json).collect::<Vec<_>>(),
        })
    }
}
