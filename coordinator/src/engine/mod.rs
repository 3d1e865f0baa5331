//! One engine per tensor-parallel group: step loop, sequences, scheduler, KV blocks.
//!
//! Knows tokens only: no text, no HTTP, no cluster. Runs on a thread of its own. It outlives its group: when that breaks, requests
//! wait for the next one and go on where they were; see `recovery.rs`.
//!
//! **Invariant:** every accepted request ends in exactly one event that carries a finish reason or an error.
//! **Invariant:** nothing but the engine's thread touches scheduler, blocks and group.

mod admission;
pub mod beam;
pub mod block_manager;
mod constraint;
#[cfg(test)]
mod engine_tests;
#[cfg(test)]
mod fake_rank;
pub mod group;
mod handle;
mod moving;
mod outbox;
pub mod policy;
mod recovery;
mod replicas;
mod request;
pub mod scheduler;
#[cfg(test)]
mod scheduler_tests;
#[cfg(test)]
pub(crate) mod scripted;
pub mod sequence;
#[cfg(test)]
pub(crate) mod simulated_engine;
#[cfg(test)]
mod simulation;
mod start;
mod step_time;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::sync::watch;
use tokio::time::Instant;

pub use constraint::{Constraint, ConstraintError, NextTokens, TokenConstraint};
pub use handle::{EngineHandle, EngineSnapshot, Places, Reservation, TokenStream};
pub use replicas::Replicas;
pub use request::{EngineError, EngineLimits, FinishReason, GenerateRequest, RecoveryLimits, TokenEvent, Usage};
pub use scheduler::Counters;
pub use start::{StartDeadlines, StartProgress};

use block_manager::BlockManager;
use constraint::ConstraintPool;
use group::{GroupError, Launched, TpGroup};
use handle::{Command, EngineState, NextGroup, Shared};
use outbox::{Outbox, is_last};
use scheduler::{Scheduler, SeqEvent};

/// Weight of a new interval in the mean time between two requests that end.
const INTERVAL_WEIGHT: f64 = 0.1;
/// No interval counts for more: an idle engine says nothing about a busy one.
const INTERVAL_MAX: Duration = Duration::from_secs(10);

/// A drain looks so often whether a request that runs as many sequences has ended.
const DRAIN_CHECK: Duration = Duration::from_millis(20);

/// Whether a turn had work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Stepped,
    Idle,
}

/// The step loop and all that it owns.
struct Engine {
    inbox: mpsc::Receiver<Command>,
    next_groups: mpsc::Receiver<NextGroup>,
    state: watch::Receiver<EngineState>,
    scheduler: Scheduler,
    blocks: BlockManager,
    group: TpGroup,
    in_flight: VecDeque<Launched>,
    constraints: ConstraintPool,
    outbox: Outbox,
    shared: Arc<Shared>,
    last_end: Instant,
    /// When a step ended last, or work came; none while there is none.
    progress_at: Option<Instant>,
    recovering: bool,
}

/// Why an epoch ends.
enum EpochEnd {
    /// Its group broke: another one may go on.
    Broken(GroupError),
    /// The engine cannot go on with any group.
    Failed(EngineError),
}

impl From<GroupError> for EpochEnd {
    fn from(error: GroupError) -> Self {
        Self::Broken(error)
    }
}

impl From<EngineError> for EpochEnd {
    fn from(error: EngineError) -> Self {
        Self::Failed(error)
    }
}

impl From<GroupError> for EngineError {
    fn from(error: GroupError) -> Self {
        Self::GroupFailed { reason: error.to_string() }
    }
}

/// Starts the engine of a group on a thread of its own.
///
/// Must be called inside the runtime that reads the streams: the task that hands events to them runs there. Where thread or
/// runtime cannot be had, the handle has failed already.
pub fn spawn(mut group: TpGroup, mut limits: EngineLimits) -> EngineHandle {
    group.set_step_deadline_min(limits.step_deadline_min);
    limits.num_blocks = limits.num_blocks.min(group.num_blocks());
    limits.features = group.features();
    tracing::info!(
        epoch = group.epoch().0,
        world_size = group.world_size(),
        num_blocks = limits.num_blocks,
        "engine ready"
    );
    let blocks = BlockManager::new(limits.num_blocks, limits.block_size, limits.enable_prefix_caching);
    let shared = Shared::new(limits.clone(), EngineSnapshot::default());
    let (handle, inbox, next_groups) = EngineHandle::new(Arc::clone(&shared));
    let (outbox, dispatcher) = outbox::outbox();
    let constraints = ConstraintPool::new(limits.num_accepted_max() as usize);
    let engine = Engine {
        inbox,
        next_groups,
        state: shared.state.subscribe(),
        scheduler: Scheduler::new(limits),
        blocks,
        group,
        in_flight: VecDeque::new(),
        constraints,
        outbox,
        shared: Arc::clone(&shared),
        last_end: Instant::now(),
        progress_at: None,
        recovering: false,
    };
    engine.publish();
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => drop(runtime.spawn(dispatcher.run())),
        Err(error) => return handle.refused(&error),
    }
    let guard = EndGuard(Arc::clone(&shared));
    match std::thread::Builder::new().name("engine".into()).spawn(move || engine.run_to_end(&guard)) {
        Ok(_thread) => handle,
        Err(error) => handle.refused(&error),
    }
}

/// An engine that ends without saying why, by a broken invariant, has failed.
struct EndGuard(Arc<Shared>);

impl EndGuard {
    fn set(&self, end: EngineState) {
        self.0.state.send_replace(end);
    }
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.state.send_if_modified(|state| {
            let ended = matches!(state, EngineState::Failed(_) | EngineState::Stopped);
            if !ended {
                *state = EngineState::Failed(EngineError::GroupFailed { reason: handle::BROKEN.into() });
            }
            !ended
        });
    }
}

impl Engine {
    /// One turn of the loop: take in what was asked, fill the queue of plans at the ranks, commit the oldest step, stream it out.
    ///
    /// Devices work on the queue meanwhile; `steps_in_flight_max` bounds it.
    ///
    /// # Errors
    /// A failed rank fails the step and its group: the epoch ends, and the next group replays what runs.
    async fn turn(&mut self) -> Result<Progress, EpochEnd> {
        self.drain_inbox();
        self.resume_constrained();
        while self.in_flight.len() < self.shared.limits.steps_in_flight_max.max(1) as usize {
            let Some(step) = self.scheduler.plan(&mut self.blocks) else { break };
            self.in_flight.push_back(self.group.launch(step).await?);
        }
        let Some(oldest) = self.in_flight.pop_front() else {
            self.emit(Vec::new()).await?;
            return Ok(Progress::Idle);
        };
        let (step, output) = self.group.finish(oldest).await?;
        self.progress_at = Some(Instant::now());
        let events = self.scheduler.commit(step, output, &mut self.blocks);
        self.constraints.submit(self.scheduler.take_constraint_work());
        self.emit(events).await?;
        Ok(Progress::Stepped)
    }

    fn run_to_end(mut self, guard: &EndGuard) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_time().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                return guard.set(EngineState::Failed(EngineError::GroupFailed { reason: error.to_string() }));
            }
        };
        runtime.block_on(async {
            match self.run().await {
                Ok(()) => {
                    self.end(EngineError::Stopping).await;
                    guard.set(EngineState::Stopped);
                }
                Err(error) => {
                    tracing::error!(epoch = self.group.epoch().0, %error, "engine failed");
                    // Set before the streams end: who submits again then must learn why.
                    guard.set(EngineState::Failed(error.clone()));
                    self.end(error).await;
                }
            }
        });
    }

    /// Epoch after epoch, until the engine is stopped or no group takes over.
    async fn run(&mut self) -> Result<(), EngineError> {
        loop {
            match self.run_epoch().await {
                Ok(()) => return Ok(()),
                Err(EpochEnd::Failed(error)) => return Err(error),
                Err(EpochEnd::Broken(error)) => self.recover(&error).await?,
            }
        }
    }

    /// Turns until the engine is stopped or its group breaks.
    async fn run_epoch(&mut self) -> Result<(), EpochEnd> {
        loop {
            let progress = self.turn().await?;
            if self.is_drained() {
                return Ok(());
            }
            if progress == Progress::Idle {
                self.rest().await?;
            }
        }
    }

    /// True where a stop was asked for, and nothing is left or its time has passed.
    fn is_drained(&self) -> bool {
        let EngineState::Draining(ends) = *self.state.borrow() else { return false };
        let is_done = self.shared.num_accepted.load(Ordering::Acquire) == 0 && self.inbox.is_empty();
        is_done || Instant::now() >= ends
    }

    /// Waits for something to do: a command, a mask, a change of state, or the end of the group.
    async fn rest(&mut self) -> Result<(), EpochEnd> {
        let is_draining = matches!(*self.state.borrow(), EngineState::Draining(_));
        tokio::select! {
            command = self.inbox.recv() => {
                match command {
                    Some(command) => self.take(command),
                    // Nobody can ask for anything any more.
                    None => drop(self.shared.state.send_replace(EngineState::Draining(Instant::now()))),
                }
                Ok(())
            }
            _changed = self.state.changed() => Ok(()),
            () = self.constraints.arrivals() => Ok(()),
            error = self.group.broken() => Err(error.into()),
            // What keeps its places between two sequences says nothing when it gives them back.
            () = tokio::time::sleep(DRAIN_CHECK), if is_draining => Ok(()),
        }
    }

    /// Lets sequences go on whose next mask is there.
    fn resume_constrained(&mut self) {
        for answer in self.constraints.take() {
            self.scheduler.resume(answer, &mut self.blocks);
        }
    }

    fn drain_inbox(&mut self) {
        while let Ok(command) = self.inbox.try_recv() {
            self.take(command);
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit { sequence, stream } => {
                self.outbox.open(sequence.id, stream);
                self.scheduler.enqueue(*sequence);
            }
            Command::Cancel(id) => self.scheduler.abort(id, &mut self.blocks),
        }
    }

    /// Streams events out, those of aborted sequences too, and says how things stand.
    async fn emit(&mut self, mut events: Vec<SeqEvent>) -> Result<(), EngineError> {
        events.append(&mut self.scheduler.take_events());
        let num_ended = events.iter().filter(|(_, event)| is_last(event)).count() as u32;
        if num_ended > 0 {
            self.note_ends(num_ended);
        }
        let has_work = !self.scheduler.is_empty();
        self.progress_at = has_work.then(|| self.progress_at.unwrap_or_else(Instant::now));
        self.publish();
        self.outbox.send(events).await
    }

    /// Estimates when a place becomes free.
    fn note_ends(&mut self, num_ended: u32) {
        let now = Instant::now();
        let interval = (now - self.last_end).min(INTERVAL_MAX).as_micros() as f64 / f64::from(num_ended);
        self.last_end = now;
        let mean = self.shared.retry_after_us.load(Ordering::Relaxed) as f64;
        let mean = mean + INTERVAL_WEIGHT * (interval - mean);
        self.shared.retry_after_us.store(mean as u64, Ordering::Relaxed);
    }

    fn publish(&self) {
        self.shared.snapshot.send_replace(EngineSnapshot {
            running: self.scheduler.num_running(),
            waiting: self.scheduler.num_waiting(),
            num_blocks: self.blocks.num_blocks(),
            num_blocks_free: self.blocks.num_available(),
            num_blocks_cached: self.blocks.num_cached(),
            epoch: self.group.epoch().0,
            counters: self.scheduler.counters(),
            progress_at: self.progress_at,
            stall_limit: self.group.stall_limit(),
            recovering: self.recovering,
            yielding: false,
        });
    }

    /// Ends every stream, then the ranks.
    async fn end(&mut self, error: EngineError) {
        self.inbox.close();
        self.drain_inbox();
        self.scheduler.fail_all(&error, &mut self.blocks);
        if let Err(error) = self.emit(Vec::new()).await {
            tracing::warn!(%error, "streams end without their last event");
        }
        self.group.shut_down(&error.to_string()).await;
    }
}
