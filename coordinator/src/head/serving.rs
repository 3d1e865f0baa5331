//! The table of served models, kept up to date with what the cluster says.
//!
//! Reads tokenizers and templates on blocking threads while ranks load their weights.
//!
//! **Invariant:** a deployment is in the table from its first `Ready` to its `Gone`; while its group starts again, requests find
//! the broken engine and are told so, rather than that the model is unknown.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use phalanx_formats::{EmbeddingSettings, GenerationDefaults, ModelError, ModelFiles};
use phalanx_proto::{DeploymentName, TokenId};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::warn;

use crate::api::{Admission, ServedModel, ServedModels};
use crate::cluster::{CheckedSpec, ServingChange};
use crate::constraint::GrammarCompiler;
use crate::engine::{EngineHandle, Replicas};
use crate::text::tools::ToolFormat;
use crate::text::{TextError, TextModel};

/// What a model's own files say about text.
struct TextSide {
    text: Option<Arc<TextModel>>,
    defaults: GenerationDefaults,
    embedding: EmbeddingSettings,
    end_token_ids: Vec<TokenId>,
}

/// Follows `changes` until the cluster ends.
pub(super) async fn keep_table(models: ServedModels, mut changes: mpsc::Receiver<ServingChange>) {
    let mut loading: HashMap<DeploymentName, JoinHandle<Result<TextSide, String>>> = HashMap::new();
    while let Some(change) = changes.recv().await {
        match change {
            ServingChange::Starting(checked) => {
                let name = checked.spec.name.clone();
                loading.insert(name, tokio::task::spawn_blocking(move || load(&checked)));
            }
            ServingChange::Ready { checked, engines, done } => {
                let task = loading.remove(&checked.spec.name).unwrap_or_else(|| {
                    let checked = Arc::clone(&checked);
                    tokio::task::spawn_blocking(move || load(&checked))
                });
                let models = models.clone();
                tokio::spawn(async move {
                    let side = task.await.unwrap_or_else(|error| Err(format!("reading the tokenizer failed: {error}")));
                    let _ = done.send(side.and_then(|side| insert(&models, &checked, engines, side)));
                });
            }
            ServingChange::Gone(name) => {
                loading.remove(&name);
                models.remove(&name.0);
            }
        }
    }
}

fn load(checked: &CheckedSpec) -> Result<TextSide, String> {
    let spec = &checked.spec;
    let open = |path| if spec.load_format == "dummy" { ModelFiles::open_config(path) } else { ModelFiles::open(path) };
    let files = open(&spec.model_path).map_err(|error: ModelError| error.to_string())?;
    let tokenizer = spec.tokenizer.as_deref().map(ModelFiles::open_config).transpose();
    let tokenizer = tokenizer.map_err(|error| format!("--tokenizer: {error}"))?;
    let mut text = match TextModel::load(tokenizer.as_ref().unwrap_or(&files)) {
        Ok(text) => Some(text),
        Err(TextError::NoTokenizer) => {
            warn!(model = %spec.model, "no tokenizer: this model answers to token ids only");
            None
        }
        Err(error) => return Err(error.to_string()),
    };
    if let (Some(text), Some(template)) = (&mut text, &spec.chat_template) {
        text.set_chat_template(template.clone()).map_err(|error| format!("--chat-template: {error}"))?;
    }
    if let (Some(text), Some(name)) = (&mut text, &spec.tool_call_parser) {
        let format =
            ToolFormat::named(name).ok_or_else(|| format!("--tool-call-parser: no format is called {name}"))?;
        text.set_tool_format(format);
    }
    Ok(TextSide {
        text: text.map(Arc::new),
        defaults: files.generation_defaults(),
        embedding: files.embedding_settings(),
        end_token_ids: files.end_token_ids().into_iter().map(TokenId).collect(),
    })
}

fn insert(
    models: &ServedModels,
    checked: &CheckedSpec,
    engines: Vec<EngineHandle>,
    side: TextSide,
) -> Result<(), String> {
    let spec = &checked.spec;
    let engine = Replicas::new(engines).ok_or_else(|| "no replica serves".to_owned())?;
    let grammars = side
        .text
        .as_ref()
        .map(|text| GrammarCompiler::new(Arc::clone(text), engine.limits().vocab_size, side.end_token_ids.clone()));
    models.insert(ServedModel {
        name: spec.name.0.clone(),
        model_path: spec.model.clone(),
        aliases: spec.aliases.clone(),
        text: side.text,
        grammars,
        engine,
        max_model_len: spec.max_model_len(&checked.geometry),
        created: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        defaults: side.defaults,
        embedding: side.embedding,
        end_token_ids: side.end_token_ids,
        queue_timeout: spec.queue_timeout,
        admission: Admission::default(),
        log_stats: !spec.disable_log_stats,
    });
    Ok(())
}
