//! The files of a folder that concern text: end tokens, generation defaults, where the tokenizer is.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::embedding::open_embedding;
use crate::json::{self, Fields};
use crate::texts::{CHAT_END_TOKENS, EndTokens, GenerationDefaults, ModelTexts, TokenizerSource};
use crate::{ModelError, SentencePieceFiles};

/// Reads what a folder says about text.
///
/// # Errors
/// A file cannot be read or is damaged.
pub(crate) fn open_texts(folder: &Path, config: &Value) -> Result<ModelTexts, ModelError> {
    let mut end_tokens = EndTokens::default();
    add_ids(Fields::root(&folder.join("config.json"), config)?, &mut end_tokens)?;
    let mut defaults = GenerationDefaults::default();
    let path = folder.join("generation_config.json");
    if let Some(generation) = json::read_optional(&path)? {
        let fields = Fields::root(&path, &generation)?;
        add_ids(fields, &mut end_tokens)?;
        defaults = generation_defaults(fields)?;
    }
    let settings_path = folder.join("tokenizer_config.json");
    let settings = json::read_optional(&settings_path)?;
    let chat_template = chat_template(folder, settings.as_ref())?;
    let tokenizer_json = folder.join("tokenizer.json");
    let tokens = SpecialTokens::open(settings.as_ref(), &tokenizer_json)?;
    let eos = settings.as_ref().and_then(|settings| token_text(settings.get("eos_token")?));
    tokens.add_ends(eos, chat_template.as_deref(), &mut end_tokens);
    let tokenizer_model = folder.join("tokenizer.model");
    let tokenizer = if tokenizer_json.is_file() {
        Some(TokenizerSource::Json { tokenizer_json, tokenizer_config: settings, chat_template })
    } else if tokenizer_model.is_file() {
        let files = SentencePieceFiles { tokenizer_model, tokenizer_config: settings, chat_template };
        Some(TokenizerSource::SentencePiece(files))
    } else {
        None
    };
    let embedding = open_embedding(folder, config)?;
    Ok(ModelTexts { end_token_ids: end_tokens.into_ids(), defaults, tokenizer, embedding })
}

/// `eos_token_id` is an id, a list of ids or null.
fn add_ids(fields: Fields<'_>, end_tokens: &mut EndTokens) -> Result<(), ModelError> {
    let Some(value) = fields.get("eos_token_id") else { return Ok(()) };
    let ids = match value {
        Value::Array(ids) => ids.as_slice(),
        one => std::slice::from_ref(one),
    };
    for id in ids {
        match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => end_tokens.add(id),
            // Published configs have -1 for "none".
            None if id.is_null() || id.as_i64() == Some(-1) => {}
            None => return Err(fields.error("eos_token_id", format!("is {value}, neither an id nor a list of ids"))),
        }
    }
    Ok(())
}

fn generation_defaults(fields: Fields<'_>) -> Result<GenerationDefaults, ModelError> {
    Ok(GenerationDefaults {
        temperature: fields.float("temperature")?,
        top_k: match fields.get("top_k") {
            Some(value) if value.as_i64() == Some(-1) => None,
            _ => fields.count("top_k")?.map(|top_k| u32::try_from(top_k).unwrap_or(u32::MAX)),
        },
        top_p: fields.float("top_p")?,
        min_p: fields.float("min_p")?,
        repetition_penalty: fields.float("repetition_penalty")?,
    })
}

/// A file of its own goes before the field; of several named templates the default one is taken.
fn chat_template(folder: &Path, settings: Option<&Value>) -> Result<Option<String>, ModelError> {
    if let Some(template) = json::read_text(&folder.join("chat_template.jinja"))? {
        return Ok(Some(template));
    }
    let named = |value: &Value| match value {
        Value::String(template) => Some(template.clone()),
        Value::Array(templates) => {
            let default = templates.iter().find(|template| template.get("name").is_some_and(|name| name == "default"));
            Some(default?.get("template")?.as_str()?.to_owned())
        }
        _ => None,
    };
    if let Some(template) = settings.and_then(|settings| named(settings.get("chat_template")?)) {
        return Ok(Some(template));
    }
    let separate = json::read_optional(&folder.join("chat_template.json"))?;
    Ok(separate.and_then(|separate| named(separate.get("chat_template")?)))
}

/// A token is a string or an object with its `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// Ids of added tokens: `added_tokens_decoder` of the settings goes before `tokenizer.json`, which may hold placeholders.
#[derive(Default)]
struct SpecialTokens {
    decoder: Vec<(u32, String)>,
    added: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

impl SpecialTokens {
    fn open(settings: Option<&Value>, tokenizer_json: &Path) -> Result<Self, ModelError> {
        let mut tokens = Self::default();
        if let Some(decoder) = settings.and_then(|settings| settings.get("added_tokens_decoder")?.as_object()) {
            for (id, token) in decoder {
                if let (Ok(id), Some(text)) = (id.parse(), token_text(token)) {
                    tokens.decoder.push((id, text.to_owned()));
                }
            }
        }
        if let Some(text) = json::read_text(tokenizer_json)? {
            let file: TokenizerFile = serde_json::from_str(&text)
                .map_err(|error| ModelError::damaged(tokenizer_json, format!("it is not a tokenizer: {error}")))?;
            tokens.added = file.added_tokens;
        }
        Ok(tokens)
    }

    fn id(&self, text: &str) -> Option<u32> {
        let decoded = self.decoder.iter().find(|(_, content)| content == text).map(|(id, _)| *id);
        decoded.or_else(|| self.added.iter().find(|token| token.content == text).map(|token| token.id))
    }

    fn add_ends(&self, eos: Option<&str>, chat_template: Option<&str>, end_tokens: &mut EndTokens) {
        let template = chat_template.unwrap_or_default();
        let in_chat = CHAT_END_TOKENS.into_iter().filter(|token| template.contains(token));
        for token in eos.into_iter().chain(in_chat) {
            if let Some(id) = self.id(token) {
                end_tokens.add(id);
            }
        }
    }
}
