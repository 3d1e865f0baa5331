//! From an HTTP request to the members of its JSON body.
//!
//! Owns content type, size and time limit of a body. Does not know what the members mean.

use std::time::Duration;

use axum::extract::Request;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, type_name};

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
}

/// Reads and parses the body of a request.
///
/// # Errors
/// The body is no JSON object, too long, too late, or says that it is something else.
pub async fn read(request: Request, limits: BodyLimits) -> Result<Body, ApiError> {
    check_content_type(request.headers())?;
    check_content_encoding(request.headers())?;
    let bytes = tokio::time::timeout(limits.time_max, collect(request, limits.bytes_max))
        .await
        .map_err(|_| ApiError::BodyLate { limit: limits.time_max })??;
    match serde_json::from_slice(bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes))
        .map_err(ApiError::MalformedJson)?
    {
        Value::Object(members) => Ok(Body { fields: Fields::new(members), num_bytes: bytes.len() }),
        other => Err(ApiError::NotAnObject { found: type_name(&other) }),
    }
}

async fn collect(request: Request, bytes_max: usize) -> Result<Bytes, ApiError> {
    let declared = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    if declared.is_some_and(|length: usize| length > bytes_max) {
        return Err(ApiError::BodyTooLarge { limit_bytes: bytes_max });
    }
    let mut stream = request.into_body().into_data_stream();
    let mut bytes = BytesMut::new();
    while let Some(part) = stream.next().await {
        let part = part.map_err(ApiError::BodyBroken)?;
        if bytes.len() + part.len() > bytes_max {
            return Err(ApiError::BodyTooLarge { limit_bytes: bytes_max });
        }
        bytes.extend_from_slice(&part);
    }
    Ok(bytes.freeze())
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
