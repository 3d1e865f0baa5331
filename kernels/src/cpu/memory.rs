//! Memory for buffers and caches: zeroed, aligned to cache lines, in huge pages where the system has them.
//!
//! **Invariant:** a failed allocation is an error, never an abort.

use std::{
    marker::PhantomData,
    ops::{Deref, DerefMut},
};

use half::f16;

use crate::KernelError;

/// Bytes of a cache line and of the widest vector.
const LINE_BYTES: usize = 64;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE_BYTES]);

/// A number without padding whose zero bytes are the value 0, and for which every other pattern is a value too.
pub(crate) trait Plain: Copy + sealed::Sealed {}

impl Plain for f32 {}
impl Plain for f16 {}

mod sealed {
    pub(crate) trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
}

/// A run of numbers that begins at a cache line.
pub(crate) struct AlignedVec<T> {
    lines: Vec<Line>,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Plain> AlignedVec<T> {
    /// Allocates `len` zeros, and touches them.
    ///
    /// # Errors
    /// No memory.
    pub(crate) fn zeroed(len: usize) -> Result<Self, KernelError> {
        let bytes = len.saturating_mul(size_of::<T>());
        let num_lines = bytes.div_ceil(LINE_BYTES);
        let mut lines = Vec::new();
        lines
            .try_reserve_exact(num_lines)
            .map_err(|_| KernelError::OutOfMemory { device: "host", bytes: bytes as u64 })?;
        prefer_huge_pages(lines.as_mut_ptr(), num_lines);
        lines.resize(num_lines, Line([0; LINE_BYTES]));
        Ok(Self { lines, len, element: PhantomData })
    }
}

impl<T: Plain> Deref for AlignedVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the lines are initialised, aligned for any `Plain`, and hold at least `len` of them.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// Asks for huge pages before the memory is touched. A refusal costs speed only.
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
