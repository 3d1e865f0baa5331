//! From one engine to another: sequences whose own engine has no group go on where there is one.
//!
//! A sequence that waits moves as it is, with its prompt, its committed tokens and its budget of replays; there it is replayed as after a
//! broken group of that engine. Its stream stays the same: only the end that feeds it changes hands.
//!
//! **Invariant:** a sequence is in one engine; the next one has room for it before this one lets it go.
//! **Invariant:** what the first engine emitted is in the stream before the next one may add to it, as the dispatcher that hands events
//! over hands the stream over too.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use super::handle::{Command, NextGroup, Places, Shared};
use super::outbox::Outbox;
use super::request::{EngineError, TokenEvent};
use super::sequence::Sequence;
use super::{Engine, EngineHandle};

/// Which engine the sequence of a stream is in.
pub(super) struct Route(Mutex<Way>);

/// The way to that engine.
struct Way {
    /// The place of the cancellation; none once the stream needs no engine any more.
    cancellation: Option<mpsc::OwnedPermit<Command>>,
    shared: Arc<Shared>,
}

impl Route {
    /// To the engine that takes the sequence first.
    pub(super) fn new(cancellation: mpsc::OwnedPermit<Command>, shared: Arc<Shared>) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Way { cancellation: Some(cancellation), shared })))
    }

    /// The stream needs no engine any more. Gives the place of the cancellation, the first time.
    pub(super) fn close(&self) -> Option<mpsc::OwnedPermit<Command>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).cancellation.take()
    }

    /// Why nothing more comes.
    pub(super) fn reason(&self) -> EngineError {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).shared.reason()
    }
}

impl std::fmt::Debug for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Route").finish_non_exhaustive()
    }
}

/// A sequence on its way, and its places where it goes.
pub(super) struct Moving {
    pub(super) sequence: Box<Sequence>,
    submission: mpsc::OwnedPermit<Command>,
    cancellation: mpsc::OwnedPermit<Command>,
    shared: Arc<Shared>,
}

impl Moving {
    /// Hands the sequence over with its stream, unless nobody reads that any more.
    pub(super) fn arrive(self, stream: mpsc::Sender<TokenEvent>) {
        let Self { sequence, submission, cancellation, shared } = self;
        let Some(route) = sequence.route() else {
            submission.send(Command::Submit { sequence, stream });
            return;
        };
        // Both under one lock: a cancellation never overtakes what it cancels.
        let mut way = route.0.lock().unwrap_or_else(PoisonError::into_inner);
        if way.cancellation.is_none() {
            return;
        }
        // An engine that has ended since reads nothing: the stream ends with its reason.
        let is_open = shared.is_open();
        *way = Way { cancellation: Some(cancellation), shared };
        if is_open {
            submission.send(Command::Submit { sequence, stream });
        }
    }
}

impl EngineHandle {
    /// Lets what waits in this engine for a group go on in others that serve, as far as they have room.
    ///
    /// May be said again at any time; an engine that is busy with its next group does not hear it.
    pub fn move_to(&self, engines: Vec<EngineHandle>) {
        if !engines.is_empty() && self.num_accepted() > 0 {
            self.tell_quietly(NextGroup::Elsewhere(engines));
        }
    }

    /// Room for a sequence that comes from another engine.
    fn make_room(&self) -> Result<(Places, [mpsc::OwnedPermit<Command>; 2]), EngineError> {
        self.check_open()?;
        Ok((self.shared.accept(1)?, [self.reserve_command()?, self.reserve_command()?]))
    }
}

impl Engine {
    /// Sends what waits to other engines, the oldest first, each to the one with the least work. What none has room for stays.
    pub(super) fn move_waiting(&mut self, engines: &[EngineHandle]) {
        self.resume_constrained();
        let mut num_moved = 0u32;
        for id in self.scheduler.movable() {
            let mut by_work: Vec<&EngineHandle> = engines.iter().collect();
            by_work.sort_by_key(|engine| engine.num_accepted());
            let room = by_work.iter().find_map(|engine| Some((engine.make_room().ok()?, &engine.shared)));
            let Some(((places, [submission, cancellation]), shared)) = room else { break };
            let Some(sequence) = self.scheduler.take_waiting(id) else { continue };
            let sequence = Box::new(sequence.with_places(Arc::new(places)));
            self.outbox.pass_on(Moving { sequence, submission, cancellation, shared: Arc::clone(shared) });
            num_moved += 1;
        }
        if num_moved > 0 {
            let num_left = self.scheduler.num_waiting();
            tracing::warn!(num_moved, num_left, "requests of a group that is gone go on in other replicas");
        }
    }
}

impl Outbox {
    /// Lets a sequence go, after all that was emitted of it.
    fn pass_on(&mut self, moving: Moving) {
        self.moved.push(moving);
    }
}
