//! Memory for buffers and caches: zeroed, aligned to pages, in huge pages where the system has them.
//!
//! **Invariant:** a failed allocation is an error, never an abort.

use std::{
    ops::{Deref, DerefMut},
    sync::atomic::{AtomicPtr, Ordering},
};

use half::f16;

use crate::KernelError;

/// A number without padding whose zero bytes are the value 0, and for which every other pattern is a value too.
pub(crate) trait Plain: Copy + sealed::Sealed {}

impl Plain for f32 {}
impl Plain for f16 {}

mod sealed {
    pub(crate) trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
}

/// A run of numbers that begins at a page.
///
/// Pages come from the system as they are touched: a KV cache of gigabytes costs nothing before its blocks are used.
pub(crate) struct AlignedVec<T> {
    memory: AtomicPtr<T>,
    bytes: usize,
    len: usize,
}

impl<T: Plain> AlignedVec<T> {
    /// Allocates `len` zeros.
    ///
    /// # Errors
    /// No room for them.
    pub(crate) fn zeroed(len: usize) -> Result<Self, KernelError> {
        let bytes = len.saturating_mul(size_of::<T>()).max(1);
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh anonymous mapping, wherever the system puts it.
        let memory = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, kind, -1, 0) };
        if memory == libc::MAP_FAILED {
            return Err(KernelError::OutOfMemory { device: "host", bytes: bytes as u64 });
        }
        prefer_huge_pages(memory, bytes);
        Ok(Self { memory: AtomicPtr::new(memory.cast()), bytes, len })
    }
}

impl<T> Drop for AlignedVec<T> {
    fn drop(&mut self) {
        // SAFETY: mapped with this length in `zeroed`, and nobody borrows it any more.
        unsafe { libc::munmap(self.memory.load(Ordering::Relaxed).cast(), self.bytes) };
    }
}

impl<T: Plain> Deref for AlignedVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the mapping holds `len` values, all initialised to zero bytes, which are values of any `Plain`.
        unsafe { std::slice::from_raw_parts(self.memory.load(Ordering::Relaxed), self.len) }
    }
}

impl<T: Plain> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.memory.load(Ordering::Relaxed), self.len) }
    }
}

/// Asks for huge pages before the memory is touched. A refusal costs speed only.
#[cfg(target_os = "linux")]
fn prefer_huge_pages(start: *mut libc::c_void, bytes: usize) {
    const HUGE_PAGE_BYTES: usize = 2 << 20;
    if bytes >= HUGE_PAGE_BYTES {
        // SAFETY: the range is the fresh mapping, and this advice does not change its contents.
        unsafe { libc::madvise(start, bytes, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn prefer_huge_pages(_start: *mut libc::c_void, _bytes: usize) {}
