//! What GGUF metadata says about text.

use super::metadata::Metadata;
use super::value::{Kind, Value};
use crate::ModelError;
use crate::embedding::{EmbeddingPooling, EmbeddingSettings};
use crate::texts::{CHAT_END_TOKENS, EndTokens, GenerationDefaults, GgufVocab, ModelTexts};

const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";
const END_IDS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// Reads end tokens and defaults, and checks that the vocabulary can be read later.
///
/// # Errors
/// An entry is of the wrong type or contradicts another one.
pub(crate) fn texts(metadata: Metadata<'_>) -> Result<ModelTexts, ModelError> {
    check_vocab(metadata)?;
    let mut end_tokens = EndTokens::default();
    for key in END_IDS {
        if let Some(id) = metadata.token_id(key)? {
            end_tokens.add(id);
        }
    }
    add_chat_ends(metadata, &mut end_tokens)?;
    let defaults = GenerationDefaults {
        temperature: metadata.float("general.sampling.temp")?,
        top_k: metadata.count("general.sampling.top_k")?.map(|top_k| u32::try_from(top_k).unwrap_or(u32::MAX)),
        top_p: metadata.float("general.sampling.top_p")?,
        min_p: metadata.float("general.sampling.min_p")?,
        repetition_penalty: metadata.float("general.sampling.penalty_repeat")?,
    };
    let embedding = embedding(metadata)?;
    Ok(ModelTexts { end_token_ids: end_tokens.into_ids(), defaults, tokenizer: None, embedding })
}

/// A file may name its pooling: 1 mean, 3 last.
fn embedding(metadata: Metadata<'_>) -> Result<EmbeddingSettings, ModelError> {
    let architecture = metadata.text("general.architecture")?.unwrap_or_default();
    let pooling = match metadata.count(&format!("{architecture}.pooling_type"))? {
        None | Some(0 | 3) => EmbeddingPooling::Last,
        Some(1) => EmbeddingPooling::Mean,
        Some(other) => EmbeddingPooling::Other(format!("pooling type {other}")),
    };
    Ok(EmbeddingSettings { pooling, ..EmbeddingSettings::default() })
}

/// Reads the vocabulary; `None` where the file has none.
///
/// # Errors
/// An entry is of the wrong type.
pub(crate) fn vocab(metadata: Metadata<'_>) -> Result<Option<GgufVocab>, ModelError> {
    let tokens = metadata.texts(TOKENS)?;
    let Some(model) = metadata.text("tokenizer.ggml.model")?.filter(|_| !tokens.is_empty()) else {
        return Ok(None);
    };
    let id = |name: &str| metadata.token_id(&format!("tokenizer.ggml.{name}_token_id"));
    Ok(Some(GgufVocab {
        model: model.to_owned(),
        pre: metadata.text("tokenizer.ggml.pre")?.unwrap_or("default").to_owned(),
        tokens,
        scores: metadata.floats(SCORES)?,
        token_types: metadata.integers(TOKEN_TYPES)?,
        merges: metadata.texts(MERGES)?,
        bos: id("bos")?,
        eos: id("eos")?,
        unk: id("unknown")?,
        pad: id("padding")?,
        add_bos: metadata.switch("tokenizer.ggml.add_bos_token")?,
        add_space_prefix: metadata.switch("tokenizer.ggml.add_space_prefix")?,
        chat_template: metadata.text(CHAT_TEMPLATE)?.map(str::to_owned),
    }))
}

fn check_vocab(metadata: Metadata<'_>) -> Result<(), ModelError> {
    let num_tokens = metadata.array(TOKENS, &[Kind::String])?.map_or(0, |array| array.len);
    for key in [SCORES, TOKEN_TYPES] {
        let kinds = [Kind::F32, Kind::F64, Kind::I8, Kind::U8, Kind::I16, Kind::U16, Kind::I32, Kind::U32];
        if let Some(array) = metadata.array(key, &kinds)?
            && array.len != num_tokens
        {
            return Err(metadata.error(key, format!("has {} entries for {num_tokens} tokens", array.len)));
        }
    }
    metadata.array(MERGES, &[Kind::String])?;
    for key in END_IDS.into_iter().chain(["tokenizer.ggml.bos_token_id"]) {
        if let Some(id) = metadata.token_id(key)?
            && num_tokens > 0
            && id as usize >= num_tokens
        {
            return Err(metadata.error(key, format!("is {id}, but there are {num_tokens} tokens")));
        }
    }
    Ok(())
}

/// Tokens that the chat template ends a turn with.
fn add_chat_ends(metadata: Metadata<'_>, end_tokens: &mut EndTokens) -> Result<(), ModelError> {
    let (Some(template), Some(tokens)) = (metadata.text(CHAT_TEMPLATE)?, metadata.array(TOKENS, &[Kind::String])?)
    else {
        return Ok(());
    };
    let wanted: Vec<&str> = CHAT_END_TOKENS.into_iter().filter(|token| template.contains(token)).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    for (id, value) in tokens.values(metadata.path, metadata.bytes).enumerate() {
        if let (Value::Text(text), Ok(id)) = (value?, u32::try_from(id))
            && wanted.contains(&text.as_str())
        {
            end_tokens.add(id);
        }
    }
    Ok(())
}
