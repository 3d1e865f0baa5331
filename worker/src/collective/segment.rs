//! The memory that the ranks of one node share, and how they come to share it.
//!
//! Rank 0 makes an anonymous file and hands it to the others over a Unix socket whose abstract name comes from the group's
//! key. Nothing of this has a place in a file system, so nothing is left behind, however the processes end.
//!
//! **Invariant:** the file cannot shrink, and every access lies inside the mapping. A slot is written by its own rank only,
//! between calls that its flags order.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use phalanx_kernels::CollectiveError;
use sha2::{Digest, Sha256};

use super::flag::Flag;
use super::{Place, setup};

/// Bytes that a rank shows at a time: a chunk and its sum stay in the second-level cache.
pub(super) const SLOT_BYTES: usize = 512 * 1024;
/// Ranks that one node can hold.
const RANKS_MAX: usize = 64;
/// Time between two looks while the group forms.
const FORMING_PAUSE: Duration = Duration::from_millis(1);

const ABSENT: u32 = 0;
const HERE: u32 = 1;
const LEFT: u32 = 2;

#[repr(C)]
struct Header {
    abort: AtomicU32,
    members: [Member; RANKS_MAX],
}

/// What one rank shows to the others. All-zero memory is a rank that is absent.
#[repr(C, align(128))]
pub(super) struct Member {
    state: AtomicU32,
    pid: AtomicU32,
    /// What the rank is at, by parity of the call: operation and length.
    pub(super) calls: [AtomicU64; 2],
    /// Calls whose data stands in the slot.
    pub(super) posted: Flag,
    /// Two-shot calls whose own segment is summed.
    pub(super) reduced: Flag,
}

impl Member {
    pub(super) fn has_left(&self) -> bool {
        self.state.load(Ordering::Acquire) == LEFT
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }
}

/// The mapped memory of a group.
pub(super) struct Segment {
    map: MmapRaw,
    world_size: usize,
}

impl Segment {
    fn bytes(world_size: usize) -> usize {
        size_of::<Header>().next_multiple_of(4096) + world_size * 2 * SLOT_BYTES
    }

    fn map(file: BorrowedFd<'_>, world_size: usize) -> io::Result<Self> {
        let bytes = Self::bytes(world_size);
        let map = MmapOptions::new().len(bytes).map_raw(&file)?;
        Ok(Self { map, world_size })
    }

    fn header(&self) -> &Header {
        // SAFETY: the mapping begins on a page, is longer than a header, lives as long as `self`, and every bit pattern is a
        // valid header of atomics.
        unsafe { &*self.map.as_ptr().cast::<Header>() }
    }

    pub(super) fn member(&self, rank: usize) -> &Member {
        &self.header().members[rank]
    }

    fn slot_ptr(&self, rank: usize, parity: usize) -> *mut u8 {
        assert!(rank < self.world_size && parity < 2, "a slot belongs to a rank of the group");
        let offset = size_of::<Header>().next_multiple_of(4096) + (rank * 2 + parity) * SLOT_BYTES;
        // SAFETY: `bytes` counts two slots for each rank behind the header.
        unsafe { self.map.as_mut_ptr().add(offset) }
    }

    /// Copies `data` into a slot of this rank, from byte `offset` on.
    pub(super) fn write(&self, rank: usize, parity: usize, offset: usize, data: &[u8]) {
        assert!(offset + data.len() <= SLOT_BYTES, "a chunk fits its slot");
        // SAFETY: in range as asserted. Only this rank writes the slot, and nobody reads it before the next post.
        unsafe { self.slot_ptr(rank, parity).add(offset).copy_from_nonoverlapping(data.as_ptr(), data.len()) };
    }

    /// Shows bytes of a slot whose post was seen, and no byte beside them: its writer may be at work there.
    ///
    /// The writer leaves them alone until this rank has posted its next call.
    pub(super) fn read(&self, rank: usize, parity: usize, range: Range<usize>) -> &[u8] {
        assert!(range.start <= range.end && range.end <= SLOT_BYTES, "a chunk fits its slot");
        // SAFETY: in range as asserted, and not written while it is read: a writer comes back to these bytes two calls later,
        // after every rank has posted the call in between, which it does when it has read this one.
        unsafe { std::slice::from_raw_parts(self.slot_ptr(rank, parity).add(range.start), range.len()) }
    }

    /// Floats of a slot; as `read`.
    pub(super) fn read_floats(&self, rank: usize, parity: usize, range: Range<usize>) -> &[f32] {
        const WIDTH: usize = size_of::<f32>();
        let bytes = self.read(rank, parity, range.start * WIDTH..range.end * WIDTH);
        // SAFETY: slots begin on cache lines and the range on a float, and every bit pattern is a float.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), range.len()) }
    }

    /// Breaks the group off and wakes everybody.
    pub(super) fn abort(&self) {
        self.header().abort.store(1, Ordering::SeqCst);
        self.wake_all();
    }

    pub(super) fn is_aborted(&self) -> bool {
        self.header().abort.load(Ordering::Relaxed) != 0
    }

    fn enter(&self, rank: usize) {
        let member = self.member(rank);
        member.pid.store(std::process::id(), Ordering::Relaxed);
        member.state.store(HERE, Ordering::Release);
    }

    /// Tells the others that this rank will make no further call.
    pub(super) fn leave(&self, rank: usize) {
        let member = self.member(rank);
        member.state.store(LEFT, Ordering::Release);
        member.posted.wake();
        member.reduced.wake();
    }

    fn wake_all(&self) {
        for rank in 0..self.world_size {
            self.member(rank).posted.wake();
            self.member(rank).reduced.wake();
        }
    }

    fn first_absent(&self) -> Option<usize> {
        (0..self.world_size).find(|rank| self.member(*rank).state.load(Ordering::Acquire) == ABSENT)
    }
}

/// A rank on its way into the shared memory of its group.
pub(super) struct Rendezvous {
    name: SocketAddr,
    host: Option<Host>,
}

/// Rank 0's side: the file, and where the others ask for it.
struct Host {
    file: OwnedFd,
    listener: UnixListener,
}

impl Rendezvous {
    /// Rank 0 makes the file and listens; the others know where to ask.
    pub(super) fn open(group_key: &[u8], place: Place) -> Result<Self, CollectiveError> {
        if place.world_size > RANKS_MAX {
            return Err(setup(format!("{} ranks on one node; at most {RANKS_MAX} fit", place.world_size)));
        }
        let failed = |what: &str, error: io::Error| setup(format!("{what}: {error}"));
        let name = abstract_name(group_key).map_err(|e| failed("the group's socket name", e))?;
        let host = if place.rank == 0 {
            let file = anonymous_file(Segment::bytes(place.world_size)).map_err(|e| failed("shared memory", e))?;
            let listener = UnixListener::bind_addr(&name).map_err(|e| failed("the group's socket", e))?;
            listener.set_nonblocking(true).map_err(|e| failed("the group's socket", e))?;
            Some(Host { file, listener })
        } else {
            None
        };
        Ok(Self { name, host })
    }

    /// Maps the memory and waits until all ranks have.
    pub(super) fn connect(self, place: Place, deadline: Duration) -> Result<Segment, CollectiveError> {
        let started = Instant::now();
        let late = |peer: usize| CollectiveError::Deadline {
            op: "connect",
            rank: place.rank,
            peer,
            waited_ms: started.elapsed().as_millis() as u64,
        };
        let file = match &self.host {
            Some(host) => host.file.try_clone().map_err(|e| setup(format!("shared memory: {e}")))?,
            None => self.fetch(started, deadline)?.ok_or_else(|| late(0))?,
        };
        let segment = Segment::map(file.as_fd(), place.world_size).map_err(|e| setup(format!("shared memory: {e}")))?;
        segment.enter(place.rank);
        while let Some(peer) = segment.first_absent() {
            if started.elapsed() >= deadline {
                segment.abort();
                return Err(late(peer));
            }
            if segment.is_aborted() {
                return Err(CollectiveError::Aborted { op: "connect" });
            }
            if let Some(host) = &self.host {
                host.serve();
            }
            std::thread::sleep(FORMING_PAUSE);
        }
        Ok(segment)
    }

    /// Asks rank 0 for the file until it answers; `None` where the deadline passes.
    fn fetch(&self, started: Instant, deadline: Duration) -> Result<Option<OwnedFd>, CollectiveError> {
        while started.elapsed() < deadline {
            if let Ok(stream) = UnixStream::connect_addr(&self.name) {
                if !is_own_user(&stream) {
                    return Err(setup("another user's process answers at the group's socket"));
                }
                let left = deadline.saturating_sub(started.elapsed()).max(FORMING_PAUSE);
                // Without the time-out a frozen rank 0 could hold this rank, so a failure here must count.
                stream.set_read_timeout(Some(left)).map_err(|e| setup(format!("the group's socket: {e}")))?;
                if let Ok(file) = receive_file(&stream) {
                    return Ok(Some(file));
                }
            }
            std::thread::sleep(FORMING_PAUSE);
        }
        Ok(None)
    }
}

impl Host {
    /// Hands the file to the processes of this user that ask for it now.
    fn serve(&self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if is_own_user(&stream) {
                // A rank that did not get it asks again or is missed by name.
                let _ = send_file(&stream, self.file.as_fd());
            }
        }
    }
}

fn abstract_name(group_key: &[u8]) -> io::Result<SocketAddr> {
    let digest = Sha256::new_with_prefix(b"phalanx group on one node").chain_update(group_key).finalize();
    let hex: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    SocketAddr::from_abstract_name(format!("phalanx-group-{hex}"))
}

fn anonymous_file(bytes: usize) -> io::Result<OwnedFd> {
    let file = memfd_create(c"phalanx-group", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    nix::unistd::ftruncate(&file, bytes as i64)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL))?;
    Ok(file)
}

fn is_own_user(stream: &UnixStream) -> bool {
    getsockopt(stream, PeerCredentials).is_ok_and(|peer| peer.uid() == nix::unistd::geteuid().as_raw())
}

/// Room for one descriptor beside a message, aligned as the kernel wants it.
type Control = [u64; 8];

fn message(bytes: &mut libc::iovec, control: &mut Control) -> libc::msghdr {
    // SAFETY: all-zero is a valid message header.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = bytes;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: a computation without memory access.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(size_of::<i32>() as u32) } as usize;
    message
}

fn send_file(stream: &UnixStream, file: BorrowedFd<'_>) -> io::Result<()> {
    let mut byte = [1u8];
    let mut bytes = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let mut control: Control = [0; 8];
    let message = message(&mut bytes, &mut control);
    // SAFETY: `control` has room for the one entry that is written, as CMSG_SPACE says.
    let sent = unsafe {
        let entry = libc::CMSG_FIRSTHDR(&raw const message);
        (*entry).cmsg_level = libc::SOL_SOCKET;
        (*entry).cmsg_type = libc::SCM_RIGHTS;
        (*entry).cmsg_len = libc::CMSG_LEN(size_of::<i32>() as u32) as usize;
        libc::CMSG_DATA(entry).cast::<i32>().write_unaligned(file.as_raw_fd());
        libc::sendmsg(stream.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL)
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn receive_file(stream: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = [0u8];
    let mut bytes = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let mut control: Control = [0; 8];
    let mut message = message(&mut bytes, &mut control);
    // SAFETY: the header points to live buffers of the lengths that it names.
    let received = unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    if received < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel filled the header; the entry is looked at only where it is a descriptor, which is ours from here on.
    unsafe {
        let entry = libc::CMSG_FIRSTHDR(&raw const message);
        if entry.is_null() || (*entry).cmsg_level != libc::SOL_SOCKET || (*entry).cmsg_type != libc::SCM_RIGHTS {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(OwnedFd::from_raw_fd(libc::CMSG_DATA(entry).cast::<i32>().read_unaligned()))
    }
}
