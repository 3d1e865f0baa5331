//! Messages between the head and one machine's agent: what should run there, and what does.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{DeploymentName, Incarnation, NodeId, Rank, Term, WireError, pb};

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

fn missing(message: &'static str) -> WireError {
    WireError::Missing { message, field: "message" }
}

fn at_least_one(field: &'static str, value: u32) -> Result<u32, WireError> {
    if value == 0 { Err(WireError::Invalid { field, value: "0".into(), expected: "at least 1" }) } else { Ok(value) }
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

impl From<AgentHello> for pb::AgentHello {
    fn from(h: AgentHello) -> Self {
        Self {
            node_id: h.node_id.0,
            version: h.version,
            address: h.address,
            hostname: h.hostname,
            device_kind: h.device_kind.as_str().into(),
            num_slots: h.num_slots,
            num_cpus: h.num_cpus,
            memory_bytes: h.memory_bytes,
            pid: h.pid,
            device_names: h.device_names,
            labels: h.labels.into_iter().collect(),
        }
    }
}

impl TryFrom<pb::AgentHello> for AgentHello {
    type Error = WireError;

    fn try_from(h: pb::AgentHello) -> Result<Self, WireError> {
        if h.node_id.is_empty() {
            return Err(WireError::Missing { message: "AgentHello", field: "node_id" });
        }
        if h.device_names.len() as u64 != u64::from(h.num_slots) {
            return Err(WireError::Invalid {
                field: "device_names",
                value: format!("{} names", h.device_names.len()),
                expected: "one for each of num_slots",
            });
        }
        Ok(Self {
            node_id: NodeId(h.node_id),
            version: h.version,
            address: h.address,
            hostname: h.hostname,
            device_kind: h.device_kind.parse()?,
            num_slots: at_least_one("num_slots", h.num_slots)?,
            num_cpus: at_least_one("num_cpus", h.num_cpus)?,
            memory_bytes: h.memory_bytes,
            pid: h.pid,
            device_names: h.device_names,
            labels: h.labels.into_iter().collect(),
        })
    }
}

impl From<RankObserved> for pb::RankObserved {
    fn from(o: RankObserved) -> Self {
        let (state, exit_code, signal, by_agent, last_lines) = match o.state {
            RankProcess::Spawned => ("spawned", None, None, false, String::new()),
            RankProcess::Exited { code, signal, by_agent, last_lines } => {
                ("exited", code, signal, by_agent, last_lines)
            }
        };
        Self {
            deployment: o.key.deployment.0,
            replica: o.key.replica,
            rank: o.key.rank.0,
            incarnation: o.key.incarnation.0,
            state: state.into(),
            pid: o.pid,
            exit_code,
            signal,
            last_lines,
            by_agent,
        }
    }
}

impl TryFrom<pb::RankObserved> for RankObserved {
    type Error = WireError;

    fn try_from(o: pb::RankObserved) -> Result<Self, WireError> {
        let state = match o.state.as_str() {
            "spawned" => RankProcess::Spawned,
            "exited" => {
                let pb::RankObserved { exit_code: code, signal, by_agent, last_lines, .. } = o;
                RankProcess::Exited { code, signal, by_agent, last_lines }
            }
            other => {
                let expected = "spawned or exited";
                return Err(WireError::Invalid { field: "rank.state", value: other.into(), expected });
            }
        };
        let key = RankKey {
            deployment: DeploymentName(o.deployment),
            replica: o.replica,
            rank: Rank(o.rank),
            incarnation: Incarnation(o.incarnation),
        };
        Ok(Self { key, pid: o.pid, state })
    }
}

impl From<AgentEvent> for pb::AgentMessage {
    fn from(event: AgentEvent) -> Self {
        use pb::agent_message::Message as M;
        let message = match event {
            AgentEvent::Hello(hello) => M::Hello(hello.into()),
            AgentEvent::Heartbeat { sequence, round_trip } => {
                let round_trip_us = round_trip.map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
                M::Heartbeat(pb::AgentHeartbeat { sequence, round_trip_us })
            }
            AgentEvent::Rank(observed) => M::Rank(observed.into()),
            AgentEvent::Leaving(reason) => M::Leaving(pb::AgentLeaving { reason }),
            AgentEvent::Draining(reason) => M::Draining(pb::AgentLeaving { reason }),
            AgentEvent::Log(LogPart { id, text, next_offset, error }) => {
                M::Log(pb::LogPart { id, text: text.into(), next_offset, error })
            }
        };
        Self { message: Some(message) }
    }
}

impl TryFrom<pb::AgentMessage> for AgentEvent {
    type Error = WireError;

    fn try_from(message: pb::AgentMessage) -> Result<Self, WireError> {
        use pb::agent_message::Message as M;
        Ok(match message.message.ok_or_else(|| missing("AgentMessage"))? {
            M::Hello(hello) => Self::Hello(hello.try_into()?),
            M::Heartbeat(beat) => {
                Self::Heartbeat { sequence: beat.sequence, round_trip: beat.round_trip_us.map(Duration::from_micros) }
            }
            M::Rank(observed) => Self::Rank(observed.try_into()?),
            M::Leaving(leaving) => Self::Leaving(leaving.reason),
            M::Draining(leaving) => Self::Draining(leaving.reason),
            M::Log(pb::LogPart { id, text, next_offset, error }) => {
                Self::Log(LogPart { id, text: text.into(), next_offset, error })
            }
        })
    }
}

impl From<DesiredRank> for pb::DesiredRank {
    fn from(d: DesiredRank) -> Self {
        Self {
            deployment: d.key.deployment.0,
            replica: d.key.replica,
            rank: d.key.rank.0,
            incarnation: d.key.incarnation.0,
            device_slot: d.device_slot,
            num_threads: d.num_threads.unwrap_or(0),
            launch_token: d.launch_token,
            env: d.env.into_iter().collect(),
        }
    }
}

impl TryFrom<pb::DesiredRank> for DesiredRank {
    type Error = WireError;

    fn try_from(d: pb::DesiredRank) -> Result<Self, WireError> {
        if d.deployment.is_empty() {
            return Err(WireError::Missing { message: "DesiredRank", field: "deployment" });
        }
        if let Some((name, _)) = d.env.iter().find(|(name, value)| !is_env_name(name) || value.contains('\0')) {
            return Err(WireError::Invalid {
                field: "env",
                value: name.clone(),
                expected: "a name and value for a process",
            });
        }
        Ok(Self {
            key: RankKey {
                deployment: DeploymentName(d.deployment),
                replica: d.replica,
                rank: Rank(d.rank),
                incarnation: Incarnation(d.incarnation),
            },
            device_slot: d.device_slot,
            num_threads: (d.num_threads > 0).then_some(d.num_threads),
            launch_token: d.launch_token,
            env: d.env.into_iter().collect(),
        })
    }
}

fn is_env_name(name: &str) -> bool {
    !name.is_empty() && !name.contains(['=', '\0'])
}

impl From<LogRequest> for pb::ReadLog {
    fn from(LogRequest { id, source, start, bytes_max }: LogRequest) -> Self {
        let rank = match source {
            LogSource::Agent => None,
            LogSource::Rank { deployment, replica, rank } => {
                Some(pb::RankLog { deployment: deployment.0, replica, rank: rank.0 })
            }
        };
        let (tail_lines, offset) = match start {
            LogStart::Tail(lines) => (Some(lines), None),
            LogStart::Offset(offset) => (None, Some(offset)),
        };
        Self { id, rank, tail_lines, offset, bytes_max }
    }
}

impl From<pb::ReadLog> for LogRequest {
    fn from(pb::ReadLog { id, rank, tail_lines, offset, bytes_max }: pb::ReadLog) -> Self {
        let source = rank.map_or(LogSource::Agent, |log| LogSource::Rank {
            deployment: DeploymentName(log.deployment),
            replica: log.replica,
            rank: Rank(log.rank),
        });
        let start = offset.map_or(LogStart::Tail(tail_lines.unwrap_or_default()), LogStart::Offset);
        Self { id, source, start, bytes_max }
    }
}

impl From<AgentCommand> for pb::HeadToAgent {
    fn from(command: AgentCommand) -> Self {
        use pb::head_to_agent::Message as M;
        let message = match command {
            AgentCommand::Welcome(w) => M::Welcome(pb::AgentWelcome {
                term: w.term.0,
                heartbeat_ms: millis(w.heartbeat),
                head_grace_ms: millis(w.head_grace),
                version: w.version,
                socket_path: w.socket.as_ref().map(|socket| socket.path.clone()).unwrap_or_default(),
                boot_id: w.socket.map(|socket| socket.boot_id).unwrap_or_default(),
            }),
            AgentCommand::Desired(d) => M::Desired(pb::DesiredRanks {
                revision: d.revision,
                ranks: d.ranks.into_iter().map(Into::into).collect(),
            }),
            AgentCommand::End(reason) => M::End(pb::AgentEnd { reason }),
            AgentCommand::Seen { sequence } => M::Seen(pb::HeartbeatSeen { sequence }),
            AgentCommand::ReadLog(request) => M::ReadLog(request.into()),
        };
        Self { message: Some(message) }
    }
}

impl TryFrom<pb::HeadToAgent> for AgentCommand {
    type Error = WireError;

    fn try_from(message: pb::HeadToAgent) -> Result<Self, WireError> {
        use pb::head_to_agent::Message as M;
        Ok(match message.message.ok_or_else(|| missing("HeadToAgent"))? {
            M::Welcome(w) => Self::Welcome(AgentWelcome {
                term: Term(w.term),
                heartbeat: Duration::from_millis(at_least_one("heartbeat_ms", w.heartbeat_ms)?.into()),
                head_grace: Duration::from_millis(w.head_grace_ms.into()),
                version: w.version,
                socket: (!w.socket_path.is_empty()).then_some(HeadSocket { path: w.socket_path, boot_id: w.boot_id }),
            }),
            M::Desired(d) => Self::Desired(DesiredRanks {
                revision: d.revision,
                ranks: d.ranks.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            }),
            M::End(end) => Self::End(end.reason),
            M::Seen(seen) => Self::Seen { sequence: seen.sequence },
            M::ReadLog(request) => Self::ReadLog(request.into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> RankKey {
        RankKey { deployment: DeploymentName("m".into()), replica: 0, rank: Rank(1), incarnation: Incarnation(4) }
    }

    fn hello() -> AgentHello {
        AgentHello {
            node_id: NodeId("host-1".into()),
            version: "1".into(),
            address: String::new(),
            hostname: "host".into(),
            device_kind: DeviceKind::Cpu,
            num_slots: 2,
            num_cpus: 2,
            memory_bytes: 1,
            pid: 7,
            device_names: vec!["cpu".into(), "cpu".into()],
            labels: BTreeMap::from([("zone".into(), "a".into())]),
        }
    }

    #[test]
    fn events_survive_the_wire() {
        let exited = RankProcess::Exited { code: None, signal: Some(9), by_agent: true, last_lines: "x".into() };
        let events = [
            AgentEvent::Hello(hello()),
            AgentEvent::Heartbeat { sequence: 3, round_trip: None },
            AgentEvent::Heartbeat { sequence: 4, round_trip: Some(Duration::from_micros(250)) },
            AgentEvent::Rank(RankObserved { key: key(), pid: 5, state: RankProcess::Spawned }),
            AgentEvent::Rank(RankObserved { key: key(), pid: 5, state: exited }),
            AgentEvent::Leaving("asked".into()),
            AgentEvent::Draining("asked".into()),
            AgentEvent::Log(LogPart { id: 4, text: b"x".to_vec(), next_offset: 9, error: "none".into() }),
        ];
        for event in events {
            assert_eq!(AgentEvent::try_from(pb::AgentMessage::from(event.clone())), Ok(event));
        }
    }

    #[test]
    fn commands_survive_the_wire() {
        let rank = DesiredRank {
            key: key(),
            device_slot: 1,
            num_threads: None,
            launch_token: "t".into(),
            env: BTreeMap::from([("A".into(), "b".into())]),
        };
        let welcome = AgentWelcome {
            term: Term(2),
            heartbeat: Duration::from_secs(1),
            head_grace: Duration::ZERO,
            version: "1".into(),
            socket: Some(HeadSocket { path: "/x".into(), boot_id: "b".into() }),
        };
        let commands = [
            AgentCommand::Welcome(welcome),
            AgentCommand::Desired(DesiredRanks { revision: 8, ranks: vec![rank] }),
            AgentCommand::End("stop".into()),
            AgentCommand::Seen { sequence: 4 },
            AgentCommand::ReadLog(LogRequest {
                id: 4,
                source: LogSource::Rank { deployment: DeploymentName("m".into()), replica: 1, rank: Rank(2) },
                start: LogStart::Offset(0),
                bytes_max: 10,
            }),
            AgentCommand::ReadLog(LogRequest {
                id: 5,
                source: LogSource::Agent,
                start: LogStart::Tail(7),
                bytes_max: 10,
            }),
        ];
        for command in commands {
            assert_eq!(AgentCommand::try_from(pb::HeadToAgent::from(command.clone())), Ok(command));
        }
    }

    #[test]
    fn lying_messages_are_refused() {
        for break_it in [
            (|h| h.num_slots = 0) as fn(&mut pb::AgentHello),
            |h| h.node_id.clear(),
            |h| h.device_kind = "tpu".into(),
            |h| h.device_names.clear(),
        ] {
            let mut wire = pb::AgentHello::from(hello());
            break_it(&mut wire);
            assert!(AgentHello::try_from(wire).is_err());
        }
        let wire = pb::RankObserved { state: "asleep".into(), ..Default::default() };
        assert!(RankObserved::try_from(wire).is_err());
        let wire = pb::DesiredRank {
            deployment: "m".into(),
            env: [("A=B".to_string(), String::new())].into(),
            ..Default::default()
        };
        assert!(DesiredRank::try_from(wire).is_err());
    }
}
