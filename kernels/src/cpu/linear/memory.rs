//! Memory for packed weights: aligned to cache lines, in huge pages where the system has them.
//!
//! **Invariant:** a failed allocation is an error, never an abort.

use crate::KernelError;

/// Bytes of a cache line and of the widest vector.
pub(super) const LINE_BYTES: usize = 64;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE_BYTES]);

/// A zeroed run of bytes that begins at a cache line.
pub(super) struct AlignedBytes {
    lines: Vec<Line>,
}

impl AlignedBytes {
    /// Allocates `len` zero bytes, rounded up to whole lines.
    pub(super) fn zeroed(len: usize) -> Result<Self, KernelError> {
        let num_lines = len.div_ceil(LINE_BYTES);
        let mut lines = Vec::new();
        lines
            .try_reserve_exact(num_lines)
            .map_err(|_| KernelError::OutOfMemory { device: "host", bytes: (num_lines * LINE_BYTES) as u64 })?;
        prefer_huge_pages(lines.as_mut_ptr(), num_lines);
        lines.resize(num_lines, Line([0; LINE_BYTES]));
        Ok(Self { lines })
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: `Line` is `repr(C)` around bytes and as large as they are, so the lines are that many initialised bytes.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.lines.len() * LINE_BYTES) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        let len = self.lines.len() * LINE_BYTES;
        // SAFETY: as in `as_slice`.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }
}

/// Asks for huge pages before the memory is touched: weights are read from end to end, and address translation is a good
/// part of that. A refusal costs speed only.
#[cfg(target_os = "linux")]
fn prefer_huge_pages(start: *mut Line, num_lines: usize) {
    const HUGE_PAGE_BYTES: usize = 2 << 20;
    const PAGE_BYTES: usize = 4096;
    let begin = (start as usize).next_multiple_of(PAGE_BYTES);
    let end = (start as usize + num_lines * LINE_BYTES) / PAGE_BYTES * PAGE_BYTES;
    if end > begin + HUGE_PAGE_BYTES {
        // SAFETY: the range lies inside the fresh allocation, and this advice does not change its contents.
        unsafe { libc::madvise(begin as *mut libc::c_void, end - begin, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn prefer_huge_pages(_start: *mut Line, _num_lines: usize) {}
