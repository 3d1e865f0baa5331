//! How a group gets ready: load, connect, measure, allocate, all ranks in step with each other.
//!
//! Knows the order of the start and its deadlines; nothing of sequences. Phases of a rank that waits for others cost it nothing.
//!
//! **Invariant:** the first failure ends the start and names rank and phase; no wait is without a deadline.

mod catch_up;

use std::collections::VecDeque;
use std::task::{Context, Poll};
use std::time::Duration;

use phalanx_proto::{HeadMessage, LoadModel, Phase, Rank, RankCapacity, RankEvent, RankResumes};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::group::{GroupError, Member, RankLink, SendFailure, TpGroup, event_name, to_wire};

/// How long ranks that have kept their weights may take to end the steps that they were at and begin an epoch. Short: a rank that was
/// sent a plan which the head could send to no other waits in a collective for ever, and its group must start again.
const RESUME_DEADLINE: Duration = Duration::from_secs(3);

/// How long each phase of a rank's start may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartDeadlines {
    /// Opening the device, and listening for the other ranks.
    pub device: Duration,
    /// Finding each other.
    pub communicator: Duration,
    /// Reading the shard.
    pub weights: Duration,
    /// Allocating KV blocks.
    pub kv_cache: Duration,
    /// Recording steps.
    pub graphs: Duration,
    /// The first step.
    pub warm_up: Duration,
}

impl Default for StartDeadlines {
    fn default() -> Self {
        Self {
            device: Duration::from_secs(60),
            communicator: Duration::from_secs(60),
            weights: Duration::from_secs(1800),
            kv_cache: Duration::from_secs(120),
            graphs: Duration::from_secs(300),
            warm_up: Duration::from_secs(300),
        }
    }
}

impl StartDeadlines {
    fn of(&self, phase: Phase) -> Duration {
        match phase {
            Phase::Connect | Phase::Device => self.device,
            Phase::Communicator => self.communicator,
            Phase::Weights => self.weights,
            Phase::KvCache => self.kv_cache,
            Phase::Graphs => self.graphs,
            Phase::WarmUp | Phase::Ready => self.warm_up,
        }
    }
}

/// One rank's progress, for status and progress lines. Where nobody reads, it is dropped.
#[derive(Debug, Clone, PartialEq)]
pub struct StartProgress {
    /// Which rank.
    pub rank: Rank,
    /// What it does.
    pub phase: Phase,
    /// 0 to 1 within the phase, where known.
    pub fraction: Option<f32>,
    /// More words, may be empty.
    pub detail: String,
    /// What it has room for, once weights are loaded.
    pub capacity: Option<RankCapacity>,
}

/// What the head waits for from every rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Address,
    Capacity,
    Ready,
}

/// Where one rank is.
struct Clock {
    phase: Phase,
    /// None while it waits for other ranks.
    since: Option<Instant>,
}

struct Start {
    members: Vec<Member>,
    clocks: Vec<Clock>,
    deadlines: StartDeadlines,
    progress: mpsc::Sender<StartProgress>,
    addresses: Vec<String>,
    capacities: Vec<RankCapacity>,
}

impl TpGroup {
    /// Brings all ranks of a group from their hello to `ready`.
    ///
    /// # Errors
    /// The first rank that is gone, fails, is late or says what it must not: the caller ends the other ranks' processes.
    pub async fn start(
        links: Vec<RankLink>,
        load: LoadModel,
        deadlines: StartDeadlines,
        progress: mpsc::Sender<StartProgress>,
    ) -> Result<TpGroup, GroupError> {
        let (term, epoch, override_blocks) = (load.term, load.epoch, load.num_blocks_override);
        let mut start = Start::new(links, load.world_size, deadlines, progress)?;
        start.tell(&HeadMessage::Load(load), Phase::Device).await?;
        start.wait_for(Wanted::Address).await?;
        start.tell(&HeadMessage::Connect(start.addresses.clone()), Phase::Communicator).await?;
        start.wait_for(Wanted::Capacity).await?;
        let num_blocks = start.num_blocks(override_blocks)?;
        start.tell(&HeadMessage::InitKvCache { num_blocks }, Phase::KvCache).await?;
        start.wait_for(Wanted::Ready).await?;
        let mut group = TpGroup::new(start.members, term, epoch, start.capacities);
        group.num_blocks = num_blocks;
        Ok(group)
    }

    /// Makes a group of ranks that were ready under an earlier head and have kept their weights: they forget their sequences
    /// and begin an epoch.
    ///
    /// # Errors
    /// As [`TpGroup::start`]: ranks whose device or communicator did not come to rest do not answer in time.
    pub async fn resume(
        links: Vec<RankLink>,
        load: &LoadModel,
        kept: Vec<RankResumes>,
        progress: mpsc::Sender<StartProgress>,
    ) -> Result<TpGroup, GroupError> {
        let deadlines = StartDeadlines { warm_up: RESUME_DEADLINE, ..StartDeadlines::default() };
        let mut start = Start::new(links, load.world_size, deadlines, progress)?;
        for (rank, kept) in (0..).map(Rank).zip(&kept) {
            let (phase, detail) = (Phase::WarmUp, "weights were kept".to_owned());
            start.report(StartProgress { rank, phase, fraction: None, detail, capacity: Some(kept.capacity) });
        }
        start.catch_up(&kept, RESUME_DEADLINE).await?;
        start.tell(&HeadMessage::BeginEpoch { term: load.term, epoch: load.epoch }, Phase::WarmUp).await?;
        start.wait_for(Wanted::Ready).await?;
        let num_blocks = kept.iter().map(|kept| kept.num_blocks).min().unwrap_or(0);
        let capacities = kept.iter().map(|kept| kept.capacity).collect();
        let mut group = TpGroup::new(start.members, load.term, load.epoch, capacities);
        group.num_blocks = num_blocks;
        Ok(group)
    }
}

impl Start {
    fn new(
        mut links: Vec<RankLink>,
        world_size: u32,
        deadlines: StartDeadlines,
        progress: mpsc::Sender<StartProgress>,
    ) -> Result<Self, GroupError> {
        links.sort_by_key(|link| link.rank);
        let num_links = links.len();
        let wrong = (0..).map(Rank).zip(&links).find(|(rank, link)| *rank != link.rank).map(|(rank, _)| rank);
        if let Some(rank) = wrong.or((num_links != world_size as usize || num_links == 0).then_some(Rank(world_size))) {
            return Err(GroupError::WrongRanks { rank, num_links });
        }
        let clocks = links.iter().map(|_| Clock { phase: Phase::Device, since: None }).collect();
        let addresses = vec![String::new(); num_links];
        let member = |link| Member { link, outputs: VecDeque::new(), has_failed: false };
        let members = links.into_iter().map(member).collect();
        Ok(Self { members, clocks, deadlines, progress, addresses, capacities: Vec::new() })
    }

    /// Sends a message to every rank, which puts each in `phase`.
    async fn tell(&mut self, message: &HeadMessage, phase: Phase) -> Result<(), GroupError> {
        let wire = to_wire(message);
        let limit = self.deadlines.of(phase);
        let now = Instant::now();
        for (member, clock) in self.members.iter().zip(&mut self.clocks) {
            let rank = member.link.rank;
            member.send(wire.clone(), now + limit).await.map_err(|failure| match failure {
                SendFailure::Gone => GroupError::Gone { rank, phase: clock.phase },
                SendFailure::Late => GroupError::StartLate { rank, phase: clock.phase, limit },
            })?;
            *clock = Clock { phase, since: Some(now) };
        }
        Ok(())
    }

    /// Waits until every rank has said what is wanted.
    async fn wait_for(&mut self, wanted: Wanted) -> Result<(), GroupError> {
        while self.clocks.iter().any(|clock| clock.since.is_some()) {
            let next = self.next_deadline();
            let event = std::future::poll_fn(|cx| self.poll_event(cx));
            match timeout_at(next, event).await {
                Ok((index, Some(event))) => self.take(index, event, wanted)?,
                Ok((index, None)) => return Err(self.gone(index)),
                Err(_) => self.check_late()?,
            }
        }
        Ok(())
    }

    fn take(&mut self, index: usize, event: RankEvent, wanted: Wanted) -> Result<(), GroupError> {
        let rank = self.members[index].link.rank;
        let clock = &mut self.clocks[index];
        match (event, wanted) {
            (RankEvent::Failure(failure), _) => return Err(GroupError::Failed { rank, failure }),
            (RankEvent::Progress { phase, fraction, detail }, _) => {
                if clock.phase != phase && clock.since.is_some() {
                    *clock = Clock { phase, since: Some(Instant::now()) };
                }
                self.report(StartProgress { rank, phase, fraction, detail, capacity: None });
            }
            (RankEvent::Listening(address), Wanted::Address) if clock.since.is_some() => {
                clock.since = None;
                self.addresses[index] = address;
            }
            (RankEvent::Capacity(capacity), Wanted::Capacity) if clock.since.is_some() => {
                clock.since = None;
                let phase = clock.phase;
                // In rank order, whoever comes first; all are known when the wait is over.
                self.capacities.resize(self.members.len(), capacity);
                self.capacities[index] = capacity;
                let detail = "weights are loaded".to_owned();
                self.report(StartProgress { rank, phase, fraction: Some(1.0), detail, capacity: Some(capacity) });
            }
            (RankEvent::Ready { .. }, Wanted::Ready) if clock.since.is_some() => {
                *clock = Clock { phase: Phase::Ready, since: None };
                let phase = Phase::Ready;
                self.report(StartProgress { rank, phase, fraction: None, detail: String::new(), capacity: None });
            }
            (event, _) => return Err(GroupError::OutOfTurn { rank, what: event_name(&event) }),
        }
        Ok(())
    }

    /// The minimum over ranks, or what was asked for.
    fn num_blocks(&self, override_blocks: Option<u32>) -> Result<u32, GroupError> {
        let fits = self.capacities.iter().map(|capacity| capacity.num_blocks).min().unwrap_or(0);
        let num_blocks = override_blocks.unwrap_or(u32::try_from(fits).unwrap_or(u32::MAX));
        let smallest = (0..).map(Rank).zip(&self.capacities).min_by_key(|(_, capacity)| capacity.num_blocks);
        match smallest {
            Some((rank, capacity)) if num_blocks == 0 => {
                let RankCapacity { free_bytes, block_bytes, .. } = *capacity;
                Err(GroupError::NoRoom { rank, free_bytes, block_bytes })
            }
            _ => Ok(num_blocks),
        }
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<(usize, Option<RankEvent>)> {
        for (index, member) in self.members.iter_mut().enumerate() {
            if let Poll::Ready(event) = member.link.events.poll_recv(cx) {
                return Poll::Ready((index, event));
            }
        }
        Poll::Pending
    }

    fn next_deadline(&self) -> Instant {
        let ends = self.clocks.iter().filter_map(|clock| Some(clock.since? + self.deadlines.of(clock.phase)));
        ends.min().unwrap_or_else(Instant::now)
    }

    fn check_late(&self) -> Result<(), GroupError> {
        let now = Instant::now();
        for (member, clock) in self.members.iter().zip(&self.clocks) {
            let limit = self.deadlines.of(clock.phase);
            if clock.since.is_some_and(|since| now >= since + limit) {
                return Err(GroupError::StartLate { rank: member.link.rank, phase: clock.phase, limit });
            }
        }
        Ok(())
    }

    fn gone(&self, index: usize) -> GroupError {
        GroupError::Gone { rank: self.members[index].link.rank, phase: self.clocks[index].phase }
    }

    fn report(&self, progress: StartProgress) {
        // A reader that lags loses a line, not the start.
        let _lagging = self.progress.try_send(progress);
    }
}
