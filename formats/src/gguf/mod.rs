//! GGUF files, in one part or several.
//!
//! Owns their header, their names for tensors, and the order of their rows. Does not know Hugging Face folders.

mod geometry;
mod header;
mod metadata;
mod names;
mod reader;
mod texts;
mod value;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::mapping::Mapping;
use crate::model::TensorEntry;
use crate::texts::{GgufVocab, ModelTexts};
use crate::{Geometry, ModelError};
use header::{Header, read_header};
use metadata::Metadata;

pub(crate) use header::is_gguf;
pub(crate) use names::NAMES;

/// Most parts of a split file.
const PARTS_MAX: usize = 1000;

/// An opened GGUF file, with its other parts if it has any.
#[derive(Debug)]
pub(crate) struct GgufFile {
    /// From the metadata.
    pub geometry: Geometry,
    /// End tokens and defaults; the tokenizer is read by `vocab`.
    pub texts: ModelTexts,
    header: Header,
}

impl GgufFile {
    /// Reads the metadata of a mapped file.
    ///
    /// # Errors
    /// The file is damaged, or the model is of a kind that is not supported.
    pub(crate) fn open(mapping: &Mapping) -> Result<Self, ModelError> {
        let (path, bytes) = (mapping.path(), mapping.bytes());
        let header = read_header(path, bytes)?;
        let metadata = Metadata { path, bytes, header: &header };
        if metadata.count("split.no")?.unwrap_or(0) != 0 {
            return Err(metadata.error("split.no", "is not 0: name the first part of the model"));
        }
        let (geometry, texts) = (geometry::geometry(metadata)?, texts::texts(metadata)?);
        Ok(Self { geometry, texts, header })
    }

    /// The vocabulary, read now.
    pub(crate) fn vocab(&self, mapping: &Mapping) -> Option<GgufVocab> {
        // All that could go wrong was checked at open.
        texts::vocab(Metadata { path: mapping.path(), bytes: mapping.bytes(), header: &self.header }).ok().flatten()
    }

    /// All tensors by Hugging Face name; further parts are added to `files`, which has the first one.
    ///
    /// # Errors
    /// A part is missing or damaged, or two tensors have one name.
    pub(crate) fn tensors(&self, files: &mut Vec<Mapping>) -> Result<HashMap<String, TensorEntry>, ModelError> {
        let mut tensors = HashMap::new();
        let Some(first) = files.first() else { return Ok(tensors) };
        let metadata = Metadata { path: first.path(), bytes: first.bytes(), header: &self.header };
        let num_parts = metadata.count("split.count")?.unwrap_or(1).max(1);
        let parts = other_parts(metadata, num_parts)?;
        self.add(&mut tensors, first.path(), 0, &self.header)?;
        for path in parts {
            let mapping = Mapping::open(&path)?;
            let header = read_header(&path, mapping.bytes())?;
            self.add(&mut tensors, &path, files.len(), &header)?;
            files.push(mapping);
        }
        Ok(tensors)
    }

    fn add(
        &self,
        tensors: &mut HashMap<String, TensorEntry>,
        path: &Path,
        file: usize,
        header: &Header,
    ) -> Result<(), ModelError> {
        for tensor in &header.tensors {
            let name = NAMES.to_llama(&tensor.name);
            let entry = TensorEntry {
                dtype: tensor.dtype.clone(),
                shape: tensor.shape.clone(),
                file,
                range: tensor.range.clone(),
                row_order: names::row_order(&self.geometry, &name),
            };
            if tensors.insert(name, entry).is_some() {
                return Err(ModelError::damaged(path, format!("tensor {} is there twice", tensor.name)));
            }
        }
        Ok(())
    }
}

/// Paths of the parts after the first: `name-00002-of-00003.gguf` beside `name-00001-of-00003.gguf`.
fn other_parts(metadata: Metadata<'_>, num_parts: usize) -> Result<Vec<PathBuf>, ModelError> {
    if num_parts == 1 {
        return Ok(Vec::new());
    }
    if num_parts > PARTS_MAX {
        return Err(metadata.error("split.count", format!("is {num_parts}, which is absurd")));
    }
    let path = metadata.path;
    let file_name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some(stem) = file_name.strip_suffix(&format!("-00001-of-{num_parts:05}.gguf")) else {
        let reason = format!("is {num_parts}, so that the file's name should end in -00001-of-{num_parts:05}.gguf");
        return Err(metadata.error("split.count", reason));
    };
    let names: Vec<String> = (2..=num_parts).map(|part| format!("{stem}-{part:05}-of-{num_parts:05}.gguf")).collect();
    let absent: Vec<String> = names.iter().filter(|name| !path.with_file_name(name).is_file()).cloned().collect();
    if !absent.is_empty() {
        return Err(ModelError::MissingFiles { path: path.to_owned(), names: absent });
    }
    Ok(names.iter().map(|name| path.with_file_name(name)).collect())
}
