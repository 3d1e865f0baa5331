//! `/v1/responses`: a conversation as items, answered whole or as named events.
//!
//! A request is rewritten as one of chat, so that templates, sampling and limits are those of `/v1/chat/completions`.
//! Nothing is kept: a response cannot be asked for again, and says so (`store` is false).
//!
//! **Invariant:** a whole response is the last event of its stream.

mod answer;
mod request;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};

use super::body::Body;
use super::caller::Caller;
use super::chat::{self, Begun};
use super::choice;
use super::error::ApiError;
use super::{ApiState, body, reply, sse};
use answer::EventWriter;
pub use answer::ResponseObject;

/// The route.
pub fn routes() -> Router<ApiState> {
    Router::new().route("/v1/responses", routing::post(create))
}

async fn create(State(state): State<ApiState>, request: Request) -> Result<Response, ApiError> {
    let caller = Caller::of(&request);
    let Body { fields, num_bytes, room } = body::read(request, state.limits.body).await?;
    let (fields, echo) = request::to_chat(fields)?;
    let Begun { answer, choices, usage, ignored } =
        chat::begin(&state, caller, Body { fields, num_bytes, room }, "resp_").await.map_err(request::renamed)?;
    let is_streamed = answer.options.stream.is_some();
    let mut writer = EventWriter::new(answer, echo, usage);
    let response = if is_streamed {
        sse::respond(choice::merged(choices), writer, state.limits.sse_keep_alive).await?
    } else {
        Json(writer.whole(choices).await?).into_response()
    };
    Ok(reply::with_ignored(response, &ignored))
}
