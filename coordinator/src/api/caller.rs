//! Who asks, since when, and for how long.
//!
//! Made by the guard for every request, from headers alone; handlers read it, streams keep it.
//!
//! **Invariant:** a request has one name, one key at most and one deadline at most, whatever endpoint answers it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName};

use super::error::ApiError;
use super::reply;
use crate::config::parse_duration;
use crate::security::keys::KeyEntry;
use crate::traces::SpanPlace;

/// How long the client waits for the whole answer: `30s`, `500ms` or seconds.
pub const TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout");

/// A time limit that a client set.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    /// When it passes.
    pub at: Instant,
    /// How long it was.
    pub limit: Duration,
}

/// The sender of a request, as far as it is known.
#[derive(Debug, Clone)]
pub struct Caller {
    /// When the request came.
    pub received: Instant,
    /// The client's name for it, or one made here.
    pub request_id: String,
    /// Present where the client said how long it waits.
    pub deadline: Option<Deadline>,
    /// The key that it was sent with, where keys are in use and it is one of the store.
    pub key: Option<Arc<KeyEntry>>,
    /// Where the span of its request belongs; none where it has none.
    pub span: Option<SpanPlace>,
}

impl Caller {
    /// The sender of a request without a key.
    ///
    /// # Errors
    /// The time limit cannot be read.
    pub fn new(request_id: String, headers: &HeaderMap, received: Instant) -> Result<Self, ApiError> {
        let bad = || ApiError::BadHeader { name: "x-request-timeout", expected: "a duration such as 30s or 500ms" };
        let deadline = match headers.get(TIMEOUT) {
            None => None,
            Some(value) => {
                let limit = value.to_str().ok().and_then(|text| parse_duration(text.trim()).ok()).ok_or_else(bad)?;
                Some(Deadline { at: received.checked_add(limit).ok_or_else(bad)?, limit })
            }
        };
        Ok(Self { received, request_id, deadline, key: None, span: None })
    }

    /// The sender of a request that passed the guard.
    pub fn of(request: &Request) -> Self {
        let known = request.extensions().get::<Self>().cloned();
        known.unwrap_or_else(|| Self {
            received: Instant::now(),
            request_id: reply::new_id(),
            deadline: None,
            key: None,
            span: None,
        })
    }
}
