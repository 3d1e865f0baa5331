//! Copies between host and device that go on while the host does something else.
//!
//! **Invariant:** host memory that the device may still read or write is neither lent nor freed: what cannot be waited for is
//! kept until the process ends.

use std::ops::Range;
use std::time::Duration;

use super::context::Context;
use super::error::CudaError;
use super::event::Event;
use super::memory::{PinnedMemory, Span};
use super::stream::Stream;

/// Device memory on its way into pinned memory.
#[derive(Debug)]
pub struct ReadBack {
    memory: Option<PinnedMemory>,
    event: Event,
}

impl ReadBack {
    /// The memory that a copy, started before, writes until `event` is reached.
    pub(super) fn new(memory: PinnedMemory, event: Event) -> Self {
        Self { memory: Some(memory), event }
    }

    /// Whether it has arrived.
    ///
    /// # Errors
    /// A fault of something before it.
    pub fn is_ready(&self) -> Result<bool, CudaError> {
        self.event.is_reached()
    }

    /// Waits for it and gives the memory back.
    ///
    /// # Errors
    /// `Deadline`, or a fault: the memory is lost then, as the device may still write it.
    pub fn wait(mut self, deadline: Duration, awaited: &'static str) -> Result<PinnedMemory, CudaError> {
        self.event.wait(deadline, awaited)?;
        self.memory.take().ok_or_else(|| CudaError::refused("wait", "nothing was read"))
    }
}

impl Drop for ReadBack {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take()
            && !self.event.is_reached().unwrap_or(false)
        {
            // The device may still write it, and nobody may wait here: it stays allocated until the process ends.
            std::mem::forget(memory);
        }
    }
}

/// Pinned buffers that are filled in turn and sent to the device while the host fills the next one.
///
/// An entry is lent only after the device has read what it held before.
#[derive(Debug)]
pub struct PinnedRing {
    entries: Vec<(PinnedMemory, Event)>,
    next: usize,
}

impl PinnedRing {
    /// Allocates `num_entries` of `entry_bytes`.
    ///
    /// # Errors
    /// The system does not lock that much memory.
    pub fn new(context: &Context, num_entries: usize, entry_bytes: usize) -> Result<Self, CudaError> {
        let entry = |_| Ok((PinnedMemory::alloc(context, entry_bytes)?, Event::new(context)?));
        Ok(Self { entries: (0..num_entries.max(1)).map(entry).collect::<Result<_, CudaError>>()?, next: 0 })
    }

    /// The entry whose turn it is, once the device is through with it.
    ///
    /// # Errors
    /// `Deadline`, or a fault.
    pub fn entry(&mut self, deadline: Duration) -> Result<RingEntry<'_>, CudaError> {
        let index = self.next;
        self.next = (index + 1) % self.entries.len();
        let (memory, event) = &mut self.entries[index];
        event.wait(deadline, "an upload of an earlier step")?;
        Ok(RingEntry { memory, event })
    }
}

impl Drop for PinnedRing {
    fn drop(&mut self) {
        for (memory, event) in self.entries.drain(..) {
            if !event.is_reached().unwrap_or(false) {
                // As in `ReadBack`: the device may still read it.
                std::mem::forget(memory);
            }
        }
    }
}

/// An entry of a ring that the device does not look at.
#[derive(Debug)]
pub struct RingEntry<'a> {
    memory: &'a mut PinnedMemory,
    event: &'a Event,
}

impl RingEntry<'_> {
    /// Its bytes, to be written; readers on other threads may fill parts of it.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.memory.slice_mut()
    }

    /// Its 32-bit words, to be written.
    pub fn words_mut(&mut self) -> &mut [u32] {
        self.memory.slice_mut()
    }

    /// Sends pieces of it to the device, in the stream's order.
    ///
    /// # Errors
    /// A piece that does not lie inside, or a target of another length.
    pub fn send(self, stream: &Stream, pieces: &[(Range<usize>, Span)]) -> Result<(), CudaError> {
        let sent = pieces.iter().try_for_each(|(range, to)| {
            let part = self.memory.span().part(range.clone())?;
            if part.len() != to.len() {
                return Err(CudaError::refused("send", format!("{} bytes into {}", part.len(), to.len())));
            }
            stream.upload_raw(self.memory.host_address().wrapping_add(range.start), *to)
        });
        // Recorded in any case: pieces before the one that failed are on their way.
        self.event.record(stream)?;
        sent
    }

    /// Lets kernels that `launch` puts into the stream read it in place.
    ///
    /// # Errors
    /// Those of `launch`.
    pub fn lend<E: From<CudaError>>(
        self,
        stream: &Stream,
        launch: impl FnOnce(Span) -> Result<(), E>,
    ) -> Result<(), E> {
        let launched = launch(self.memory.span());
        self.event.record(stream)?;
        launched
    }
}
