//! The thread that writes the store: whoever changes something goes on at once, and hears when it is on disk.
//!
//! **Invariant:** each change that was taken is answered once, in order.

use std::io;
use std::sync::mpsc::{self, SyncSender, TrySendError};

use super::{Backend, StoreError, Table};

/// Changes that may wait for the disk.
const CHANGES_MAX: usize = 64;

/// One change of one record.
pub struct Change {
    /// What it is about.
    pub table: Table,
    /// Whose.
    pub name: String,
    /// The record; none removes it.
    pub record: Option<Vec<u8>>,
    /// Hears when it is on disk, or why not; called on the store's thread.
    pub done: Box<dyn FnOnce(Result<(), StoreError>) + Send>,
}

/// The way to the thread; it ends when this is dropped.
#[derive(Debug, Clone)]
pub struct StoreWriter {
    changes: SyncSender<Change>,
}

impl StoreWriter {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn spawn(mut store: Box<dyn Backend>) -> io::Result<Self> {
        let (changes, inbox) = mpsc::sync_channel::<Change>(CHANGES_MAX);
        let write = move || {
            for Change { table, name, record, done } in inbox {
                done(store.keep(table, &name, record.as_deref()));
            }
        };
        std::thread::Builder::new().name("store".into()).spawn(write)?;
        Ok(Self { changes })
    }

    /// A writer whose changes a simulation takes.
    #[cfg(test)]
    pub(crate) fn to(changes: SyncSender<Change>) -> Self {
        Self { changes }
    }

    /// Hands a change over. False: too many wait, or the thread has ended; try again.
    pub fn write(&self, change: Change) -> bool {
        match self.changes.try_send(change) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        }
    }
}
