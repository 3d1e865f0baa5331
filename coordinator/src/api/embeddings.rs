//! `/v1/embeddings`.
//!
//! Owns the fields of a request for embeddings, what is made of pooled hidden states (cut, brought to length 1, encoded), and
//! the shape of the answer. Knows no token behind a prompt: none is drawn.

use std::num::NonZeroU32;

use axum::extract::{Request, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing};
use base64::Engine as _;
use phalanx_formats::{EmbeddingPooling, EmbeddingWidths};
use phalanx_proto::{Pooling, SamplingParams, TokenId};
use schemars::JsonSchema;
use serde::Serialize;

use super::body::{self, Body};
use super::caller::Caller;
use super::error::ApiError;
use super::fields::{Fields, text_of};
use super::meter::{OutputMeter, RequestMeter};
use super::patience::Patience;
use super::prompts::Prompts;
use super::request_span::RequestFacts;
use super::served_models::ServedModel;
use super::submission::{Accepted, check_priority};
use super::truncation::Truncation;
use super::{ApiState, options, reply};
use crate::engine::{GenerateRequest, TokenEvent, TokenStream};
use crate::heavy::HeavyError;

/// Answers of more numbers than this are written on a blocking thread.
const INLINE_NUMBERS_MAX: usize = 4 * 1024;

/// The route.
pub fn routes() -> Router<ApiState> {
    Router::new().route("/v1/embeddings", routing::post(create))
}

/// How numbers are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Float,
    Base64,
}

/// A validated request.
#[derive(Debug)]
struct EmbeddingRequest {
    model: Option<String>,
    inputs: Prompts,
    encoding: Encoding,
    dimensions: Option<u32>,
    normalizes: Option<bool>,
    add_special: bool,
    truncation: Option<Truncation>,
    priority: i32,
    request_id: Option<String>,
    ignored: Vec<String>,
}

impl EmbeddingRequest {
    fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        let encodings = [("float", Encoding::Float), ("base64", Encoding::Base64)];
        let request = Self {
            model: fields.text("model")?,
            inputs: Prompts::take(&mut fields, "input")?,
            encoding: text_of(&mut fields, "encoding_format", &encodings)?.unwrap_or(Encoding::Float),
            dimensions: fields.integer("dimensions", 1, u32::MAX.into())?.map(|dimensions| dimensions as u32),
            normalizes: fields.boolean("normalize")?,
            add_special: fields.flag("add_special_tokens", true)?,
            truncation: Truncation::take(&mut fields)?,
            priority: options::take_priority(&mut fields)?,
            request_id: options::take_request_id(&mut fields)?,
            ignored: Vec::new(),
        };
        if matches!(&request.inputs, Prompts::Texts(texts) if texts.iter().any(String::is_empty)) {
            return Err(empty_input());
        }
        Ok(Self { ignored: fields.into_ignored(), ..request })
    }

    /// What this model makes of hidden states for this request.
    ///
    /// # Errors
    /// The model's way of pooling is not built, or its vectors cannot be cut like that.
    fn shape(&self, model: &ServedModel) -> Result<Shape, ApiError> {
        let settings = &model.embedding;
        let pooling = match &settings.pooling {
            EmbeddingPooling::Last => Pooling::Last,
            EmbeddingPooling::Mean => Pooling::Mean,
            EmbeddingPooling::Other(what) => {
                return Err(ApiError::NoEmbeddings { model: model.name.clone(), what: what.clone() });
            }
        };
        if let Some(dimensions) = self.dimensions {
            check_dimensions(dimensions, &settings.widths)?;
        }
        let normalizes = self.normalizes.unwrap_or(settings.normalizes);
        Ok(Shape { pooling, dimensions: self.dimensions, normalizes, encoding: self.encoding })
    }

    /// Cuts inputs where that is allowed.
    ///
    /// # Errors
    /// One is empty, too long or not of this vocabulary; or there are too many.
    fn check(&self, model: &ServedModel, inputs: &mut [Vec<TokenId>]) -> Result<(), ApiError> {
        let limits = model.engine.limits();
        check_priority(self.priority, limits.policy)?;
        let room = u64::from(limits.max_queue) + u64::from(limits.max_num_seqs);
        if inputs.len() as u64 > room {
            let expected = format!("at most {room} inputs");
            return Err(ApiError::OutOfRange { param: "input".into(), value: inputs.len().to_string(), expected });
        }
        for input in inputs {
            if let Some(truncation) = self.truncation {
                truncation.cut(input, model.max_model_len)?;
            }
            if input.is_empty() {
                return Err(empty_input());
            }
            if input.len() > model.max_model_len as usize {
                let (prompt_tokens, max_model_len) = (input.len() as u64, model.max_model_len);
                return Err(ApiError::ContextLength { param: "input", prompt_tokens, max_model_len });
            }
            if let Some(token) = input.iter().find(|token| token.0 >= limits.vocab_size) {
                let expected = format!("token ids within the vocabulary of {}", limits.vocab_size);
                return Err(ApiError::OutOfRange { param: "input".into(), value: token.to_string(), expected });
            }
        }
        Ok(())
    }
}

fn empty_input() -> ApiError {
    let expected = "at least one token long".into();
    ApiError::OutOfRange { param: "input".into(), value: "empty".into(), expected }
}

fn check_dimensions(dimensions: u32, widths: &EmbeddingWidths) -> Result<(), ApiError> {
    let expected = match widths {
        EmbeddingWidths::Whole => "left out: this model's embeddings cannot be cut".into(),
        EmbeddingWidths::Any => return Ok(()),
        EmbeddingWidths::Only(list) if list.contains(&dimensions) => return Ok(()),
        EmbeddingWidths::Only(list) => format!("one of {list:?}"),
    };
    Err(ApiError::OutOfRange { param: "dimensions".into(), value: dimensions.to_string(), expected })
}

async fn create(State(state): State<ApiState>, request: Request) -> Result<Response, ApiError> {
    let caller = Caller::of(&request);
    let Body { fields, num_bytes, room } = body::read(request, state.limits.body).await?;
    let mut request = EmbeddingRequest::parse(fields)?;
    let id = format!("embd-{}", request.request_id.as_ref().unwrap_or(&caller.request_id));
    let accepted = Accepted::new(&state, request.model.as_deref(), id, caller)?;
    let shape = request.shape(&accepted.model)?;
    let inputs = std::mem::take(&mut request.inputs);
    let mut inputs = inputs.tokenize(&accepted, "input", request.add_special, num_bytes).await?;
    drop(room);
    request.check(&accepted.model, &mut inputs)?;
    let num_tokens = inputs.iter().map(|input| input.len() as u64).sum();
    let mut vectors = Vec::with_capacity(inputs.len());
    for pending in submit(&accepted, inputs, shape.pooling, request.priority)? {
        vectors.push(pending.vector().await?);
    }
    let ignored = std::mem::take(&mut request.ignored);
    Ok(reply::with_ignored(shape.answer(accepted, vectors, num_tokens).await?, &ignored))
}

/// Hands all inputs to the engine, or none.
fn submit(
    accepted: &Accepted,
    inputs: Vec<Vec<TokenId>>,
    pooling: Pooling,
    priority: i32,
) -> Result<Vec<Pending>, ApiError> {
    let model = &accepted.model;
    let meter = RequestMeter::new(&model.name, &accepted.caller, RequestFacts::default());
    let mut pending = Vec::with_capacity(inputs.len());
    for (index, prompt) in inputs.into_iter().enumerate() {
        let num_tokens = prompt.len();
        let stream = model.engine.submit(GenerateRequest {
            request_id: format!("{}-{index}", accepted.id),
            prompt,
            sampling: SamplingParams { temperature: 0.0, pooling: Some(pooling), ..SamplingParams::default() },
            max_tokens: NonZeroU32::MIN,
            stop_token_ids: Vec::new(),
            constraint: None,
            priority,
            cache_salt: None,
        })?;
        let patience = Patience::new(model.queue_timeout, accepted.caller.deadline);
        meter.prompt(num_tokens);
        pending.push(Pending { stream, patience, meter: meter.output() });
    }
    accepted.leave();
    Ok(pending)
}

/// An input that is in the engine. Dropping it aborts its sequence.
struct Pending {
    stream: TokenStream,
    patience: Patience,
    meter: OutputMeter,
}

impl Pending {
    /// Its pooled hidden states.
    async fn vector(mut self) -> Result<Vec<f32>, ApiError> {
        let mut vector = None;
        let error = loop {
            match self.patience.next(&mut self.stream).await {
                Ok(Some(TokenEvent::Pooled(values))) => vector = Some(values),
                Ok(Some(TokenEvent::Finished { .. }) | None) => match vector {
                    Some(vector) => {
                        self.meter.end("stop");
                        return Ok(vector);
                    }
                    None => break ApiError::EngineGone,
                },
                Ok(Some(TokenEvent::Failed(error))) => break error.into(),
                Ok(Some(TokenEvent::Token { .. } | TokenEvent::PromptLogprobs(_))) => {}
                Err(error) => break error,
            }
        };
        self.meter.end("error");
        Err(error)
    }
}

/// What becomes of pooled hidden states.
#[derive(Debug, Clone, Copy)]
struct Shape {
    pooling: Pooling,
    dimensions: Option<u32>,
    normalizes: bool,
    encoding: Encoding,
}

impl Shape {
    async fn answer(self, of: Accepted, vectors: Vec<Vec<f32>>, num_tokens: u64) -> Result<Response, ApiError> {
        if let (Some(asked), Some(first)) = (self.dimensions, vectors.first())
            && asked as usize > first.len()
        {
            let expected = format!("at most {}", first.len());
            return Err(ApiError::OutOfRange { param: "dimensions".into(), value: asked.to_string(), expected });
        }
        if vectors.iter().map(Vec::len).sum::<usize>() <= INLINE_NUMBERS_MAX {
            return Ok(Json(self.list(&of, vectors, num_tokens)).into_response());
        }
        let write = move || serde_json::to_vec(&self.list(&of, vectors, num_tokens));
        let written = tokio::task::spawn_blocking(write).await;
        let bytes = written.ok().and_then(Result::ok).ok_or(HeavyError::Broke)?;
        Ok(([(header::CONTENT_TYPE, "application/json")], bytes).into_response())
    }

    fn list(self, of: &Accepted, vectors: Vec<Vec<f32>>, num_tokens: u64) -> EmbeddingList<'_> {
        let embedding = |(index, vector)| Embedding { object: "embedding", index, embedding: self.encode(vector) };
        EmbeddingList {
            id: &of.id,
            object: "list",
            created: of.created,
            model: &of.model.name,
            data: vectors.into_iter().enumerate().map(embedding).collect(),
            usage: EmbeddingUsage { prompt_tokens: num_tokens, total_tokens: num_tokens },
        }
    }

    fn encode(self, mut vector: Vec<f32>) -> Numbers {
        if let Some(dimensions) = self.dimensions {
            vector.truncate(dimensions as usize);
        }
        if self.normalizes {
            normalize(&mut vector);
        }
        match self.encoding {
            Encoding::Float => Numbers::Float(vector),
            Encoding::Base64 => {
                let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
                Numbers::Base64(base64::engine::general_purpose::STANDARD.encode(bytes))
            }
        }
    }
}

/// Brings a vector to length 1; one of zeros stays.
fn normalize(vector: &mut [f32]) {
    let squares: f64 = vector.iter().map(|value| f64::from(*value) * f64::from(*value)).sum();
    if squares > 0.0 {
        let length = squares.sqrt();
        for value in vector {
            *value = (f64::from(*value) / length) as f32;
        }
    }
}

/// The answer.
#[derive(Serialize, JsonSchema)]
pub struct EmbeddingList<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    data: Vec<Embedding>,
    usage: EmbeddingUsage,
}

/// The vector of one input.
#[derive(Serialize, JsonSchema)]
struct Embedding {
    object: &'static str,
    index: usize,
    embedding: Numbers,
}

/// A vector's numbers, or their bytes as text.
#[derive(Serialize, JsonSchema)]
#[serde(untagged)]
enum Numbers {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(Serialize, JsonSchema)]
struct EmbeddingUsage {
    prompt_tokens: u64,
    total_tokens: u64,
}
