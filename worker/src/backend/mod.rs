//! Devices that a rank can compute on, one file per kind.
//!
//! Owns the list of kinds and how each is opened. Knows no plan and no model.
//!
//! **Invariant:** a kind that cannot be used is refused by name when the rank starts; nothing falls back to another one.

pub mod cpu;
pub mod cuda;
pub mod presence;
pub mod reference;

use std::fmt;
use std::str::FromStr;

use phalanx_proto::{LoadModel, NodeId};

use crate::error::WorkerError;

/// Kind of device of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// Own kernels on the host.
    Cpu,
    /// candle-core on the host: slow, the oracle of the others.
    Reference,
    /// NVIDIA.
    Cuda,
    /// AMD.
    Rocm,
}

impl DeviceKind {
    /// The word in flags and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Reference => "reference",
            Self::Cuda => "cuda",
            Self::Rocm => "rocm",
        }
    }

    /// What a rank says that was started for a device without kernels.
    pub fn refused(self) -> WorkerError {
        WorkerError::Device { device: self.as_str(), reason: "this build has no kernels for it; use --device cpu" }
    }

    /// Whether this build can use it.
    ///
    /// # Errors
    /// It cannot; the message says what to use.
    pub fn check(self) -> Result<(), WorkerError> {
        if self == Self::Rocm { Err(self.refused()) } else { Ok(()) }
    }
}

/// Ends the process without the exit handlers of libraries: those of a driver wait for a device that may never come to rest.
pub fn end_process(code: u8) -> ! {
    // SAFETY: has no precondition; the system takes back what handlers would have released.
    unsafe { libc::_exit(code.into()) }
}

/// Ranks of the group that run on a node; at least the one that asks.
pub fn ranks_here(node_id: &NodeId, load: &LoadModel) -> usize {
    load.rank_nodes.iter().filter(|node| *node == node_id).count().max(1)
}

/// Threads that a rank computes with: as asked for, or its share of the CPUs that the process may use.
pub fn num_threads(asked: usize, node_id: &NodeId, load: &LoadModel) -> usize {
    if asked > 0 { asked } else { (num_cpus() / ranks_here(node_id, load)).max(1) }
}

/// CPUs that the process may use.
pub fn num_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for DeviceKind {
    type Err = WorkerError;

    fn from_str(name: &str) -> Result<Self, WorkerError> {
        let all = [Self::Cpu, Self::Reference, Self::Cuda, Self::Rocm];
        all.into_iter().find(|kind| kind.as_str() == name).ok_or_else(|| WorkerError::Setting {
            setting: "device",
            found: name.into(),
            expected: "cpu, reference, cuda or rocm",
        })
    }
}
