//! The device thread's two channels: what the head says, and what it is told.

use std::cell::Cell;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use phalanx_proto::{HeadMessage, LoadModel, Phase, RankEvent};
use tokio::sync::mpsc::{self, error::TrySendError};
use tracing::info;

use crate::error::WorkerError;

/// Longest wait for the head to say what to load, and where the other ranks are: their devices open meanwhile.
const HEAD_DEADLINE: Duration = Duration::from_secs(300);
/// Longest wait for the number of KV blocks: the slowest rank's weights are read meanwhile.
const WEIGHTS_DEADLINE: Duration = Duration::from_secs(3600);
/// Longest wait for room among the events.
const SEND_DEADLINE: Duration = Duration::from_secs(30);
/// How often a full channel is tried again.
const SEND_RETRY: Duration = Duration::from_millis(1);
/// Shortest time between two fractions of one phase.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// The head, as the device thread sees it.
pub(super) struct Head {
    inbox: Receiver<HeadMessage>,
    outbox: mpsc::Sender<RankEvent>,
    phase: Phase,
    last_fraction: Cell<Option<Instant>>,
}

impl Head {
    pub(super) fn new(inbox: Receiver<HeadMessage>, outbox: mpsc::Sender<RankEvent>) -> Self {
        Self { inbox, outbox, phase: Phase::Connect, last_fraction: Cell::new(None) }
    }

    /// The phase that the rank is in.
    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    /// Enters a phase and says so.
    pub(super) fn enter(&mut self, phase: Phase, detail: impl Into<String>) -> Result<(), WorkerError> {
        self.phase = phase;
        self.last_fraction.set(None);
        let detail = detail.into();
        info!(%phase, detail, "phase entered");
        self.send(RankEvent::Progress { phase, fraction: None, detail })
    }

    /// Says how far the phase is, now and then; a full channel drops it.
    pub(super) fn fraction(&self, fraction: f32) {
        let now = Instant::now();
        if self.last_fraction.get().is_none_or(|last| now.duration_since(last) >= PROGRESS_INTERVAL) {
            self.last_fraction.set(Some(now));
            let event = RankEvent::Progress { phase: self.phase, fraction: Some(fraction), detail: String::new() };
            let _ = self.outbox.try_send(event);
        }
    }

    /// Tells the head something.
    pub(super) fn send(&mut self, event: RankEvent) -> Result<(), WorkerError> {
        let mut event = event;
        let started = Instant::now();
        loop {
            event = match self.outbox.try_send(event) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Closed(_)) => return Err(self.gone()),
                Err(TrySendError::Full(event)) => event,
            };
            if started.elapsed() >= SEND_DEADLINE {
                return Err(WorkerError::SessionStuck { waited_ms: SEND_DEADLINE.as_millis() as u64 });
            }
            std::thread::sleep(SEND_RETRY);
        }
    }

    /// Waits for what to load.
    pub(super) fn load(&mut self) -> Result<LoadModel, WorkerError> {
        match self.wait("load", HEAD_DEADLINE)? {
            HeadMessage::Load(load) => Ok(load),
            other => Err(out_of_order("load", &other)),
        }
    }

    /// Waits for the addresses of all ranks.
    pub(super) fn addresses(&mut self) -> Result<Vec<String>, WorkerError> {
        match self.wait("connect", HEAD_DEADLINE)? {
            HeadMessage::Connect(addresses) => Ok(addresses),
            other => Err(out_of_order("connect", &other)),
        }
    }

    /// Waits for the number of KV blocks.
    pub(super) fn num_blocks(&mut self) -> Result<u32, WorkerError> {
        match self.wait("the number of KV blocks", WEIGHTS_DEADLINE)? {
            HeadMessage::InitKvCache { num_blocks } => Ok(num_blocks),
            other => Err(out_of_order("the number of KV blocks", &other)),
        }
    }

    /// Waits for what comes next while the rank is ready; an idle group waits here until its session ends.
    pub(super) fn next(&mut self) -> Result<HeadMessage, WorkerError> {
        self.inbox.recv().map_err(|_| self.gone())
    }

    /// What the head has sent already.
    pub(super) fn try_next(&mut self) -> Result<Option<HeadMessage>, WorkerError> {
        match self.inbox.try_recv() {
            Ok(message) => Ok(Some(message)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(self.gone()),
        }
    }

    fn wait(&mut self, expected: &'static str, deadline: Duration) -> Result<HeadMessage, WorkerError> {
        match self.inbox.recv_timeout(deadline) {
            Ok(HeadMessage::Shutdown(reason)) => Err(WorkerError::ShutDown { reason }),
            Ok(message) => Ok(message),
            Err(RecvTimeoutError::Disconnected) => Err(self.gone()),
            Err(RecvTimeoutError::Timeout) => {
                Err(WorkerError::Deadline { expected, waited_ms: deadline.as_millis() as u64 })
            }
        }
    }

    fn gone(&self) -> WorkerError {
        WorkerError::SessionGone { phase: self.phase }
    }
}

/// The head sent something that does not come now.
pub(super) fn out_of_order(expected: &'static str, found: &HeadMessage) -> WorkerError {
    let found = match found {
        HeadMessage::Load(_) => "load",
        HeadMessage::Connect(_) => "connect",
        HeadMessage::InitKvCache { .. } => "the number of KV blocks",
        HeadMessage::Stage { .. } => "a staged part",
        HeadMessage::Plan(_) => "a plan",
        HeadMessage::BeginEpoch { .. } => "the beginning of an epoch",
        HeadMessage::RecallPlans => "a recall of plans",
        HeadMessage::Shutdown(_) => "shutdown",
    };
    WorkerError::OutOfOrder { expected, found }
}
