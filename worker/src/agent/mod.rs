//! The node agent: answers for this machine, starts and ends its ranks as the head wishes.
//!
//! Owns the stream to the head, the home's record, and (through `supervisor`) the rank processes. Owns no device and decides
//! nothing: what should run comes from the head as desired state.
//!
//! **Invariant:** ranks never outlive their agent, nor a lost head by more than its grace. Every wait has a deadline; only the
//! wait for a head that is not there goes on, and says so.

pub mod background;
pub mod credentials;
pub mod devices;
pub mod doctor;
pub mod launch;
pub mod link;
pub mod log_reader;
pub mod lookout;
pub mod node;
pub mod process;
pub mod record;
pub mod supervisor;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use phalanx_proto::{
    AgentCommand, AgentEvent, AgentHello, AgentWelcome, DesiredRank, RankKey, RankObserved, RankProcess,
};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{info, warn};

use crate::config::defaults;
use crate::head_note::HeadNote;
use credentials::Credentials;
use link::{Link, LinkError};
use process::HeadFacts;
use supervisor::{Order, SupervisorHandle};

/// Why an agent ends in failure.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The head does not want this node.
    #[error("the head at {head} refuses this machine: {message}")]
    Refused {
        /// Where it is.
        head: String,
        /// Its words.
        message: String,
    },
    /// The thread that owns the ranks has ended.
    #[error("the thread that owns the ranks has ended")]
    SupervisorGone,
    /// Ranks that would not end.
    #[error("{num_ranks} ranks did not end within {waited:?}")]
    RanksRemain {
        /// How many.
        num_ranks: usize,
        /// How long.
        waited: Duration,
    },
    /// The system refuses signals, threads or a runtime.
    #[error("the agent cannot run: {0}")]
    System(#[from] io::Error),
}

/// What whoever started the agent wants to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// The head took this node in.
    Joined,
    /// The head does not answer yet; the agent goes on trying.
    Waiting {
        /// What was seen.
        reason: String,
    },
}

/// Why an agent ended without failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// Asked by a signal.
    Signal,
    /// Asked by the head.
    ByHead(String),
    /// The head that it was started with is gone.
    HeadGone(String),
}

/// How an agent was started.
pub struct AgentSetup {
    /// The head, or one of several, how it is known, and what is shown to it.
    pub credentials: Credentials,
    /// Where the ranks are told which head leads.
    pub head_note: PathBuf,
    /// What this machine is and offers.
    pub hello: AgentHello,
    /// Whether the agent ends with its head; else it waits for the head's return.
    pub with_head: bool,
    /// Where this node's logs are.
    pub log_dir: PathBuf,
    /// The ranks' thread.
    pub supervisor: SupervisorHandle,
}

/// A running agent.
pub struct Agent<R> {
    setup: AgentSetup,
    report: R,
    /// What the head should know: each rank that is desired or running.
    observed: BTreeMap<RankKey, RankObserved>,
    head_facts: HeadFacts,
    /// Which head leads.
    leading: watch::Receiver<HeadNote>,
    has_joined: bool,
    /// When the ranks must end, once the head is lost.
    orphaned_at: Option<Instant>,
    signals: Signals,
    asked_to_end: bool,
}

/// The signals that ask an agent to end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// Asks an agent to leave once its work has moved.
    drain: Signal,
}

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    End,
    Drain,
}

impl Signals {
    async fn any(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::End,
            _ = self.interrupt.recv() => Asked::End,
            _ = self.drain.recv() => Asked::Drain,
        }
    }
}

/// Sleeps until then; for ever where there is no then.
async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Resolves when another head leads than this one.
async fn moved(leading: &mut watch::Receiver<HeadNote>, head: &str) {
    if leading.wait_for(|note| note.address != head).await.is_err() {
        // Nobody looks any more: the agent ends.
        std::future::pending::<()>().await;
    }
}

/// Heartbeats of one link, and how long the head's answers take.
#[derive(Debug, Default)]
struct Pulse {
    sequence: u64,
    sent_at: Option<(u64, Instant)>,
    round_trip: Option<Duration>,
}

impl Pulse {
    /// The next heartbeat.
    fn beat(&mut self, now: Instant) -> AgentEvent {
        self.sequence += 1;
        // One answer is waited for at a time: on a slow way it comes after later heartbeats.
        self.sent_at.get_or_insert((self.sequence, now));
        AgentEvent::Heartbeat { sequence: self.sequence, round_trip: self.round_trip.take() }
    }

    /// The head has seen a heartbeat.
    fn seen(&mut self, sequence: u64, now: Instant) {
        // A later one than what is waited for: the answer between them was lost.
        if let Some((waited_for, sent_at)) = self.sent_at.take_if(|(waited_for, _)| *waited_for <= sequence) {
            self.round_trip = (waited_for == sequence).then(|| now - sent_at);
        }
    }
}

/// Why a link ended.
enum Served {
    Lost(String),
    Ended(End),
}

impl<R: FnMut(&Report)> Agent<R> {
    /// Readies an agent; must be called inside a tokio runtime.
    ///
    /// # Errors
    /// Signals cannot be received.
    pub fn new(setup: AgentSetup, report: R) -> Result<Self, AgentError> {
        let signals = Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            drain: signal(SignalKind::user_defined2())?,
        };
        Ok(Self {
            // A head that was started together with this agent, and never came, is gone too.
            orphaned_at: setup.with_head.then(|| Instant::now() + defaults::HEAD_START_DEADLINE),
            leading: lookout::start(&setup.credentials, setup.head_note.clone()),
            setup,
            report,
            observed: BTreeMap::new(),
            head_facts: HeadFacts::default(),
            has_joined: false,
            signals,
            asked_to_end: false,
        })
    }

    /// Serves the head, waits for it where it is not there, and ends all ranks in the end.
    ///
    /// # Errors
    /// The head refuses this node, or the ranks' thread is gone.
    pub async fn run(mut self) -> Result<End, AgentError> {
        let renewal = tokio::spawn(self.setup.credentials.clone().keep_renewed(self.leading.clone()));
        let result = self.serve_until_end().await;
        renewal.abort();
        self.end_ranks().await?;
        result
    }

    async fn serve_until_end(&mut self) -> Result<End, AgentError> {
        let mut pause = defaults::RETRY_PAUSE_MIN;
        loop {
            match self.connect().await {
                Ok(Some((head, link, welcome))) => {
                    pause = defaults::RETRY_PAUSE_MIN;
                    match self.serve(&head, link, welcome).await? {
                        Served::Ended(end) => return Ok(end),
                        Served::Lost(reason) => self.lose_head(&reason),
                    }
                }
                Ok(None) => {}
                Err(LinkError::Refused { message, is_final }) if is_final || !self.has_joined => {
                    return Err(AgentError::Refused { head: self.head(), message });
                }
                Err(error) => (self.report)(&Report::Waiting { reason: error.to_string() }),
            }
            if let Some(end) = self.rest(pause).await? {
                return Ok(end);
            }
            // While ranks wait with their weights, every moment counts.
            let pause_max =
                if self.orphaned_at.is_some() { defaults::RETRY_PAUSE_ORPHANED } else { defaults::RETRY_PAUSE_MAX };
            pause = (pause * 2).min(pause_max);
        }
    }

    /// One attempt to reach the head; `None` where something else must be looked at first.
    async fn connect(&mut self) -> Result<Option<(String, Link, AgentWelcome)>, LinkError> {
        if self.asked_to_end {
            return Ok(None);
        }
        let orphaned = sleep_until(self.orphaned_at);
        let head = self.head();
        tokio::select! {
            linked = Link::open(&self.setup.credentials, &head, self.setup.hello.clone()) => {
                linked.map(|(link, welcome)| Some((head.clone(), link, welcome)))
            }
            () = moved(&mut self.leading, &head) => Ok(None),
            () = orphaned => Ok(None),
            // Without a head there is no work to move: both are asked to end.
            _ = self.signals.any() => {
                self.asked_to_end = true;
                Ok(None)
            }
        }
    }

    /// The head that leads, as far as this agent knows.
    fn head(&self) -> String {
        self.leading.borrow().address.clone()
    }

    /// The link's life: desired state down, observed state and heartbeats up.
    async fn serve(&mut self, head: &str, mut link: Link, welcome: AgentWelcome) -> Result<Served, AgentError> {
        self.joined(head, &mut link, &welcome).await;
        let mut beats = tokio::time::interval(welcome.heartbeat);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pulse = Pulse::default();
        loop {
            let sent = tokio::select! {
                command = link.next() => match command {
                    Ok(AgentCommand::Desired(desired)) => { self.desire(desired.ranks)?; Ok(()) }
                    Ok(AgentCommand::End(reason)) => {
                        info!(reason, "head ends this agent");
                        return self.leave(link, End::ByHead(reason)).await;
                    }
                    Ok(AgentCommand::Seen { sequence }) => { pulse.seen(sequence, Instant::now()); Ok(()) }
                    Ok(AgentCommand::ReadLog(request)) => {
                        let log_dir = self.setup.log_dir.clone();
                        let read = tokio::task::spawn_blocking(move || log_reader::read(&log_dir, &request));
                        match read.await {
                            Ok(part) => link.send(AgentEvent::Log(part)).await,
                            Err(_) => Ok(()),
                        }
                    }
                    Ok(AgentCommand::Welcome(_)) => Ok(()),
                    Err(reason) => Err(reason),
                },
                observed = self.setup.supervisor.observed.recv() => {
                    let observed = observed.ok_or(AgentError::SupervisorGone)?;
                    self.note(&observed);
                    link.send(AgentEvent::Rank(observed)).await
                }
                _ = beats.tick() => link.send(pulse.beat(Instant::now())).await,
                () = moved(&mut self.leading, head) => {
                    return Ok(Served::Lost(format!("the head at {} leads", self.head())));
                }
                asked = self.signals.any() => match asked {
                    Asked::End => return self.leave(link, End::Signal).await,
                    Asked::Drain => {
                        info!("asked to leave, once the work here has moved");
                        link.send(AgentEvent::Draining("asked to leave".into())).await
                    }
                },
            };
            if let Err(error) = sent {
                return Ok(Served::Lost(error.to_string()));
            }
        }
    }

    async fn joined(&mut self, head: &str, link: &mut Link, welcome: &AgentWelcome) {
        self.has_joined = true;
        self.orphaned_at = None;
        let boot_id = node::boot_id();
        let is_here = |boot: &str| !boot_id.is_empty() && boot == boot_id;
        let socket = welcome.socket.as_ref().filter(|s| is_here(&s.boot_id)).map(|s| s.path.clone());
        self.head_facts = HeadFacts { address: head.to_owned(), socket, grace: welcome.head_grace };
        info!(head, node_id = %self.setup.hello.node_id, term = %welcome.term, "joined");
        (self.report)(&Report::Joined);
        // A head that came back learns what runs here.
        for observed in self.observed.values() {
            if link.send(AgentEvent::Rank(observed.clone())).await.is_err() {
                // The link's end is seen by whoever reads it next.
                break;
            }
        }
    }

    fn desire(&mut self, ranks: Vec<DesiredRank>) -> Result<(), AgentError> {
        let runs = |observed: &RankObserved| observed.state == RankProcess::Spawned;
        self.observed.retain(|key, observed| runs(observed) || ranks.iter().any(|rank| rank.key == *key));
        let order = Order::Desired { ranks, head: self.head_facts.clone() };
        self.setup.supervisor.orders.try_send(order).map_err(|_| AgentError::SupervisorGone)
    }

    fn note(&mut self, observed: &RankObserved) {
        self.observed.insert(observed.key.clone(), observed.clone());
    }

    /// Starts the grace of the ranks.
    fn lose_head(&mut self, reason: &str) {
        let grace = self.head_facts.grace;
        warn!(head = self.leading.borrow().address, reason, ?grace, "head is gone");
        self.orphaned_at = Some(Instant::now() + grace);
    }

    /// Waits before the next attempt, unless it is time to end. Ranks are ended when their grace passes.
    async fn rest(&mut self, pause: Duration) -> Result<Option<End>, AgentError> {
        let until = Instant::now() + pause;
        while !self.asked_to_end {
            tokio::select! {
                biased;
                () = sleep_until(self.orphaned_at) => {
                    self.orphaned_at = None;
                    if self.setup.with_head {
                        return Ok(Some(End::HeadGone("the head is gone".into())));
                    }
                    self.desire(Vec::new())?;
                }
                _ = self.signals.any() => self.asked_to_end = true,
                observed = self.setup.supervisor.observed.recv() => {
                    let observed = observed.ok_or(AgentError::SupervisorGone)?;
                    self.note(&observed);
                }
                () = tokio::time::sleep_until(until) => return Ok(None),
            }
        }
        Ok(Some(End::Signal))
    }

    /// Ends the ranks, tells the head about them, and says goodbye.
    async fn leave(&mut self, mut link: Link, end: End) -> Result<Served, AgentError> {
        let reason = match &end {
            End::ByHead(reason) | End::HeadGone(reason) => reason.clone(),
            End::Signal => "the agent was asked to end".into(),
        };
        // The head must learn first that what ends now ends on purpose.
        let mut listening = link.send(AgentEvent::Leaving(reason)).await.is_ok();
        self.order_shutdown()?;
        let deadline = Instant::now() + 2 * defaults::RANK_END_DEADLINE;
        while let Ok(Some(observed)) = tokio::time::timeout_at(deadline, self.setup.supervisor.observed.recv()).await {
            self.note(&observed);
            listening = listening && link.send(AgentEvent::Rank(observed)).await.is_ok();
        }
        link.close().await;
        Ok(Served::Ended(end))
    }

    fn order_shutdown(&self) -> Result<(), AgentError> {
        self.setup.supervisor.orders.try_send(Order::Shutdown).or_else(|error| match error {
            // It was told before, and has ended.
            std::sync::mpsc::TrySendError::Disconnected(_) => Ok(()),
            std::sync::mpsc::TrySendError::Full(_) => Err(AgentError::SupervisorGone),
        })
    }

    /// Waits until no rank runs.
    async fn end_ranks(&mut self) -> Result<(), AgentError> {
        self.order_shutdown()?;
        let waited = 2 * defaults::RANK_END_DEADLINE;
        let deadline = Instant::now() + waited;
        while let Some(observed) = tokio::time::timeout_at(deadline, self.setup.supervisor.observed.recv())
            .await
            .map_err(|_| AgentError::RanksRemain { num_ranks: self.num_running(), waited })?
        {
            self.note(&observed);
        }
        Ok(())
    }

    fn num_running(&self) -> usize {
        self.observed.values().filter(|observed| observed.state == RankProcess::Spawned).count()
    }
}
