//! Text to token ids and back.

use std::collections::HashMap;
use std::fs;

use phalanx_formats::{GgufVocab, TokenizerSource};
use phalanx_proto::TokenId;
use serde_json::{Map, Value, json};

use super::{TextError, gguf_vocab, token_bytes};

/// A model's tokenizer with its special tokens.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("bos_token", &self.bos_token).field("eos_token", &self.eos_token).finish()
    }
}

fn unusable(reason: impl ToString) -> TextError {
    TextError::Tokenizer { reason: reason.to_string() }
}

impl Tokenizer {
    /// Reads a tokenizer, and the chat template that stands beside it.
    pub fn from_source(source: &TokenizerSource) -> Result<(Self, Option<String>), TextError> {
        match source {
            TokenizerSource::Json { tokenizer_json, tokenizer_config, chat_template } => {
                let bytes = fs::read(tokenizer_json)
                    .map_err(|source| TextError::Io { path: tokenizer_json.clone(), source })?;
                let config = tokenizer_config.as_ref().and_then(Value::as_object);
                Ok((Self::from_json(&bytes, config)?, chat_template.clone()))
            }
            TokenizerSource::Gguf(vocab) => Self::from_vocab(vocab),
            TokenizerSource::SentencePiece(files) => Self::from_vocab(&files.read().map_err(unusable)?),
        }
    }

    fn from_vocab(vocab: &GgufVocab) -> Result<(Self, Option<String>), TextError> {
        let value = gguf_vocab::to_tokenizer_json(vocab)?;
        let bytes = serde_json::to_vec(&value).map_err(unusable)?;
        let inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(unusable)?;
        let token = |id: Option<u32>| id.and_then(|id| vocab.tokens.get(id as usize).cloned());
        let tokenizer = Self { inner, bos_token: token(vocab.bos), eos_token: token(vocab.eos) };
        Ok((tokenizer, vocab.chat_template.clone()))
    }

    /// Reads `tokenizer.json`, put right by `added_tokens_decoder` of `tokenizer_config.json`.
    pub fn from_json(bytes: &[u8], config: Option<&Map<String, Value>>) -> Result<Self, TextError> {
        let added = config.and_then(|config| config.get("added_tokens_decoder")).and_then(Value::as_object);
        let inner = match added {
            Some(added) => {
                let mut value: Value = serde_json::from_slice(bytes).map_err(unusable)?;
                if rename_added_tokens(&mut value, added) {
                    let bytes = serde_json::to_vec(&value).map_err(unusable)?;
                    tokenizers::Tokenizer::from_bytes(&bytes)
                } else {
                    tokenizers::Tokenizer::from_bytes(bytes)
                }
            }
            None => tokenizers::Tokenizer::from_bytes(bytes),
        };
        let token = |key: &str| match config?.get(key)? {
            Value::String(text) => Some(text.clone()),
            Value::Object(object) => object.get("content")?.as_str().map(str::to_owned),
            _ => None,
        };
        Ok(Self { inner: inner.map_err(unusable)?, bos_token: token("bos_token"), eos_token: token("eos_token") })
    }

    /// Token ids of a text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, TextError> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(unusable)?;
        Ok(encoding.get_ids().iter().map(|id| TokenId(*id)).collect())
    }

    /// Text of token ids; ids outside the vocabulary are left out.
    pub fn decode(&self, tokens: &[TokenId], skip_special: bool) -> String {
        let ids: Vec<u32> = tokens.iter().map(|token| token.0).collect();
        // Decoders only refuse what their own configuration cannot express; such ids have no text.
        self.inner.decode(&ids, skip_special).unwrap_or_default()
    }

    /// A token as the vocabulary writes it.
    pub(super) fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token as the vocabulary writes it.
    pub fn token_id(&self, token: &str) -> Option<TokenId> {
        self.inner.token_to_id(token).map(TokenId)
    }

    /// The id of a control token by its text.
    pub(super) fn control_token(&self, text: &str) -> Option<TokenId> {
        let id = self.inner.token_to_id(text)?;
        let added = self.inner.get_added_tokens_decoder();
        added.get(&id).is_some_and(|token| token.special).then_some(TokenId(id))
    }

    /// Added tokens by id: their text, and whether they are control tokens.
    pub(super) fn added_tokens(&self) -> HashMap<u32, (String, bool)> {
        let added = self.inner.get_added_tokens_decoder();
        added.into_iter().map(|(id, token)| (id, (token.content, token.special))).collect()
    }

    /// The names of all steps of the decoder.
    pub(super) fn decoder_kinds(&self) -> Vec<String> {
        let decoder = self.inner.get_decoder().and_then(|decoder| serde_json::to_value(decoder).ok());
        let mut found = Vec::new();
        token_bytes::kinds(&decoder.unwrap_or_default(), &mut found);
        found
    }

    /// The begin token's text.
    pub fn bos_token(&self) -> Option<&str> {
        self.bos_token.as_deref()
    }

    /// The end token's text.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos_token.as_deref()
    }
}

/// Gives the ids of `added_tokens_decoder` their names. Some models (InternLM2) ship a `tokenizer.json` in which the
/// chat tokens still carry placeholder names. Returns false where nothing had to change.
fn rename_added_tokens(tokenizer: &mut Value, added: &Map<String, Value>) -> bool {
    let known: HashMap<u64, String> = tokenizer["added_tokens"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|entry| Some((entry["id"].as_u64()?, entry["content"].as_str()?.to_owned())))
        .collect();
    let missing: Vec<(u64, &Value)> = added
        .iter()
        .filter_map(|(id, entry)| Some((id.parse::<u64>().ok()?, entry)))
        .filter(|(id, entry)| known.get(id).map(String::as_str) != entry["content"].as_str())
        .collect();
    if missing.is_empty() {
        return false;
    }
    if let Some(vocab) = tokenizer["model"]["vocab"].as_object_mut() {
        let names: HashMap<u64, &str> =
            missing.iter().filter_map(|(id, entry)| Some((*id, entry["content"].as_str()?))).collect();
        // Only what stands in the vocabulary is renamed: ids behind it belong to `added_tokens` alone.
        *vocab = std::mem::take(vocab)
            .into_iter()
            .map(|(token, id)| {
                let name = id.as_u64().and_then(|id| names.get(&id)).map(|name| (*name).to_owned());
                (name.unwrap_or(token), id)
            })
            .collect();
    }
    if let Some(list) = tokenizer["added_tokens"].as_array_mut() {
        list.retain(|entry| entry["id"].as_u64().is_none_or(|id| missing.iter().all(|(other, _)| *other != id)));
        for (id, entry) in &missing {
            let flag = |key: &str| entry[key].as_bool().unwrap_or(false);
            list.push(json!({
                "id": id,
                "content": entry["content"],
                "single_word": flag("single_word"),
                "lstrip": flag("lstrip"),
                "rstrip": flag("rstrip"),
                "normalized": flag("normalized"),
                "special": flag("special"),
            }));
        }
        list.sort_by_key(|entry| entry["id"].as_u64());
    }
    true
}
