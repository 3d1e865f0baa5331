//! From an HTTP request to the members of its JSON body.
//!
//! Owns content type, size and time limit of a body. Does not know what the members mean. Long bodies are parsed away from the
//! runtime's threads.

use std::time::Duration;

use axum::extract::Request;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use serde_json::Value;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::error::ApiError;
use super::fields::{Fields, type_name};
use crate::heavy::{self, HeavyError};

/// What all long bodies together may hold at a time, in [`ROOM_UNIT`]s: those that find no room are not read until they do.
static ROOM: Semaphore = Semaphore::const_new(ROOM_UNITS);
/// 128 MiB.
const ROOM_UNITS: usize = (128 << 20) / ROOM_UNIT;
/// Bytes that one permit of [`ROOM`] stands for.
const ROOM_UNIT: usize = 1024;

/// Some editors and shells put it before a text; it is no part of it.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Limits of a body.
#[derive(Debug, Clone, Copy)]
pub struct BodyLimits {
    /// Longest body.
    pub bytes_max: usize,
    /// Longest time that a body may take to arrive.
    pub time_max: Duration,
}

/// A parsed body.
pub struct Body {
    /// Its members.
    pub fields: Fields,
    /// Its length, which bounds the text in it.
    pub num_bytes: usize,
    /// Its share of what all bodies may hold, where it is long: given back with the body.
    pub room: Option<SemaphorePermit<'static>>,
}

/// Reads and parses the body of a request.
///
/// # Errors
/// The body is no JSON object, too long, too late, or says that it is something else.
pub async fn read(request: Request, limits: BodyLimits) -> Result<Body, ApiError> {
    check_content_type(request.headers())?;
    check_content_encoding(request.headers())?;
    let (bytes, room) = tokio::time::timeout(limits.time_max, collect(request, limits.bytes_max))
        .await
        .map_err(|_| ApiError::BodyLate { limit: limits.time_max })??;
    let num_bytes = bytes.len();
    match heavy::run(num_bytes, move || parse(&bytes)).await?.map_err(ApiError::MalformedJson)? {
        Value::Object(members) => Ok(Body { fields: Fields::new(members), num_bytes, room }),
        other => Err(ApiError::NotAnObject { found: type_name(&other) }),
    }
}

fn parse(bytes: &[u8]) -> serde_json::Result<Value> {
    serde_json::from_slice(bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes))
}

/// Reads a body. One that is long, or does not say how long it is and turns out to be, waits for room first.
async fn collect(request: Request, bytes_max: usize) -> Result<(Bytes, Option<SemaphorePermit<'static>>), ApiError> {
    let declared = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    if declared.is_some_and(|length: usize| length > bytes_max) {
        return Err(ApiError::BodyTooLarge { limit_bytes: bytes_max });
    }
    let mut room = match declared {
        Some(length) if length > heavy::INLINE_BYTES_MAX => Some(room_for(length).await?),
        _ => None,
    };
    let mut stream = request.into_body().into_data_stream();
    let mut bytes = BytesMut::new();
    while let Some(part) = stream.next().await {
        let part = part.map_err(ApiError::BodyBroken)?;
        if bytes.len() + part.len() > bytes_max {
            return Err(ApiError::BodyTooLarge { limit_bytes: bytes_max });
        }
        bytes.extend_from_slice(&part);
        if room.is_none() && bytes.len() > heavy::INLINE_BYTES_MAX {
            room = Some(room_for(bytes_max).await?);
        }
    }
    Ok((bytes.freeze(), room))
}

async fn room_for(num_bytes: usize) -> Result<SemaphorePermit<'static>, ApiError> {
    let units = num_bytes.div_ceil(ROOM_UNIT).min(ROOM_UNITS) as u32;
    // It is never closed, and the body's own deadline bounds the wait.
    ROOM.acquire_many(units).await.map_err(|_| HeavyError::Busy.into())
}

/// A body without a content type counts as JSON: many scripts leave it out.
fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let given = String::from_utf8_lossy(value.as_bytes()).into_owned();
    let essence = given.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json")) {
        return Ok(());
    }
    Err(ApiError::ContentType { given })
}

fn check_content_encoding(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_ENCODING) else { return Ok(()) };
    let given = String::from_utf8_lossy(value.as_bytes()).into_owned();
    if given.trim().eq_ignore_ascii_case("identity") { Ok(()) } else { Err(ApiError::ContentEncoding { given }) }
}
