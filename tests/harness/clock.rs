//! A wall clock that jumps: a library that is loaded before the C library, and a file that says by how much.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::Node;

/// The wall clock of all programs of some nodes.
pub struct Clock {
    folder: TempDir,
}

impl Clock {
    /// A clock that is right; `cc` compiles what makes it jump.
    ///
    /// # Panics
    /// If that cannot be compiled.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("offset"), 0i64.to_le_bytes()).expect("a file");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("harness/clock.c");
        let mut compile = Command::new("cc");
        compile.args(["-shared", "-fPIC", "-O1", "-o"]).arg(folder.path().join("clock.so")).arg(source);
        assert!(compile.status().expect("cc").success(), "the clock is compiled");
        Self { folder }
    }

    /// A node whose programs read this clock.
    pub fn give(&self, node: Node) -> Node {
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        let node = node.with_env("LD_PRELOAD", text(self.folder.path().join("clock.so")));
        node.with_env("PHALANX_TEST_CLOCK", text(self.offset()))
    }

    /// Sets the clock so far from the right time.
    pub fn jump(&self, seconds: i64) {
        // The file is mapped: it is changed, never replaced.
        let file = fs::OpenOptions::new().write(true).open(self.offset()).expect("the file");
        std::os::unix::fs::FileExt::write_all_at(&file, &seconds.to_le_bytes(), 0).expect("a write");
    }

    fn offset(&self) -> PathBuf {
        self.folder.path().join("offset")
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}
