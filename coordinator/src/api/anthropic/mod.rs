//! `/v1/messages` and `/v1/messages/count_tokens`, as clients of Anthropic's API send them.
//!
//! A request is rewritten as one of chat, so that templates, sampling and limits are those of `/v1/chat/completions`.
//!
//! **Invariant:** every answer below [`ROOT`] that is no success is `{"type": "error", "error": {"type", "message", ...}}`.

mod answer;
mod request;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use schemars::JsonSchema;
use serde::Serialize;

use super::body::Body;
use super::caller::Caller;
use super::chat::{self, Begun};
use super::choice;
use super::error::ApiError;
use super::{ApiState, body, reply, sse};
use answer::EventWriter;
pub use answer::Message;

/// Where these routes begin.
pub const ROOT: &str = "/v1/messages";

/// The routes.
pub fn routes() -> Router<ApiState> {
    Router::new().route(ROOT, routing::post(create)).route("/v1/messages/count_tokens", routing::post(count))
}

/// An error as these clients read it.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "AnthropicErrorBody")]
pub struct ErrorBody<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    error: ErrorObject<'a>,
}

#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "AnthropicErrorObject")]
struct ErrorObject<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    message: String,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl<'a> ErrorBody<'a> {
    /// The body of an error, also used for error events.
    pub fn new(error: &'a ApiError) -> Self {
        let kind = match error.status() {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::GATEWAY_TIMEOUT => "timeout_error",
            StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
            status if status.is_server_error() => "api_error",
            _ => "invalid_request_error",
        };
        let error = ErrorObject { kind, message: error.to_string(), param: error.param(), code: error.code() };
        Self { kind: "error", error }
    }
}

/// An error as an answer.
pub fn refusal(error: &ApiError) -> Response {
    let mut response = (error.status(), Json(ErrorBody::new(error))).into_response();
    error.add_headers(&mut response);
    response
}

async fn create(State(state): State<ApiState>, request: Request) -> Response {
    answer(&state, request).await.unwrap_or_else(|error| refusal(&error))
}

async fn answer(state: &ApiState, request: Request) -> Result<Response, ApiError> {
    let caller = Caller::of(&request);
    let Body { fields, num_bytes, room } = body::read(request, state.limits.body).await?;
    let fields = request::to_chat(fields)?;
    let Begun { answer, choices, usage, ignored } =
        chat::begin(state, caller, Body { fields, num_bytes, room }, "msg_").await?;
    let is_streamed = answer.options.stream.is_some();
    let mut writer = EventWriter::new(answer, usage);
    let response = if is_streamed {
        sse::respond(choice::merged(choices), writer, state.limits.sse_keep_alive).await?
    } else {
        Json(writer.whole(choices).await?).into_response()
    };
    Ok(reply::with_ignored(response, &ignored))
}

/// How long a conversation is.
#[derive(Serialize, JsonSchema)]
pub struct Count {
    input_tokens: usize,
}

async fn count(State(state): State<ApiState>, request: Request) -> Response {
    match counted(&state, request).await {
        Ok(input_tokens) => Json(Count { input_tokens }).into_response(),
        Err(error) => refusal(&error),
    }
}

async fn counted(state: &ApiState, request: Request) -> Result<usize, ApiError> {
    let caller = Caller::of(&request);
    let Body { mut fields, num_bytes, room } = body::read(request, state.limits.body).await?;
    fields.take("max_tokens");
    let fields = request::rewritten(fields)?;
    chat::count(state, caller, Body { fields, num_bytes, room }).await
}
