//! Memory for packed weights: aligned to cache lines, many matrices side by side in huge pages where the system has them.
//!
//! Weights are read from end to end for every token. In pages of 4 KiB that is a third slower: address translation, and the
//! hardware's prefetch, which stops at a page's end. A matrix of a small model is no huge page, so matrices share chunks.
//!
//! **Invariant:** a piece of a chunk is handed out once, and the chunk lives as long as any of its pieces.
//! **Invariant:** a failed allocation is an error, never an abort.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::{KernelError, cpu::memory::Pages};

/// Bytes of a cache line and of the widest vector.
pub(super) const LINE_BYTES: usize = 64;
/// What is taken from the system at once. Pages that nobody touches cost nothing.
const CHUNK_BYTES: usize = 64 << 20;

/// A zeroed run of bytes that begins at a cache line.
pub(super) struct AlignedBytes {
    chunk: Arc<Pages>,
    start: usize,
    len: usize,
}

/// The chunk that is being handed out, while any of its pieces is alive, and how much of it is.
struct Open {
    chunk: Weak<Pages>,
    used: usize,
}

static OPEN: Mutex<Open> = Mutex::new(Open { chunk: Weak::new(), used: 0 });

impl AlignedBytes {
    /// Allocates `len` zero bytes, rounded up to whole lines.
    pub(super) fn zeroed(len: usize) -> Result<Self, KernelError> {
        let no_memory = KernelError::OutOfMemory { device: "host", bytes: len as u64 };
        let len = len.checked_next_multiple_of(LINE_BYTES).ok_or(no_memory)?;
        if len > CHUNK_BYTES / 4 {
            return Ok(Self { chunk: Arc::new(Pages::zeroed(len)?), start: 0, len });
        }
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let chunk = match open.chunk.upgrade().filter(|_| len <= CHUNK_BYTES - open.used) {
            Some(chunk) => chunk,
            None => {
                let chunk = Arc::new(Pages::zeroed(CHUNK_BYTES)?);
                *open = Open { chunk: Arc::downgrade(&chunk), used: 0 };
                chunk
            }
        };
        let start = open.used;
        open.used += len;
        Ok(Self { chunk, start, len })
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: a piece lies inside its chunk.
        unsafe { self.chunk.start().add(self.start) }
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: a chunk is zeroed memory, the piece lies inside it, and no other piece overlaps it.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.len) }
    }
}

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
        assert!(AlignedBytes::zeroed(usize::MAX).is_err());
    }
}
