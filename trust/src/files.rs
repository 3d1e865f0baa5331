//! Files and folders that only their owner may read.
//!
//! **Invariant:** a file is replaced whole or not at all, and is never readable by others, not even for a moment.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Makes a folder of mode 0700, and its missing parents; one that is there becomes 0700.
///
/// # Errors
/// The folder cannot be made, or belongs to somebody else.
pub fn private_dir(path: &Path) -> io::Result<()> {
    if !path.is_dir() {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    }
    fs::set_permissions(path, Permissions::from_mode(0o700))
}

/// Writes a file of mode 0600; on disk when this returns.
///
/// # Errors
/// The folder cannot be written.
pub fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension(format!("new{}", std::process::id()));
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&fresh, path)?;
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_owner_reads() {
        let dir = tempfile::tempdir().expect("a folder");
        let folder = dir.path().join("a/b");
        private_dir(&folder).expect("made");
        private_dir(&folder).expect("made again");
        write_private(&folder.join("f"), b"one").expect("written");
        write_private(&folder.join("f"), b"two").expect("written");
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!((mode(&folder), mode(&folder.join("f"))), (0o700, 0o600));
        assert_eq!(fs::read(folder.join("f")).expect("reads"), b"two");
        assert_eq!(fs::read_dir(&folder).expect("reads").count(), 1);
    }
}
