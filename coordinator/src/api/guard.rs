//! What happens around every request: keys, names, counters.

use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tracing::Instrument;

use super::error::ApiError;
use super::{ApiState, reply};
use crate::metrics as names;

/// Checks the key, names the request, passes it on and counts the answer.
pub async fn pass(State(state): State<ApiState>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let endpoint = endpoint(request.uri().path());
    let request_id = reply::request_id(request.headers()).unwrap_or_else(reply::new_id);
    // It was checked to be visible ASCII, or made here.
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        request.headers_mut().insert(reply::REQUEST_ID, value);
    }
    let allowed = is_open(endpoint) || is_allowed(&state.api_keys, request.headers());
    let mut response = if allowed {
        let span = tracing::info_span!("request", %request_id, endpoint);
        next.run(request).instrument(span).await
    } else {
        ApiError::Unauthorized.into_response()
    };
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert(reply::REQUEST_ID, value);
    }
    count(endpoint, &response, started);
    response
}

/// The endpoint as metrics name it: few words, whatever clients ask for.
fn endpoint(path: &str) -> &'static str {
    const ENDPOINTS: [&str; 10] = [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/health",
        "/health/live",
        "/ping",
        "/version",
        "/metrics",
    ];
    match ENDPOINTS.iter().find(|known| **known == path) {
        Some(known) => known,
        None if path.starts_with("/v1/models/") => "/v1/models/{id}",
        None => "other",
    }
}

fn is_open(endpoint: &str) -> bool {
    matches!(endpoint, "/health" | "/health/live" | "/ping")
}

fn is_allowed(keys: &[String], headers: &HeaderMap) -> bool {
    if keys.is_empty() {
        return true;
    }
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let Some(given) = given.and_then(|value| value.strip_prefix("Bearer ")) else { return false };
    // All keys are looked at in full: time tells nothing about where a guess went wrong.
    keys.iter().fold(false, |found, key| found | is_equal(key.as_bytes(), given.trim().as_bytes()))
}

fn is_equal(key: &[u8], given: &[u8]) -> bool {
    key.len() == given.len() && key.iter().zip(given).fold(0, |different, (a, b)| different | (a ^ b)) == 0
}

fn count(endpoint: &'static str, response: &Response, started: Instant) {
    let status = response.status().as_u16().to_string();
    metrics::counter!(names::HTTP_REQUESTS, "endpoint" => endpoint, "status" => status).increment(1);
    metrics::histogram!(names::HTTP_RESPONSE_SECONDS, "endpoint" => endpoint).record(started.elapsed());
    if let Ok(recorder) = names::recorder() {
        recorder.upkeep(Instant::now());
    }
}
