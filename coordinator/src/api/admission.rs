//! The door of a model: requests are counted from before their text is looked at until its engine has them.
//!
//! **Invariant:** at no time are more requests let in than the engine has places for, tokenized or not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use super::error::ApiError;
use crate::engine::{EngineError, Replicas};

/// When a client should try again after a queue that was full before its prompt was looked at.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Requests of one model that were let in and are not in its engine yet.
#[derive(Debug, Clone, Default)]
pub struct Admission {
    preparing: Arc<AtomicU32>,
}

/// One request that was let in; its place is given back when it is in the engine, or dropped.
#[derive(Debug)]
pub struct Entry {
    preparing: Arc<AtomicU32>,
    left: AtomicBool,
}

impl Admission {
    /// Lets a request in.
    ///
    /// # Errors
    /// The queue is full: no work was spent.
    pub fn enter(&self, engine: &Replicas) -> Result<Entry, ApiError> {
        let limits = engine.limits();
        let full = |waiting| {
            let error = EngineError::QueueFull { waiting, max_queue: limits.max_queue, retry_after: RETRY_AFTER };
            metrics::counter!(crate::metrics::ADMISSION_REJECTIONS, "reason" => "queue_full").increment(1);
            Err(error.into())
        };
        let waiting = engine.snapshot().waiting;
        if waiting >= limits.max_queue.saturating_mul(engine.len()) {
            return full(waiting);
        }
        let places = limits.num_accepted_max().saturating_mul(engine.len());
        let running_max = limits.num_running_max().saturating_mul(engine.len());
        let preparing = self.preparing.fetch_add(1, Ordering::AcqRel) + 1;
        let entry = Entry { preparing: Arc::clone(&self.preparing), left: AtomicBool::new(false) };
        let accepted = engine.num_accepted().saturating_add(preparing);
        if accepted > places { full(accepted - 1 - running_max) } else { Ok(entry) }
    }
}

impl Entry {
    /// The request is in the engine, which counts it from now on.
    pub fn leave(&self) {
        if !self.left.swap(true, Ordering::AcqRel) {
            self.preparing.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_given_back_once() {
        let admission = Admission::default();
        let entry = |admission: &Admission| {
            admission.preparing.fetch_add(1, Ordering::AcqRel);
            Entry { preparing: Arc::clone(&admission.preparing), left: AtomicBool::new(false) }
        };
        let (one, other) = (entry(&admission), entry(&admission));
        one.leave();
        one.leave();
        drop(one);
        assert_eq!(admission.preparing.load(Ordering::Acquire), 1);
        drop(other);
        assert_eq!(admission.preparing.load(Ordering::Acquire), 0);
    }
}
