//! The models that answer requests, by every name that they answer to.
//!
//! Written by the cluster when a deployment becomes ready or goes; read by every request.
//!
//! **Invariant:** a model in the table has a running engine; served names are unique.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use phalanx_formats::{EmbeddingSettings, GenerationDefaults};
use phalanx_proto::TokenId;

use super::admission::Admission;
use crate::constraint::GrammarCompiler;
use crate::engine::Replicas;
use crate::text::TextModel;

/// One deployment as requests see it.
pub struct ServedModel {
    /// The name that answers carry.
    pub name: String,
    /// The model as it was given to `serve`.
    pub model_path: String,
    /// Further served names.
    pub aliases: Vec<String>,
    /// Absent for a folder without a tokenizer: token ids only.
    pub text: Option<Arc<TextModel>>,
    /// Holds outputs to grammars; absent where `text` is.
    pub grammars: Option<GrammarCompiler>,
    /// Where its requests go.
    pub engine: Replicas,
    /// Longest sequence, prompt and output together.
    pub max_model_len: u32,
    /// When it became ready, seconds since 1970.
    pub created: u64,
    /// The model's own sampling defaults.
    pub defaults: GenerationDefaults,
    /// How its embeddings are made.
    pub embedding: EmbeddingSettings,
    /// Longest wait of a request in the queue, where there is a limit.
    pub queue_timeout: Option<Duration>,
    /// Whether its throughput and queues are written into the log.
    pub log_stats: bool,
    /// Its door.
    pub admission: Admission,
    /// Tokens that end an answer, from all the places where a model names them.
    pub end_token_ids: Vec<TokenId>,
}

impl ServedModel {
    /// True where `asked` is one of the served names.
    fn is_named(&self, asked: &str) -> bool {
        self.name == asked || self.aliases.iter().any(|alias| alias == asked)
    }

    /// True where `asked` is the path, with or without the last slash.
    fn is_at(&self, asked: &str) -> bool {
        trimmed(&self.model_path) == trimmed(asked)
    }

    /// True where `asked` is the last part of the path.
    fn ends_in(&self, asked: &str) -> bool {
        trimmed(&self.model_path).rsplit('/').next() == Some(trimmed(asked))
    }
}

/// A path without its last slashes; the root stays itself.
fn trimmed(path: &str) -> &str {
    match path.trim_end_matches('/') {
        "" => path,
        rest => rest,
    }
}

/// The table; clones share it.
#[derive(Clone, Default)]
pub struct ServedModels {
    models: Arc<RwLock<Vec<Arc<ServedModel>>>>,
}

impl ServedModels {
    /// Adds a model, in place of one of the same name.
    pub fn insert(&self, model: ServedModel) {
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        models.retain(|other| other.name != model.name);
        models.push(Arc::new(model));
    }

    /// Takes a model out; requests that run keep it until they end.
    pub fn remove(&self, name: &str) {
        self.models.write().unwrap_or_else(PoisonError::into_inner).retain(|model| model.name != name);
    }

    /// The model that answers to `asked`: served names first, then paths, then last parts of paths.
    pub fn lookup(&self, asked: &str) -> Option<Arc<ServedModel>> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let first = |answers: fn(&ServedModel, &str) -> bool| models.iter().find(|model| answers(model, asked));
        first(ServedModel::is_named)
            .or_else(|| first(ServedModel::is_at))
            .or_else(|| first(ServedModel::ends_in))
            .cloned()
    }

    /// All models, in the order in which they became ready.
    pub fn list(&self) -> Vec<Arc<ServedModel>> {
        self.models.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
