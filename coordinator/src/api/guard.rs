//! What happens around every request: keys, names, counters, one line of access log.

use std::sync::Arc;
use std::time::Instant;

use axum::body::HttpBody;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;

use super::caller::Caller;
use super::error::ApiError;
use super::{ApiState, reply};
use crate::metrics as names;
use crate::security::keys::{KeyEntry, Refusal, Scope};
use crate::traces::TraceParent;

/// Checks the key, names the request, passes it on and counts the answer.
pub async fn pass(State(state): State<ApiState>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let endpoint = endpoint(request.uri().path());
    let request_id = reply::request_id(request.headers()).unwrap_or_else(reply::new_id);
    // It was checked to be visible ASCII, or made here.
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        request.headers_mut().insert(reply::REQUEST_ID, value);
    }
    let span = tracing::info_span!("request", %request_id, endpoint);
    let method = request.method().clone();
    let brings_body = brings_body(&request);
    let caller = allow(&state, endpoint, request.headers()).and_then(|key| {
        let caller = Caller::new(request_id.clone(), request.headers(), started)?;
        let span = state.traces.as_ref().and_then(|traces| traces.place(TraceParent::of(request.headers())));
        Ok(Caller { key, span, ..caller })
    });
    let key = caller.as_ref().ok().and_then(|caller| caller.key.clone());
    let mut response = match caller {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).instrument(span.clone()).await
        }
        Err(error) => super::refused(request.uri(), error),
    };
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert(reply::REQUEST_ID, value);
    }
    if brings_body && is_early(response.status()) {
        // The body may never have been read, and the connection is of no use then: a client must not send on it again.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    count(endpoint, &response, started);
    let key = key.as_ref().map_or("", |key| key.name());
    let (status, elapsed_us) = (response.status().as_u16(), started.elapsed().as_micros() as u64);
    // Probes and scrapes come all the time and say nothing.
    if is_open(endpoint) || endpoint == "/metrics" {
        tracing::debug!(parent: &span, %method, status, elapsed_us, key, "answered");
    } else {
        tracing::info!(parent: &span, %method, status, elapsed_us, key, "answered");
    }
    response
}

/// Whether a body comes with it over a connection that takes one request after the other.
fn brings_body(request: &Request) -> bool {
    request.version() <= Version::HTTP_11 && !request.body().is_end_stream()
}

/// Whether a request may be refused so before its body is looked at.
fn is_early(status: StatusCode) -> bool {
    matches!(status.as_u16(), 401 | 403 | 404 | 405 | 413 | 415 | 429 | 503)
}

/// The endpoint as metrics name it: few words, whatever clients ask for.
fn endpoint(path: &str) -> &'static str {
    const ENDPOINTS: [&str; 16] = [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/embeddings",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/health",
        "/health/live",
        "/ping",
        "/version",
        "/metrics",
        "/openapi.json",
        "/docs",
    ];
    match ENDPOINTS.iter().find(|known| **known == path) {
        Some(known) => known,
        None if path.starts_with("/v1/models/") => "/v1/models/{id}",
        None if path.starts_with("/v1/responses/") => "/v1/responses/{id}",
        None => "other",
    }
}

fn is_open(endpoint: &str) -> bool {
    matches!(endpoint, "/health" | "/health/live" | "/ping")
}

/// What a route needs of a key.
fn scope(endpoint: &str) -> Option<Scope> {
    match endpoint {
        "/metrics" => Some(Scope::Metrics),
        "/v1/chat/completions"
        | "/v1/completions"
        | "/v1/responses"
        | "/v1/messages"
        | "/v1/messages/count_tokens"
        | "/v1/embeddings"
        | "/tokenize"
        | "/detokenize" => Some(Scope::Inference),
        _ => None,
    }
}

/// Finds the key of a request.
///
/// # Errors
/// A key is needed and is not there, does not open the route, or has used up what it may.
fn allow(state: &ApiState, endpoint: &str, headers: &HeaderMap) -> Result<Option<Arc<KeyEntry>>, ApiError> {
    if is_open(endpoint) {
        return Ok(None);
    }
    state.keys.admit(presented(headers), scope(endpoint)).map_err(|refusal| {
        metrics::counter!(names::ADMISSION_REJECTIONS, "reason" => refusal.word()).increment(1);
        match refusal {
            Refusal::Unknown => ApiError::Unauthorized,
            Refusal::Scope(scope) => ApiError::Forbidden { scope: scope.as_str() },
            Refusal::Rate { rate, retry_after } => ApiError::RateLimit { allowed: rate.to_string(), retry_after },
            Refusal::Quota { tokens_per_day, retry_after } => ApiError::Quota { tokens_per_day, retry_after },
        }
    })
}

/// The key that a request carries, in either of the two ways that clients know.
fn presented(headers: &HeaderMap) -> Option<&str> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let bearer = text(header::AUTHORIZATION.as_str()).and_then(|value| {
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(key)
    });
    bearer.or_else(|| text("x-api-key")).map(str::trim)
}

fn count(endpoint: &'static str, response: &Response, started: Instant) {
    let status = response.status().as_u16().to_string();
    metrics::counter!(names::HTTP_REQUESTS, "endpoint" => endpoint, "status" => status).increment(1);
    metrics::histogram!(names::HTTP_RESPONSE_SECONDS, "endpoint" => endpoint).record(started.elapsed());
    if let Ok(recorder) = names::recorder() {
        recorder.upkeep(Instant::now());
    }
}
