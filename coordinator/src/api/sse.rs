//! Server-sent events: deltas in, frames out.
//!
//! **Invariant:** a stream ends with its endpoint's last frame, for most `data: [DONE]`, also after an error frame; nothing
//! follows it.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::{BufMut, Bytes, BytesMut};
use futures::{FutureExt, Stream, StreamExt, stream};
use serde::Serialize;

use super::choice::Delta;
use super::error::ApiError;

/// Deltas that are ready at once and share one write.
const DELTAS_PER_WRITE_MAX: usize = 32;

/// Longest wait for the first delta before the headers are sent, where no comments are.
const FIRST_DELTA_WAIT: Duration = Duration::from_secs(15);

/// Frames of one stream, collected for the next write.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: BytesMut,
}

impl Frames {
    /// Adds one frame.
    pub fn push(&mut self, value: &impl Serialize) {
        let start = self.bytes.len();
        self.bytes.put_slice(b"data: ");
        match serde_json::to_writer((&mut self.bytes).writer(), value) {
            Ok(()) => self.bytes.put_slice(b"\n\n"),
            Err(error) => {
                self.bytes.truncate(start);
                tracing::error!(%error, "a frame could not be written");
            }
        }
    }

    /// Adds one frame with the name of its event.
    pub fn push_event(&mut self, name: &str, value: &impl Serialize) {
        self.bytes.put_slice(b"event: ");
        self.bytes.put_slice(name.as_bytes());
        self.bytes.put_slice(b"\n");
        self.push(value);
    }

    /// Adds the frame behind which nothing comes.
    pub fn push_done(&mut self) {
        self.bytes.put_slice(b"data: [DONE]\n\n");
    }

    /// True where nothing was added since the last write.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The bytes of the next write.
    pub fn take(&mut self) -> Bytes {
        self.bytes.split().freeze()
    }
}

/// Writes the frames of an endpoint.
pub trait WriteFrames: Send + 'static {
    /// Whether `[DONE]` follows the last frame.
    const DONE: bool = true;

    /// Frames of one delta; none where it has nothing to say.
    fn delta(&mut self, delta: Delta, frames: &mut Frames);

    /// Frames after the last delta, before `[DONE]`.
    fn end(&mut self, frames: &mut Frames);

    /// The frame of an error; nothing but `[DONE]` follows it.
    fn error(&mut self, error: &ApiError, frames: &mut Frames) {
        frames.push(&error.body());
    }
}

struct Driver<S, W> {
    deltas: S,
    writer: W,
    keep_alive: Option<Duration>,
    frames: Frames,
}

/// Answers with a stream. Dropping the response drops `deltas`, which aborts what still runs.
///
/// Waits for the first delta, though not longer than for a comment: what fails before it has a status of its own.
///
/// # Errors
/// The first thing that came was an error.
pub async fn respond<S, W>(mut deltas: S, writer: W, keep_alive: Option<Duration>) -> Result<Response, ApiError>
where
    S: Stream<Item = Result<Delta, ApiError>> + Send + Unpin + 'static,
    W: WriteFrames,
{
    let first = tokio::time::timeout(keep_alive.unwrap_or(FIRST_DELTA_WAIT), deltas.next()).await.ok().flatten();
    let first = first.transpose()?;
    let deltas = stream::iter(first.map(Ok)).chain(deltas);
    let driver = Driver { deltas, writer, keep_alive, frames: Frames::default() };
    let body = stream::unfold(Some(driver), async |driver| {
        let (bytes, driver) = driver?.write().await;
        Some((Ok::<_, Infallible>(bytes), driver))
    });
    let mut response = Body::from_stream(body).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

impl<S, W> Driver<S, W>
where
    S: Stream<Item = Result<Delta, ApiError>> + Unpin,
    W: WriteFrames,
{
    /// The next bytes, and what goes on afterwards.
    async fn write(mut self) -> (Bytes, Option<Self>) {
        loop {
            let next = match self.keep_alive {
                None => self.deltas.next().await,
                Some(interval) => match tokio::time::timeout(interval, self.deltas.next()).await {
                    Ok(next) => next,
                    Err(_) => return (Bytes::from_static(b": keep-alive\n\n"), Some(self)),
                },
            };
            let mut goes_on = self.frame(next);
            for _ in 1..DELTAS_PER_WRITE_MAX {
                let ready = if goes_on { self.deltas.next().now_or_never() } else { None };
                let Some(next) = ready else { break };
                goes_on = self.frame(next);
            }
            if !goes_on {
                return (self.frames.take(), None);
            }
            if !self.frames.is_empty() {
                return (self.frames.take(), Some(self));
            }
        }
    }

    /// Adds the frames of what came; false at the end.
    fn frame(&mut self, next: Option<Result<Delta, ApiError>>) -> bool {
        match next {
            Some(Ok(delta)) => {
                self.writer.delta(delta, &mut self.frames);
                return true;
            }
            Some(Err(error)) => {
                tracing::warn!(%error, "stream ends with an error");
                self.writer.error(&error, &mut self.frames);
            }
            None => self.writer.end(&mut self.frames),
        }
        if W::DONE {
            self.frames.push_done();
        }
        false
    }
}
