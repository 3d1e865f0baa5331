//! How the ranks of a group add and gather host data.
//!
//! Owns the transports (`local`, `shm`, `tcp`) and the way a group is formed: `prepare`, exchange of addresses through the
//! head, `connect`. Knows no plan, no model and no device.
//!
//! **Invariant:** sums are formed in rank order in f32, element by element, so all ranks hold the same bits whatever the
//! transport, the size and the path. Every wait has a deadline, sees a peer that is gone and sees the group's abort. A group
//! that failed once stays failed: each later call returns an error at once.

mod flag;
mod handshake;
mod interface;
mod local;
mod segment;
mod shm;
mod sum;
mod tcp;

#[cfg(test)]
mod tests;

use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use phalanx_kernels::{Collective, CollectiveError};
use phalanx_proto::{LoadModel, Rank};

pub use interface::name_of;
use segment::Segment;

/// Longest wait of one call, where `PendingGroup::with_call_deadline` says nothing else.
///
/// The head's step deadline is shorter; this one holds where the head is gone too.
pub const CALL_DEADLINE: Duration = Duration::from_secs(60);
/// How long a call spins before it sleeps, where there are processors to spare.
const SPIN: Duration = Duration::from_micros(20);
/// Fewest bytes of a key that keeps strangers out.
const GROUP_KEY_BYTES_MIN: usize = 16;

/// A group that this rank is ready to join, before the addresses of the others are known.
pub struct PendingGroup {
    place: Place,
    transport: Pending,
    num_threads: usize,
    call_deadline: Duration,
    abort: AbortHandle,
}

/// Where a rank stands in its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which of them.
    pub rank: usize,
    /// How many there are.
    pub world_size: usize,
}

impl Place {
    /// A place outside the group, and a key that keeps nobody out, are refused.
    fn check(self, group_key: &[u8]) -> Result<(), CollectiveError> {
        if self.rank >= self.world_size {
            return Err(setup(format!("rank {} is not in a group of {}", self.rank, self.world_size)));
        }
        if self.world_size > 1 && group_key.len() < GROUP_KEY_BYTES_MIN {
            return Err(setup(format!("the group's key is shorter than {GROUP_KEY_BYTES_MIN} bytes")));
        }
        Ok(())
    }

    fn peers(self) -> impl Iterator<Item = usize> {
        (0..self.world_size).filter(move |peer| *peer != self.rank)
    }
}

/// How long calls wait.
#[derive(Debug, Clone, Copy)]
struct Patience {
    spin: Duration,
    deadline: Duration,
}

enum Pending {
    Local,
    Shm(segment::Rendezvous),
    Tcp(tcp::Listening),
}

/// Readies this rank for its group: alone, through shared memory on one node, else over TCP (which listens from here on).
///
/// # Errors
/// A rank outside the group, a short key, no address or port to listen on.
pub fn prepare(load: &LoadModel, rank: Rank) -> Result<PendingGroup, CollectiveError> {
    let place = Place { rank: rank.0 as usize, world_size: load.world_size as usize };
    let one_node = load.rank_nodes.iter().all(|node| Some(node) == load.rank_nodes.first());
    if one_node || place.world_size == 1 {
        return prepare_here(&load.group_key, place);
    }
    prepare_between(&load.group_key, place, &load.collective_interface, load.collective_ports)
}

/// Readies a rank for a group whose ranks are all on this machine: alone, or through shared memory.
///
/// # Errors
/// As `prepare`.
pub fn prepare_here(group_key: &[u8], place: Place) -> Result<PendingGroup, CollectiveError> {
    place.check(group_key)?;
    Ok(PendingGroup::new(
        place,
        match place.world_size {
            1 => Pending::Local,
            _ => Pending::Shm(segment::Rendezvous::open(group_key, place)?),
        },
    ))
}

/// Readies a rank for a group over TCP: it listens on an interface (its name or an address), on a port of a range.
///
/// # Errors
/// As `prepare`.
pub fn prepare_between(
    group_key: &[u8],
    place: Place,
    interface: &str,
    ports: (u16, u16),
) -> Result<PendingGroup, CollectiveError> {
    place.check(group_key)?;
    let ip = interface::address(interface)?;
    Ok(PendingGroup::new(place, Pending::Tcp(tcp::Listening::bind(group_key, place, ip, ports)?)))
}

impl PendingGroup {
    fn new(place: Place, transport: Pending) -> Self {
        Self { place, transport, num_threads: 1, call_deadline: CALL_DEADLINE, abort: AbortHandle::default() }
    }

    /// Where this rank listens; empty where nothing needs to be known.
    pub fn address(&self) -> String {
        match &self.transport {
            Pending::Local | Pending::Shm(_) => String::new(),
            Pending::Tcp(listening) => listening.address().to_string(),
        }
    }

    /// Says how many threads compute on each rank: where all of them and one more do not fit the machine, calls never spin.
    #[must_use]
    pub fn with_threads(mut self, num_threads: usize) -> Self {
        self.num_threads = num_threads.max(1);
        self
    }

    /// Sets the longest wait of one call.
    #[must_use]
    pub fn with_call_deadline(mut self, deadline: Duration) -> Self {
        self.call_deadline = deadline;
        self
    }

    /// Breaks the group off, from any thread, now or after `connect`.
    pub fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    /// Meets the other ranks. `addresses`: one for each rank, in rank order. Collective.
    ///
    /// # Errors
    /// A rank that does not come within `deadline`, or does not hold the group's key.
    pub fn connect(self, addresses: &[String], deadline: Duration) -> Result<Box<dyn Collective>, CollectiveError> {
        let ranks_here = match self.transport {
            Pending::Local => 0,
            Pending::Shm(_) => self.place.world_size,
            Pending::Tcp(_) => 1,
        };
        let spare = ranks_here * self.num_threads < num_cpus();
        let patience = Patience { spin: if spare { SPIN } else { Duration::ZERO }, deadline: self.call_deadline };
        Ok(match self.transport {
            Pending::Local => Box::new(local::LocalGroup),
            Pending::Shm(rendezvous) => {
                Box::new(shm::ShmGroup::connect(rendezvous, self.place, patience, deadline, self.abort)?)
            }
            Pending::Tcp(listening) => Box::new(listening.connect(addresses, patience, deadline, self.abort)?),
        })
    }
}

/// Breaks a group off: every rank's waiting or next call ends with `CollectiveError::Aborted` or `PeerGone`.
#[derive(Clone, Default)]
pub struct AbortHandle(Arc<Abort>);

#[derive(Default)]
struct Abort {
    raised: AtomicBool,
    target: OnceLock<AbortTarget>,
}

/// What wakes the ranks that wait.
enum AbortTarget {
    Shm(Arc<Segment>),
    Tcp(Vec<TcpStream>),
}

impl AbortHandle {
    /// Breaks the group off. Doing it twice changes nothing.
    pub fn abort(&self) {
        self.0.raised.store(true, Ordering::SeqCst);
        match self.0.target.get() {
            Some(AbortTarget::Shm(segment)) => segment.abort(),
            Some(AbortTarget::Tcp(streams)) => {
                streams.iter().for_each(tcp::break_off);
            }
            None => {}
        }
    }

    fn is_raised(&self) -> bool {
        self.0.raised.load(Ordering::SeqCst)
    }

    /// Names what `abort` acts on; an abort that came before is carried out now.
    fn arm(&self, target: AbortTarget) {
        // A handle belongs to one group, which is connected once.
        let _ = self.0.target.set(target);
        if self.is_raised() {
            self.abort();
        }
    }
}

fn setup(reason: impl Into<String>) -> CollectiveError {
    CollectiveError::Setup { reason: reason.into() }
}

fn num_cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
