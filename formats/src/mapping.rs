//! A file in memory, read where it is touched.
//!
//! Owns the only `unsafe` of this crate. Does not know what the bytes mean.
//!
//! **Invariant:** a model's files do not change while they are open: a file that shrinks under a mapping ends the process.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap, UncheckedAdvice};

use crate::ModelError;

/// One read-only mapped file.
#[derive(Debug)]
pub(crate) struct Mapping {
    path: PathBuf,
    bytes: Mmap,
}

impl Mapping {
    /// Maps a file; nothing of it is read yet.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if !metadata.is_file() {
            return Err(ModelError::NotAModel { path: path.to_owned(), reason: "not a regular file".to_owned() });
        }
        if metadata.len() == 0 {
            return Err(ModelError::damaged(path, "the file is empty"));
        }
        // SAFETY: the mapping is read-only, and no reference outlives it. That nobody changes the file meanwhile is the
        // module's invariant; readers never trust its contents beyond the bounds that they checked.
        let bytes = unsafe { Mmap::map(&file) }.map_err(io)?;
        // Advice only: a system that refuses it reads a little slower.
        let _ = bytes.advise(Advice::Sequential);
        Ok(Self { path: path.to_owned(), bytes })
    }

    /// Where it was opened.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Gives the pages of these bytes back; touching them again reads the file again.
    pub(crate) fn release(&self, range: Range<usize>) {
        if range.is_empty() || range.end > self.bytes.len() {
            return;
        }
        // SAFETY: a read-only mapping of a file has no changed pages to lose: dropped pages are read from the
        // file again, with the same contents, so references into the range stay valid.
        let advised = unsafe { self.bytes.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
        // Advice only: a system that refuses it keeps more memory in use.
        let _ = advised;
    }
}
