//! Times sums over the devices of this machine: one process a device, as ranks are, started for the purpose.
//!
//! Owns what is measured, the processes that measure (`child`) and those who start them (`run`). Knows no plan, no model and
//! no head.
//!
//! **Invariant:** the processes meet as ranks do, over a key that stands in no argument and no environment, and end with
//! whoever started them. Every run has a deadline, after which none of its processes is left.

pub mod child;
mod run;

use std::path::PathBuf;
use std::time::Duration;

use phalanx_kernels::{CollectiveError, KernelError};
use phalanx_proto::DeviceKind;
use serde::{Deserialize, Serialize};

pub use run::{Measured, Setup};

/// Smallest and largest size of a whole run.
pub const BYTES: (usize, usize) = (8 << 10, 64 << 20);
/// Most processes of a group.
pub const WORLD_MAX: usize = 8;

/// Sizes from the smallest to the largest, each twice the one before.
pub fn sizes(from: usize, to: usize) -> Vec<usize> {
    std::iter::successors(Some(from), |bytes| bytes.checked_mul(2)).take_while(|bytes| *bytes <= to).collect()
}

/// Which ways are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ways {
    /// All of them.
    All,
    /// Those that serve: own kernels by their table, and NCCL.
    Served,
}

/// What one of the processes is told: one line on its standard input, which then stays open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BenchLaunch {
    /// Who started it.
    pub parent_pid: u32,
    /// What the processes of this group know and others do not.
    pub group_key: Vec<u8>,
    /// Which one it is.
    pub rank: usize,
    /// How many there are.
    pub world_size: usize,
    /// What it computes on.
    pub device: DeviceKind,
    /// What is measured.
    pub ways: Ways,
    /// For which sizes, in bytes of one rank's data.
    pub sizes: Vec<usize>,
    /// Folder that keeps device code which was compiled here.
    pub kernel_cache_dir: PathBuf,
    /// The toolkit that the user has named.
    pub cuda_home: Option<PathBuf>,
}

/// What one of the processes says: a line on its standard output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BenchLine {
    /// Something that a person should know of the figures.
    Note(String),
    /// A figure.
    Timing(Timing),
    /// It gives up.
    Failed(String),
    /// Nothing follows.
    Done,
}

/// How long one sum took on the slowest rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// The way: `own`, `pull`, `two-shot`, `push+add+norm`, `nccl`, `nccl in a graph`; on CPUs `shm` and `tcp`.
    pub way: String,
    /// Blocks that the way may use at most, or that share a row; 0 where it chooses itself.
    pub blocks: u32,
    /// Bytes of one rank's data.
    pub bytes: usize,
    /// Microseconds.
    pub us: f64,
    /// Whether all ranks found the right sums.
    pub right: bool,
}

impl Timing {
    /// What each link carries in each direction, GB/s, if data crosses it no more often than it must: `2 (n - 1) / n` times.
    pub fn bus_gb_per_s(&self, world_size: usize) -> f64 {
        let n = world_size.max(1) as f64;
        2.0 * (n - 1.0) / n * self.bytes as f64 / (self.us.max(f64::MIN_POSITIVE) * 1e3)
    }
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A process cannot be started or spoken with.
    #[error("a process that measures cannot be started: {0}")]
    System(#[from] std::io::Error),
    /// The device, or the group of devices.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The group of processes.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// One of the processes gave up.
    #[error("rank {rank}: {reason}")]
    Rank {
        /// Which.
        rank: usize,
        /// Why.
        reason: String,
    },
    /// It took too long.
    #[error("not done within {0:?}")]
    Late(Duration),
    /// A group that cannot be, here or at all.
    #[error("sums over {asked} {kind} devices cannot be measured here: this machine can have groups of 2 to {here}")]
    WorldSize {
        /// What was asked for.
        asked: usize,
        /// The kind.
        kind: DeviceKind,
        /// How many can be joined here.
        here: usize,
    },
    /// Kind of device that has no such measurement.
    #[error("sums over {0} devices are not measured by this version")]
    Device(DeviceKind),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_double_and_rates_count_what_must_cross() {
        let all = sizes(BYTES.0, BYTES.1);
        assert_eq!((all.len(), all[0], all[13]), (14, 8192, 64 << 20));
        assert!(sizes(3, 2).is_empty());
        let timing = Timing { way: "own".into(), blocks: 0, bytes: 64 << 20, us: 245.0, right: true };
        assert!((timing.bus_gb_per_s(2) - 273.9).abs() < 0.1);
        assert!((timing.bus_gb_per_s(4) - 410.9).abs() < 0.1);
    }

    #[test]
    fn lines_are_read_as_they_were_written() {
        let timing = Timing { way: "push+add+norm".into(), blocks: 2, bytes: 8192, us: 3.5, right: true };
        for line in
            [BenchLine::Timing(timing), BenchLine::Note("n".into()), BenchLine::Failed("f".into()), BenchLine::Done]
        {
            let text = serde_json::to_string(&line).unwrap();
            assert_eq!(serde_json::from_str::<BenchLine>(&text).unwrap(), line, "{text}");
        }
    }
}
