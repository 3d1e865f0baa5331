//! The OpenAI-compatible HTTP surface: one file per endpoint.
//!
//! Parses requests into types that cannot be wrong, asks `text` for tokens and `engine` for outputs, and writes answers.
//! Knows no cluster: [`ServedModels`] is what it is told.
//!
//! **Invariant:** every answer that is no success is an OpenAI error object; every field of a request is either obeyed, refused
//! with its name, or named in `x-phalanx-ignored`.

mod admission;
mod anthropic;
mod beam;
mod body;
mod caller;
mod chat;
mod choice;
mod completions;
mod delivery;
mod edits;
mod embeddings;
mod error;
mod fields;
mod finish;
mod guard;
mod health;
mod logprobs;
mod message;
mod messages;
mod meter;
mod metrics;
mod models;
mod openapi;
mod options;
mod origins;
mod patience;
mod prompts;
mod repetition;
mod reply;
mod request_span;
mod responses;
mod scoring;
mod served_models;
mod sse;
pub mod standby;
pub mod stats;
mod structured;
mod submission;
#[cfg(test)]
mod tests;
mod tokenize;
mod tools;
mod truncation;
mod usage;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use axum::http::{Method, Uri};
use axum::response::{IntoResponse, Response};
use axum::{Router, middleware};
use phalanx_proto::StatusSnapshot;

use crate::security::keys::KeyRing;
use crate::traces::TraceSink;

pub use admission::Admission;
pub use body::BodyLimits;
pub use error::ApiError;
pub use origins::AllowedOrigins;
pub use served_models::{ServedModel, ServedModels};
pub use sse::Frames;

/// What the deployment is, as OpenAI's answers tell it.
const SYSTEM_FINGERPRINT: &str = concat!("phalanx-", env!("CARGO_PKG_VERSION"));

/// Limits of the HTTP surface.
#[derive(Debug, Clone, Copy)]
pub struct ApiLimits {
    /// Of a request's body.
    pub body: BodyLimits,
    /// A comment is sent on a stream that is silent for so long; proxies cut idle streams.
    pub sse_keep_alive: Option<Duration>,
}

impl Default for ApiLimits {
    fn default() -> Self {
        Self {
            body: BodyLimits { bytes_max: 32 << 20, time_max: Duration::from_secs(60) },
            sse_keep_alive: Some(Duration::from_secs(15)),
        }
    }
}

/// What handlers share.
#[derive(Clone)]
pub struct ApiState {
    /// Who answers.
    pub models: ServedModels,
    /// The cluster, for what is not running and why.
    pub status: Arc<dyn Fn() -> StatusSnapshot + Send + Sync>,
    /// Keys that open all routes but health; none: open to all.
    pub keys: Arc<KeyRing>,
    /// Pages that may read answers.
    pub origins: AllowedOrigins,
    /// Limits.
    pub limits: ApiLimits,
    /// Where spans of requests go; none: there are none.
    pub traces: Option<TraceSink>,
}

impl ApiState {
    /// A state with default limits and no keys.
    pub fn new(models: ServedModels, status: Arc<dyn Fn() -> StatusSnapshot + Send + Sync>) -> Self {
        Self {
            models,
            status,
            keys: Arc::default(),
            origins: AllowedOrigins::default(),
            limits: ApiLimits::default(),
            traces: None,
        }
    }
}

/// All routes. Installs the process's metrics recorder.
pub fn router(state: ApiState) -> Router {
    if let Err(error) = crate::metrics::recorder() {
        tracing::warn!(%error, "metrics are not recorded");
    }
    let origins = state.origins.clone();
    let routes = Router::new()
        .merge(chat::routes())
        .merge(completions::routes())
        .merge(responses::routes())
        .merge(embeddings::routes())
        .merge(anthropic::routes())
        .merge(models::routes())
        .merge(tokenize::routes())
        .merge(health::routes())
        .merge(openapi::routes())
        .merge(metrics::routes())
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(state.clone(), guard::pass))
        .with_state(state);
    // What stands around a router sees an address before it is looked up.
    Router::new()
        .fallback_service(routes)
        .layer(middleware::from_fn_with_state(origins, origins::pass))
        .layer(middleware::map_request(tidy_path))
}

/// An address without slashes at its end and with one at its beginning: what `http://host:8000/` and `/v1/models/` make together
/// is meant to be found.
async fn tidy_path(mut request: Request) -> Request {
    let path = request.uri().path();
    let tidied = format!("/{}", path.trim_matches('/'));
    if tidied != path {
        let query = request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
        // It was an address before, so it is one now.
        if let Ok(uri) = Uri::try_from(format!("{tidied}{query}")) {
            *request.uri_mut() = uri;
        }
    }
    request
}

async fn unknown_route(uri: Uri) -> Response {
    refused(&uri, ApiError::UnknownRoute { path: uri.path().to_owned() })
}

async fn method_not_allowed(method: Method, uri: Uri) -> Response {
    refused(&uri, ApiError::MethodNotAllowed { method: method.to_string(), path: uri.path().to_owned() })
}

/// An error in the form that the clients of an address read.
fn refused(uri: &Uri, error: ApiError) -> Response {
    if uri.path().starts_with(anthropic::ROOT) { anthropic::refusal(&error) } else { error.into_response() }
}
