//! A counter in shared memory that ranks wait for: one writer, sleeping readers.
//!
//! **Invariant:** a value that was posted is seen by every later `reached`, together with all that was written before it.

use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::Duration;

/// Longest sleep before a waiter looks around.
pub(super) const SLICE: Duration = Duration::from_millis(1);

/// One writer's progress, alone on its cache line. All-zero memory is a flag at 0.
#[repr(C, align(128))]
pub(super) struct Flag {
    value: AtomicU32,
    num_sleepers: AtomicU32,
}

impl Flag {
    /// Whether the writer has come to `target`, or beyond it.
    pub(super) fn reached(&self, target: u32) -> bool {
        // The counter wraps; the ranks are never more than two apart.
        self.value.load(Ordering::Acquire).wrapping_sub(target).cast_signed() >= 0
    }

    /// Says that the writer has come to `value`.
    pub(super) fn post(&self, value: u32) {
        self.value.store(value, Ordering::Release);
        // Pairs with the fence in `sleep`: either this side sees the sleeper, or the sleeper sees the value.
        fence(Ordering::SeqCst);
        if self.num_sleepers.load(Ordering::Relaxed) > 0 {
            self.wake();
        }
    }

    /// Wakes whoever sleeps here, so that it looks around.
    pub(super) fn wake(&self) {
        // SAFETY: the word lives as long as `self`; waking touches no memory.
        unsafe { libc::syscall(libc::SYS_futex, self.value.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
    }

    /// Sleeps at most a slice, and not at all where `target` was reached meanwhile.
    pub(super) fn sleep(&self, target: u32) {
        self.num_sleepers.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let seen = self.value.load(Ordering::Relaxed);
        if !self.reached(target) {
            let slice = libc::timespec { tv_sec: 0, tv_nsec: SLICE.subsec_nanos().into() };
            // SAFETY: word and time-out live through the call. Whatever it returns, the caller looks again.
            unsafe { libc::syscall(libc::SYS_futex, self.value.as_ptr(), libc::FUTEX_WAIT, seen, &raw const slice) };
        }
        self.num_sleepers.fetch_sub(1, Ordering::Relaxed);
    }
}
