//! One replica of a deployment: a tensor-parallel group in the making, at work, or broken.
//!
//! Owns what is known of its ranks' processes and streams. A plain record with pure transitions: time is an argument, nothing
//! here sends or waits.
//!
//! **Invariant:** only ranks of the current incarnation count; a stage that wants processes names them all.

use std::time::{Duration, Instant};

use phalanx_proto::{Epoch, Incarnation, NodeId, Phase, Rank, RankCapacity, RankProcess, RankResumes};
use tokio::task::AbortHandle;

use super::placement_group::Place;
use crate::engine::EngineHandle;
use crate::engine::group::{Fuse, RankLink};
use crate::security::LaunchToken;

/// An agent that was told to start a rank and then not to may never speak of it.
const UNSPOKEN: Duration = Duration::from_secs(1);

/// The task that starts a group; it ends with this value, and the ranks' streams with it.
#[derive(Debug)]
pub(super) struct Starter(pub AbortHandle);

impl Drop for Starter {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Where a replica stands.
#[derive(Debug)]
pub(super) enum Stage {
    /// It has no slots.
    Unplaced,
    /// Its ranks are asked for; their streams arrive.
    Connecting {
        /// Since when.
        since: Instant,
    },
    /// All ranks are there; the group starts.
    Starting {
        /// Ends the start when this stage is left.
        _starter: Starter,
    },
    /// It takes steps.
    Serving,
    /// It takes steps and is to end: new work goes elsewhere, what runs may end until then, and is replayed after.
    Yielding {
        /// When it ends at the latest.
        until: Instant,
        /// Why it ends.
        why: &'static str,
    },
    /// It broke; its processes end, and it may start again later. Its engine waits.
    Broken {
        /// Since when.
        since: Instant,
        /// When its fate is decided: words about the processes arrive until then.
        decide_at: Instant,
    },
    /// It drains: its ranks are still wanted, and its engine ends what runs.
    Draining,
    /// Nothing of it is wanted any more.
    Ended {
        /// Since when.
        since: Instant,
    },
}

/// What is known of a rank's process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Process {
    /// Its agent was told, and has not answered.
    Asked,
    /// It has dialed, and its agent has not spoken of it: where agents are gone since, nobody ever will.
    Dialed(u32),
    /// It runs, as its agent says.
    Running(u32),
    /// Its machine is gone.
    Lost(u32),
    /// It has ended.
    Exited {
        /// Its pid, 0 where it never ran.
        pid: u32,
        /// Exit code, where it ended by itself.
        code: Option<i32>,
        /// Signal, where one ended it.
        signal: Option<i32>,
        /// Whether its agent had sent that signal.
        by_agent: bool,
        /// The end of its log.
        last_lines: String,
    },
}

impl Process {
    /// Whether its end was seen.
    pub fn has_exited(&self) -> bool {
        matches!(self, Self::Exited { .. })
    }
}

/// One rank of the current incarnation.
#[derive(Debug)]
pub(super) struct RankRecord {
    pub place: Place,
    pub token: LaunchToken,
    pub process: Process,
    pub device: String,
    pub phase: Phase,
    pub phase_since: Instant,
    /// Phases that are over, with the time that each took.
    pub phases_done: Vec<(Phase, Duration)>,
    pub started: Instant,
    pub fraction: Option<f32>,
    pub detail: String,
    pub capacity: Option<RankCapacity>,
    pub dialed: bool,
    /// What it has kept, where it served an earlier head.
    pub resumes: Option<RankResumes>,
    pub link: Option<RankLink>,
}

impl RankRecord {
    fn new(place: Place, token: LaunchToken, now: Instant) -> Self {
        Self {
            place,
            token,
            resumes: None,
            process: Process::Asked,
            device: String::new(),
            phase: Phase::Connect,
            phase_since: now,
            phases_done: Vec::new(),
            started: now,
            fraction: None,
            detail: String::new(),
            capacity: None,
            dialed: false,
            link: None,
        }
    }

    /// The process id, 0 before it is known.
    pub fn pid(&self) -> u32 {
        match self.process {
            Process::Asked => 0,
            Process::Dialed(pid) | Process::Running(pid) | Process::Lost(pid) | Process::Exited { pid, .. } => pid,
        }
    }

    /// Notes a phase; its clock restarts when the phase changes.
    pub fn enter(&mut self, phase: Phase, fraction: Option<f32>, detail: String, now: Instant) {
        if self.phase != phase {
            self.phases_done.push((self.phase, now.saturating_duration_since(self.phase_since)));
            self.phase = phase;
            self.phase_since = now;
        }
        self.fraction = fraction;
        self.detail = detail;
    }
}

/// One replica.
#[derive(Debug)]
pub(super) struct Replica {
    pub incarnation: Incarnation,
    /// The last epoch that a group of it was started for.
    pub epoch: Epoch,
    pub stage: Stage,
    /// Holds the requests, whether or not a group takes steps for them now.
    pub engine: Option<EngineHandle>,
    /// Breaks the group that takes steps.
    pub fuse: Option<Fuse>,
    /// Since when its group takes steps, and how many sequences had ended then.
    pub serves_since: Option<(Instant, u64)>,
    /// Since when no machine is there for it.
    pub unplaced_since: Option<Instant>,
    pub ranks: Vec<RankRecord>,
    /// Why it broke, as far as is known.
    pub cause: String,
    /// It was ended on purpose: that is no trouble to be counted.
    pub moves: bool,
    /// Restarts, oldest first.
    pub restarts: Vec<Instant>,
    pub num_blocks: u32,
}

impl Replica {
    /// `last` counts up: no key of a rank may name two processes, whoever had this place before.
    pub fn new(last: Incarnation) -> Self {
        Self {
            incarnation: last,
            epoch: Epoch(0),
            stage: Stage::Unplaced,
            engine: None,
            fuse: None,
            serves_since: None,
            unplaced_since: None,
            ranks: Vec::new(),
            cause: String::new(),
            moves: false,
            restarts: Vec::new(),
            num_blocks: 0,
        }
    }

    /// Begins a new incarnation on these places.
    pub fn launch(&mut self, places: Vec<Place>, now: Instant) {
        self.incarnation = Incarnation(self.incarnation.0 + 1);
        self.ranks = places.into_iter().map(|place| RankRecord::new(place, LaunchToken::new(), now)).collect();
        self.stage = Stage::Connecting { since: now };
        self.unplaced_since = None;
        self.moves = false;
    }

    /// Waits for the ranks of the present incarnation, which an earlier head had started.
    pub fn restore(&mut self, places: Vec<Place>, tokens: Vec<LaunchToken>, now: Instant) {
        self.ranks = places.into_iter().zip(tokens).map(|(place, token)| RankRecord::new(place, token, now)).collect();
        self.stage = Stage::Connecting { since: now };
    }

    /// What all ranks have kept; `Some` and `None` where they differ is an error that names those that are new.
    ///
    /// # Errors
    /// Some ranks have kept their weights and others are new: they cannot be one group.
    pub fn resumes(&self) -> Result<Option<Vec<RankResumes>>, String> {
        let kept: Vec<RankResumes> = self.ranks.iter().filter_map(|rank| rank.resumes).collect();
        if kept.is_empty() {
            return Ok(None);
        }
        let lacks = |(_, rank): &(usize, &RankRecord)| rank.resumes.is_none();
        match self.ranks.iter().enumerate().find(lacks) {
            Some((rank, _)) => Err(format!("rank {rank} was started anew while others kept their weights")),
            None => Ok(Some(kept)),
        }
    }

    /// Whether its ranks' processes should run.
    pub fn wants_processes(&self) -> bool {
        matches!(
            self.stage,
            Stage::Connecting { .. }
                | Stage::Starting { .. }
                | Stage::Serving
                | Stage::Yielding { .. }
                | Stage::Draining
        )
    }

    /// Its engine, where it takes steps.
    pub fn engine(&self) -> Option<&EngineHandle> {
        self.engine.as_ref().filter(|_| matches!(self.stage, Stage::Serving | Stage::Yielding { .. }))
    }

    /// Begins to end a group that takes steps, on purpose. Nothing that runs is lost by it.
    pub fn yield_work(&mut self, why: &'static str, until: Instant) {
        if let Some(engine) = self.engine().filter(|_| matches!(self.stage, Stage::Serving)) {
            engine.yield_work();
            self.stage = Stage::Yielding { until, why };
        }
    }

    /// Whether what ran when it began to yield has ended, or may not go on any longer.
    pub fn has_yielded(&self, until: Instant, now: Instant) -> bool {
        now >= until || self.engine.as_ref().is_none_or(|engine| engine.num_accepted() == 0)
    }

    /// One rank of the current incarnation.
    pub fn rank_mut(&mut self, rank: Rank) -> Option<&mut RankRecord> {
        self.ranks.get_mut(rank.0 as usize)
    }

    /// Takes all streams, in rank order, once the last has come.
    pub fn take_links(&mut self) -> Option<Vec<RankLink>> {
        if self.ranks.iter().any(|rank| rank.link.is_none()) {
            return None;
        }
        Some(self.ranks.iter_mut().filter_map(|rank| rank.link.take()).collect())
    }

    /// Notes what became of a process of the current incarnation.
    pub fn observe(&mut self, rank: Rank, pid: u32, state: RankProcess) {
        let Some(record) = self.rank_mut(rank) else { return };
        record.process = match state {
            RankProcess::Spawned => Process::Running(pid),
            RankProcess::Exited { code, signal, by_agent, last_lines } => {
                Process::Exited { pid, code, signal, by_agent, last_lines }
            }
        };
    }

    /// Whether the group that broke had done any good: a request that ended, or some time without trouble. What serves is not
    /// what breaks at each start.
    pub fn has_proved_itself(&mut self, now: Instant, forgiven_after: Duration) -> bool {
        let Some((since, num_ended)) = self.serves_since.take() else { return false };
        let has_ended_some = self.engine.as_ref().is_some_and(|engine| engine.snapshot().counters.finished > num_ended);
        has_ended_some || now.saturating_duration_since(since) >= forgiven_after
    }

    /// Gives up what runs, for this cause. The engine hears it, and waits for the next group; dropping streams ends the sessions
    /// of ranks that have not started.
    pub fn break_down(&mut self, cause: String, now: Instant, decide_at: Instant) {
        if let Some(fuse) = self.fuse.take() {
            // An engine that saw the break first does not listen any more.
            let _seen = fuse.send(cause.clone());
        }
        self.cause = cause;
        for rank in &mut self.ranks {
            rank.link = None;
        }
        self.stage = Stage::Broken { since: now, decide_at };
    }

    /// Ends the wait of its requests: no group will come.
    pub fn fail_requests(&mut self, reason: &str) {
        if let Some(engine) = self.engine.take() {
            engine.give_up(reason.to_owned());
        }
    }

    /// Whether all its processes are gone. One that an agent never spoke of counts as gone after a second.
    pub fn is_gone(&self, since: Instant, now: Instant) -> bool {
        let patient = now.saturating_duration_since(since) < UNSPOKEN;
        !self.lingering().any(|rank| patient || matches!(rank.process, Process::Running(_)))
    }

    /// Notes that the machine of some ranks is gone; true where it had any.
    pub fn lose_node(&mut self, node: &NodeId) -> bool {
        let mut any = false;
        for rank in self.ranks.iter_mut().filter(|rank| rank.place.node == *node) {
            if matches!(rank.process, Process::Asked | Process::Dialed(_) | Process::Running(_)) {
                rank.process = Process::Lost(rank.pid());
                any = true;
            }
        }
        any
    }

    /// Ranks whose process may still run, with their places.
    pub fn lingering(&self) -> impl Iterator<Item = &RankRecord> {
        self.ranks
            .iter()
            .filter(|rank| matches!(rank.process, Process::Asked | Process::Dialed(_) | Process::Running(_)))
    }

    /// The words for why it broke: a process that something killed says more than a closed stream. What the agents end
    /// after the break is no cause.
    pub fn reason(&self) -> String {
        let killed =
            self.exit_words(|process| matches!(process, Process::Exited { signal: Some(_), by_agent: false, .. }));
        killed.unwrap_or_else(|| self.cause.clone())
    }

    /// The rank that something killed, or else the first that ended in failure by itself.
    pub fn culprit(&self) -> Option<Rank> {
        let found = |which: fn(&Process) -> bool| self.ranks.iter().position(|record| which(&record.process));
        let killed = |process: &Process| matches!(process, Process::Exited { signal: Some(_), by_agent: false, .. });
        let failed = |process: &Process| matches!(process, Process::Exited { code: Some(code), .. } if *code != 0);
        let lost = |process: &Process| matches!(process, Process::Lost(_));
        let rank = found(killed).or_else(|| found(lost)).or_else(|| found(failed))?;
        u32::try_from(rank).ok().map(Rank)
    }

    /// How long a start took, and which rank in which phase took longest.
    pub fn start_words(&self, now: Instant) -> String {
        let took = self.ranks.iter().map(|rank| now.saturating_duration_since(rank.started)).max().unwrap_or_default();
        let phases = self.ranks.iter().enumerate().flat_map(|(rank, record)| {
            record.phases_done.iter().map(move |(phase, took)| (*took, rank, *phase, &record.place.node))
        });
        let slowest = phases.max_by_key(|(took, ..)| *took);
        let slowest = slowest.map(|(took, rank, phase, node)| {
            format!("; longest: rank {rank} on {node} in {phase}, {:.1} s", took.as_secs_f64())
        });
        format!("ready after {:.1} s{}", took.as_secs_f64(), slowest.unwrap_or_default())
    }

    /// The rank that is furthest behind in a start, in words.
    pub fn slowest_words(&self, now: Instant) -> Option<String> {
        if !matches!(self.stage, Stage::Connecting { .. } | Stage::Starting { .. }) {
            return None;
        }
        let behind =
            |(_, record): &(usize, &RankRecord)| (record.phase, record.fraction.map(|part| (part * 1e3) as u32));
        let (rank, record) = self.ranks.iter().enumerate().min_by_key(behind)?;
        let percent = record.fraction.map(|part| format!(" {:.0} %", part * 100.0)).unwrap_or_default();
        let since = now.saturating_duration_since(record.phase_since).as_secs();
        Some(format!("rank {rank} on {} is in phase {}{percent} for {since} s", record.place.node, record.phase))
    }

    /// The first process that ended in a way that `which` looks for.
    pub fn exit_words(&self, which: impl Fn(&Process) -> bool) -> Option<String> {
        let (rank, record) = self.ranks.iter().enumerate().find(|(_, record)| which(&record.process))?;
        let Process::Exited { pid, code, signal, last_lines, .. } = &record.process else { return None };
        let node = &record.place.node;
        let how = match (signal, code) {
            (Some(signal), _) => format!("was ended by signal {signal} ({})", signal_name(*signal)),
            (None, Some(code)) => format!("ended with exit code {code}"),
            (None, None) => "could not be started".to_owned(),
        };
        let last = last_lines.lines().rev().find(|line| !line.trim().is_empty()).map(str::trim).unwrap_or_default();
        let last = if last.is_empty() || signal.is_some() { String::new() } else { format!(": {last}") };
        Some(format!("rank {rank} (pid {pid} on {node}) {how}{last}"))
    }
}

fn signal_name(signal: i32) -> &'static str {
    nix::sys::signal::Signal::try_from(signal).map_or("unknown", nix::sys::signal::Signal::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replica(num_ranks: u32, now: Instant) -> Replica {
        let mut replica = Replica::new(Incarnation(0));
        let places = (0..num_ranks).map(|slot| Place { node: NodeId("node-a".into()), slot }).collect();
        replica.launch(places, now);
        replica
    }

    fn exited(code: Option<i32>, signal: Option<i32>, last_lines: &str) -> RankProcess {
        RankProcess::Exited { code, signal, by_agent: false, last_lines: last_lines.into() }
    }

    #[test]
    fn a_killed_rank_is_named_before_those_that_followed_it() {
        let now = Instant::now();
        let mut replica = replica(2, now);
        replica.break_down("rank 0's stream ended".into(), now, now);
        assert_eq!(replica.reason(), "rank 0's stream ended");
        replica.observe(Rank(0), 7, exited(Some(1), None, "the group broke"));
        replica.observe(Rank(1), 8, exited(None, Some(9), ""));
        assert_eq!(replica.reason(), "rank 1 (pid 8 on node-a) was ended by signal 9 (SIGKILL)");
    }

    #[test]
    fn what_the_agent_ended_after_the_break_is_no_cause() {
        let now = Instant::now();
        let mut replica = replica(2, now);
        replica.break_down("rank 0 failed in phase weights: no memory".into(), now, now);
        for (rank, signal) in [(0, 15), (1, 9)] {
            let state =
                RankProcess::Exited { code: None, signal: Some(signal), by_agent: true, last_lines: String::new() };
            replica.observe(Rank(rank), 7 + rank, state);
        }
        assert_eq!(replica.reason(), "rank 0 failed in phase weights: no memory");
    }

    #[test]
    fn an_exit_quotes_the_last_line() {
        let mut replica = replica(1, Instant::now());
        replica.observe(Rank(0), 7, exited(Some(2), None, "one\nout of memory\n\n"));
        let words = replica.exit_words(|process| matches!(process, Process::Exited { .. }));
        assert_eq!(words.as_deref(), Some("rank 0 (pid 7 on node-a) ended with exit code 2: out of memory"));
    }

    #[test]
    fn a_new_incarnation_forgets_the_old_processes() {
        let now = Instant::now();
        let mut replica = replica(2, now);
        replica.observe(Rank(0), 7, RankProcess::Spawned);
        assert_eq!(replica.lingering().count(), 2);
        let places = replica.ranks.iter().map(|rank| rank.place.clone()).collect();
        replica.launch(places, now);
        assert_eq!((replica.incarnation, replica.ranks[0].pid()), (Incarnation(2), 0));
    }
}
