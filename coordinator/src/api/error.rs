//! What a client is told when a request cannot be served: one type, one mapping to HTTP.
//!
//! Knows the OpenAI error object and nothing of where an error came from.
//!
//! **Invariant:** every error leaves as `{"error": {"message", "type", "param", "code"}}`, in a body or in a frame of a stream.

use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use schemars::JsonSchema;
use serde::Serialize;

use crate::constraint::GrammarError;
use crate::engine::EngineError;
use crate::heavy::HeavyError;
use crate::text::TextError;

/// When to try again where nothing better is known.
const RETRY_AFTER_DEFAULT: Duration = Duration::from_secs(2);

/// Why a request is refused or given up.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The body is not JSON.
    #[error("the body is not valid JSON: {0}")]
    MalformedJson(#[source] serde_json::Error),
    /// The body is JSON, but no object.
    #[error("the body must be a JSON object; it is {found}")]
    NotAnObject {
        /// What it is.
        found: &'static str,
    },
    /// The body claims to be something else.
    #[error("the content type must be application/json; it is {given:?} (curl: -H 'Content-Type: application/json')")]
    ContentType {
        /// What the header says.
        given: String,
    },
    /// The body is compressed.
    #[error("the body must not be compressed; its content encoding is {given:?}")]
    ContentEncoding {
        /// What the header says.
        given: String,
    },
    /// The body is longer than the server reads.
    #[error("the body is larger than {limit_bytes} bytes")]
    BodyTooLarge {
        /// The limit.
        limit_bytes: usize,
    },
    /// The body did not arrive in time.
    #[error("the body did not arrive within {} s", .limit.as_secs())]
    BodyLate {
        /// The limit.
        limit: Duration,
    },
    /// The connection broke within the body.
    #[error("the body could not be read")]
    BodyBroken(#[source] axum::Error),
    /// A field that must be there is not.
    #[error("{param} is required")]
    Missing {
        /// The field.
        param: String,
    },
    /// A field has the wrong JSON type.
    #[error("{param} must be {expected}; it is {found}")]
    WrongType {
        /// The field.
        param: String,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// A field's value is outside its range.
    #[error("{param} must be {expected}; it is {value}")]
    OutOfRange {
        /// The field.
        param: String,
        /// Its value.
        value: String,
        /// The range in words.
        expected: String,
    },
    /// Two fields do not go together.
    #[error("{rule}")]
    Conflict {
        /// The field to change.
        param: &'static str,
        /// The rule in words.
        rule: &'static str,
    },
    /// A field asks for something that this server does not do (yet).
    #[error("{param}: {feature} is not supported by this server; leave the field out")]
    Unsupported {
        /// The field.
        param: String,
        /// What it asks for.
        feature: &'static str,
    },
    /// No deployment answers to the name.
    #[error("The model `{model}` does not exist.")]
    UnknownModel {
        /// The name.
        model: String,
    },
    /// The request names no model and there is none to take.
    #[error("no model is served")]
    NothingServed,
    /// The model folder has no tokenizer: only token ids can be asked for.
    #[error("the model `{model}` is served without a tokenizer; {param} needs one. Send token ids to /v1/completions")]
    NoTokenizer {
        /// The field that needs text.
        param: &'static str,
        /// The served name.
        model: String,
    },
    /// The model has no chat template.
    #[error("the model `{model}` has no chat template; use /v1/completions")]
    NoChatTemplate {
        /// The served name.
        model: String,
    },
    /// The model's embeddings are made in a way that is not built.
    #[error("the model `{model}` makes embeddings by {what}, which is not supported by this server")]
    NoEmbeddings {
        /// The served name.
        model: String,
        /// The way.
        what: String,
    },
    /// The prompt leaves no room for an answer.
    #[error(
        "This model's maximum context length is {max_model_len} tokens, but the prompt has {prompt_tokens}. Shorten the prompt."
    )]
    ContextLength {
        /// The field that holds the prompt.
        param: &'static str,
        /// Tokens of the prompt.
        prompt_tokens: u64,
        /// The limit, prompt and output together.
        max_model_len: u32,
    },
    /// The template or the tokenizer refused the text.
    #[error("{param} could not be made into tokens: {source}")]
    Text {
        /// The field that holds the text.
        param: &'static str,
        /// Why.
        source: TextError,
    },
    /// A grammar or a schema cannot be used.
    #[error("{param}: {source}")]
    Grammar {
        /// The field that holds it.
        param: String,
        /// Why.
        source: GrammarError,
    },
    /// A long text could not be worked on.
    #[error(transparent)]
    Heavy(#[from] HeavyError),
    /// The engine refused the request or gave it up.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A choice ended without a finish reason: the engine has gone.
    #[error("the engine ended the request without a result")]
    EngineGone,
    /// No key, or a wrong one.
    #[error("a valid API key is needed: send `Authorization: Bearer KEY`")]
    Unauthorized,
    /// The key does not open this route.
    #[error("this API key has no scope `{scope}`, which the route needs")]
    Forbidden {
        /// What it lacks.
        scope: &'static str,
    },
    /// The key has made all the requests that it may make for now.
    #[error("this API key may make {allowed}; try again in {} s", seconds(*.retry_after))]
    RateLimit {
        /// Its rate in words.
        allowed: String,
        /// When the next one is allowed.
        retry_after: Duration,
    },
    /// The key has used its tokens of the day.
    #[error("this API key may use {tokens_per_day} tokens a day (UTC) and has used them")]
    Quota {
        /// Its share.
        tokens_per_day: u64,
        /// When the next day begins.
        retry_after: Duration,
    },
    /// No place in the batch became free in time.
    #[error("the request waited {} ms in the queue, longer than it may; try again later", .waited.as_millis())]
    QueueTimeout {
        /// How long it waited.
        waited: Duration,
        /// When to try again.
        retry_after: Duration,
    },
    /// The client's own time limit has passed.
    #[error("the request did not end within the {} ms that its {} header allows", .limit.as_millis(), super::caller::TIMEOUT)]
    DeadlinePassed {
        /// The limit.
        limit: Duration,
    },
    /// A header cannot be read.
    #[error("the header {name} must be {expected}")]
    BadHeader {
        /// The header.
        name: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// The model is known and does not answer now.
    #[error("the model `{model}` is {state}{}", because(.reason))]
    NotReady {
        /// The name.
        model: String,
        /// Where its deployment stands.
        state: String,
        /// Why, where that is known.
        reason: String,
    },
    /// No such route.
    #[error("there is no {path} here")]
    UnknownRoute {
        /// The path.
        path: String,
    },
    /// The route exists for another method.
    #[error("{method} is not allowed on {path}")]
    MethodNotAllowed {
        /// The method.
        method: String,
        /// The path.
        path: String,
    },
    /// The address is no text.
    #[error("the address cannot be read: {reason}")]
    BadAddress {
        /// What is wrong with it.
        reason: String,
    },
    /// This head stands by.
    #[error("this head stands by; {}", leading(.leader))]
    Standby {
        /// HTTP address of the head that leads, where one does.
        leader: Option<String>,
    },
    /// The server cannot take work.
    #[error("not healthy: {reason}")]
    Unhealthy {
        /// Why.
        reason: String,
    },
}

/// The OpenAI error object in its envelope.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ErrorBody<'a> {
    error: ErrorObject<'a>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct ErrorObject<'a> {
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl ApiError {
    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::ContentType { .. } | Self::ContentEncoding { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyLate { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::UnknownModel { .. } | Self::UnknownRoute { .. } => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden { .. } => StatusCode::FORBIDDEN,
            Self::RateLimit { .. } | Self::Quota { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::DeadlinePassed { .. } => StatusCode::GATEWAY_TIMEOUT,
            Self::NothingServed
            | Self::NotReady { .. }
            | Self::QueueTimeout { .. }
            | Self::Standby { .. }
            | Self::Unhealthy { .. }
            | Self::EngineGone => StatusCode::SERVICE_UNAVAILABLE,
            Self::Heavy(HeavyError::Busy) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Heavy(HeavyError::Broke) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Grammar { source: GrammarError::Busy, .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::Engine(error) => engine_status(error),
            _ => StatusCode::BAD_REQUEST,
        }
    }

    /// The body, also used for error frames.
    pub fn body(&self) -> ErrorBody<'_> {
        let kind = match self.status() {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::GATEWAY_TIMEOUT => "timeout_error",
            StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        ErrorBody { error: ErrorObject { message: self.to_string(), kind, param: self.param(), code: self.code() } }
    }

    /// The field that is to blame.
    pub(super) fn param(&self) -> Option<&str> {
        match self {
            Self::Missing { param }
            | Self::WrongType { param, .. }
            | Self::OutOfRange { param, .. }
            | Self::Grammar { param, .. }
            | Self::Unsupported { param, .. } => Some(param),
            Self::Conflict { param, .. }
            | Self::BadHeader { name: param, .. }
            | Self::NoTokenizer { param, .. }
            | Self::ContextLength { param, .. }
            | Self::Text { param, .. } => Some(param),
            Self::UnknownModel { .. } | Self::NotReady { .. } | Self::NoEmbeddings { .. } => Some("model"),
            Self::NoChatTemplate { .. } => Some("messages"),
            Self::Engine(EngineError::EmptyPrompt | EngineError::UnknownToken { .. }) => Some("prompt"),
            _ => None,
        }
    }

    /// The kind in one word, where clients act on it.
    pub(super) fn code(&self) -> Option<&'static str> {
        match self {
            Self::UnknownModel { .. } => Some("model_not_found"),
            Self::NothingServed => Some("no_model"),
            Self::Standby { .. } => Some("standby"),
            Self::ContextLength { .. } => Some("context_length_exceeded"),
            Self::Unsupported { .. } => Some("unsupported_parameter"),
            Self::Grammar { .. } => Some("invalid_grammar"),
            Self::Unauthorized => Some("invalid_api_key"),
            Self::Forbidden { .. } => Some("insufficient_scope"),
            Self::RateLimit { .. } => Some("rate_limit_exceeded"),
            Self::Quota { .. } => Some("insufficient_quota"),
            Self::QueueTimeout { .. } => Some("queue_timeout"),
            Self::DeadlinePassed { .. } => Some("deadline_exceeded"),
            Self::NotReady { .. } => Some("model_not_ready"),
            Self::Engine(error) => match error {
                EngineError::QueueFull { .. } => Some("queue_full"),
                EngineError::PromptTooLong { .. } | EngineError::TooFewBlocks { .. } => Some("context_length_exceeded"),
                EngineError::EmptyPrompt | EngineError::UnknownToken { .. } => None,
                EngineError::Constraint { .. } => Some("grammar_failed"),
                EngineError::GroupFailed { .. } => Some("group_failed"),
                EngineError::Stopping => Some("stopping"),
            },
            _ => None,
        }
    }

    /// When it is worth trying again: every answer that says "not now" says when.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Engine(EngineError::QueueFull { retry_after, .. })
            | Self::QueueTimeout { retry_after, .. }
            | Self::RateLimit { retry_after, .. }
            | Self::Quota { retry_after, .. } => Some(*retry_after),
            Self::Grammar { source: GrammarError::Busy, .. } => Some(Duration::from_secs(1)),
            _ if self.status() == StatusCode::SERVICE_UNAVAILABLE => Some(RETRY_AFTER_DEFAULT),
            _ => None,
        }
    }

    /// Adds what an answer of this kind tells beside its body.
    pub(super) fn add_headers(&self, response: &mut Response) {
        if let Some(wait) = self.retry_after() {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds(wait)));
        }
        if matches!(self, Self::DeadlinePassed { .. }) {
            // The client's patience is over: its library should not try again by itself.
            response.headers_mut().insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if matches!(self, Self::Unauthorized) {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
    }
}

/// Whole seconds, at least one.
fn seconds(wait: Duration) -> u64 {
    wait.as_secs_f64().ceil().max(1.0) as u64
}

fn leading(leader: &Option<String>) -> String {
    leader.as_ref().map_or_else(|| "no head leads now".to_owned(), |leader| format!("{leader} leads"))
}

fn because(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

fn engine_status(error: &EngineError) -> StatusCode {
    match error {
        EngineError::EmptyPrompt
        | EngineError::PromptTooLong { .. }
        | EngineError::UnknownToken { .. }
        | EngineError::Constraint { .. }
        | EngineError::TooFewBlocks { .. } => StatusCode::BAD_REQUEST,
        EngineError::QueueFull { .. } | EngineError::GroupFailed { .. } | EngineError::Stopping => {
            StatusCode::SERVICE_UNAVAILABLE
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), axum::Json(self.body())).into_response();
        self.add_headers(&mut response);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(error: ApiError, status: u16, body: &str) {
        assert_eq!(error.status().as_u16(), status);
        assert_eq!(serde_json::to_string(&error.body()).unwrap(), body);
    }

    #[test]
    fn errors_become_the_openai_object() {
        check(
            ApiError::UnknownModel { model: "x".into() },
            404,
            r#"{"error":{"message":"The model `x` does not exist.","type":"invalid_request_error","param":"model","code":"model_not_found"}}"#,
        );
        check(
            ApiError::Unsupported { param: "logit_bias".into(), feature: "a bias on logits" },
            400,
            r#"{"error":{"message":"logit_bias: a bias on logits is not supported by this server; leave the field out","type":"invalid_request_error","param":"logit_bias","code":"unsupported_parameter"}}"#,
        );
        check(
            ApiError::Engine(EngineError::QueueFull {
                waiting: 8,
                max_queue: 8,
                retry_after: Duration::from_millis(1500),
            }),
            503,
            r#"{"error":{"message":"8 requests wait already; the limit is 8","type":"service_unavailable_error","param":null,"code":"queue_full"}}"#,
        );
    }

    #[test]
    fn a_full_queue_says_when_to_come_back() {
        let full = EngineError::QueueFull { waiting: 8, max_queue: 8, retry_after: Duration::from_millis(1500) };
        let response = ApiError::from(full).into_response();
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
    }
}
