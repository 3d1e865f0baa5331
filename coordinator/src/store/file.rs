//! The database's file, whose length is on disk before anything is written that counts on it.
//!
//! The database makes its file longer, writes a header that says so, and syncs both at once. A disk may keep the header and lose
//! the length when power fails between; the database takes such a file for damaged beyond help.
//!
//! **Invariant:** a file never becomes longer for its writer before it is so for good.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

use redb::backends::FileBackend;
use redb::{Database, StorageBackend};

/// Storage that syncs when it grows.
#[derive(Debug)]
struct SyncedGrowth<B>(B);

impl<B: StorageBackend> StorageBackend for SyncedGrowth<B> {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let grows = len > self.0.len()?;
        self.0.set_len(len)?;
        if grows { self.0.sync_data() } else { Ok(()) }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.0.close()
    }
}

/// Opens the database in a file, and makes it where there is none.
pub(super) fn open(path: &Path) -> Result<Database, redb::Error> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    open_on(FileBackend::new(file)?)
}

/// The same on some storage.
pub(super) fn open_on(storage: impl StorageBackend) -> Result<Database, redb::Error> {
    Ok(Database::builder().create_with_backend(SyncedGrowth(storage))?)
}
