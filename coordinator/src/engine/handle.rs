//! The engine as the API runtime sees it: submit, read a stream, look at it, stop it.
//!
//! Knows nothing of steps. Everything crosses to the engine's thread through one bounded channel.
//!
//! **Invariant:** dropping a stream always reaches the engine: its place in the channel is taken when the request is submitted.
//! **Invariant:** a stream yields exactly one `Finished` or `Failed`, whatever becomes of the engine.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use phalanx_proto::{Epoch, SeqId};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

use super::group::TpGroup;
use super::moving::Route;
use super::request::{EngineError, EngineLimits, GenerateRequest, TokenEvent};
use super::scheduler::Counters;
use super::sequence::Sequence;

/// Events of a stream beside its tokens: the prompt's log-probabilities and the last one.
const OTHER_EVENTS_MAX: usize = 2;
/// Streams that may be open for each request that may be in the engine: ended ones that are still read.
const OPEN_STREAMS_SHARE: usize = 4;
/// How long an engine may take to end after its drain: a step, and telling the ranks.
const END_DEADLINE: Duration = Duration::from_secs(60);

/// Words that may be on their way to an engine without a group: to move its requests, the next group, and that there is none.
const NEXT_GROUPS_MAX: usize = 3;

/// The last sequence's number: one row for all engines of this process, as sequences move between them.
static LAST_SEQ_ID: AtomicU64 = AtomicU64::new(0);

/// The reason of an engine that ended without one, by a broken invariant.
pub(super) const BROKEN: &str = "the engine broke";

/// What the engine's thread is asked for.
pub(super) enum Command {
    Submit { sequence: Box<Sequence>, stream: mpsc::Sender<TokenEvent> },
    Cancel(SeqId),
}

/// What becomes of an engine whose group broke.
#[derive(Debug)]
pub(super) enum NextGroup {
    /// It goes on with this one.
    Ready(Box<TpGroup>),
    /// None yet: what waits may go on in these engines.
    Elsewhere(Vec<EngineHandle>),
    /// There will be none.
    None(EngineError),
}

/// Where an engine stands.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum EngineState {
    Serving,
    /// The group of that epoch broke; requests wait for the next one.
    Recovering {
        epoch: Epoch,
        reason: String,
    },
    /// No new requests; those in the engine may go on until then.
    Draining(Instant),
    Failed(EngineError),
    Stopped,
}

/// An engine at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineSnapshot {
    /// Sequences in the batch.
    pub running: u32,
    /// Sequences in the queue.
    pub waiting: u32,
    /// KV blocks of every rank.
    pub num_blocks: u32,
    /// Of these, free (cached prefixes count as free).
    pub num_blocks_free: u32,
    /// Blocks that hold a prefix that can be found.
    pub num_blocks_cached: u32,
    /// This life of sequences and KV blocks.
    pub epoch: u64,
    /// What was done so far, in all epochs.
    pub counters: Counters,
    /// When a step ended last, or when work came to an engine that had none. None where nothing runs or waits.
    pub progress_at: Option<Instant>,
    /// Without a step for so long, with work there, the engine is called stalled.
    pub stall_limit: Duration,
    /// The group broke, and the next one is not there yet.
    pub recovering: bool,
    /// Its group is to end soon: new work goes elsewhere where it can.
    pub yielding: bool,
}

impl EngineSnapshot {
    /// How long there has been work and no step has ended.
    pub fn stalled_for(&self, now: Instant) -> Duration {
        self.progress_at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at))
    }

    /// Steps committed so far, in all epochs.
    pub fn steps(&self) -> u64 {
        self.counters.steps
    }
}

/// What handle and engine share.
pub(super) struct Shared {
    pub(super) limits: EngineLimits,
    /// The group is to end soon.
    pub(super) yielding: AtomicBool,
    /// KV blocks of the group that serves now, which differ from the first one's.
    pub(super) num_blocks: AtomicU32,
    /// Requests accepted and not ended.
    pub(super) num_accepted: AtomicU32,
    /// Mean time between two requests that end.
    pub(super) retry_after_us: AtomicU64,
    pub(super) snapshot: watch::Sender<EngineSnapshot>,
    pub(super) state: watch::Sender<EngineState>,
}

impl Shared {
    pub(super) fn new(limits: EngineLimits, snapshot: EngineSnapshot) -> Arc<Self> {
        Arc::new(Self {
            num_blocks: AtomicU32::new(limits.num_blocks),
            limits,
            num_accepted: AtomicU32::new(0),
            yielding: AtomicBool::new(false),
            retry_after_us: AtomicU64::new(0),
            snapshot: watch::Sender::new(snapshot),
            state: watch::Sender::new(EngineState::Serving),
        })
    }

    /// Takes places for a request, if the bound allows.
    pub(super) fn accept(self: &Arc<Self>, count: u32) -> Result<Places, EngineError> {
        let max = self.limits.num_accepted_max();
        let grow = |num: u32| num.checked_add(count).filter(|num| *num <= max);
        match self.num_accepted.fetch_update(Ordering::AcqRel, Ordering::Acquire, grow) {
            Ok(_) => Ok(Places { shared: Arc::clone(self), count }),
            Err(num) => Err(self.queue_full(num)),
        }
    }

    fn queue_full(&self, num_accepted: u32) -> EngineError {
        let mean = Duration::from_micros(self.retry_after_us.load(Ordering::Relaxed));
        EngineError::QueueFull {
            waiting: num_accepted.saturating_sub(self.limits.num_running_max()),
            max_queue: self.limits.max_queue,
            retry_after: mean.clamp(Duration::from_secs(1), Duration::from_secs(60)),
        }
    }

    /// Whether it takes requests in.
    pub(super) fn is_open(&self) -> bool {
        matches!(*self.state.borrow(), EngineState::Serving | EngineState::Recovering { .. })
    }

    /// Why nothing more comes from the engine.
    pub(super) fn reason(&self) -> EngineError {
        match &*self.state.borrow() {
            EngineState::Failed(error) => error.clone(),
            EngineState::Draining(_) | EngineState::Stopped => EngineError::Stopping,
            EngineState::Serving | EngineState::Recovering { .. } => EngineError::GroupFailed { reason: BROKEN.into() },
        }
    }
}

/// Places of a request in an engine: kept while it runs, given back when dropped.
pub struct Places {
    shared: Arc<Shared>,
    count: u32,
}

impl std::fmt::Debug for Places {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Places").field("count", &self.count).finish_non_exhaustive()
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        self.shared.num_accepted.fetch_sub(self.count, Ordering::AcqRel);
    }
}

/// A request that runs as many short sequences, one set after the other, as a search does.
///
/// It keeps its places between them, and their turn in the queue is that of the first one.
///
/// **Invariant:** no more of its sequences run at once than it has places; the caller sees to it.
#[derive(Debug)]
pub struct Reservation {
    engine: EngineHandle,
    places: Arc<Places>,
    arrival: Option<SeqId>,
}

impl Reservation {
    /// Hands one more sequence to the engine.
    ///
    /// # Errors
    /// As of [`EngineHandle::submit`], but for the queue, which has room for it, and for a drain, which waits for it.
    pub fn submit(&mut self, request: GenerateRequest) -> Result<TokenStream, EngineError> {
        let max_tokens = self.engine.fit(&request)?;
        let stream = self.engine.start(request, max_tokens, Arc::clone(&self.places), self.arrival)?;
        self.arrival.get_or_insert(stream.id);
        Ok(stream)
    }

    /// What the engine accepts.
    pub fn limits(&self) -> &EngineLimits {
        self.engine.limits()
    }
}

/// Submits requests to one engine. Cheap to clone.
#[derive(Clone)]
pub struct EngineHandle {
    pub(super) shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    groups: mpsc::Sender<NextGroup>,
}

impl std::fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineHandle").field("snapshot", &self.snapshot()).finish_non_exhaustive()
    }
}

impl EngineHandle {
    pub(super) fn new(shared: Arc<Shared>) -> (Self, mpsc::Receiver<Command>, mpsc::Receiver<NextGroup>) {
        let places = shared.limits.num_accepted_max() as usize;
        // One for each submission under way, and one kept by each open stream for its cancellation.
        let capacity = places.saturating_mul(1 + OPEN_STREAMS_SHARE).min(tokio::sync::Semaphore::MAX_PERMITS);
        let (commands, inbox) = mpsc::channel(capacity);
        let (groups, next_groups) = mpsc::channel(NEXT_GROUPS_MAX);
        (Self { shared, commands, groups }, inbox, next_groups)
    }

    /// Hands a request to the engine and gives the stream of its tokens.
    ///
    /// # Errors
    /// The request can never run (the client must change it), the queue is full (try again later), or the engine has ended.
    pub fn submit(&self, request: GenerateRequest) -> Result<TokenStream, EngineError> {
        self.check_open()?;
        let max_tokens = self.fit(&request)?;
        let places = Arc::new(self.shared.accept(1)?);
        self.start(request, max_tokens, places, None)
    }

    /// Takes places for a request that runs as up to `count` sequences at once.
    ///
    /// # Errors
    /// The queue is full (try again later), or the engine has ended.
    pub fn reserve(&self, count: u32) -> Result<Reservation, EngineError> {
        self.check_open()?;
        let places = Arc::new(self.shared.accept(count)?);
        Ok(Reservation { engine: self.clone(), places, arrival: None })
    }

    pub(super) fn check_open(&self) -> Result<(), EngineError> {
        if self.shared.is_open() { Ok(()) } else { Err(self.shared.reason()) }
    }

    /// Most tokens that a request may have.
    fn fit(&self, request: &GenerateRequest) -> Result<NonZeroU32, EngineError> {
        let num_blocks = self.shared.num_blocks.load(Ordering::Acquire);
        EngineLimits { num_blocks, ..self.shared.limits.clone() }.admit(request)
    }

    fn start(
        &self,
        request: GenerateRequest,
        max_tokens: NonZeroU32,
        places: Arc<Places>,
        arrival: Option<SeqId>,
    ) -> Result<TokenStream, EngineError> {
        let (submission, cancellation) = (self.reserve_command()?, self.reserve_command()?);
        let id = SeqId(LAST_SEQ_ID.fetch_add(1, Ordering::Relaxed) + 1);
        let capacity = (max_tokens.get() as usize).saturating_add(OTHER_EVENTS_MAX);
        let (stream, events) = mpsc::channel(capacity);
        let route = Route::new(cancellation, Arc::clone(&self.shared));
        let sequence = Sequence::new(id, request, max_tokens).with_places(places).with_arrival(arrival);
        let sequence = Box::new(sequence.with_route(Arc::clone(&route)));
        let started = sequence.started();
        submission.send(Command::Submit { sequence, stream });
        Ok(TokenStream { id, events, route, has_ended: false, started })
    }

    /// A place among the commands.
    pub(super) fn reserve_command(&self) -> Result<mpsc::OwnedPermit<Command>, EngineError> {
        self.commands.clone().try_reserve_owned().map_err(|_| self.refusal())
    }

    /// The engine now.
    pub fn snapshot(&self) -> EngineSnapshot {
        let yielding = self.shared.yielding.load(Ordering::Acquire);
        EngineSnapshot { yielding, ..*self.shared.snapshot.borrow() }
    }

    /// Asks for no new work where others can take it: the group is about to end. The next group takes it back.
    pub fn yield_work(&self) {
        self.shared.yielding.store(true, Ordering::Release);
    }

    /// Requests that it has accepted and that have not ended.
    pub fn num_accepted(&self) -> u32 {
        self.shared.num_accepted.load(Ordering::Acquire)
    }

    /// What it accepts.
    pub fn limits(&self) -> &EngineLimits {
        &self.shared.limits
    }

    /// Resolves when the group of `epoch` broke, with the reason; `None` after an orderly stop.
    pub async fn broke(&self, epoch: Epoch) -> Option<String> {
        let mut state = self.shared.state.subscribe();
        let reason = |state: &EngineState| match state {
            EngineState::Failed(EngineError::GroupFailed { reason }) => Some(Some(reason.clone())),
            EngineState::Failed(error) => Some(Some(error.to_string())),
            EngineState::Recovering { epoch: broken, reason } if *broken >= epoch => Some(Some(reason.clone())),
            EngineState::Stopped => Some(None),
            EngineState::Serving | EngineState::Recovering { .. } | EngineState::Draining(_) => None,
        };
        loop {
            if let Some(end) = reason(&state.borrow_and_update()) {
                return end;
            }
            // The sender lives as long as this handle.
            state.changed().await.ok()?;
        }
    }

    /// Gives the next group to an engine whose group broke, or is about to be seen broken.
    ///
    /// # Errors
    /// The engine has ended; the group comes back.
    pub fn adopt(&self, group: TpGroup) -> Result<(), Box<TpGroup>> {
        let returned = |next| match next {
            NextGroup::Ready(group) => Err(group),
            NextGroup::None(_) | NextGroup::Elsewhere(_) => Ok(()),
        };
        match self.groups.try_send(NextGroup::Ready(Box::new(group))) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Closed(next) | mpsc::error::TrySendError::Full(next)) => returned(next),
        }
    }

    /// Tells an engine whose group broke that there will be no other: its streams end with this reason.
    pub fn give_up(&self, reason: String) {
        // One that has ended needs no word, and one that was told already ends.
        let _ended = self.groups.try_send(NextGroup::None(EngineError::GroupFailed { reason }));
    }

    /// Says something that is not needed where other word is on its way.
    pub(super) fn tell_quietly(&self, word: NextGroup) {
        if self.groups.capacity() == NEXT_GROUPS_MAX {
            let _ended = self.groups.try_send(word);
        }
    }

    /// Refuses new requests, lets those in the engine end for at most `drain`, fails the rest, and ends ranks and thread.
    pub async fn stop(&self, drain: Duration) {
        let ends = Instant::now() + drain;
        self.shared.state.send_if_modified(|state| {
            let sooner = match state {
                EngineState::Serving | EngineState::Recovering { .. } => true,
                EngineState::Draining(at) => ends < *at,
                EngineState::Failed(_) | EngineState::Stopped => false,
            };
            if sooner {
                *state = EngineState::Draining(ends);
            }
            sooner
        });
        let mut state = self.shared.state.subscribe();
        let ended = state.wait_for(|state| matches!(state, EngineState::Stopped | EngineState::Failed(_)));
        if timeout(drain.saturating_add(END_DEADLINE), ended).await.is_err() {
            tracing::warn!("engine has not ended in time");
        }
    }

    /// A handle of an engine that could not be started.
    pub(super) fn refused(self, error: &dyn std::error::Error) -> Self {
        let error = EngineError::GroupFailed { reason: format!("the engine cannot start: {error}") };
        self.shared.state.send_replace(EngineState::Failed(error));
        self
    }

    fn refusal(&self) -> EngineError {
        if self.commands.is_closed() {
            return self.shared.reason();
        }
        self.shared.queue_full(self.shared.num_accepted.load(Ordering::Acquire))
    }
}

/// The events of one request, in order. Dropping it aborts the sequence at the next commit.
pub struct TokenStream {
    id: SeqId,
    events: mpsc::Receiver<TokenEvent>,
    /// Where the sequence is.
    route: Arc<Route>,
    /// The last event was read.
    has_ended: bool,
    started: Arc<AtomicBool>,
}

impl std::fmt::Debug for TokenStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenStream").field("seq_id", &self.id).finish_non_exhaustive()
    }
}

impl TokenStream {
    /// The engine's name for the sequence, for logs.
    pub fn seq_id(&self) -> SeqId {
        self.id
    }

    /// True once the sequence has left the queue.
    pub fn has_started(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }

    /// The next event; none after the last one.
    pub async fn next(&mut self) -> Option<TokenEvent> {
        if self.has_ended {
            return None;
        }
        let event = self.events.recv().await.unwrap_or_else(|| TokenEvent::Failed(self.route.reason()));
        if super::outbox::is_last(&event) {
            self.has_ended = true;
            drop(self.route.close());
        }
        Some(event)
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        if let Some(place) = self.route.close() {
            place.send(Command::Cancel(self.id));
        }
    }
}
