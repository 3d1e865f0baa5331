//! JSON files, and fields of them with messages that name the key.

use std::path::Path;

use serde_json::Value;

use crate::ModelError;

/// Largest JSON file that is read whole: configurations and tokenizer settings.
const JSON_BYTES_MAX: u64 = 64 << 20;

/// Reads a JSON file; `None` where there is none.
///
/// # Errors
/// It cannot be read, is absurdly large or not JSON.
pub(crate) fn read_optional(path: &Path) -> Result<Option<Value>, ModelError> {
    match read_text(path)? {
        None => Ok(None),
        Some(text) => match serde_json::from_str(&text) {
            Ok(value) => Ok(Some(value)),
            Err(error) => Err(ModelError::damaged(path, format!("it is not JSON: {error}"))),
        },
    }
}

/// Reads a small text file; `None` where there is none.
///
/// # Errors
/// It cannot be read, is absurdly large or not UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<Option<String>, ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let length = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    if length > JSON_BYTES_MAX {
        let reason = format!("it has {length} bytes; at most {JSON_BYTES_MAX} are believed");
        return Err(ModelError::damaged(path, reason));
    }
    let bytes = std::fs::read(path).map_err(io)?;
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Some(text)),
        Err(error) => Err(ModelError::damaged(path, format!("it is not UTF-8: {error}"))),
    }
}

/// One object of a JSON file, whose fields are asked for by name. A field that is `null` counts as absent.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    /// The file, for messages.
    pub path: &'a Path,
    /// Where in the file, for messages: "" or "rope_scaling.".
    pub prefix: &'a str,
    /// The object.
    pub value: &'a Value,
}

impl<'a> Fields<'a> {
    /// The root of a file.
    pub(crate) fn root(path: &'a Path, value: &'a Value) -> Result<Self, ModelError> {
        if !value.is_object() {
            return Err(ModelError::damaged(path, "it is not a JSON object"));
        }
        Ok(Self { path, prefix: "", value })
    }

    /// A field, if there.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.value.get(name).filter(|value| !value.is_null())
    }

    /// What is wrong with a field.
    pub(crate) fn error(&self, name: &str, reason: impl Into<String>) -> ModelError {
        ModelError::config(self.path, format!("{}{name}", self.prefix), reason)
    }

    /// A count.
    pub(crate) fn count(&self, name: &str) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let count = value.as_u64().or_else(|| value.as_f64().filter(is_count).map(|float| float as u64));
        match count.and_then(|count| usize::try_from(count).ok()) {
            Some(count) => Ok(Some(count)),
            None => Err(self.error(name, format!("is {value}, not a count"))),
        }
    }

    /// A count that must be there.
    pub(crate) fn required_count(&self, name: &str) -> Result<usize, ModelError> {
        self.count(name)?.ok_or_else(|| self.error(name, "is missing"))
    }

    /// A number.
    pub(crate) fn float(&self, name: &str) -> Result<Option<f32>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(float) => Ok(Some(float as f32)),
            None => Err(self.error(name, format!("is {value}, not a number"))),
        }
    }

    /// A switch.
    pub(crate) fn switch(&self, name: &str) -> Result<Option<bool>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_bool() {
            Some(on) => Ok(Some(on)),
            None => Err(self.error(name, format!("is {value}, neither true nor false"))),
        }
    }

    /// A word.
    pub(crate) fn word(&self, name: &str) -> Result<Option<&'a str>, ModelError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_str() {
            Some(word) => Ok(Some(word)),
            None => Err(self.error(name, format!("is {value}, not a string"))),
        }
    }
}

fn is_count(float: &f64) -> bool {
    *float >= 0.0 && *float < 9e15 && float.fract() == 0.0
}
