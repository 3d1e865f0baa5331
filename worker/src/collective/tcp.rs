//! Collectives between nodes: one connection between every two ranks.
//!
//! Small calls are one-shot (all terms to all ranks), large ones two-shot (segments to their rank, sums to all).
//!
//! **Invariant:** at most one message each way is under way on a connection, and each begins with a header that both sides
//! expect: ranks that disagree see it at once. A connection that ends breaks the group.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use phalanx_kernels::{Collective, CollectiveError};

use super::handshake::Greeter;
use super::sum::{segment, sum_in_rank_order};
use super::{AbortHandle, AbortTarget, Patience, Place, setup};

const _: () = assert!(cfg!(target_endian = "little"), "floats cross the wire as little-endian bytes");

/// Calls of at most this many bytes are one-shot.
const ONE_SHOT_BYTES_MAX: usize = 16 * 1024;
/// Longest sleep before a waiter looks around; data and hang-ups wake it at once.
const SLICE: Duration = Duration::from_millis(20);
/// Longest that one connection may take to greet: a stranger holds the others up no longer.
const GREETING_MAX: Duration = Duration::from_secs(2);
/// Time between two looks for connections while the group forms.
const FORMING_PAUSE: Duration = Duration::from_millis(1);
/// Rest between two looks where a peer that is done has hung up.
const GONE_PAUSE: Duration = Duration::from_micros(200);
const HEADER_BYTES: usize = 16;

/// A rank that listens for the others of its group.
pub(super) struct Listening {
    greeter: Greeter,
    place: Place,
    listener: TcpListener,
    address: SocketAddr,
}

impl Listening {
    pub(super) fn bind(group_key: &[u8], place: Place, ip: IpAddr, ports: (u16, u16)) -> Result<Self, CollectiveError> {
        let (listener, address) =
            bind_in_range(place, ip, ports).map_err(|e| setup(format!("no port of {ip} in {ports:?}: {e}")))?;
        listener.set_nonblocking(true).map_err(|e| setup(format!("listening on {address}: {e}")))?;
        Ok(Self { greeter: Greeter::new(group_key, place), place, listener, address })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Dials the lower ranks, is dialled by the higher ones.
    pub(super) fn connect(
        self,
        addresses: &[String],
        patience: Patience,
        deadline: Duration,
        abort: AbortHandle,
    ) -> Result<TcpGroup, CollectiveError> {
        let Place { rank, world_size } = self.place;
        if addresses.len() != world_size {
            return Err(setup(format!("{} addresses for a group of {world_size}", addresses.len())));
        }
        let started = Instant::now();
        let mut streams: Vec<Option<TcpStream>> = (0..world_size).map(|_| None).collect();
        for (peer, address) in addresses.iter().enumerate().take(rank) {
            streams[peer] = Some(self.dial(peer, address, started, deadline)?);
        }
        while let Some(missing) = (rank + 1..world_size).find(|peer| streams[*peer].is_none()) {
            if abort.is_raised() {
                return Err(CollectiveError::Aborted { op: "connect" });
            }
            if started.elapsed() >= deadline {
                return Err(self.late(missing, started));
            }
            match self.accept(started, deadline) {
                Some((peer, stream)) if peer > rank && streams[peer].is_none() => streams[peer] = Some(stream),
                _ => std::thread::sleep(FORMING_PAUSE),
            }
        }
        TcpGroup::new(self.place, streams, patience, abort).map_err(|e| setup(format!("connections: {e}")))
    }

    fn dial(
        &self,
        peer: usize,
        address: &str,
        started: Instant,
        deadline: Duration,
    ) -> Result<TcpStream, CollectiveError> {
        let target: SocketAddr =
            address.parse().map_err(|_| setup(format!("rank {peer} listens at {address:?}, which is no address")))?;
        let left = deadline.saturating_sub(started.elapsed()).max(FORMING_PAUSE);
        let greeted = TcpStream::connect_timeout(&target, left).and_then(|stream| {
            let left = deadline.saturating_sub(started.elapsed());
            self.greeter.dial(&stream, peer, left)?;
            Ok(stream)
        });
        greeted.map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => self.late(peer, started),
            _ => CollectiveError::PeerGone { op: "connect", peer, reason: format!("{target}: {error}") },
        })
    }

    /// The next rank that greets; strangers are turned away.
    fn accept(&self, started: Instant, deadline: Duration) -> Option<(usize, TcpStream)> {
        let (stream, _) = self.listener.accept().ok()?;
        stream.set_nonblocking(false).ok()?;
        let left = deadline.saturating_sub(started.elapsed()).min(GREETING_MAX);
        let peer = self.greeter.accept(&stream, left).ok()?;
        Some((peer, stream))
    }

    fn late(&self, peer: usize, started: Instant) -> CollectiveError {
        let waited_ms = started.elapsed().as_millis() as u64;
        CollectiveError::Deadline { op: "connect", rank: self.place.rank, peer, waited_ms }
    }
}

fn bind_in_range(place: Place, ip: IpAddr, (first, last): (u16, u16)) -> io::Result<(TcpListener, SocketAddr)> {
    let num_ports = usize::from(last.saturating_sub(first)) + 1;
    let mut result = Err(io::ErrorKind::AddrInUse.into());
    for i in 0..num_ports {
        // Ranks begin at different ports, so that they seldom try the same one.
        let port = first + ((place.rank + i) % num_ports) as u16;
        result = TcpListener::bind((ip, port)).and_then(|listener| {
            let address = listener.local_addr()?;
            Ok((listener, address))
        });
        if result.is_ok() {
            break;
        }
    }
    result
}

/// A group whose ranks are on several nodes.
pub(super) struct TcpGroup {
    place: Place,
    streams: Vec<Option<TcpStream>>,
    /// Terms of the others, one buffer for each rank; they grow to the largest call and stay.
    terms: Vec<Vec<f32>>,
    patience: Patience,
    abort: AbortHandle,
    num_messages: u32,
}

/// What goes to one peer and comes from it in one exchange.
struct Swap<'a> {
    peer: usize,
    out: &'a [u8],
    into: &'a mut [u8],
}

/// One connection while messages cross.
struct Crossing<'a> {
    stream: &'a TcpStream,
    swap: Swap<'a>,
    header_out: [u8; HEADER_BYTES],
    header_in: [u8; HEADER_BYTES],
    expected: [u8; HEADER_BYTES],
    num_out: usize,
    num_in: usize,
}

impl TcpGroup {
    fn new(place: Place, streams: Vec<Option<TcpStream>>, patience: Patience, abort: AbortHandle) -> io::Result<Self> {
        let mut clones = Vec::new();
        for stream in streams.iter().flatten() {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            clones.push(stream.try_clone()?);
        }
        abort.arm(AbortTarget::Tcp(clones));
        let terms = vec![Vec::new(); place.world_size];
        Ok(Self { place, streams, terms, patience, abort, num_messages: 0 })
    }

    /// Sends to and receives from each named peer at once.
    fn exchange(&mut self, op: &'static str, swaps: Vec<Swap<'_>>) -> Result<(), CollectiveError> {
        if self.abort.is_raised() {
            return Err(CollectiveError::Aborted { op });
        }
        self.num_messages = self.num_messages.wrapping_add(1);
        let mut crossings = Vec::with_capacity(swaps.len());
        for swap in swaps {
            let gone = || CollectiveError::PeerGone { op, peer: swap.peer, reason: "never connected".into() };
            let stream = self.streams[swap.peer].as_ref().ok_or_else(gone)?;
            crossings.push(Crossing::new(stream, swap, op, self.num_messages));
        }
        let result = drive(&mut crossings, op, self.place.rank, self.patience, &self.abort);
        if result.is_err() {
            self.abort.abort();
        }
        result
    }

    fn one_shot(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        let mut terms = self.take_terms(data.len());
        let result = self.exchange("all_reduce_sum", swaps(self.place, &mut terms, |_| as_bytes(data)));
        if result.is_ok() {
            sum_in_rank_order(data, self.place.rank, self.place.world_size, |peer| &terms[peer]);
        }
        self.terms = terms;
        result
    }

    fn two_shot(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        let Place { rank, world_size } = self.place;
        let mine = segment(data.len(), world_size, rank);
        let mut terms = self.take_terms(mine.len());
        let theirs = |peer| as_bytes(&data[segment(data.len(), world_size, peer)]);
        let result = self.exchange("all_reduce_sum", swaps(self.place, &mut terms, theirs));
        if result.is_ok() {
            sum_in_rank_order(&mut data[mine], rank, world_size, |peer| &terms[peer]);
        }
        self.terms = terms;
        result?;
        self.spread_segments(data)
    }

    /// Second half of a two-shot sum: every rank's segment goes to all.
    fn spread_segments(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        let Place { rank, world_size } = self.place;
        let len = data.len();
        let mut segments = Vec::with_capacity(world_size);
        let mut rest = data;
        for peer in 0..world_size {
            let (head, tail) = rest.split_at_mut(segment(len, world_size, peer).len());
            segments.push(head);
            rest = tail;
        }
        let mine: &[f32] = segments.remove(rank);
        let swaps = self.place.peers().zip(segments);
        let swaps = swaps.map(|(peer, theirs)| Swap { peer, out: as_bytes(mine), into: as_bytes_mut(theirs) });
        let swaps = swaps.collect();
        self.exchange("all_reduce_sum", swaps)
    }

    fn take_terms(&mut self, len: usize) -> Vec<Vec<f32>> {
        let mut terms = std::mem::take(&mut self.terms);
        for term in &mut terms {
            term.resize(len, 0.0);
        }
        terms
    }
}

fn swaps<'a>(place: Place, terms: &'a mut [Vec<f32>], out: impl Fn(usize) -> &'a [u8]) -> Vec<Swap<'a>> {
    let others = terms.iter_mut().enumerate().filter(|(peer, _)| *peer != place.rank);
    others.map(|(peer, term)| Swap { peer, out: out(peer), into: as_bytes_mut(term) }).collect()
}

impl Collective for TcpGroup {
    fn rank(&self) -> usize {
        self.place.rank
    }

    fn world_size(&self) -> usize {
        self.place.world_size
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        if size_of_val(data) <= ONE_SHOT_BYTES_MAX { self.one_shot(data) } else { self.two_shot(data) }
    }

    fn all_gather(&mut self, part: &[u8], out: &mut [u8]) -> Result<(), CollectiveError> {
        let Place { rank, world_size } = self.place;
        assert!(out.len() == part.len() * world_size, "a gather's output holds one part per rank");
        if part.is_empty() {
            return Ok(());
        }
        out[rank * part.len()..(rank + 1) * part.len()].copy_from_slice(part);
        let places = out.chunks_mut(part.len()).enumerate().filter(|(peer, _)| *peer != rank);
        let swaps = places.map(|(peer, into)| Swap { peer, out: part, into }).collect();
        self.exchange("all_gather", swaps)
    }
}

impl<'a> Crossing<'a> {
    fn new(stream: &'a TcpStream, swap: Swap<'a>, op: &str, number: u32) -> Self {
        let header = |bytes: usize| {
            let mut header = [0; HEADER_BYTES];
            header[..4].copy_from_slice(&number.to_le_bytes());
            header[4..8].copy_from_slice(&(op.len() as u32).to_le_bytes());
            header[8..].copy_from_slice(&(bytes as u64).to_le_bytes());
            header
        };
        let (header_out, expected) = (header(swap.out.len()), header(swap.into.len()));
        Self { stream, swap, header_out, header_in: [0; HEADER_BYTES], expected, num_out: 0, num_in: 0 }
    }

    fn out_left(&self) -> usize {
        HEADER_BYTES + self.swap.out.len() - self.num_out
    }

    fn in_left(&self) -> usize {
        HEADER_BYTES + self.swap.into.len() - self.num_in
    }

    /// Sends what the connection takes now; whether it took anything.
    fn push(&mut self) -> io::Result<bool> {
        if self.out_left() == 0 {
            return Ok(false);
        }
        let head = &self.header_out[self.num_out.min(HEADER_BYTES)..];
        let body = &self.swap.out[self.num_out.saturating_sub(HEADER_BYTES)..];
        let count = ready((&*self.stream).write_vectored(&[IoSlice::new(head), IoSlice::new(body)]))?;
        self.num_out += count;
        Ok(count > 0)
    }

    /// Receives what has come; whether anything had.
    fn pull(&mut self) -> io::Result<bool> {
        if self.in_left() == 0 {
            return Ok(false);
        }
        let head = &mut self.header_in[self.num_in.min(HEADER_BYTES)..];
        let body = &mut self.swap.into[self.num_in.saturating_sub(HEADER_BYTES)..];
        let result = (&*self.stream).read_vectored(&mut [IoSliceMut::new(head), IoSliceMut::new(body)]);
        if matches!(result, Ok(0)) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended"));
        }
        let count = ready(result)?;
        self.num_in += count;
        if self.num_in >= HEADER_BYTES && self.header_in != self.expected {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is at another call than this rank"));
        }
        Ok(count > 0)
    }

    fn is_done(&self) -> bool {
        self.out_left() == 0 && self.in_left() == 0
    }

    /// A peer that is done may leave, which is no news here; that it breaks the group off is.
    fn poll_entry(&self) -> libc::pollfd {
        let wants = |left: usize, event: i16| if left > 0 { event } else { 0 };
        let events = wants(self.out_left(), libc::POLLOUT) | wants(self.in_left(), libc::POLLIN) | libc::POLLPRI;
        libc::pollfd { fd: self.stream.as_raw_fd(), events, revents: 0 }
    }
}

/// Nothing to do now is no error.
fn ready(result: io::Result<usize>) -> io::Result<usize> {
    match result {
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(0),
        other => other,
    }
}

fn drive(
    crossings: &mut [Crossing<'_>],
    op: &'static str,
    rank: usize,
    patience: Patience,
    abort: &AbortHandle,
) -> Result<(), CollectiveError> {
    let started = Instant::now();
    let mut idle_since = started;
    loop {
        let mut moved = false;
        for crossing in crossings.iter_mut() {
            let peer = crossing.swap.peer;
            moved |= crossing.push().and_then(|pushed| Ok(crossing.pull()? | pushed)).map_err(|error| {
                if abort.is_raised() {
                    return CollectiveError::Aborted { op };
                }
                CollectiveError::PeerGone { op, peer, reason: error.to_string() }
            })?;
        }
        let Some(late) = crossings.iter().find(|c| !c.is_done()) else { return Ok(()) };
        let now = Instant::now();
        if abort.is_raised() {
            return Err(CollectiveError::Aborted { op });
        }
        if now - started >= patience.deadline {
            let waited_ms = (now - started).as_millis() as u64;
            return Err(CollectiveError::Deadline { op, rank, peer: late.swap.peer, waited_ms });
        }
        if moved {
            idle_since = now;
        } else if now - idle_since >= patience.spin
            && let Some(peer) = sleep(crossings, patience.deadline - (now - started))
        {
            return Err(CollectiveError::PeerGone { op, peer, reason: "it broke the group off".into() });
        }
    }
}

/// Sleeps until a connection can go on, at most a slice; names a peer that broke the group off.
fn sleep(crossings: &[Crossing<'_>], left: Duration) -> Option<usize> {
    let mut entries: Vec<libc::pollfd> = crossings.iter().map(Crossing::poll_entry).collect();
    let hung_up = libc::POLLHUP | libc::POLLERR;
    let slice = left.min(SLICE).as_millis().max(1) as i32;
    // SAFETY: the entries live through the call. Whatever it returns, the caller looks again.
    unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, slice) };
    let broken = entries.iter().zip(crossings).find(|(entry, _)| entry.revents & libc::POLLPRI != 0);
    if broken.is_none() && entries.iter().zip(crossings).any(|(e, c)| c.is_done() && e.revents & hung_up != 0) {
        // A peer that is done and has left would end every poll at once: rest without it.
        std::thread::sleep(GONE_PAUSE);
    }
    broken.map(|(_, crossing)| crossing.swap.peer)
}

/// Tells the peer that the group is broken off, by an urgent byte, and ends the connection.
pub(super) fn break_off(stream: &TcpStream) {
    let byte = [1u8];
    // SAFETY: one byte, alive through the call. A connection that takes no byte is one whose reader sees the end instead.
    unsafe {
        libc::send(stream.as_raw_fd(), byte.as_ptr().cast(), 1, libc::MSG_OOB | libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
    };
    // One that is down already is as good.
    let _ = stream.shutdown(std::net::Shutdown::Both);
}

fn as_bytes(data: &[f32]) -> &[u8] {
    // SAFETY: floats have no padding, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}

fn as_bytes_mut(data: &mut [f32]) -> &mut [u8] {
    // SAFETY: as above, and every bit pattern is a float.
    unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast(), size_of_val(data)) }
}
