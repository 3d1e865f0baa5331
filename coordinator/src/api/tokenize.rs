//! `/tokenize` and `/detokenize`.

use axum::extract::{Request, State};
use axum::{Json, Router, routing};
use phalanx_proto::TokenId;
use schemars::JsonSchema;
use serde::Serialize;

use super::caller::Caller;
use super::error::ApiError;
use super::fields::Fields;
use super::submission::{Accepted, with_text};
use super::tools::ToolUse;
use super::{ApiState, body, chat, messages, options};
use crate::engine::EngineError;
use crate::text::{ChatPrompt, TextModel};

/// The routes.
pub fn routes() -> Router<ApiState> {
    Router::new().route("/tokenize", routing::post(tokenize)).route("/detokenize", routing::post(detokenize))
}

/// What is to be tokenized.
enum Source {
    Text(String),
    Chat(ChatPrompt, Option<ToolUse>),
}

impl Source {
    fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        match fields.text("prompt")? {
            Some(text) => Ok(Self::Text(text)),
            None => Ok(Self::Chat(messages::take_prompt(fields)?, ToolUse::take(fields)?)),
        }
    }
}

/// Tokens of a text.
#[derive(Serialize, JsonSchema)]
pub struct Tokens {
    count: usize,
    max_model_len: u32,
    #[schemars(with = "Vec<u32>")]
    tokens: Vec<TokenId>,
    token_strs: Option<Vec<String>>,
}

/// Text of tokens.
#[derive(Serialize, JsonSchema)]
pub struct Text {
    prompt: String,
}

async fn tokenize(State(state): State<ApiState>, request: Request) -> Result<Json<Tokens>, ApiError> {
    let caller = Caller::of(&request);
    let body = body::read(request, state.limits.body).await?;
    let mut fields = body.fields;
    let model = fields.text("model")?;
    let source = Source::take(&mut fields)?;
    let add_special = fields.flag("add_special_tokens", matches!(source, Source::Text(_)))?;
    let wants_texts = fields.flag("return_token_strs", false)?;
    let accepted = Accepted::without_place(&state, model.as_deref(), caller.request_id.clone(), caller)?;
    let work = move |text: &TextModel| {
        let tokens = match source {
            Source::Text(prompt) => text.encode(&prompt, add_special)?,
            Source::Chat(prompt, tools) => {
                let prompt = chat::with_tools(text, prompt, tools.as_ref());
                text.encode(&text.render_chat(&prompt)?, add_special)?
            }
        };
        let texts = wants_texts.then(|| tokens.iter().map(|token| text.token_text(*token)).collect());
        Ok((tokens, texts))
    };
    let (tokens, token_strs) = with_text(accepted.text("prompt")?, body.num_bytes, "prompt", work).await?;
    Ok(Json(Tokens { count: tokens.len(), max_model_len: accepted.model.max_model_len, tokens, token_strs }))
}

async fn detokenize(State(state): State<ApiState>, request: Request) -> Result<Json<Text>, ApiError> {
    let caller = Caller::of(&request);
    let body = body::read(request, state.limits.body).await?;
    let mut fields = body.fields;
    let model = fields.text("model")?;
    let tokens = options::required_token_ids(&mut fields, "tokens")?;
    let accepted = Accepted::without_place(&state, model.as_deref(), caller.request_id.clone(), caller)?;
    let vocab_size = accepted.model.engine.limits().vocab_size;
    if let Some(token) = tokens.iter().copied().find(|token| token.0 >= vocab_size) {
        return Err(EngineError::UnknownToken { token, vocab_size }.into());
    }
    let work = move |text: &TextModel| Ok(text.decode(&tokens, false));
    let prompt = with_text(accepted.text("tokens")?, body.num_bytes, "tokens", work).await?;
    Ok(Json(Text { prompt }))
}
