//! The machines of the cluster and whether they live: a state machine without sockets and without a clock of its own.
//!
//! Owns what an agent said of its machine, when it was last heard, and which of its sessions counts. Does not know what
//! runs on a machine: which slots are taken is in the placement groups.
//!
//! **Invariant:** at most one session of a node counts; whatever an older one says is ignored.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use phalanx_proto::{AgentHello, DeviceKind, NodeId};

use super::placement::IMPLIED_LABELS;
use crate::config::defaults;

/// Ways there and back that are remembered: the shortest of them counts, for a busy machine lengthens some.
const ROUND_TRIPS_KEPT: usize = 5;
/// The table is looked at more often than this. Where it was not, this process itself stood still, and what the nodes said
/// meanwhile still waits to be read.
const OWN_PAUSE_MAX: Duration = Duration::from_secs(1);

/// Whether a node can be worked with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeState {
    /// It was heard in time.
    Alive,
    /// It is late: nothing new is placed there.
    Suspect,
    /// Its agent is gone, or silent for too long.
    Dead,
    /// It left on purpose.
    Left,
}

impl NodeState {
    /// The word in `status`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Suspect => "suspect",
            Self::Dead => "dead",
            Self::Left => "left",
        }
    }
}

/// One connection of one agent; grows with each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct AgentSession(pub u64);

/// One machine.
#[derive(Debug, Clone)]
pub struct Node {
    /// What its agent said of it.
    pub hello: AgentHello,
    /// Where it came from.
    pub address: String,
    /// Whether it lives.
    pub state: NodeState,
    /// Why it is not alive, else empty.
    pub reason: String,
    /// The connection that counts.
    pub session: AgentSession,
    last_heard: Instant,
    order: u64,
    round_trips: VecDeque<Duration>,
}

impl Node {
    /// The way to it and back, once it was measured.
    pub fn round_trip(&self) -> Option<Duration> {
        self.round_trips.iter().min().copied()
    }

    /// That way, where it is long.
    pub fn slow_round_trip(&self) -> Option<Duration> {
        let is_known = self.round_trips.len() >= ROUND_TRIPS_KEPT;
        self.round_trip().filter(|time| is_known && *time >= defaults::SLOW_ROUND_TRIP)
    }

    /// Why it is not alive, or what is wrong with it; else empty.
    pub fn trouble(&self) -> String {
        match self.slow_round_trip() {
            Some(time) if self.reason.is_empty() => {
                format!("the network is slow: {:.0} ms to the head and back", time.as_secs_f64() * 1000.0)
            }
            _ => self.reason.clone(),
        }
    }

    /// The labels that it was given, and those that every node has.
    pub fn labels(&self) -> BTreeMap<String, String> {
        let mut labels = self.hello.labels.clone();
        let implied = [self.hello.node_id.to_string(), self.hello.hostname.clone(), self.hello.device_kind.to_string()];
        labels.extend(IMPLIED_LABELS.into_iter().map(str::to_owned).zip(implied));
        labels
    }

    /// The device in words.
    pub fn device(&self) -> String {
        let count = self.hello.num_slots;
        match self.hello.device_kind {
            DeviceKind::Cpu => {
                let cpus = self.hello.num_cpus;
                let gib = self.hello.memory_bytes as f64 / f64::from(1u32 << 30);
                format!("cpu ({cpus} processors, {gib:.0} GiB)")
            }
            kind => {
                let name = self.hello.device_names.first().map(String::as_str).unwrap_or_default();
                format!("{kind} {count} x {name}")
            }
        }
    }
}

/// Why an agent may not join.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// Another build.
    #[error("version {theirs} cannot join a head of version {ours}: install the same version on both machines")]
    Version {
        /// The agent's.
        theirs: String,
        /// The head's.
        ours: String,
    },
    /// Its id is in use.
    #[error("node {id} has joined already (agent pid {pid} on {hostname}); give this one another PHALANX_HOME")]
    Duplicate {
        /// The id.
        id: NodeId,
        /// The process that joined first.
        pid: u32,
        /// Its machine.
        hostname: String,
    },
    /// The head ends.
    #[error("the head is stopping")]
    Stopping,
}

/// When a silent agent is late, and when it is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Silence after which nothing new is placed on a node.
    pub suspect_after: Duration,
    /// Silence after which its ranks are given up.
    pub dead_after: Duration,
}

impl Patience {
    /// Dead after so long, suspect after half of it.
    pub fn of(dead_after: Duration) -> Self {
        Self { suspect_after: dead_after / 2, dead_after }
    }

    /// Time between heartbeats: some may be late before anybody worries.
    pub fn heartbeat(&self) -> Duration {
        (self.suspect_after / 4).min(defaults::HEARTBEAT)
    }
}

/// All machines that ever joined in this life of the head.
#[derive(Debug)]
pub struct NodeTable {
    nodes: BTreeMap<NodeId, Node>,
    patience: Patience,
    next: u64,
    looked_at: Option<Instant>,
}

impl NodeTable {
    /// An empty table.
    pub fn new(patience: Patience) -> Self {
        Self { nodes: BTreeMap::new(), patience, next: 1, looked_at: None }
    }

    /// Takes a machine in, or takes it back.
    ///
    /// # Errors
    /// Another version, or a second agent with the id of one that lives.
    pub fn join(&mut self, hello: AgentHello, address: String, now: Instant) -> Result<AgentSession, JoinError> {
        let ours = phalanx_proto::VERSION;
        if hello.version != ours {
            return Err(JoinError::Version { theirs: hello.version, ours: ours.to_owned() });
        }
        let session = AgentSession(self.next);
        let before = self.nodes.get(&hello.node_id);
        if let Some(node) = before
            && node.state == NodeState::Alive
            && node.hello.pid != hello.pid
        {
            let Node { hello: AgentHello { pid, hostname, .. }, .. } = node;
            return Err(JoinError::Duplicate { id: hello.node_id, pid: *pid, hostname: hostname.clone() });
        }
        let order = before.map_or(self.next, |node| node.order);
        self.next += 1;
        let (state, reason) = (NodeState::Alive, String::new());
        let round_trips = VecDeque::new();
        let node = Node { address, state, reason, session, last_heard: now, order, round_trips, hello };
        self.nodes.insert(node.hello.node_id.clone(), node);
        Ok(session)
    }

    /// Notes that a node's agent said something. False where the session does not count any more.
    pub fn heard(&mut self, id: &NodeId, session: AgentSession, now: Instant) -> bool {
        let Some(node) = self.nodes.get_mut(id).filter(|node| node.session == session) else { return false };
        if node.state == NodeState::Dead {
            return false;
        }
        node.last_heard = now;
        if node.state == NodeState::Suspect {
            node.state = NodeState::Alive;
            node.reason.clear();
        }
        true
    }

    /// Notes how long the way to a node and back was; gives that time where it is found to be slow now.
    pub fn note_round_trip(&mut self, id: &NodeId, time: Duration) -> Option<Duration> {
        let node = self.nodes.get_mut(id)?;
        let was_slow = node.slow_round_trip().is_some();
        if node.round_trips.len() == ROUND_TRIPS_KEPT {
            node.round_trips.pop_front();
        }
        node.round_trips.push_back(time);
        node.slow_round_trip().filter(|_| !was_slow)
    }

    /// Notes that a node goes on purpose. False where the session does not count any more.
    pub fn leaving(&mut self, id: &NodeId, session: AgentSession, reason: String) -> bool {
        let Some(node) = self.nodes.get_mut(id).filter(|node| node.session == session) else { return false };
        node.state = NodeState::Left;
        node.reason = reason;
        true
    }

    /// Notes that a session ended. True where the node is dead by that.
    pub fn closed(&mut self, id: &NodeId, session: AgentSession) -> bool {
        let Some(node) = self.nodes.get_mut(id).filter(|node| node.session == session) else { return false };
        if matches!(node.state, NodeState::Left | NodeState::Dead) {
            return false;
        }
        node.state = NodeState::Dead;
        node.reason = format!("its agent (pid {}) closed the connection without leaving", node.hello.pid);
        true
    }

    /// Ages the silent; returns the nodes that died by it.
    pub fn tick(&mut self, now: Instant) -> Vec<NodeId> {
        let mut died = Vec::new();
        let pause = self.looked_at.replace(now).map_or(Duration::ZERO, |before| now.saturating_duration_since(before));
        let forgiven = if pause > OWN_PAUSE_MAX { pause } else { Duration::ZERO };
        for (id, node) in &mut self.nodes {
            node.last_heard = (node.last_heard + forgiven).min(now);
            let silent = now.saturating_duration_since(node.last_heard);
            let state = match node.state {
                NodeState::Alive | NodeState::Suspect if silent >= self.patience.dead_after => NodeState::Dead,
                NodeState::Alive if silent >= self.patience.suspect_after => NodeState::Suspect,
                _ => continue,
            };
            node.state = state;
            node.reason =
                format!("its agent (pid {}) has been silent for {:.0} s", node.hello.pid, silent.as_secs_f64());
            if state == NodeState::Dead {
                died.push(id.clone());
            }
        }
        died
    }

    /// One machine.
    pub fn node(&self, id: &NodeId) -> Option<&Node> {
        self.nodes.get(id)
    }

    /// All machines, in order of joining.
    pub fn iter(&self) -> impl Iterator<Item = &Node> {
        let mut nodes: Vec<&Node> = self.nodes.values().collect();
        nodes.sort_by_key(|node| node.order);
        nodes.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Patience = Patience { suspect_after: Duration::from_secs(3), dead_after: Duration::from_secs(10) };

    fn hello(id: &str, pid: u32) -> AgentHello {
        AgentHello {
            node_id: NodeId(id.into()),
            version: phalanx_proto::VERSION.into(),
            address: String::new(),
            hostname: "host".into(),
            device_kind: DeviceKind::Cpu,
            num_slots: 2,
            num_cpus: 2,
            memory_bytes: 1 << 33,
            pid,
            device_names: vec!["cpu".into(); 2],
            labels: BTreeMap::new(),
        }
    }

    fn state(table: &NodeTable, id: &str) -> NodeState {
        table.node(&NodeId(id.into())).expect("joined").state
    }

    #[test]
    fn silence_ages_a_node_and_a_word_brings_it_back_until_it_is_dead() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut table = NodeTable::new(PATIENCE);
        let id = NodeId("a".into());
        let session = table.join(hello("a", 1), "x".into(), start).expect("joins");
        let look = |table: &mut NodeTable, from: u64, to: u64| -> Vec<NodeId> {
            (from..=to).flat_map(|second| table.tick(at(second))).collect()
        };
        assert!(look(&mut table, 0, 2).is_empty());
        assert_eq!(state(&table, "a"), NodeState::Alive);
        assert!(look(&mut table, 3, 4).is_empty());
        assert_eq!(state(&table, "a"), NodeState::Suspect);
        assert!(table.heard(&id, session, at(5)));
        assert_eq!(state(&table, "a"), NodeState::Alive);
        assert!(look(&mut table, 5, 14).is_empty());
        assert_eq!(look(&mut table, 15, 15), std::slice::from_ref(&id));
        assert!(table.tick(at(16)).is_empty());
        assert!(!table.heard(&id, session, at(16)));
        assert_eq!(state(&table, "a"), NodeState::Dead);
    }

    #[test]
    fn a_head_that_stood_still_does_not_blame_the_nodes() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut table = NodeTable::new(PATIENCE);
        let id = NodeId("a".into());
        let session = table.join(hello("a", 1), "x".into(), start).expect("joins");
        assert!(table.tick(at(0)).is_empty());
        assert!(table.tick(at(60)).is_empty());
        assert_eq!(state(&table, "a"), NodeState::Alive);
        assert!(table.heard(&id, session, at(60)));
    }

    #[test]
    fn a_slow_way_is_said_once_and_named_until_it_is_short_again() {
        let mut table = NodeTable::new(PATIENCE);
        let id = NodeId("a".into());
        table.join(hello("a", 1), "x".into(), Instant::now()).expect("joins");
        let mut note = |millis| {
            let said = table.note_round_trip(&id, Duration::from_millis(millis)).is_some();
            (said, table.node(&id).expect("joined").trouble())
        };
        for _ in 0..ROUND_TRIPS_KEPT - 1 {
            assert_eq!(note(204), (false, String::new()), "a few may be chance");
        }
        let (said, words) = note(203);
        assert!(said && words.contains("203 ms"), "{words}");
        assert!(matches!(note(210), (false, words) if words.contains("203 ms")));
        assert_eq!(note(2), (false, String::new()));
    }

    #[test]
    fn only_the_newest_session_counts() {
        let now = Instant::now();
        let mut table = NodeTable::new(PATIENCE);
        let id = NodeId("a".into());
        let first = table.join(hello("a", 1), "x".into(), now).expect("joins");
        let second = table.join(hello("a", 1), "x".into(), now).expect("the same process may come again");
        assert!(!table.closed(&id, first));
        assert_eq!(state(&table, "a"), NodeState::Alive);
        assert!(table.closed(&id, second));
        assert_eq!(state(&table, "a"), NodeState::Dead);
        assert!(table.join(hello("a", 2), "x".into(), now).is_ok());
    }

    #[test]
    fn strangers_are_refused() {
        let now = Instant::now();
        let mut table = NodeTable::new(PATIENCE);
        table.join(hello("a", 1), "x".into(), now).expect("joins");
        assert!(matches!(table.join(hello("a", 2), "x".into(), now), Err(JoinError::Duplicate { pid: 1, .. })));
        let old = AgentHello { version: "0.0.0".into(), ..hello("b", 1) };
        assert!(matches!(table.join(old, "x".into(), now), Err(JoinError::Version { .. })));
    }

    #[test]
    fn who_leaves_is_not_dead() {
        let now = Instant::now();
        let mut table = NodeTable::new(PATIENCE);
        let id = NodeId("a".into());
        let session = table.join(hello("a", 1), "x".into(), now).expect("joins");
        assert!(table.leaving(&id, session, "asked".into()));
        assert!(!table.closed(&id, session));
        assert_eq!(state(&table, "a"), NodeState::Left);
    }
}
