//! `/openapi.json` and the page `/docs`: what can be asked here, generated from types.
//!
//! **Invariant:** every route of the API but these two and those that answer text stands in [`OPERATIONS`].

mod requests;

use std::sync::LazyLock;

use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use schemars::generate::{SchemaGenerator, SchemaSettings};
use schemars::{JsonSchema, Schema};
use serde_json::{Map, Value, json};

use super::{ApiState, anthropic, chat, completions, embeddings, error, models, responses, tokenize};

const PAGE: &str = include_str!("page.html");

/// The routes.
pub fn routes() -> Router<ApiState> {
    Router::new().route("/openapi.json", routing::get(document)).route("/docs", routing::get(page))
}

async fn document() -> Json<&'static Value> {
    static DOCUMENT: LazyLock<Value> = LazyLock::new(generate);
    Json(&DOCUMENT)
}

async fn page() -> Response {
    const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'";
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_FRAME_OPTIONS, "DENY"),
    ];
    (headers, PAGE).into_response()
}

/// Adds the schema of a type and gives a reference to it.
type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// One thing that can be asked.
struct Operation {
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    request: Option<SchemaOf>,
    response: SchemaOf,
    /// Whether the answer may be a stream.
    streams: bool,
    error: SchemaOf,
}

const fn post(path: &'static str, summary: &'static str, request: SchemaOf, response: SchemaOf) -> Operation {
    let error = of::<error::ErrorBody<'static>>;
    Operation { method: "post", path, summary, request: Some(request), response, streams: false, error }
}

const fn get(path: &'static str, summary: &'static str, response: SchemaOf) -> Operation {
    let error = of::<error::ErrorBody<'static>>;
    Operation { method: "get", path, summary, request: None, response, streams: false, error }
}

const fn streamed(operation: Operation) -> Operation {
    Operation { streams: true, ..operation }
}

const fn anthropics(operation: Operation) -> Operation {
    Operation { error: of::<anthropic::ErrorBody<'static>>, ..operation }
}

/// What can be asked.
const OPERATIONS: &[Operation] = &[
    streamed(post(
        "/v1/chat/completions",
        "Answer a conversation",
        of::<requests::ChatCompletionRequest>,
        of::<chat::ChatCompletion<'static>>,
    )),
    streamed(post(
        "/v1/completions",
        "Go on with a text or with token ids",
        of::<requests::CompletionRequest>,
        of::<completions::Completion<'static>>,
    )),
    streamed(post(
        "/v1/responses",
        "Answer a conversation of items",
        of::<requests::ResponseRequest>,
        of::<responses::ResponseObject<'static>>,
    )),
    post(
        "/v1/embeddings",
        "Vectors of texts or of token ids",
        of::<requests::EmbeddingRequest>,
        of::<embeddings::EmbeddingList<'static>>,
    ),
    anthropics(streamed(post(
        "/v1/messages",
        "Answer a conversation in the form of Anthropic's API",
        of::<requests::MessageRequest>,
        of::<anthropic::Message<'static>>,
    ))),
    anthropics(post(
        "/v1/messages/count_tokens",
        "Count the tokens of such a conversation",
        of::<requests::CountTokensRequest>,
        of::<anthropic::Count>,
    )),
    post("/tokenize", "Tokens of a text or of a conversation", of::<requests::TokenizeRequest>, of::<tokenize::Tokens>),
    post("/detokenize", "Text of tokens", of::<requests::DetokenizeRequest>, of::<tokenize::Text>),
    get("/v1/models", "Models by every name that they answer to", of::<models::ModelList>),
    get("/v1/models/{id}", "One model", of::<models::Model>),
    get("/health", "Whether a model is served and makes progress", of::<super::health::Status>),
    get("/health/live", "Whether the process answers", of::<super::health::Status>),
    get("/version", "The version", of::<super::health::Version>),
];

/// The document.
fn generate() -> Value {
    let settings = |settings: SchemaSettings| settings.with(|s| s.definitions_path = "/components/schemas".into());
    let mut requests = settings(SchemaSettings::draft2020_12()).into_generator();
    let mut answers = settings(SchemaSettings::draft2020_12().for_serialize()).into_generator();
    let mut paths = Map::new();
    for operation in OPERATIONS {
        let described = describe(operation, &mut requests, &mut answers);
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method] = described;
    }
    let mut schemas = requests.take_definitions(true);
    schemas.extend(answers.take_definitions(true));
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Phalanx", "version": phalanx_proto::VERSION},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    })
}

fn describe(operation: &Operation, requests: &mut SchemaGenerator, answers: &mut SchemaGenerator) -> Value {
    let mut content = json!({"application/json": {"schema": (operation.response)(answers)}});
    if operation.streams {
        content["text/event-stream"] = json!({});
    }
    let failure = |words: &str, schema: Schema| json!({"description": words, "content": {"application/json": {"schema": schema}}});
    let error = (operation.error)(answers);
    let mut described = json!({
        "summary": operation.summary,
        "operationId": format!("{}{}", operation.method, operation.path.replace(['/', '{', '}', '.'], "_")),
        "responses": {
            "200": {"description": "The answer", "content": content},
            "4XX": failure("The request is refused", error.clone()),
            "5XX": failure("Not now, or an error of the server", error),
        },
    });
    if let Some(request) = operation.request {
        described["requestBody"] =
            json!({"required": true, "content": {"application/json": {"schema": request(requests)}}});
    }
    if operation.path.contains("{id}") {
        described["parameters"] =
            json!([{"name": "id", "in": "path", "required": true, "schema": {"type": "string", "minLength": 1}}]);
    }
    described
}

#[cfg(test)]
pub(super) fn document_for_tests() -> Value {
    generate()
}
