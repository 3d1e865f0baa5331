//! What can be wrong with a model's files.

use std::path::{Path, PathBuf};

/// A model that cannot be used, with what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Reading failed.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Neither a model folder nor a GGUF file.
    #[error("{path} is not a model: {reason}")]
    NotAModel {
        /// What was given.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// A header that is cut or lies.
    #[error("{path} is damaged: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// No code for this architecture.
    #[error("architecture {found} is not supported; known are {known}")]
    UnknownArchitecture {
        /// What the config says.
        found: String,
        /// What is known.
        known: String,
    },
    /// A configuration that is missing something or contradicts itself.
    #[error("{path}: {field} {reason}")]
    Config {
        /// The file.
        path: PathBuf,
        /// The key.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor that the architecture needs is absent or has another shape.
    #[error("tensor {name}: {reason}")]
    Tensor {
        /// Its name in the file.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Files that the model's index names are not there.
    #[error("{path} lacks {} of its files: {}", names.len(), names.join(", "))]
    MissingFiles {
        /// The folder.
        path: PathBuf,
        /// What is absent.
        names: Vec<String>,
    },
}

impl ModelError {
    /// A header that is cut or lies.
    pub(crate) fn damaged(path: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), reason: reason.into() }
    }

    /// A key of a configuration that is missing or wrong.
    pub(crate) fn config(path: &Path, field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Config { path: path.to_owned(), field: field.into(), reason: reason.into() }
    }

    /// A tensor that cannot be used.
    pub fn tensor(name: &str, reason: impl Into<String>) -> Self {
        Self::Tensor { name: name.to_owned(), reason: reason.into() }
    }
}
