//! What a folder says about embeddings: `modules.json` of sentence-transformers, the modules' own files, `config.json`.

use std::path::{Component, Path};

use serde_json::Value;

use crate::ModelError;
use crate::embedding::{EmbeddingPooling, EmbeddingSettings, EmbeddingWidths};
use crate::json::{self, Fields};

/// Reads what a folder says about embeddings.
///
/// # Errors
/// A file cannot be read or is damaged.
pub(super) fn open_embedding(folder: &Path, config: &Value) -> Result<EmbeddingSettings, ModelError> {
    let widths = widths(Fields::root(&folder.join("config.json"), config)?)?;
    let path = folder.join("modules.json");
    let Some(modules) = json::read_optional(&path)? else {
        return Ok(EmbeddingSettings { widths, ..EmbeddingSettings::default() });
    };
    let Value::Array(modules) = &modules else {
        return Err(ModelError::damaged(&path, "it is not a JSON list"));
    };
    let mut settings = EmbeddingSettings { pooling: EmbeddingPooling::Last, normalizes: false, widths };
    for module in modules {
        let fields = Fields::root(&path, module)?;
        let kind = fields.word("type")?.unwrap_or_default();
        match kind.rsplit('.').next().unwrap_or_default() {
            "Transformer" => {}
            "Normalize" => settings.normalizes = true,
            "Pooling" => settings.pooling = pooling(&inside(folder, fields)?.join("config.json"))?,
            other => settings.pooling = EmbeddingPooling::Other(format!("a module of type {other}")),
        }
        if matches!(settings.pooling, EmbeddingPooling::Other(_)) {
            break;
        }
    }
    Ok(settings)
}

/// The folder of a module, which lies within the model's.
fn inside(folder: &Path, module: Fields<'_>) -> Result<std::path::PathBuf, ModelError> {
    let path = Path::new(module.word("path")?.unwrap_or_default());
    if path.components().all(|part| matches!(part, Component::Normal(_))) {
        return Ok(folder.join(path));
    }
    Err(module.error("path", "leads out of the model's folder"))
}

/// One mode by its name, or several switches of which one is on.
fn pooling(path: &Path) -> Result<EmbeddingPooling, ModelError> {
    let Some(config) = json::read_optional(path)? else {
        return Err(ModelError::damaged(path, "modules.json names it, and it is not there"));
    };
    let fields = Fields::root(path, &config)?;
    const SWITCHES: [(&str, &str); 6] = [
        ("pooling_mode_lasttoken", "lasttoken"),
        ("pooling_mode_mean_tokens", "mean"),
        ("pooling_mode_cls_token", "cls"),
        ("pooling_mode_max_tokens", "max"),
        ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
        ("pooling_mode_weightedmean_tokens", "weightedmean"),
    ];
    let mut modes: Vec<&str> = fields.word("pooling_mode")?.into_iter().collect();
    if modes.is_empty() {
        for (switch, mode) in SWITCHES {
            if fields.switch(switch)? == Some(true) {
                modes.push(mode);
            }
        }
    }
    Ok(match modes.as_slice() {
        ["lasttoken"] => EmbeddingPooling::Last,
        ["mean"] => EmbeddingPooling::Mean,
        [] => EmbeddingPooling::Other("no pooling mode".into()),
        modes => EmbeddingPooling::Other(format!("pooling mode {}", modes.join(" and "))),
    })
}

/// `matryoshka_dimensions` lists widths, `is_matryoshka` allows any.
fn widths(config: Fields<'_>) -> Result<EmbeddingWidths, ModelError> {
    let width = |value: &Value| value.as_u64().and_then(|width| u32::try_from(width).ok()).filter(|width| *width > 0);
    match config.get("matryoshka_dimensions") {
        Some(Value::Array(list)) if !list.is_empty() => match list.iter().map(width).collect() {
            Some(widths) => Ok(EmbeddingWidths::Only(widths)),
            None => Err(config.error("matryoshka_dimensions", "is not a list of widths")),
        },
        Some(Value::Array(_)) | None => Ok(match config.switch("is_matryoshka")? {
            Some(true) => EmbeddingWidths::Any,
            _ => EmbeddingWidths::Whole,
        }),
        Some(other) => Err(config.error("matryoshka_dimensions", format!("is {other}, not a list of widths"))),
    }
}
