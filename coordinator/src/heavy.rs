//! Work that takes long and that no step waits for: parsing and tokenizing long texts, compiling grammars.
//!
//! Each piece runs on a thread of its own that gives way to the step loop, the ranks and the streams of others, though not so far
//! that it starves on a machine whose ranks compute on all processors. Knows nothing of the work.
//!
//! **Invariant:** a few pieces run at a time, and of those over [`HUGE_BYTES`] one; what waits holds no thread, and goes when
//! nobody waits for it any more. What runs keeps its place until it ends.

use std::thread::Builder;
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit, oneshot};
use tokio::time::{Instant, timeout_at};

/// Texts up to this length are worked on where they are: it takes less than handing them over.
pub const INLINE_BYTES_MAX: usize = 8 * 1024;
/// Texts over this length wait for each other, so that they do not hold up those in between.
pub const HUGE_BYTES: usize = 256 * 1024;
/// Longest wait for a place.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Stack of a thread.
const STACK_BYTES: usize = 8 << 20;
/// A third of the share of a usual thread, where they compete.
const NICE: i32 = 5;

static LONG: Semaphore = Semaphore::const_new(2);
static HUGE: Semaphore = Semaphore::const_new(1);

/// Why there is no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeavyError {
    /// Other texts had the places for too long.
    #[error("too many long texts are being read; try again")]
    Busy,
    /// The work broke, or there was no thread for it.
    #[error("the text could not be worked on")]
    Broke,
}

/// Runs work on a text of `num_bytes`: in place where that is little, otherwise on a thread that gives way.
///
/// # Errors
/// No place became free in time, or the work broke.
pub async fn run<T: Send + 'static>(
    num_bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, HeavyError> {
    if num_bytes <= INLINE_BYTES_MAX {
        return Ok(work());
    }
    let permit = place(num_bytes).await?;
    let (reply, answer) = oneshot::channel();
    let body = move || {
        let _permit = permit;
        give_way();
        let _gone = reply.send(work());
    };
    Builder::new().name("text".into()).stack_size(STACK_BYTES).spawn(body).map_err(|_| HeavyError::Broke)?;
    // The thread drops its end when it panics, so this wait is as long as the work.
    answer.await.map_err(|_| HeavyError::Broke)
}

async fn place(num_bytes: usize) -> Result<SemaphorePermit<'static>, HeavyError> {
    let places = if num_bytes > HUGE_BYTES { &HUGE } else { &LONG };
    match timeout_at(Instant::now() + WAIT_MAX, places.acquire()).await {
        Ok(Ok(permit)) => Ok(permit),
        Ok(Err(_)) | Err(_) => Err(HeavyError::Busy),
    }
}

/// Lets other threads go first. On Linux the priority is the calling thread's own.
pub fn give_way() {
    // It may always be lowered; where it cannot, the work is only less polite.
    let _refused = rustix::process::setpriority_process(None, NICE);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_on_long_texts_gives_way_and_short_texts_stay() {
        let niceness = || rustix::process::getpriority_process(None).unwrap();
        let here = niceness();
        assert_eq!(run(10, niceness).await, Ok(here));
        assert_eq!(run(INLINE_BYTES_MAX + 1, niceness).await, Ok(NICE));
        assert_eq!(run(HUGE_BYTES + 1, niceness).await, Ok(NICE));
        assert_eq!(niceness(), here);
    }

    #[tokio::test]
    async fn what_breaks_is_an_error_and_gives_its_place_back() {
        for _ in 0..4 {
            let broken: Result<(), HeavyError> = run(HUGE_BYTES + 1, || panic!("as a test wants")).await;
            assert_eq!(broken, Err(HeavyError::Broke));
        }
        assert_eq!(run(HUGE_BYTES + 1, || 7).await, Ok(7));
    }
}
