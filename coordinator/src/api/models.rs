//! `/v1/models` and `/v1/models/{id}`.

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::{Json, Router, routing};
use schemars::JsonSchema;
use serde::Serialize;

use super::ApiState;
use super::error::ApiError;
use super::served_models::ServedModel;

/// The routes. An id may be a path, so the rest of the address is taken whole.
pub fn routes() -> Router<ApiState> {
    Router::new().route("/v1/models", routing::get(list)).route("/v1/models/{*id}", routing::get(show))
}

/// All models.
#[derive(Serialize, JsonSchema)]
pub struct ModelList {
    object: &'static str,
    data: Vec<Model>,
}

/// One model.
#[derive(Serialize, JsonSchema)]
pub struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    max_model_len: u32,
    vocab_size: u32,
    permission: [Permission; 1],
}

#[derive(Serialize, JsonSchema)]
struct Permission {
    id: String,
    object: &'static str,
    created: u64,
    allow_create_engine: bool,
    allow_sampling: bool,
    allow_logprobs: bool,
    allow_search_indices: bool,
    allow_view: bool,
    allow_fine_tuning: bool,
    organization: &'static str,
    group: Option<String>,
    is_blocking: bool,
}

impl Model {
    fn new(model: &ServedModel, id: &str) -> Self {
        let permission = Permission {
            id: format!("modelperm-{id}"),
            object: "model_permission",
            created: model.created,
            allow_create_engine: false,
            allow_sampling: true,
            allow_logprobs: true,
            allow_search_indices: false,
            allow_view: true,
            allow_fine_tuning: false,
            organization: "*",
            group: None,
            is_blocking: false,
        };
        Self {
            id: id.to_owned(),
            object: "model",
            created: model.created,
            owned_by: "phalanx",
            root: model.model_path.clone(),
            parent: None,
            max_model_len: model.max_model_len,
            vocab_size: model.engine.limits().vocab_size,
            permission: [permission],
        }
    }
}

async fn list(State(state): State<ApiState>) -> Json<ModelList> {
    let models = state.models.list();
    let data = models.iter().flat_map(|model| {
        let names = std::iter::once(&model.name).chain(&model.aliases);
        names.map(|name| Model::new(model, name))
    });
    Json(ModelList { object: "list", data: data.collect() })
}

/// Also answers to a path whose first slash was lost in the address.
async fn show(
    State(state): State<ApiState>,
    asked: Result<Path<String>, PathRejection>,
) -> Result<Json<Model>, ApiError> {
    let Path(asked) = asked.map_err(|error| ApiError::BadAddress { reason: error.body_text() })?;
    let found = state.models.lookup(&asked).or_else(|| state.models.lookup(&format!("/{asked}")));
    let model = found.ok_or_else(|| ApiError::UnknownModel { model: asked })?;
    Ok(Json(Model::new(&model, &model.name)))
}
