//! A folder in Hugging Face layout.
//!
//! Owns which files are read: `config.json`, `generation_config.json`, tokenizer files, one safetensors file or the shards that
//! an index names. Does not know GGUF.

mod config;
mod embedding;
mod safetensors;
mod texts;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::json::{self, Fields};
use crate::mapping::Mapping;
use crate::model::TensorEntry;
use crate::row_order::RowOrder;
use crate::texts::ModelTexts;
use crate::{Geometry, ModelError, StoredType};
use safetensors::read_header;
use texts::open_texts;

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What a folder's small files say.
pub(crate) struct Folder {
    /// From `config.json`.
    pub geometry: Geometry,
    /// The type that `config.json` declares.
    pub declared_dtype: StoredType,
    /// End tokens, defaults, tokenizer.
    pub texts: ModelTexts,
}

/// Tensors of a folder, and the files that they are in.
pub(crate) struct FolderTensors {
    /// By the name that Hugging Face's Llama has for them.
    pub tensors: HashMap<String, TensorEntry>,
    /// In the order that `TensorEntry::file` counts.
    pub files: Vec<Mapping>,
}

/// Reads everything but tensors.
///
/// # Errors
/// It is no model folder, or a file of it is damaged or not supported.
pub(crate) fn open_folder(folder: &Path) -> Result<Folder, ModelError> {
    let path = folder.join(CONFIG);
    let Some(config) = json::read_optional(&path)? else {
        return Err(ModelError::NotAModel { path: folder.to_owned(), reason: missing_config(folder) });
    };
    Ok(Folder {
        geometry: config::geometry(&path, &config)?,
        declared_dtype: config::declared_dtype(&path, &config)?,
        texts: open_texts(folder, &config)?,
    })
}

/// Reads the headers of all safetensors files of a model.
///
/// # Errors
/// A file is missing or damaged.
pub(crate) fn open_tensors(folder: &Path, geometry: &Geometry) -> Result<FolderTensors, ModelError> {
    let FolderTensors { tensors, files } = open_stored(folder)?;
    Ok(FolderTensors { tensors: geometry.architecture.family().names.adopt(geometry, tensors)?, files })
}

/// All tensors, by the names in the files.
fn open_stored(folder: &Path) -> Result<FolderTensors, ModelError> {
    let index_path = folder.join(INDEX);
    if let Some(index) = json::read_optional(&index_path)? {
        return open_shards(folder, &index_path, &index);
    }
    let path = folder.join(SINGLE);
    if !path.exists() {
        return Err(ModelError::NotAModel { path: folder.to_owned(), reason: missing_weights(folder) });
    }
    let mut found = FolderTensors { tensors: HashMap::new(), files: Vec::new() };
    add_file(&mut found, &path, |_| true)?;
    Ok(found)
}

fn open_shards(folder: &Path, index_path: &Path, index: &Value) -> Result<FolderTensors, ModelError> {
    let fields = Fields::root(index_path, index)?;
    let Some(map) = fields.get("weight_map").and_then(Value::as_object) else {
        return Err(fields.error("weight_map", "is missing or not an object"));
    };
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, shard) in map {
        let Some(shard) = shard.as_str().filter(|shard| is_plain_name(shard)) else {
            return Err(fields.error("weight_map", format!("puts {name} into {shard}, which is no file name")));
        };
        shards.entry(shard).or_default().push(name);
    }
    let absent: Vec<String> =
        shards.keys().filter(|shard| !folder.join(shard).is_file()).map(|shard| (*shard).to_owned()).collect();
    if !absent.is_empty() {
        return Err(ModelError::MissingFiles { path: folder.to_owned(), names: absent });
    }
    let mut found = FolderTensors { tensors: HashMap::new(), files: Vec::new() };
    for (shard, names) in shards {
        let path = folder.join(shard);
        add_file(&mut found, &path, |name| map.get(name).and_then(Value::as_str) == Some(shard))?;
        if let Some(absent) = names.iter().find(|name| !found.tensors.contains_key(**name)) {
            return Err(ModelError::damaged(&path, format!("it lacks tensor {absent}, which the index puts there")));
        }
    }
    Ok(found)
}

fn add_file(found: &mut FolderTensors, path: &Path, wanted: impl Fn(&str) -> bool) -> Result<(), ModelError> {
    let mapping = Mapping::open(path)?;
    let file = found.files.len();
    for tensor in read_header(path, mapping.bytes())? {
        if wanted(&tensor.name) {
            let entry = TensorEntry {
                dtype: tensor.dtype,
                shape: tensor.shape,
                file,
                range: tensor.range,
                row_order: RowOrder::AsStored,
            };
            found.tensors.insert(tensor.name, entry);
        }
    }
    found.files.push(mapping);
    Ok(())
}

/// One name, no folders: an index must not lead out of the model's folder.
fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
}

fn missing_config(folder: &Path) -> String {
    match files_with(folder, "gguf").as_slice() {
        [] => format!("it has no {CONFIG}"),
        [one] => format!("it has no {CONFIG}, but a GGUF file: name {}", one.display()),
        [first, ..] => format!("it has no {CONFIG}, but GGUF files: name one of them, such as {}", first.display()),
    }
}

fn missing_weights(folder: &Path) -> String {
    if !files_with(folder, "safetensors").is_empty() {
        return format!("it has safetensors files, but neither {SINGLE} nor {INDEX}");
    }
    if !files_with(folder, "bin").is_empty() || !files_with(folder, "pth").is_empty() {
        return format!(
            "it has neither {SINGLE} nor {INDEX}; pickled weights are not read: convert them to safetensors"
        );
    }
    format!("it has neither {SINGLE} nor {INDEX}")
}

/// Files of a folder with this extension, in order; none where the folder cannot be read.
fn files_with(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    found.sort();
    found
}
