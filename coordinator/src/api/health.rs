//! `/health`, `/health/live`, `/ping` and `/version`.
//!
//! Alive is a process that answers. Healthy is a server that can answer a request now: a model is served, and no engine that
//! has work stands still.

use axum::extract::State;
use axum::{Json, Router, routing};
use schemars::JsonSchema;
use serde::Serialize;
use tokio::time::Instant;

use super::ApiState;
use super::error::ApiError;

/// The routes.
pub fn routes() -> Router<ApiState> {
    Router::new()
        .route("/health", routing::get(health))
        .route("/ping", routing::get(health).post(health))
        .merge(routes_of_any_head())
}

/// What a head answers whether or not it leads.
pub(super) fn routes_of_any_head<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new().route("/health/live", routing::get(live)).route("/version", routing::get(version))
}

/// All is well.
#[derive(Serialize, JsonSchema)]
pub struct Status {
    status: &'static str,
}

/// The version of this server.
#[derive(Serialize, JsonSchema)]
pub struct Version {
    version: &'static str,
}

async fn health(State(state): State<ApiState>) -> Result<Json<Status>, ApiError> {
    let models = state.models.list();
    if models.is_empty() {
        return Err(ApiError::Unhealthy { reason: why_nothing_is_served(&state) });
    }
    for model in &models {
        if let Some(trouble) = model.engine.trouble(Instant::now()) {
            return Err(ApiError::Unhealthy { reason: format!("{}: {trouble}", model.name) });
        }
    }
    Ok(Json(Status { status: "ok" }))
}

fn why_nothing_is_served(state: &ApiState) -> String {
    let waiting: Vec<String> = (state.status)()
        .deployments
        .into_iter()
        .map(|deployment| match deployment.reason.is_empty() {
            true => format!("{} is {}", deployment.name, deployment.state),
            false => format!("{} is {}: {}", deployment.name, deployment.state, deployment.reason),
        })
        .collect();
    if waiting.is_empty() { "no model is served".into() } else { waiting.join("; ") }
}

async fn live() -> Json<Status> {
    Json(Status { status: "ok" })
}

async fn version() -> Json<Version> {
    Json(Version { version: phalanx_proto::VERSION })
}
