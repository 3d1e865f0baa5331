//! The file of API keys in the store, and the one beside it of what they have used.
//!
//! **Invariant:** a file is replaced whole or not at all, and changed by one process at a time.

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use nix::fcntl::{Flock, FlockArg};
use phalanx_trust::files::write_private;
use serde::{Deserialize, Serialize};

use super::FileError;
use super::keys::KeyRecord;

/// What keys have used on one day.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Usage {
    /// Days since 1970.
    pub(super) day: u64,
    /// Tokens, by the id of the key.
    pub(super) tokens: HashMap<String, u64>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Stored {
    keys: Vec<KeyRecord>,
}

/// Tells one state of a file from the next.
type Stamp = Option<(SystemTime, u64)>;

/// The keys of one store.
#[derive(Debug)]
pub struct KeyFile {
    folder: PathBuf,
    read: Mutex<Stamp>,
}

impl KeyFile {
    /// The keys in this folder; there need not be any.
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), read: Mutex::new(None) }
    }

    fn path(&self) -> PathBuf {
        self.folder.join("keys.json")
    }

    fn usage_path(&self) -> PathBuf {
        self.folder.join("key-usage.json")
    }

    fn stamp(&self) -> Stamp {
        let metadata = fs::metadata(self.path()).ok()?;
        Some((metadata.modified().ok()?, metadata.len()))
    }

    /// True where the file is another one than was read last.
    pub(super) fn has_changed(&self) -> bool {
        self.stamp() != *self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All keys, in the order in which they were made.
    ///
    /// # Errors
    /// The file cannot be read, or is damaged.
    pub fn read(&self) -> Result<Vec<KeyRecord>, FileError> {
        *self.read.lock().unwrap_or_else(PoisonError::into_inner) = self.stamp();
        let path = self.path();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(FileError::Io { path, source }),
        };
        let stored: Stored = serde_json::from_slice(&text).map_err(|source| FileError::Damaged { path, source })?;
        Ok(stored.keys)
    }

    /// Changes the keys; others that do so wait.
    ///
    /// # Errors
    /// The file cannot be read or written, or is damaged.
    pub fn change<T>(&self, change: impl FnOnce(&mut Vec<KeyRecord>) -> T) -> Result<T, FileError> {
        let path = self.folder.join("keys.lock");
        let io = |source| FileError::Io { path: path.clone(), source };
        fs::create_dir_all(&self.folder).map_err(io)?;
        let opened = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(io)?;
        let _lock = Flock::lock(opened, FlockArg::LockExclusive).map_err(|(_, error)| io(error.into()))?;
        let mut keys = self.read()?;
        let result = change(&mut keys);
        let text = serde_json::to_vec_pretty(&Stored { keys }).map_err(|error| io(error.into()))?;
        write_private(&self.path(), &text).map_err(io)?;
        Ok(result)
    }

    /// What was used, as far as it is known.
    pub(super) fn read_usage(&self) -> Usage {
        let text = fs::read(self.usage_path()).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// Writes what was used.
    pub(super) fn write_usage(&self, day: u64, tokens: HashMap<String, u64>) {
        if tokens.is_empty() {
            return;
        }
        let text = serde_json::to_vec(&Usage { day, tokens }).unwrap_or_default();
        if let Err(error) = write_private(&self.usage_path(), &text) {
            tracing::warn!(%error, "what keys have used is not written");
        }
    }
}
