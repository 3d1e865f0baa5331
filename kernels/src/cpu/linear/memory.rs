//! Memory for packed weights: aligned to cache lines, many matrices side by side in huge pages where the system has them.
//!
//! Weights are read from end to end for every token. In pages of 4 KiB that is a third slower: address translation, and the
//! hardware's prefetch, which stops at a page's end. A matrix of a small model is no huge page, so matrices share chunks.
//!
//! **Invariant:** a piece of a chunk is handed out once, and the chunk lives as long as any of its pieces.
//! **Invariant:** a failed allocation is an error, never an abort.

use std::{
    alloc::{Layout, alloc, dealloc},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicPtr, Ordering},
    },
};

use crate::KernelError;

/// Bytes of a cache line and of the widest vector.
pub(super) const LINE_BYTES: usize = 64;
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// What is taken from the system at once. Pages that nobody touches cost nothing.
const CHUNK_BYTES: usize = 64 << 20;

/// A zeroed run of bytes that begins at a cache line.
pub(super) struct AlignedBytes {
    chunk: Arc<Chunk>,
    start: usize,
    len: usize,
}

/// Memory from the system.
struct Chunk {
    memory: AtomicPtr<u8>,
    layout: Layout,
}

/// The chunk that is being handed out, while any of its pieces is alive, and how much of it is.
struct Open {
    chunk: Weak<Chunk>,
    used: usize,
}

static OPEN: Mutex<Open> = Mutex::new(Open { chunk: Weak::new(), used: 0 });

impl AlignedBytes {
    /// Allocates `len` zero bytes, rounded up to whole lines.
    pub(super) fn zeroed(len: usize) -> Result<Self, KernelError> {
        let len = len.next_multiple_of(LINE_BYTES);
        let bytes = if len > CHUNK_BYTES / 4 {
            Self { chunk: Arc::new(Chunk::new(len)?), start: 0, len }
        } else {
            let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
            let chunk = match open.chunk.upgrade().filter(|chunk| len <= chunk.layout.size() - open.used) {
                Some(chunk) => chunk,
                None => {
                    let chunk = Arc::new(Chunk::new(CHUNK_BYTES)?);
                    *open = Open { chunk: Arc::downgrade(&chunk), used: 0 };
                    chunk
                }
            };
            let start = open.used;
            open.used += len;
            Self { chunk, start, len }
        };
        let start = bytes.start();
        // SAFETY: the piece lies inside its chunk and belongs to nobody else; this initialises it.
        unsafe { start.write_bytes(0, len) };
        Ok(bytes)
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: a piece lies inside its chunk.
        unsafe { self.chunk.memory.load(Ordering::Relaxed).add(self.start) }
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: the piece is initialised, and no other piece overlaps it.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.len) }
    }
}

impl Chunk {
    fn new(len: usize) -> Result<Self, KernelError> {
        let no_memory = || KernelError::OutOfMemory { device: "host", bytes: len as u64 };
        let len = len.max(1).checked_next_multiple_of(HUGE_PAGE_BYTES).ok_or_else(no_memory)?;
        let layout = Layout::from_size_align(len, HUGE_PAGE_BYTES).map_err(|_| no_memory())?;
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc(layout) };
        if memory.is_null() {
            return Err(no_memory());
        }
        prefer_huge_pages(memory, len);
        Ok(Self { memory: AtomicPtr::new(memory), layout })
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout; the last piece is gone.
        unsafe { dealloc(self.memory.load(Ordering::Relaxed), self.layout) };
    }
}

/// Asks for huge pages before the memory is touched. A refusal costs speed only.
#[cfg(target_os = "linux")]
fn prefer_huge_pages(memory: *mut u8, len: usize) {
    // SAFETY: the range is the fresh allocation, and this advice does not change its contents.
    unsafe { libc::madvise(memory.cast(), len, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn prefer_huge_pages(_memory: *mut u8, _len: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_zero_and_apart() {
        let mut pieces = Vec::new();
        for round in 0..200u8 {
            let mut piece = AlignedBytes::zeroed(usize::from(round) * 10_007).unwrap();
            assert_eq!(piece.as_slice().as_ptr() as usize % LINE_BYTES, 0);
            assert!(piece.as_slice().iter().all(|byte| *byte == 0));
            piece.as_mut_slice().fill(round);
            pieces.push((round, piece));
            if round % 3 == 0 {
                pieces.swap_remove(usize::from(round) % pieces.len());
            }
        }
        assert!(pieces.iter().all(|(round, piece)| piece.as_slice().iter().all(|byte| byte == round)));
        assert_eq!(AlignedBytes::zeroed(CHUNK_BYTES).unwrap().as_slice().len(), CHUNK_BYTES);
        assert!(AlignedBytes::zeroed(1 << 60).is_err());
    }
}
