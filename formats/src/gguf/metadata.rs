//! Metadata entries asked for by key, with messages that name it.

use std::path::Path;

use super::header::Header;
use super::value::{Array, Kind, Value};
use crate::ModelError;

/// The metadata of one file.
#[derive(Clone, Copy)]
pub(crate) struct Metadata<'a> {
    /// The file.
    pub path: &'a Path,
    /// Its bytes, for arrays.
    pub bytes: &'a [u8],
    /// Its header.
    pub header: &'a Header,
}

impl<'a> Metadata<'a> {
    /// What is wrong with an entry.
    pub(crate) fn error(&self, key: &str, reason: impl Into<String>) -> ModelError {
        ModelError::config(self.path, key, reason)
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.header.metadata.get(key)
    }

    /// A count. A list of equal counts, one per layer, is that count.
    pub(crate) fn count(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let single = |value: &Value| match value {
            Value::Integer(value) => usize::try_from(*value).ok(),
            _ => None,
        };
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) => {
                let mut values = array.values(self.path, self.bytes);
                let first = values.next().transpose()?.as_ref().and_then(single);
                for value in values {
                    if single(&value?) != first {
                        return Err(self.error(key, "differs between layers, which is not supported"));
                    }
                }
                first.map(Some).ok_or_else(|| self.error(key, "is an array without counts"))
            }
            Some(value) => match single(value) {
                Some(count) => Ok(Some(count)),
                None => Err(self.error(key, format!("is {value:?}, not a count"))),
            },
        }
    }

    /// A count that must be there.
    pub(crate) fn required_count(&self, key: &str) -> Result<usize, ModelError> {
        self.count(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    /// A token id.
    pub(crate) fn token_id(&self, key: &str) -> Result<Option<u32>, ModelError> {
        match self.get(key) {
            // Some files have -1, or the same in 32 bits, for "none".
            Some(Value::Integer(-1 | 0xffff_ffff)) | None => Ok(None),
            Some(_) => match self.count(key)?.and_then(|id| u32::try_from(id).ok()) {
                Some(id) => Ok(Some(id)),
                None => Err(self.error(key, "is no token id")),
            },
        }
    }

    /// A number.
    pub(crate) fn float(&self, key: &str) -> Result<Option<f32>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) => Ok(Some(*value as f32)),
            Some(Value::Integer(value)) => Ok(Some(*value as f32)),
            Some(value) => Err(self.error(key, format!("is {value:?}, not a number"))),
        }
    }

    /// A switch.
    pub(crate) fn switch(&self, key: &str) -> Result<Option<bool>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(value) => Err(self.error(key, format!("is {value:?}, neither true nor false"))),
        }
    }

    /// A text.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(value) => Err(self.error(key, format!("is {value:?}, not a text"))),
        }
    }

    /// An array whose elements are of one of these types.
    pub(crate) fn array(&self, key: &str, kinds: &[Kind]) -> Result<Option<&'a Array>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) if kinds.contains(&array.kind) => Ok(Some(array)),
            Some(_) => Err(self.error(key, format!("is no array of {kinds:?}"))),
        }
    }

    /// An array of strings; empty where there is none.
    pub(crate) fn texts(&self, key: &str) -> Result<Vec<String>, ModelError> {
        let Some(array) = self.array(key, &[Kind::String])? else { return Ok(Vec::new()) };
        let mut texts = Vec::new();
        for value in array.values(self.path, self.bytes) {
            if let Value::Text(text) = value? {
                texts.push(text);
            }
        }
        Ok(texts)
    }

    /// An array of floats; empty where there is none.
    pub(crate) fn floats(&self, key: &str) -> Result<Vec<f32>, ModelError> {
        let Some(array) = self.array(key, &[Kind::F32, Kind::F64])? else { return Ok(Vec::new()) };
        let mut floats = Vec::new();
        for value in array.values(self.path, self.bytes) {
            if let Value::Float(float) = value? {
                floats.push(float as f32);
            }
        }
        Ok(floats)
    }

    /// An array of small integers; empty where there is none.
    pub(crate) fn integers(&self, key: &str) -> Result<Vec<i32>, ModelError> {
        let kinds = [Kind::I8, Kind::U8, Kind::I16, Kind::U16, Kind::I32, Kind::U32];
        let Some(array) = self.array(key, &kinds)? else { return Ok(Vec::new()) };
        let mut integers = Vec::new();
        for value in array.values(self.path, self.bytes) {
            if let Value::Integer(integer) = value? {
                let fits = i32::try_from(integer);
                integers.push(fits.map_err(|_| self.error(key, format!("holds {integer}, which is absurd")))?);
            }
        }
        Ok(integers)
    }
}
