//! Messages between the head and one machine's agent: what should run there, and what does.

mod wire;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{DeploymentName, Incarnation, NodeId, Rank, Term, WireError};

/// What a node's slots are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// The machine's processors.
    Cpu,
    /// GPUs that speak CUDA.
    Cuda,
    /// GPUs that speak HIP.
    Rocm,
}

impl DeviceKind {
    /// The word on the wire, in flags and in `status`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Rocm => "rocm",
        }
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for DeviceKind {
    type Err = WireError;

    fn from_str(name: &str) -> Result<Self, WireError> {
        [Self::Cpu, Self::Cuda, Self::Rocm].into_iter().find(|kind| kind.as_str() == name).ok_or_else(|| {
            WireError::Invalid { field: "device_kind", value: name.into(), expected: "cpu, cuda or rocm" }
        })
    }
}

/// Names one rank process: the same key never means two processes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RankKey {
    /// The deployment that it serves.
    pub deployment: DeploymentName,
    /// Which replica of it.
    pub replica: u32,
    /// Place in the group.
    pub rank: Rank,
    /// The set of processes that it belongs to.
    pub incarnation: Incarnation,
}

impl fmt::Display for RankKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{} (incarnation {})", self.deployment, self.replica, self.rank, self.incarnation)
    }
}

/// First message of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentHello {
    /// Its node.
    pub node_id: NodeId,
    /// Version of the program.
    pub version: String,
    /// Where other machines reach this one (an IP address without a port); empty: where the head sees it come from.
    pub address: String,
    /// The machine's name.
    pub hostname: String,
    /// What its slots are.
    pub device_kind: DeviceKind,
    /// Slots that it offers, at least 1.
    pub num_slots: u32,
    /// Processors that it may use, at least 1.
    pub num_cpus: u32,
    /// Memory of the machine.
    pub memory_bytes: u64,
    /// The agent's process id.
    pub pid: u32,
    /// One name for each slot.
    pub device_names: Vec<String>,
    /// What it was labelled with, for placement.
    pub labels: BTreeMap<String, String>,
}

/// What became of one rank process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankObserved {
    /// Which rank.
    pub key: RankKey,
    /// Its process id; 0 where it could not be started.
    pub pid: u32,
    /// What was seen.
    pub state: RankProcess,
}

/// Whether a rank's process lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RankProcess {
    /// It was started.
    Spawned,
    /// It has ended, or could not be started.
    Exited {
        /// Exit code, where it ended by itself.
        code: Option<i32>,
        /// Signal, where one ended it.
        signal: Option<i32>,
        /// Whether that signal is one that its agent had sent: then it says nothing about why the group broke.
        by_agent: bool,
        /// The end of its log, or why it could not be started.
        last_lines: String,
    },
}

/// Which log of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogSource {
    /// The agent's own.
    Agent,
    /// A rank's, of whatever incarnation.
    Rank {
        /// Its deployment.
        deployment: DeploymentName,
        /// Its replica.
        replica: u32,
        /// Its place.
        rank: Rank,
    },
}

/// Where to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogStart {
    /// So many lines before the end.
    Tail(u32),
    /// Behind so many bytes; what is not there any more is passed over.
    Offset(u64),
}

/// Asks for a part of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRequest {
    /// Told again with the answer.
    pub id: u64,
    /// Which log.
    pub source: LogSource,
    /// Where to begin.
    pub start: LogStart,
    /// Most bytes of the answer.
    pub bytes_max: u32,
}

/// Part of a log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogPart {
    /// Of the request.
    pub id: u64,
    /// Whole lines where there are any.
    pub text: Vec<u8>,
    /// Where the next part begins.
    pub next_offset: u64,
    /// Why it cannot be read, else empty.
    pub error: String,
}

/// What an agent tells the head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentEvent {
    /// First message.
    Hello(AgentHello),
    /// It lives; counts from 1.
    Heartbeat {
        /// Which.
        sequence: u64,
        /// How long the answer to an earlier one took, where one came since the last heartbeat.
        round_trip: Option<Duration>,
    },
    /// A rank process began or ended.
    Rank(RankObserved),
    /// It ends on purpose, for this reason.
    Leaving(String),
    /// It wants to leave, for this reason, and stays until it is told to end.
    Draining(String),
    /// Part of a log.
    Log(LogPart),
}

/// A Unix socket of the head, of use only on the head's machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HeadSocket {
    /// Absolute path.
    pub path: String,
    /// `/proc/sys/kernel/random/boot_id` of the head's machine.
    pub boot_id: String,
}

/// The head's answer to a hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentWelcome {
    /// Life of the head.
    pub term: Term,
    /// Time between heartbeats; never zero.
    pub heartbeat: Duration,
    /// How long ranks outlive a lost head.
    pub head_grace: Duration,
    /// Version of the head.
    pub version: String,
    /// A shorter way for ranks on the head's machine.
    pub socket: Option<HeadSocket>,
}

/// One rank that should run on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredRank {
    /// Which.
    pub key: RankKey,
    /// The slot that it takes.
    pub device_slot: u32,
    /// Threads for it; `None`: the agent's share of the machine.
    pub num_threads: Option<u32>,
    /// What the rank shows to the head as proof that it was asked for.
    pub launch_token: String,
    /// Additional environment.
    pub env: BTreeMap<String, String>,
}

/// Every rank that should run on a node; whatever else runs there is ended. Saying it twice changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DesiredRanks {
    /// Grows with each change within a term.
    pub revision: u64,
    /// All of them.
    pub ranks: Vec<DesiredRank>,
}

/// What the head tells an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentCommand {
    /// First message.
    Welcome(AgentWelcome),
    /// What should run.
    Desired(DesiredRanks),
    /// End all ranks, then the agent.
    End(String),
    /// A heartbeat has arrived; said at once, so that the agent knows how long the way is.
    Seen {
        /// Which.
        sequence: u64,
    },
    /// Read a log.
    ReadLog(LogRequest),
}

#[cfg(test)]
mod tests;
