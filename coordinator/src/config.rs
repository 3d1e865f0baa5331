//! Defaults, limits and what the environment says.
//!
//! Owns every number that has a default, by name and unit, and the one reading of the environment. Flags are parsed in
//! `cli`; what is discovered (ports that were picked, memory, blocks) is other types.
//!
//! **Invariant:** nothing else in this crate reads the environment, and nothing here changes after the start.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// Defaults and limits.
pub mod defaults {
    use std::time::Duration;

    /// Port of the cluster's gRPC.
    pub const CLUSTER_PORT: u16 = 8001;
    /// Port of the OpenAI-compatible API.
    pub const HTTP_PORT: u16 = 8000;
    /// Port of the dashboard.
    pub const DASHBOARD_PORT: u16 = 8265;
    /// Host of all three.
    pub const HOST: &str = "127.0.0.1";

    /// Tokens in a KV block.
    pub const BLOCK_SIZE: u32 = 16;
    /// Share of device memory that may be used.
    pub const MEMORY_UTILIZATION: f64 = 0.90;
    /// Most sequences in a step.
    pub const MAX_NUM_SEQS: u32 = 256;
    /// Most tokens in a step.
    pub const MAX_NUM_BATCHED_TOKENS: u32 = 2048;
    /// Most requests that wait.
    pub const MAX_QUEUE: u32 = 1024;
    /// Most plans queued at a rank.
    pub const STEPS_IN_FLIGHT_MAX: u32 = 2;
    /// Most ranks in a group.
    pub const WORLD_SIZE_MAX: u32 = 256;
    /// Most bundles of a placement group.
    pub const BUNDLES_MAX: usize = 256;
    /// Most placement groups that are made by hand.
    pub const GROUPS_MAX: usize = 256;
    /// Most replicas of a deployment.
    pub const REPLICAS_MAX: u32 = 64;
    /// A step's chunks are sized so that it takes about this long.
    pub const STEP_TIME_BUDGET: Duration = Duration::from_millis(10);
    /// Shortest deadline of a step.
    pub const STEP_DEADLINE_MIN: Duration = Duration::from_secs(5);
    /// Most broken groups that one request is replayed after.
    pub const REPLAYS_MAX: u32 = 4;
    /// Longest wait of running requests for the group that replaces a broken one.
    pub const RECOVERY_DEADLINE: Duration = Duration::from_secs(900);
    /// Longest wait of running requests while there is no machine to start a group on.
    pub const NO_MACHINE_DEADLINE: Duration = Duration::from_secs(30);

    /// Time between an agent's heartbeats.
    pub const HEARTBEAT: Duration = Duration::from_millis(500);
    /// Silence after which a node's ranks are given up; after half of it nothing new is placed there.
    pub const NODE_TIMEOUT: Duration = Duration::from_millis(4_500);
    /// Shortest of these: a busy machine is silent for a moment now and then.
    pub const NODE_TIMEOUT_MIN: Duration = Duration::from_secs(1);
    /// The way to a node and back from which it is called slow.
    pub const SLOW_ROUND_TRIP: Duration = Duration::from_millis(100);
    /// How long agents and ranks outlive the head.
    pub const HEAD_GRACE: Duration = Duration::from_secs(60);
    /// Time for all ranks of a group to be started and to dial the head.
    pub const CONNECT_DEADLINE: Duration = Duration::from_secs(60);
    /// How long a broken group waits for word of what happened to its processes before it starts again.
    pub const SETTLE: Duration = Duration::from_millis(500);
    /// Time for the processes of a broken or stopping group to end.
    pub const END_DEADLINE: Duration = Duration::from_secs(15);
    /// Time for running requests to end when their deployment stops.
    pub const DRAIN: Duration = Duration::from_secs(10);
    /// The same for a replica whose node leaves while no other has room for it. Less than agents wait for their drain.
    pub const DRAIN_IN_PLACE: Duration = Duration::from_secs(100);
    /// Most restarts of a replica within [`RESTART_WINDOW`].
    pub const RESTARTS_MAX: usize = 5;
    /// Restarts before a group that has served so long count no more.
    pub const RESTARTS_FORGIVEN_AFTER: Duration = Duration::from_secs(10);
    /// The window in which restarts are counted.
    pub const RESTART_WINDOW: Duration = Duration::from_secs(600);

    /// Time for a head to listen once it was started.
    pub const HEAD_START_DEADLINE: Duration = Duration::from_secs(20);
    /// Time for an agent to join once it was started.
    pub const AGENT_JOIN_DEADLINE: Duration = Duration::from_secs(20);
    /// Time for a call to the head to connect.
    pub const CALL_CONNECT_DEADLINE: Duration = Duration::from_secs(3);
    /// Time for an answer that needs no work.
    pub const CALL_DEADLINE: Duration = Duration::from_secs(10);
    /// Events that a head remembers.
    pub const EVENTS_MAX: usize = 1000;
    /// Size at which the file of events starts anew; the one before is kept.
    pub const EVENT_BYTES_MAX: u64 = 4 << 20;
    /// Most bytes of a log in one answer.
    pub const LOG_PART_BYTES_MAX: u32 = 256 << 10;
    /// Answers of agents about their logs that may be waited for.
    pub const LOG_READS_MAX: usize = 64;
    /// Time for all replicas of a deployment to be started again, one after the other.
    pub const RESTART_DEADLINE: Duration = Duration::from_secs(3600);
    /// Longest wait that one call asks for.
    pub const WAIT_MAX: Duration = Duration::from_secs(86_400);
    /// Time for all processes of a cluster to end.
    pub const STOP_DEADLINE: Duration = Duration::from_secs(60);
    /// Time between pings on an idle gRPC connection.
    pub const KEEPALIVE: Duration = Duration::from_secs(1);
    /// Silence after a ping that ends a connection.
    pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

    /// HTTP/2 window of a stream, bytes.
    pub const STREAM_WINDOW_BYTES: u32 = 8 << 20;
    /// HTTP/2 window of a connection, bytes.
    pub const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
    /// Largest message of a rank (log-probabilities of a long prompt), bytes.
    pub const MESSAGE_BYTES_MAX: usize = 64 << 20;
    /// Events that wait for the cluster's task.
    pub const CLUSTER_QUEUE: usize = 1024;
    /// Messages that wait for one agent or one rank.
    pub const PEER_QUEUE: usize = 64;
    /// Progress lines that wait for one client.
    pub const WATCH_QUEUE: usize = 256;
}

/// What the environment says, read once in `main`.
#[derive(Debug, Clone)]
pub struct Environment {
    /// Everything that a node of this machine writes.
    pub home: Home,
    /// The default log filter, where set.
    pub log: Option<String>,
    /// What proves to a head elsewhere that it may be asked.
    pub token: Option<String>,
}

impl Environment {
    /// Reads `PHALANX_HOME`, `PHALANX_LOG` and `PHALANX_TOKEN`.
    #[expect(clippy::disallowed_methods, reason = "this is the one place that reads the environment")]
    pub fn read() -> Self {
        let path = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let state = path("XDG_STATE_HOME").or_else(|| path("HOME").map(|home| home.join(".local/state")));
        let home = path("PHALANX_HOME").or_else(|| state.map(|state| state.join("phalanx")));
        Self {
            home: Home::new(home.unwrap_or_else(|| std::env::temp_dir().join("phalanx"))),
            log: std::env::var("PHALANX_LOG").ok().filter(|value| !value.is_empty()),
            token: std::env::var("PHALANX_TOKEN").ok().filter(|value| !value.is_empty()),
        }
    }
}

/// The folder of one node, and where things lie in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home(PathBuf);

impl Home {
    /// A home at this path, made absolute.
    pub fn new(path: PathBuf) -> Self {
        Self(std::path::absolute(&path).unwrap_or(path))
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Sockets and records of running processes.
    pub fn run_dir(&self) -> PathBuf {
        self.0.join("run")
    }

    /// Logs.
    pub fn log_dir(&self) -> PathBuf {
        self.0.join("logs")
    }

    /// Ports that a head with free choice has picked, for the one after it.
    pub fn ports(&self) -> PathBuf {
        self.run_dir().join("ports.json")
    }

    /// What happened, as the last heads of this home told it.
    pub fn events(&self) -> PathBuf {
        self.log_dir().join("events.jsonl")
    }

    /// The log of a head in the background.
    pub fn head_log(&self) -> PathBuf {
        self.log_dir().join("head.log")
    }

    /// What survives a restart.
    pub fn store_dir(&self) -> PathBuf {
        self.0.join("store")
    }

    /// Keys and certificates between machines.
    pub fn trust_dir(&self) -> PathBuf {
        self.0.join("trust")
    }

    /// The cluster's Unix socket on this machine.
    pub fn head_socket(&self) -> PathBuf {
        self.run_dir().join("head.sock")
    }

    /// The record of the running agent, which the agent writes.
    pub fn agent_record(&self) -> PathBuf {
        self.run_dir().join("agent.json")
    }

    /// The record of the running head.
    pub fn head_record(&self) -> PathBuf {
        self.run_dir().join("head.json")
    }
}

/// Parses `500ms`, `60s`, `10m`, `1h30m` or plain seconds.
///
/// # Errors
/// Says what a duration looks like.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text} is not a duration; write 500ms, 60s, 10m or 1h30m");
    if let Ok(seconds) = text.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).map_err(|_| bad());
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).filter(|&end| end > 0).ok_or_else(bad)?;
        let amount: u64 = rest[..digits].parse().map_err(|_| bad())?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let millis = match &rest[..letters] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(bad()),
        };
        rest = &rest[letters..];
        total += Duration::from_millis(amount.checked_mul(millis).ok_or_else(bad)?);
    }
    if text.is_empty() { Err(bad()) } else { Ok(total) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, millis: Option<u64>) {
        assert_eq!(parse_duration(text).ok(), millis.map(Duration::from_millis), "{text}");
    }

    #[test]
    fn durations_are_read_as_people_write_them() {
        check("60s", Some(60_000));
        check("10m", Some(600_000));
        check("1h30m", Some(5_400_000));
        check("500ms", Some(500));
        check("0s", Some(0));
        check("2", Some(2_000));
        check("0.5", Some(500));
        check("", None);
        check("-1", None);
        check("m", None);
        check("10 m", None);
        check("10d", None);
        check("99999999999999999999h", None);
    }
}
