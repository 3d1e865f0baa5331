//! A cursor over a file that does not trust it: every length is checked before it is used.

use std::path::Path;

use crate::ModelError;

/// Longest string that is believed; chat templates are the longest ones.
const STRING_BYTES_MAX: u64 = 64 << 20;

/// Reads little-endian values from the front of a file.
#[derive(Clone)]
pub(crate) struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Starts at byte `at`.
    pub(crate) fn new(path: &'a Path, bytes: &'a [u8], at: usize) -> Self {
        Self { path, bytes, at }
    }

    /// How far it has come.
    pub(crate) fn position(&self) -> usize {
        self.at
    }

    /// Bytes that are left.
    pub(crate) fn remaining(&self) -> usize {
        self.bytes.len().saturating_sub(self.at)
    }

    /// What is wrong with the file.
    pub(crate) fn error(&self, reason: impl Into<String>) -> ModelError {
        ModelError::damaged(self.path, reason)
    }

    /// The next `len` bytes.
    pub(crate) fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], ModelError> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let Some(found) = end.and_then(|end| self.bytes.get(self.at..end)) else {
            let (at, left) = (self.at, self.remaining());
            return Err(
                self.error(format!("{what} at byte {at} needs {len} bytes, but {left} are left: the file is cut"))
            );
        };
        self.at += len;
        Ok(found)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ModelError> {
        let mut value = [0; N];
        value.copy_from_slice(self.take(N, what)?);
        Ok(value)
    }

    /// An 8-bit number.
    pub(crate) fn u8(&mut self, what: &str) -> Result<u8, ModelError> {
        self.array(what).map(u8::from_le_bytes)
    }

    /// A 16-bit number.
    pub(crate) fn u16(&mut self, what: &str) -> Result<u16, ModelError> {
        self.array(what).map(u16::from_le_bytes)
    }

    /// A 32-bit number.
    pub(crate) fn u32(&mut self, what: &str) -> Result<u32, ModelError> {
        self.array(what).map(u32::from_le_bytes)
    }

    /// A 64-bit number.
    pub(crate) fn u64(&mut self, what: &str) -> Result<u64, ModelError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A 64-bit count of things that have at least `bytes_each` bytes: what cannot fit into the file is refused.
    pub(crate) fn count(&mut self, bytes_each: usize, max: u64, what: &str) -> Result<usize, ModelError> {
        let count = self.u64(what)?;
        let room = (self.remaining() / bytes_each.max(1)) as u64;
        if count > room || count > max {
            return Err(self.error(format!("it claims {what} of {count}, but there is room for {}", room.min(max))));
        }
        Ok(count as usize)
    }

    /// The bytes of a string.
    pub(crate) fn string_bytes(&mut self, what: &str) -> Result<&'a [u8], ModelError> {
        let len = self.count(1, STRING_BYTES_MAX, what)?;
        self.take(len, what)
    }

    /// A string; bytes that are not UTF-8 are replaced.
    pub(crate) fn string(&mut self, what: &str) -> Result<String, ModelError> {
        self.string_bytes(what).map(|bytes| String::from_utf8_lossy(bytes).into_owned())
    }
}
