//! Memory for buffers, caches and packed weights: zeroed, aligned to pages, in huge pages where the system has them.
//!
//! **Invariant:** a failed allocation is an error, never an abort.

use std::{
    marker::PhantomData,
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

const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Zeroed memory from the system, its own until it is dropped.
///
/// Pages come as they are touched: a KV cache of gigabytes costs nothing before its blocks are used.
pub(crate) struct Pages {
    mapping: AtomicPtr<u8>,
    num_mapped: usize,
    /// Bytes of the mapping before the first huge page.
    lead: usize,
}

impl Pages {
    /// Maps at least `bytes` zeros.
    ///
    /// # Errors
    /// No room for them.
    pub(crate) fn zeroed(bytes: usize) -> Result<Self, KernelError> {
        let is_huge = bytes >= HUGE_PAGE_BYTES;
        // Whole huge pages, and one more to begin at one.
        let num_huge = bytes.div_ceil(HUGE_PAGE_BYTES) + 1;
        let num_mapped = if is_huge { num_huge.saturating_mul(HUGE_PAGE_BYTES) } else { bytes.max(1) };
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh anonymous mapping, wherever the system puts it.
        let mapping = unsafe { libc::mmap(std::ptr::null_mut(), num_mapped, access, kind, -1, 0) };
        if mapping == libc::MAP_FAILED {
            return Err(KernelError::OutOfMemory { device: "host", bytes: bytes as u64 });
        }
        let lead = if is_huge { mapping.addr().next_multiple_of(HUGE_PAGE_BYTES) - mapping.addr() } else { 0 };
        if is_huge {
            prefer_huge_pages(mapping, num_mapped);
        }
        Ok(Self { mapping: AtomicPtr::new(mapping.cast()), num_mapped, lead })
    }

    /// The first byte.
    pub(crate) fn start(&self) -> *mut u8 {
        // SAFETY: the mapping is longer than its lead.
        unsafe { self.mapping.load(Ordering::Relaxed).add(self.lead) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped with this length in `zeroed`, and nobody borrows it any more.
        unsafe { libc::munmap(self.mapping.load(Ordering::Relaxed).cast(), self.num_mapped) };
    }
}

/// Asks for huge pages before the memory is touched. A refusal costs speed only.
#[cfg(target_os = "linux")]
fn prefer_huge_pages(start: *mut libc::c_void, bytes: usize) {
    // SAFETY: the range is the fresh mapping, and this advice does not change its contents.
    unsafe { libc::madvise(start, bytes, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn prefer_huge_pages(_start: *mut libc::c_void, _bytes: usize) {}

/// A run of numbers that begins at a page.
pub(crate) struct AlignedVec<T> {
    pages: Pages,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Plain> AlignedVec<T> {
    /// Allocates `len` zeros.
    ///
    /// # Errors
    /// No room for them.
    pub(crate) fn zeroed(len: usize) -> Result<Self, KernelError> {
        let pages = Pages::zeroed(len.saturating_mul(size_of::<T>()))?;
        Ok(Self { pages, len, element: PhantomData })
    }
}

impl<T: Plain> Deref for AlignedVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the pages hold `len` values, all initialised to zero bytes, which are values of any `Plain`.
        unsafe { std::slice::from_raw_parts(self.pages.start().cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.pages.start().cast(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_all_sizes_is_zero_and_writable() {
        for len in [0, 1, 5_000, HUGE_PAGE_BYTES / 4 - 1, HUGE_PAGE_BYTES / 4, HUGE_PAGE_BYTES + 3] {
            let mut numbers = AlignedVec::<f32>::zeroed(len).unwrap();
            assert_eq!(numbers.len(), len);
            assert!(numbers.iter().all(|number| *number == 0.0));
            numbers.fill(1.0);
            let is_huge = len * 4 >= HUGE_PAGE_BYTES;
            assert!(!is_huge || numbers.as_ptr().addr().is_multiple_of(HUGE_PAGE_BYTES));
        }
        for len in [1 << 58, usize::MAX / 4, usize::MAX] {
            assert!(matches!(AlignedVec::<f32>::zeroed(len), Err(KernelError::OutOfMemory { .. })));
        }
    }
}
