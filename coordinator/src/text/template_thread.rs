//! Where a model's template is read and rendered when it may need more than a caller has: a stack for what it nests, and a bound on time.
//!
//! The engine of templates counts instructions and the text that they make. It does not count what a single one does: comparing or
//! printing a value that was built to be huge or deep is one instruction.
//!
//! **Invariant:** a caller waits no longer than [`DEADLINE`]. A thread that is late cannot be ended: it gets no company, as its
//! template is not rendered again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

/// Stack of a thread: addresses, of which only what is used becomes memory.
const STACK_BYTES: usize = 256 << 20;
/// Longest time for one conversation, far above what any takes.
const DEADLINE: Duration = Duration::from_secs(10);
/// Words without which a template only goes through what it is given: nothing that it holds grows.
const GROWING: [&str; 6] = ["set", "with", "macro", "call", "filter", "recursive"];

/// Why there is no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum ThreadError {
    /// The system gives no thread.
    #[error("there is no thread for the chat template now")]
    NoThread,
    /// The work broke.
    #[error("the chat template broke its engine")]
    Broke,
    /// It did not end, now or once before.
    #[error("the chat template does not come to an end; another one can be given with --chat-template")]
    Endless,
}

/// The threads of one template.
#[derive(Debug, Clone)]
pub(super) struct TemplateThreads {
    /// Rendering may need more than a caller has.
    grows: bool,
    is_endless: Arc<AtomicBool>,
    deadline: Duration,
}

impl TemplateThreads {
    /// For a template of this text.
    pub(super) fn new(template: &str) -> Self {
        let grows = GROWING.iter().any(|word| template.contains(word));
        Self { grows, is_endless: Arc::default(), deadline: DEADLINE }
    }

    /// Renders: in place where nothing can grow, else on a thread.
    ///
    /// # Errors
    /// It does not end, or there is no thread.
    pub(super) fn render<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ThreadError> {
        if self.grows { self.run(work) } else { Ok(work()) }
    }

    /// Works on a thread, whatever the template is.
    ///
    /// # Errors
    /// As of [`Self::render`].
    pub(super) fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, ThreadError> {
        if self.is_endless.load(Ordering::Acquire) {
            return Err(ThreadError::Endless);
        }
        let (reply, result) = sync_channel(1);
        let body = move || {
            let _gone = reply.send(work());
        };
        let thread = thread::Builder::new().name("template".into()).stack_size(STACK_BYTES);
        thread.spawn(body).map_err(|_| ThreadError::NoThread)?;
        result.recv_timeout(self.deadline).map_err(|error| match error {
            RecvTimeoutError::Disconnected => ThreadError::Broke,
            RecvTimeoutError::Timeout => {
                if !self.is_endless.swap(true, Ordering::AcqRel) {
                    tracing::error!("the chat template does not come to an end: it is not used any more");
                }
                ThreadError::Endless
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_ends_is_tried_once() {
        let threads =
            TemplateThreads { deadline: Duration::from_millis(50), ..TemplateThreads::new("{% set x = 1 %}") };
        let (release, held) = sync_channel::<()>(1);
        assert_eq!(threads.render(move || held.recv().is_ok()), Err(ThreadError::Endless));
        let started = std::time::Instant::now();
        assert_eq!(threads.clone().render(|| 1), Err(ThreadError::Endless));
        assert!(started.elapsed() < Duration::from_secs(5), "it is not waited for again");
        drop(release);
    }

    #[test]
    fn plain_templates_stay_where_they_are() {
        let own = thread::current().id();
        let elsewhere = |template: &str| TemplateThreads::new(template).render(move || thread::current().id() != own);
        assert_eq!(elsewhere("{% for m in messages %}{{ m.content }}{% endfor %}"), Ok(false));
        assert_eq!(elsewhere("{% set x = [x] %}"), Ok(true));
    }
}
