//! Compiled device code on disk.
//!
//! Owns the files of one folder. An entry is its SHA-256, then the image: one that was cut short or changed is not used.
//!
//! **Invariant:** an entry is written beside and then renamed, so that a reader sees all of it or none.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// Bytes of the checksum in front.
const SUM_BYTES: usize = 32;

fn path(dir: &Path, name: &str, key: &str) -> PathBuf {
    dir.join(format!("{name}-{key}.bin"))
}

/// The image that was kept under this key, if it is whole.
pub(super) fn read(dir: &Path, name: &str, key: &str) -> Option<Vec<u8>> {
    let bytes = fs::read(path(dir, name, key)).ok()?;
    let (sum, image) = bytes.split_at_checked(SUM_BYTES)?;
    (Sha256::digest(image).as_slice() == sum).then(|| image.to_vec())
}

/// Keeps an image.
pub(super) fn write(dir: &Path, name: &str, key: &str, image: &[u8]) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let beside = dir.join(format!(".{name}-{key}.{}", std::process::id()));
    let entry = [Sha256::digest(image).as_slice(), image].concat();
    let written = fs::write(&beside, entry).and_then(|()| fs::rename(&beside, path(dir, name, key)));
    if written.is_err() {
        // What could not be renamed is of no use to anybody.
        let _ = fs::remove_file(&beside);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_that_is_not_whole_is_not_used() {
        let dir = std::env::temp_dir().join(format!("phalanx-cuda-cache-{}", std::process::id()));
        assert_eq!(read(&dir, "poison", "k"), None);
        write(&dir, "poison", "k", b"image").unwrap();
        assert_eq!(read(&dir, "poison", "k").as_deref(), Some(b"image".as_slice()));
        assert_eq!(read(&dir, "poison", "other"), None);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing but the entry stays");
        let file = path(&dir, "poison", "k");
        let whole = fs::read(&file).unwrap();
        let mut changed = whole.clone();
        changed[SUM_BYTES] ^= 1;
        for broken in [&whole[..10], &whole[..whole.len() - 1], &changed] {
            fs::write(&file, broken).unwrap();
            assert_eq!(read(&dir, "poison", "k"), None);
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
