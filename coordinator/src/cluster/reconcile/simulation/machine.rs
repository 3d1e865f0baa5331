//! A machine as the head can know it: an agent that obeys, ranks that live and die, and a network that delays, stops and heals.
//!
//! **Invariant:** what one stream carries arrives in order, late or never; a slot has one process at a time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use phalanx_proto::{
    AgentCommand, AgentEvent, AgentHello, DesiredRank, DeviceKind, NodeId, RankCapacity, RankEvent, RankHello, RankKey,
    RankObserved, RankProcess, RankResumes, SamplerFeatures, VERSION,
};
use tokio::sync::{mpsc, oneshot};

use super::super::super::ClusterError;
use super::super::super::event::ClusterEvent;
use super::super::super::nodes::AgentSession;
use super::{NUM_BLOCKS, NUM_SLOTS, Random};
use crate::engine::group::RankLink;

/// A silent peer is noticed after so long, milliseconds.
pub const SILENCE_MS: u64 = 11_000;
/// Ranks wait for a lost head so long.
const GRACE_MS: u64 = 60_000;
const HEARTBEAT_MS: u64 = 500;

/// What a machine sees of the rest of the world in one moment.
pub struct Surroundings<'a> {
    pub now: u64,
    pub random: &'a mut Random,
    /// The way to the head that is there, and which life of it that is.
    pub head: Option<(mpsc::Sender<ClusterEvent>, u64)>,
    /// Nothing goes wrong any more.
    pub calm: bool,
}

impl Surroundings<'_> {
    fn life(&self) -> Option<u64> {
        self.head.as_ref().map(|(_, life)| *life)
    }

    fn tell_head(&self, event: ClusterEvent) {
        if let Some((events, _)) = &self.head {
            assert!(events.try_send(event).is_ok(), "the queue is long enough for a simulation");
        }
    }
}

enum Stage {
    New,
    Dialing { life: u64, reply: oneshot::Receiver<Result<(), ClusterError>>, events: mpsc::Sender<RankEvent> },
    Connected { life: u64, events: mpsc::Sender<RankEvent> },
}

/// A rank's process.
pub struct RankSim {
    pub pid: u32,
    pub slot: u32,
    pub is_dead: bool,
    pub is_frozen: bool,
    /// It has been in a group that served: it holds weights.
    pub was_ready: bool,
    token: String,
    stage: Stage,
    dial_at: u64,
    dying_at: Option<u64>,
    lost_at: u64,
    exit: (Option<i32>, Option<i32>),
}

impl RankSim {
    fn end(&mut self, code: Option<i32>, signal: Option<i32>) {
        self.is_dead = true;
        self.exit = (code, signal);
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.end(None, Some(9));
    }

    /// Its head is gone: it waits with what it has, if it has anything.
    fn lose_head(&mut self, now: u64) {
        if self.was_ready {
            (self.stage, self.dial_at, self.lost_at) = (Stage::New, now + 200, now);
        } else {
            self.end(Some(1), None);
        }
    }

    fn live(&mut self, key: &RankKey, node: &NodeId, is_cut: bool, cut_for: u64, around: &mut Surroundings<'_>) {
        if self.dying_at.is_some_and(|at| around.now >= at) {
            return self.end(None, Some(15));
        }
        if self.is_dead || self.is_frozen {
            return;
        }
        let life = around.life();
        match &mut self.stage {
            Stage::New if self.was_ready && around.now > self.lost_at + GRACE_MS => self.end(Some(1), None),
            Stage::New if around.now < self.dial_at => {}
            Stage::New => match life.filter(|_| !is_cut) {
                Some(life) => self.dial(key, node, life, around),
                None if !self.was_ready && around.now > self.dial_at + 3_000 => self.end(Some(1), None),
                None => {}
            },
            Stage::Dialing { life: dialed, .. } if life != Some(*dialed) => self.lose_head(around.now),
            Stage::Dialing { life, reply, events } => match reply.try_recv() {
                Ok(Ok(())) => self.stage = Stage::Connected { life: *life, events: events.clone() },
                Ok(Err(_)) => self.end(Some(1), None),
                Err(oneshot::error::TryRecvError::Empty) => {}
                Err(oneshot::error::TryRecvError::Closed) => self.lose_head(around.now),
            },
            Stage::Connected { life: known, .. } if !is_cut && life != Some(*known) => self.lose_head(around.now),
            Stage::Connected { .. } if cut_for > SILENCE_MS => self.lose_head(around.now),
            Stage::Connected { events, .. } if !is_cut && events.is_closed() => self.end(Some(0), None),
            Stage::Connected { .. } => {}
        }
    }

    fn dial(&mut self, key: &RankKey, node: &NodeId, life: u64, around: &Surroundings<'_>) {
        let (commands, _) = mpsc::channel(1);
        let (events, incoming) = mpsc::channel(1);
        let (answer, reply) = oneshot::channel();
        let capacity = RankCapacity {
            num_blocks: u64::from(NUM_BLOCKS),
            weight_bytes: 1,
            block_bytes: 1,
            free_bytes: 1,
            features: SamplerFeatures::default(),
        };
        let hello = RankHello {
            deployment: key.deployment.clone(),
            replica: key.replica,
            rank: key.rank,
            incarnation: key.incarnation,
            node_id: node.clone(),
            pid: self.pid,
            launch_token: self.token.clone(),
            version: VERSION.into(),
            device: "made-up".into(),
            resumes: self.was_ready.then_some(RankResumes { capacity, num_blocks: NUM_BLOCKS, last_plan: None }),
        };
        let link = RankLink { rank: key.rank, commands, events: incoming };
        around.tell_head(ClusterEvent::RankDialed { hello, link, reply: answer });
        self.stage = Stage::Dialing { life, reply, events };
    }
}

enum Link {
    None,
    Joining { life: u64, reply: oneshot::Receiver<Result<AgentSession, ClusterError>>, inbox: Inbox },
    Up(Stream),
}

/// What is on its way to an agent.
struct Inbox {
    commands: mpsc::Receiver<AgentCommand>,
    /// None: the head closed the stream.
    to_agent: VecDeque<(u64, Option<AgentCommand>)>,
}

/// An agent's stream.
struct Stream {
    life: u64,
    session: AgentSession,
    inbox: Inbox,
    to_head: VecDeque<(u64, AgentEvent)>,
    beat_at: u64,
}

impl Stream {
    fn say(&mut self, event: AgentEvent, around: &mut Surroundings<'_>) {
        let after = self.to_head.back().map_or(0, |(due, _)| *due);
        self.to_head.push_back((after.max(around.now + around.random.below(60)), event));
    }
}

/// A machine.
pub struct Machine {
    pub node: NodeId,
    /// 0: no agent runs.
    pub agent_pid: u32,
    pub back_at: u64,
    pub frozen_until: u64,
    pub cut_until: u64,
    pub cut_since: u64,
    pub ranks: BTreeMap<RankKey, RankSim>,
    next_pid: u32,
    link: Link,
    desired: BTreeMap<RankKey, DesiredRank>,
    finished: BTreeSet<RankKey>,
    observed: BTreeMap<RankKey, RankObserved>,
    /// Ends of streams that the head will see.
    goodbyes: Vec<(u64, u64, AgentSession)>,
}

impl Machine {
    pub fn new(number: u32) -> Self {
        Self {
            node: NodeId(format!("node-{number}")),
            agent_pid: 1_000 * (number + 1),
            back_at: 0,
            frozen_until: 0,
            cut_until: 0,
            cut_since: 0,
            ranks: BTreeMap::new(),
            next_pid: 1_000 * (number + 1) + 1,
            link: Link::None,
            desired: BTreeMap::new(),
            finished: BTreeSet::new(),
            observed: BTreeMap::new(),
            goodbyes: Vec::new(),
        }
    }

    pub fn is_cut(&self, now: u64) -> bool {
        now < self.cut_until
    }

    /// `kill -9` of the agent: its ranks go with it.
    pub fn kill_agent(&mut self, now: u64, back_at: u64) {
        self.ranks.clear();
        self.desired.clear();
        self.finished.clear();
        self.observed.clear();
        (self.agent_pid, self.back_at, self.frozen_until) = (0, back_at, 0);
        self.drop_link(now);
    }

    fn drop_link(&mut self, now: u64) {
        if let Link::Up(stream) = std::mem::replace(&mut self.link, Link::None) {
            let seen_at = if self.is_cut(now) { self.cut_until.min(self.cut_since + SILENCE_MS) } else { now };
            self.goodbyes.push((seen_at, stream.life, stream.session));
        }
    }

    /// One moment of this machine's life.
    pub fn live(&mut self, around: &mut Surroundings<'_>) {
        let now = around.now;
        let (due, later) = self.goodbyes.drain(..).partition(|(at, ..)| *at <= now);
        self.goodbyes = later;
        let due: Vec<(u64, u64, AgentSession)> = due;
        for (_, life, session) in due {
            if around.life() == Some(life) {
                around.tell_head(ClusterEvent::AgentGone { node: self.node.clone(), session });
            }
        }
        if self.agent_pid == 0 {
            if now < self.back_at {
                return;
            }
            self.agent_pid = self.pid();
        }
        let (is_cut, cut_for) = (self.is_cut(now), if self.is_cut(now) { now - self.cut_since } else { 0 });
        for (key, rank) in &mut self.ranks {
            rank.live(key, &self.node, is_cut, cut_for, around);
        }
        if now >= self.frozen_until {
            self.supervise(around);
            self.keep_link(is_cut, cut_for, around);
        }
        if let Link::Up(stream) = &mut self.link
            && !is_cut
            && around.life() == Some(stream.life)
        {
            while let Some((_, event)) = stream.to_head.pop_front_if(|(due, _)| *due <= now) {
                let (node, session) = (self.node.clone(), stream.session);
                around.tell_head(ClusterEvent::AgentSaid { node, session, event });
            }
        }
    }

    fn pid(&mut self) -> u32 {
        self.next_pid += 1;
        self.next_pid
    }

    /// Takes the dead away, ends what is not desired, starts what is missing.
    fn supervise(&mut self, around: &mut Surroundings<'_>) {
        let dead: Vec<RankKey> =
            self.ranks.iter().filter(|(_, rank)| rank.is_dead).map(|(key, _)| key.clone()).collect();
        for key in dead {
            let Some(rank) = self.ranks.remove(&key) else { continue };
            let (code, signal) = rank.exit;
            let by_agent = rank.dying_at.is_some();
            if self.desired.contains_key(&key) {
                self.finished.insert(key.clone());
            }
            let state = RankProcess::Exited { code, signal, by_agent, last_lines: String::new() };
            self.report(RankObserved { key, pid: rank.pid, state }, around);
        }
        for (key, rank) in &mut self.ranks {
            if !self.desired.contains_key(key) && rank.dying_at.is_none() {
                rank.dying_at = Some(around.now + around.random.below(3_000));
            }
        }
        let missing: Vec<DesiredRank> = self.desired.values().cloned().collect();
        for rank in missing {
            let slot_is_free = self.ranks.values().all(|other| other.slot != rank.device_slot);
            if slot_is_free && !self.finished.contains(&rank.key) {
                self.start(rank, around);
            }
        }
    }

    fn start(&mut self, rank: DesiredRank, around: &mut Surroundings<'_>) {
        let pid = self.pid();
        let fails = !around.calm && around.random.one_in(30);
        let sim = RankSim {
            pid,
            slot: rank.device_slot,
            is_dead: fails,
            is_frozen: false,
            was_ready: false,
            token: rank.launch_token,
            stage: Stage::New,
            dial_at: around.now + 10 + around.random.below(400),
            dying_at: None,
            lost_at: 0,
            exit: (Some(2), None),
        };
        self.ranks.insert(rank.key.clone(), sim);
        self.report(RankObserved { key: rank.key, pid, state: RankProcess::Spawned }, around);
    }

    fn report(&mut self, observed: RankObserved, around: &mut Surroundings<'_>) {
        self.observed.insert(observed.key.clone(), observed.clone());
        if let Link::Up(stream) = &mut self.link {
            stream.say(AgentEvent::Rank(observed), around);
        }
    }

    fn keep_link(&mut self, is_cut: bool, cut_for: u64, around: &mut Surroundings<'_>) {
        let now = around.now;
        match &mut self.link {
            Link::None if !is_cut && around.life().is_some() && around.random.one_in(2) => self.join(around),
            Link::None => {}
            Link::Joining { life, .. } if around.life() != Some(*life) => self.link = Link::None,
            Link::Joining { reply, .. } => match reply.try_recv() {
                Ok(Ok(session)) => self.joined(session, around),
                Err(oneshot::error::TryRecvError::Empty) => {}
                _ => self.link = Link::None,
            },
            Link::Up(stream) if !is_cut && around.life() != Some(stream.life) => self.link = Link::None,
            Link::Up(_) if cut_for > SILENCE_MS => self.drop_link(now),
            Link::Up(stream) => {
                if now >= stream.beat_at {
                    stream.beat_at = now + HEARTBEAT_MS;
                    stream.say(AgentEvent::Heartbeat { sequence: 1, round_trip: None }, around);
                }
                if !is_cut {
                    self.obey(now);
                }
            }
        }
    }

    fn join(&mut self, around: &Surroundings<'_>) {
        let Some(life) = around.life() else { return };
        let (commands, inbox) = mpsc::channel(64);
        let (answer, reply) = oneshot::channel();
        let hello = AgentHello {
            node_id: self.node.clone(),
            version: VERSION.into(),
            address: String::new(),
            hostname: "made-up".into(),
            device_kind: DeviceKind::Cpu,
            num_slots: NUM_SLOTS,
            num_cpus: 2,
            memory_bytes: 1 << 33,
            pid: self.agent_pid,
            device_names: vec!["cpu".into(); NUM_SLOTS as usize],
            labels: BTreeMap::new(),
        };
        let (hello, peer) = (Box::new(hello), "made-up".to_owned());
        around.tell_head(ClusterEvent::AgentJoined { hello, peer, commands, reply: answer });
        let inbox = Inbox { commands: inbox, to_agent: VecDeque::new() };
        self.link = Link::Joining { life, reply, inbox };
    }

    fn joined(&mut self, session: AgentSession, around: &mut Surroundings<'_>) {
        let Link::Joining { life, inbox, .. } = std::mem::replace(&mut self.link, Link::None) else { return };
        let mut stream = Stream { life, session, inbox, to_head: VecDeque::new(), beat_at: around.now };
        for observed in self.observed.values() {
            stream.say(AgentEvent::Rank(observed.clone()), around);
        }
        self.link = Link::Up(stream);
    }

    fn obey(&mut self, now: u64) {
        let Link::Up(stream) = &mut self.link else { return };
        let mut desired = None;
        while let Some((_, command)) = stream.inbox.to_agent.pop_front_if(|(due, _)| *due <= now) {
            match command {
                Some(AgentCommand::Desired(ranks)) => desired = Some(ranks.ranks),
                Some(_) => {}
                None => {
                    self.drop_link(now);
                    break;
                }
            }
        }
        let Some(desired) = desired else { return };
        self.desired = desired.into_iter().map(|rank| (rank.key.clone(), rank)).collect();
        self.finished.retain(|key| self.desired.contains_key(key));
        let (ranks, desired) = (&self.ranks, &self.desired);
        self.observed.retain(|key, _| ranks.contains_key(key) || desired.contains_key(key));
    }

    /// Takes what the head has said to its stream; `told` hears what should run here.
    pub fn collect(&mut self, now: u64, random: &mut Random, mut told: impl FnMut(&[DesiredRank])) {
        let inbox = match &mut self.link {
            Link::None => return,
            Link::Joining { inbox, .. } => inbox,
            Link::Up(stream) => &mut stream.inbox,
        };
        loop {
            let after = inbox.to_agent.back().map_or(0, |(due, _)| *due);
            let due = after.max(now + random.below(60));
            match inbox.commands.try_recv() {
                Ok(command) => {
                    if let AgentCommand::Desired(desired) = &command {
                        told(&desired.ranks);
                    }
                    inbox.to_agent.push_back((due, Some(command)));
                }
                Err(mpsc::error::TryRecvError::Empty) => return,
                Err(mpsc::error::TryRecvError::Disconnected) => {
                    if !matches!(inbox.to_agent.back(), Some((_, None))) {
                        inbox.to_agent.push_back((due, None));
                    }
                    return;
                }
            }
        }
    }

    /// Everything that was wrong is right again; a frozen rank stays frozen: the cluster must get rid of it.
    pub fn heal(&mut self, now: u64) {
        self.cut_until = self.cut_until.min(now);
        self.frozen_until = self.frozen_until.min(now);
        self.back_at = self.back_at.min(now);
    }
}
