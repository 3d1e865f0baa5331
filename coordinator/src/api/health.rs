//! `/health`, `/health/live`, `/ping` and `/version`.
//!
//! Alive is a process that answers. Healthy is a server that can answer a request now: a model is served, and no engine that
//! has work stands still.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::{Json, Router, routing};
use schemars::JsonSchema;
use serde::Serialize;

use super::ApiState;
use super::error::ApiError;

/// The routes.
pub fn routes() -> Router<ApiState> {
    Router::new()
        .route("/health", routing::get(health))
        .route("/ping", routing::get(health).post(health))
        .route("/health/live", routing::get(live))
        .route("/version", routing::get(version))
}

/// When each engine was last seen to make a step.
#[derive(Default)]
pub struct ProgressWatch {
    seen: Mutex<HashMap<String, Seen>>,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    steps: u64,
    at: Instant,
}

impl ProgressWatch {
    /// How long an engine has had work and made no step, as far as it was looked at.
    fn stalled_for(&self, model: &str, running: u32, steps: u64, now: Instant) -> Duration {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match seen.get(model) {
            Some(last) if running > 0 && last.steps == steps => now.duration_since(last.at),
            _ => {
                seen.insert(model.to_owned(), Seen { steps, at: now });
                Duration::ZERO
            }
        }
    }
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
        let snapshot = model.engine.snapshot();
        let stalled = state.progress.stalled_for(&model.name, snapshot.running, snapshot.steps(), Instant::now());
        if stalled > state.limits.stall_max {
            let reason = format!("{} has made no step for {} s", model.name, stalled.as_secs());
            return Err(ApiError::Unhealthy { reason });
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_stalls_only_with_work_and_without_steps() {
        let watch = ProgressWatch::default();
        let start = Instant::now();
        let check = |running, steps, at: u64, expected: u64| {
            let now = start + Duration::from_secs(at);
            assert_eq!(watch.stalled_for("m", running, steps, now).as_secs(), expected);
        };
        check(1, 5, 0, 0);
        check(1, 5, 7, 7);
        check(1, 6, 8, 0);
        check(0, 6, 20, 0);
        check(1, 6, 21, 1);
    }
}
