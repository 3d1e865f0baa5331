//! One rank's membership in a group, from joining to leaving.
//!
//! Owns the handle, what it may be asked in which state, and every wait on it. Knows no device: the caller has made its own current.
//!
//! **Invariant:** after the first failure no function but teardown sees the handle again. Teardown runs on a thread of its own
//! and is waited for no longer than its deadline; what is not done by then is left behind, never waited for.
//! **Invariant:** a wait asks the library only for its state, and never the device: calls may be made while their stream records.

mod calls;

use std::cell::{Cell, RefCell};
use std::ffi::c_int;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{IN_PROGRESS, NcclError, SUCCESS};
use crate::library::Library;
use crate::table::{RawComm, RawConfig};
use crate::types::UniqueId;

/// How long joining may take, where [`Membership::with_init_deadline`] says nothing else.
const INIT_DEADLINE: Duration = Duration::from_secs(60);
/// How long the host's part of a call may take, where [`Membership::with_call_deadline`] says nothing else.
const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// How long dropping a communicator may take.
const DROP_DEADLINE: Duration = Duration::from_secs(5);
/// How long a wait looks again at once. A call through a non-blocking communicator is put into its stream by a thread of the
/// library's within tens of microseconds; one short sleep would be longer than that.
const SPIN: Duration = Duration::from_micros(500);
/// First and longest sleep between two looks at a call that is in progress.
const SLEEP: (Duration, Duration) = (Duration::from_micros(50), Duration::from_millis(2));

/// Which place in which group a communicator takes.
#[derive(Debug, Clone)]
pub struct Membership {
    id: UniqueId,
    rank: u32,
    world_size: u32,
    init_deadline: Duration,
    call_deadline: Duration,
}

impl Membership {
    /// Rank `rank` of the `world_size` ranks that got `id`.
    pub fn new(id: UniqueId, rank: u32, world_size: u32) -> Self {
        Self { id, rank, world_size, init_deadline: INIT_DEADLINE, call_deadline: CALL_DEADLINE }
    }

    /// Bounds the wait for the other ranks (60 s otherwise).
    #[must_use]
    pub fn with_init_deadline(self, init_deadline: Duration) -> Self {
        Self { init_deadline, ..self }
    }

    /// Bounds the host's part of each call (30 s otherwise); what runs on the device is bounded by whoever waits for its stream.
    #[must_use]
    pub fn with_call_deadline(self, call_deadline: Duration) -> Self {
        Self { call_deadline, ..self }
    }

    /// Rank and world size as the library takes them.
    fn place(&self) -> Result<(c_int, c_int), NcclError> {
        let fits = |value: u32| c_int::try_from(value).ok();
        match (fits(self.rank), fits(self.world_size)) {
            (Some(rank), Some(world_size)) if rank < world_size => Ok((rank, world_size)),
            _ => Err(argument(format!("rank {} of {} ranks", self.rank, self.world_size))),
        }
    }
}

/// A rank's end of a group. Stays on the thread that joined.
pub struct Communicator {
    library: Library,
    /// Null once teardown has taken it.
    raw: RawComm,
    rank: u32,
    world_size: u32,
    has_deadlines: bool,
    call_deadline: Duration,
    in_group: Cell<bool>,
    failure: RefCell<Option<String>>,
    /// What ends it already, elsewhere.
    teardown: Option<Teardown>,
}

/// How a communicator ends.
#[derive(Clone, Copy)]
enum End {
    Destroy,
    Abort,
}

impl Communicator {
    /// Joins a group; collective. The thread's current device becomes the rank's.
    ///
    /// With NCCL 2.14 and newer the wait ends by the deadline; older libraries wait for the other ranks without end, and so does one
    /// whose environment sets `NCCL_COMM_BLOCKING=1`.
    ///
    /// # Errors
    /// [`NcclError::Deadline`] where ranks are missing; [`NcclError::Call`] where the library gives up. What was begun is aborted, for
    /// which up to 5 seconds pass. All ranks must join again with a new id.
    pub fn join(library: &Library, membership: &Membership) -> Result<Self, NcclError> {
        let (rank, world_size) = membership.place()?;
        let table = library.table();
        let mut raw: RawComm = std::ptr::null_mut();
        let (function, code) = match table.comm_init_rank_config {
            Some(init) => {
                let mut config = RawConfig::non_blocking();
                // SAFETY: `raw` and `config` have room and layout; both are read and written during the call only.
                let code = unsafe { init(&raw mut raw, world_size, membership.id, rank, &raw mut config) };
                ("ncclCommInitRankConfig", code)
            }
            None => {
                // SAFETY: `raw` has room for the answer.
                let code = unsafe { (table.comm_init_rank)(&raw mut raw, world_size, membership.id, rank) };
                ("ncclCommInitRank", code)
            }
        };
        let communicator = Self {
            library: library.clone(),
            raw,
            rank: membership.rank,
            world_size: membership.world_size,
            has_deadlines: table.comm_init_rank_config.is_some(),
            call_deadline: membership.call_deadline,
            in_group: Cell::new(false),
            failure: RefCell::new(None),
            teardown: None,
        };
        communicator.accept(function, code)?;
        if communicator.has_deadlines {
            communicator.wait(function, membership.init_deadline)?;
        }
        Ok(communicator)
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// How many ranks the group has.
    pub fn world_size(&self) -> u32 {
        self.world_size
    }

    /// Whether joining and calls end by a deadline: true from NCCL 2.14 on.
    pub fn has_deadlines(&self) -> bool {
        self.has_deadlines
    }

    /// Looks whether something went wrong since: a peer that is gone, a network that failed. Cheap; to be asked between steps.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    pub fn async_error(&self) -> Result<(), NcclError> {
        self.usable()?;
        self.progress("ncclCommGetAsyncError").map(|_| ())
    }

    /// Leaves the group when all of its work is done. Every rank calls it, with its stream drained and its graphs destroyed. A failed
    /// communicator is aborted instead.
    ///
    /// # Errors
    /// [`NcclError::Deadline`] if it is not done by then: the library's part is left behind, and the process should end soon.
    pub fn close(mut self, deadline: Duration) -> Result<(), NcclError> {
        self.end(deadline)
    }

    /// Leaves the group at once, ending what still runs on the device.
    ///
    /// # Errors
    /// As [`Self::close`].
    pub fn abort(mut self, deadline: Duration) -> Result<(), NcclError> {
        self.record("aborted");
        self.end(deadline)
    }

    /// Begins to leave the group: what runs on the device ends at once, and no further call is taken. Not waited for here, but by
    /// [`Self::abort`] or by dropping, so that recordings which hold the communicator's work can be destroyed in between: the
    /// library waits for them.
    ///
    /// # Errors
    /// [`NcclError::Thread`]: nothing was begun.
    pub fn begin_abort(&mut self) -> Result<(), NcclError> {
        self.record("aborted");
        if self.teardown.is_none() && !self.raw.is_null() {
            let teardown = Teardown::begin(&self.library, self.raw, End::Abort)?;
            self.raw = std::ptr::null_mut();
            self.teardown = Some(teardown);
        }
        Ok(())
    }

    /// The handle, unless the communicator has failed.
    fn usable(&self) -> Result<RawComm, NcclError> {
        match &*self.failure.borrow() {
            None => Ok(self.raw),
            Some(reason) => Err(NcclError::Failed { reason: reason.clone() }),
        }
    }

    fn peer(&self, peer: u32) -> Result<c_int, NcclError> {
        c_int::try_from(peer)
            .ok()
            .filter(|_| peer < self.world_size)
            .ok_or_else(|| argument(format!("rank {peer} of {} ranks", self.world_size)))
    }

    /// Remembers the first failure.
    fn record(&self, reason: impl std::fmt::Display) {
        self.failure.borrow_mut().get_or_insert_with(|| reason.to_string());
    }

    fn fail(&self, error: NcclError) -> NcclError {
        self.record(&error);
        error
    }

    /// Refuses the codes of failures.
    fn accept(&self, function: &'static str, code: c_int) -> Result<(), NcclError> {
        match code {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => Err(self.fail(self.library.error(function, code, self.raw))),
        }
    }

    /// Makes a result of a call's code; waits for what is in progress, unless a group will.
    fn settle(&self, function: &'static str, code: c_int) -> Result<(), NcclError> {
        self.accept(function, code)?;
        if code == SUCCESS || self.in_group.get() { Ok(()) } else { self.wait(function, self.call_deadline) }
    }

    /// Whether nothing is in progress any more.
    fn progress(&self, function: &'static str) -> Result<bool, NcclError> {
        let mut state: c_int = SUCCESS;
        // SAFETY: the communicator is alive, and `state` has room for the answer.
        let code = unsafe { (self.library.table().comm_get_async_error)(self.raw, &raw mut state) };
        match if code == SUCCESS { state } else { code } {
            SUCCESS => Ok(true),
            IN_PROGRESS => Ok(false),
            code => Err(self.fail(self.library.error(function, code, self.raw))),
        }
    }

    fn wait(&self, phase: &'static str, deadline: Duration) -> Result<(), NcclError> {
        let begin = Instant::now();
        let mut sleep = SLEEP.0;
        while !self.progress(phase)? {
            let waited = begin.elapsed();
            if waited >= deadline {
                return Err(self.fail(NcclError::Deadline { phase, waited }));
            }
            if waited < SPIN {
                // The library's thread may need this very processor.
                thread::yield_now();
                continue;
            }
            thread::sleep(sleep.min(deadline.saturating_sub(waited)));
            sleep = (sleep * 2).min(SLEEP.1);
        }
        Ok(())
    }

    /// Ends the communicator; the second time nothing is left to do.
    fn end(&mut self, deadline: Duration) -> Result<(), NcclError> {
        if let Some(teardown) = self.teardown.take() {
            return teardown.wait(deadline);
        }
        if self.raw.is_null() {
            return Ok(());
        }
        let begin = Instant::now();
        let flushed = if self.failure.borrow().is_none() { self.finalize(deadline) } else { Ok(()) };
        let raw = std::mem::replace(&mut self.raw, std::ptr::null_mut());
        if matches!(flushed, Err(NcclError::Deadline { .. })) {
            return flushed;
        }
        let how = if self.failure.borrow().is_some() { End::Abort } else { End::Destroy };
        let ended = Teardown::begin(&self.library, raw, how);
        flushed.and(ended?.wait(deadline.saturating_sub(begin.elapsed())))
    }

    /// Waits until all ranks are done, where the library can say so.
    fn finalize(&self, deadline: Duration) -> Result<(), NcclError> {
        let Some(finalize) = self.library.table().comm_finalize.filter(|_| self.has_deadlines) else {
            return Ok(());
        };
        // SAFETY: the communicator is alive and has not been finalized.
        let code = unsafe { finalize(self.raw) };
        self.accept("ncclCommFinalize", code)?;
        self.wait("ncclCommFinalize", deadline)
    }
}

impl Drop for Communicator {
    /// Destroys a healthy communicator, aborts a failed one; after 5 seconds it is left behind.
    fn drop(&mut self) {
        // Nobody is left to hear of it; `close` tells.
        let _ = self.end(DROP_DEADLINE);
    }
}

/// A thread that destroys or aborts; left behind if it is not done by the deadline.
struct Teardown {
    library: Library,
    function: &'static str,
    ended: mpsc::Receiver<c_int>,
}

impl Teardown {
    fn begin(library: &Library, raw: RawComm, how: End) -> Result<Self, NcclError> {
        let function = match how {
            End::Destroy => "ncclCommDestroy",
            End::Abort => "ncclCommAbort",
        };
        let (done, ended) = mpsc::sync_channel(1);
        let (address, on_thread) = (raw.expose_provenance(), library.clone());
        let body = move || {
            let raw: RawComm = std::ptr::with_exposed_provenance_mut(address);
            let table = on_thread.table();
            // SAFETY: the communicator is alive, this is its last call, and both functions may be called on any thread.
            let code = unsafe {
                match how {
                    End::Destroy => (table.comm_destroy)(raw),
                    End::Abort => (table.comm_abort)(raw),
                }
            };
            // Nobody listens after the deadline.
            let _ = done.send(code);
        };
        let spawned = thread::Builder::new().name("nccl-teardown".to_owned()).spawn(body);
        spawned.map_err(|source| NcclError::Thread { source })?;
        Ok(Self { library: library.clone(), function, ended })
    }

    fn wait(self, deadline: Duration) -> Result<(), NcclError> {
        let Self { library, function, ended } = self;
        match ended.recv_timeout(deadline) {
            Ok(SUCCESS | IN_PROGRESS) => Ok(()),
            Ok(code) => Err(library.error(function, code, std::ptr::null_mut())),
            Err(_) => Err(NcclError::Deadline { phase: function, waited: deadline }),
        }
    }
}

fn argument(what: String) -> NcclError {
    NcclError::Argument { what }
}
