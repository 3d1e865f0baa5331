//! Collectives between the processes of one node, through shared memory.
//!
//! Small calls are one-shot: every rank shows its term and sums all of them. Large ones are two-shot: every rank sums one
//! segment, then all copy the sums (reduce-scatter, all-gather). Both form the same sums. Source: arXiv:1909.08053,
//! section 3, for the use; Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH", for the shape.
//!
//! **Invariant:** slots are used in turns of two: a rank writes the slot of call `n + 2` when all ranks have posted `n + 1`,
//! hence have read `n`.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::signal::kill;
use nix::unistd::Pid;
use phalanx_kernels::{Collective, CollectiveError};

use super::flag::Flag;
use super::segment::{Member, Rendezvous, SLOT_BYTES, Segment};
use super::sum::{segment, sum_in_rank_order};
use super::{AbortHandle, AbortTarget, Patience, Place};

/// Calls of at most this many bytes are one-shot.
const ONE_SHOT_BYTES_MAX: usize = 32 * 1024;
/// Slices between two looks at the peer's process.
const SLICES_PER_LOOK: u32 = 8;
/// Looks at the flag between two looks at the clock.
const SPINS_PER_LOOK: u32 = 32;

/// What a call is; part of what the ranks compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    AllReduce = 1,
    AllGather = 2,
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce_sum",
            Self::AllGather => "all_gather",
        }
    }

    fn describe(self, bytes: usize) -> u64 {
        (self as u64) << 56 | bytes as u64
    }
}

/// A group whose ranks share memory.
pub(super) struct ShmGroup {
    place: Place,
    memory: Arc<Segment>,
    peers: Vec<Option<Peer>>,
    patience: Patience,
    abort: AbortHandle,
    num_calls: u32,
    num_two_shots: u32,
}

/// How a peer's process is watched.
enum Peer {
    Descriptor(OwnedFd),
    Number(Pid),
}

impl Peer {
    fn watch(pid: u32) -> Self {
        // SAFETY: takes two integers and returns a new descriptor or an error.
        let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
        match i32::try_from(descriptor) {
            // SAFETY: the kernel just made this descriptor for us.
            Ok(fd) if fd >= 0 => Self::Descriptor(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => Self::Number(Pid::from_raw(pid.cast_signed())),
        }
    }

    fn is_gone(&self) -> bool {
        match self {
            Self::Descriptor(fd) => {
                let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
                // SAFETY: one entry, alive through the call, which does not wait.
                unsafe { libc::poll(&raw mut poll, 1, 0) > 0 }
            }
            Self::Number(pid) => kill(*pid, None) == Err(nix::errno::Errno::ESRCH),
        }
    }
}

impl ShmGroup {
    pub(super) fn connect(
        rendezvous: Rendezvous,
        place: Place,
        patience: Patience,
        deadline: Duration,
        abort: AbortHandle,
    ) -> Result<Self, CollectiveError> {
        let memory = Arc::new(rendezvous.connect(place, deadline)?);
        abort.arm(AbortTarget::Shm(memory.clone()));
        let peers = (0..place.world_size)
            .map(|rank| (rank != place.rank).then(|| Peer::watch(memory.member(rank).pid())))
            .collect();
        Ok(Self { place, memory, peers, patience, abort, num_calls: 0, num_two_shots: 0 })
    }

    fn me(&self) -> &Member {
        self.memory.member(self.place.rank)
    }

    /// Begins a call: the slot of the returned parity is free to be written.
    fn begin(&mut self) -> usize {
        self.num_calls = self.num_calls.wrapping_add(1);
        (self.num_calls & 1) as usize
    }

    /// Shows what was written to the slot, and waits for all others to do so.
    fn meet(&self, op: Op, bytes: usize, parity: usize) -> Result<(), CollectiveError> {
        self.me().calls[parity].store(op.describe(bytes), Ordering::Relaxed);
        self.me().posted.post(self.num_calls);
        for peer in self.place.peers() {
            let member = self.memory.member(peer);
            self.wait(op, peer, &member.posted, self.num_calls)?;
            let theirs = member.calls[parity].load(Ordering::Relaxed);
            if theirs != op.describe(bytes) {
                let reason = format!("it makes call {theirs:#x} where this rank makes {:#x}", op.describe(bytes));
                return Err(CollectiveError::PeerGone { op: op.name(), peer, reason });
            }
        }
        Ok(())
    }

    fn wait(&self, op: Op, peer: usize, flag: &Flag, target: u32) -> Result<(), CollectiveError> {
        if flag.reached(target) {
            return Ok(());
        }
        let started = Instant::now();
        while started.elapsed() < self.patience.spin {
            for _ in 0..SPINS_PER_LOOK {
                if flag.reached(target) {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
        }
        let mut num_slices = 0;
        while !flag.reached(target) {
            let result = self.look_around(op, peer, started, num_slices % SLICES_PER_LOOK == SLICES_PER_LOOK - 1);
            // A peer may have posted and ended in between: what it posted counts.
            if result.is_err() && !flag.reached(target) {
                return result;
            }
            flag.sleep(target);
            num_slices += 1;
        }
        Ok(())
    }

    fn look_around(&self, op: Op, peer: usize, started: Instant, at_process: bool) -> Result<(), CollectiveError> {
        let op = op.name();
        if self.memory.is_aborted() || self.abort.is_raised() {
            return Err(CollectiveError::Aborted { op });
        }
        if self.memory.member(peer).has_left() {
            return Err(CollectiveError::PeerGone { op, peer, reason: "it left the group".into() });
        }
        if at_process && self.peers[peer].as_ref().is_some_and(Peer::is_gone) {
            return Err(CollectiveError::PeerGone { op, peer, reason: "its process ended".into() });
        }
        let waited = started.elapsed();
        if waited >= self.patience.deadline {
            let waited_ms = waited.as_millis() as u64;
            return Err(CollectiveError::Deadline { op, rank: self.place.rank, peer, waited_ms });
        }
        Ok(())
    }

    fn one_shot(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        let parity = self.begin();
        self.memory.write(self.place.rank, parity, 0, as_bytes(data));
        self.meet(Op::AllReduce, size_of_val(data), parity)?;
        let (memory, len) = (&self.memory, data.len());
        sum_in_rank_order(data, self.place.rank, self.place.world_size, |peer| {
            memory.read_floats(peer, parity, 0..len)
        });
        Ok(())
    }

    fn two_shot(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        let Place { rank, world_size } = self.place;
        let parity = self.begin();
        for peer in self.place.peers() {
            let theirs = segment(data.len(), world_size, peer);
            self.memory.write(rank, parity, theirs.start * size_of::<f32>(), as_bytes(&data[theirs]));
        }
        self.meet(Op::AllReduce, size_of_val(data), parity)?;
        let mine = segment(data.len(), world_size, rank);
        let memory = &self.memory;
        sum_in_rank_order(&mut data[mine.clone()], rank, world_size, |peer| {
            memory.read_floats(peer, parity, mine.clone())
        });
        // Nobody reads this rank's own segment in its slot before the second flag.
        self.memory.write(rank, parity, mine.start * size_of::<f32>(), as_bytes(&data[mine]));
        self.num_two_shots = self.num_two_shots.wrapping_add(1);
        self.me().reduced.post(self.num_two_shots);
        for peer in self.place.peers() {
            self.wait(Op::AllReduce, peer, &self.memory.member(peer).reduced, self.num_two_shots)?;
            let theirs = segment(data.len(), world_size, peer);
            data[theirs.clone()].copy_from_slice(self.memory.read_floats(peer, parity, theirs));
        }
        Ok(())
    }

    fn reduce_chunk(&mut self, chunk: &mut [f32]) -> Result<(), CollectiveError> {
        if size_of_val(chunk) <= ONE_SHOT_BYTES_MAX { self.one_shot(chunk) } else { self.two_shot(chunk) }
    }

    fn gather_chunk(
        &mut self,
        part: &[u8],
        out: &mut [u8],
        stride: usize,
        start: usize,
    ) -> Result<(), CollectiveError> {
        let parity = self.begin();
        self.memory.write(self.place.rank, parity, 0, part);
        self.meet(Op::AllGather, part.len(), parity)?;
        for peer in 0..self.place.world_size {
            let begin = peer * stride + start;
            out[begin..begin + part.len()].copy_from_slice(self.memory.read(peer, parity, 0..part.len()));
        }
        Ok(())
    }

    /// A group that failed once stays failed, for every rank.
    fn settle(&self, result: Result<(), CollectiveError>) -> Result<(), CollectiveError> {
        if result.is_err() {
            self.abort.abort();
        }
        result
    }

    fn check_alive(&self, op: Op) -> Result<(), CollectiveError> {
        if self.memory.is_aborted() { Err(CollectiveError::Aborted { op: op.name() }) } else { Ok(()) }
    }
}

impl Collective for ShmGroup {
    fn rank(&self) -> usize {
        self.place.rank
    }

    fn world_size(&self) -> usize {
        self.place.world_size
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.check_alive(Op::AllReduce)?;
        let result = data.chunks_mut(SLOT_BYTES / size_of::<f32>()).try_for_each(|chunk| self.reduce_chunk(chunk));
        self.settle(result)
    }

    fn all_gather(&mut self, part: &[u8], out: &mut [u8]) -> Result<(), CollectiveError> {
        assert!(out.len() == part.len() * self.place.world_size, "a gather's output holds one part per rank");
        self.check_alive(Op::AllGather)?;
        let mut start = 0;
        let result = part.chunks(SLOT_BYTES).try_for_each(|chunk| {
            let result = self.gather_chunk(chunk, out, part.len(), start);
            start += chunk.len();
            result
        });
        self.settle(result)
    }
}

impl Drop for ShmGroup {
    fn drop(&mut self) {
        self.memory.leave(self.place.rank);
    }
}

fn as_bytes(data: &[f32]) -> &[u8] {
    // SAFETY: floats have no padding, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}
