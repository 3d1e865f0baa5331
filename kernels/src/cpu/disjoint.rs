//! One slice, written by several threads in places that do not overlap.

use std::{
    marker::PhantomData,
    sync::atomic::{AtomicPtr, Ordering},
};

/// A mutable slice that is handed out in pieces.
pub(crate) struct Disjoint<'a, T> {
    start: AtomicPtr<T>,
    len: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

impl<'a, T: Send> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: AtomicPtr::new(slice.as_mut_ptr()), len: slice.len(), borrowed: PhantomData }
    }

    /// The piece of `len` values from `start` on.
    ///
    /// # Safety
    /// Pieces that are alive at the same time do not overlap.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that pieces do not overlap")]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "a piece lies inside its slice");
        // SAFETY: inside the slice that is borrowed for 'a; the caller keeps pieces apart.
        unsafe { std::slice::from_raw_parts_mut(self.start.load(Ordering::Relaxed).add(start), len) }
    }
}
