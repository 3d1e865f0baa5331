//! A disk that is full when a test wants it to be.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A small file system in memory; it goes with the value.
pub struct TinyDisk {
    path: PathBuf,
}

impl TinyDisk {
    /// Mounts so many bytes on a folder, which is made; `None` where this machine lets nobody mount.
    pub fn mount(path: &Path, bytes: u64) -> Option<Self> {
        fs::create_dir_all(path).expect("a folder");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"]).arg(path);
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        mounted.then(|| Self { path: path.to_owned() })
    }

    /// Takes all room that is left.
    ///
    /// # Panics
    /// If nothing can be written at all.
    pub fn fill(&self) {
        let mut ballast = File::create(self.ballast()).expect("a file");
        while ballast.write_all(&[1; 4096]).is_ok() {}
    }

    /// Gives it back.
    ///
    /// # Panics
    /// If it cannot be given back.
    pub fn free(&self) {
        fs::remove_file(self.ballast()).expect("it was full");
    }

    fn ballast(&self) -> PathBuf {
        self.path.join("ballast")
    }
}

impl Drop for TinyDisk {
    fn drop(&mut self) {
        // Lazily: whoever still has a file open there ends with its cluster.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}
