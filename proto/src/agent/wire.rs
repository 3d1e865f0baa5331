//! Checked conversions of agents' messages to their generated types and back.

use std::time::Duration;

use super::{
    AgentCommand, AgentEvent, AgentHello, AgentWelcome, DesiredRank, DesiredRanks, HeadSocket, LogPart, LogRequest,
    LogSource, LogStart, RankKey, RankObserved, RankProcess,
};
use crate::{DeploymentName, Incarnation, NodeId, Rank, Term, WireError, pb};

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
