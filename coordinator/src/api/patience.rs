//! How long an output may take: in the queue as its deployment says, in all as its client says.
//!
//! **Invariant:** a request without limits costs no timer; one that has left the queue is never ended for its wait there.

use std::time::{Duration, Instant};

use super::caller::Deadline;
use super::error::ApiError;
use crate::engine::{TokenEvent, TokenStream};

/// When to try again after a wait that was too long.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// The limits of one output.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    submitted: Instant,
    queue: Option<Duration>,
    deadline: Option<Deadline>,
}

impl Patience {
    /// Limits of an output that is submitted now.
    pub fn new(queue: Option<Duration>, deadline: Option<Deadline>) -> Self {
        Self { submitted: Instant::now(), queue, deadline }
    }

    /// The next event of a stream.
    ///
    /// # Errors
    /// A limit has passed; the caller drops the stream, which ends the sequence.
    pub async fn next(&mut self, stream: &mut TokenStream) -> Result<Option<TokenEvent>, ApiError> {
        loop {
            let queue = self.queue.map(|limit| self.submitted + limit);
            let Some(until) = queue.into_iter().chain(self.deadline.map(|deadline| deadline.at)).min() else {
                return Ok(stream.next().await);
            };
            if let Ok(event) = tokio::time::timeout_at(until.into(), stream.next()).await {
                return Ok(event);
            }
            self.check(stream.has_started())?;
        }
    }

    /// What it means that a limit has passed.
    fn check(&mut self, started: bool) -> Result<(), ApiError> {
        let now = Instant::now();
        if let Some(Deadline { limit, .. }) = self.deadline.filter(|deadline| now >= deadline.at) {
            return Err(ApiError::DeadlinePassed { limit });
        }
        if started {
            self.queue = None;
        }
        match self.queue.filter(|limit| now >= self.submitted + *limit) {
            Some(_) => {
                metrics::counter!(crate::metrics::ADMISSION_REJECTIONS, "reason" => "queue_timeout").increment(1);
                Err(ApiError::QueueTimeout { waited: now - self.submitted, retry_after: RETRY_AFTER })
            }
            None => Ok(()),
        }
    }
}
