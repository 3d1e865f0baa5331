//! Where programs and reference data lie: in the repository, or where the environment says (a packed folder on another machine).
//!
//! **Invariant:** no other file of the tests asks the environment or knows the repository's folders.

use std::path::{Path, PathBuf};

/// Folder of the programs.
const PROGRAMS: &str = "PHALANX_TEST_PROGRAMS";
/// Folder of the reference data.
const GOLDENS: &str = "PHALANX_TEST_GOLDENS";
/// Folder of models that were obtained.
const MODELS: &str = "PHALANX_TEST_MODELS";

fn said(name: &str) -> Option<PathBuf> {
    #[expect(clippy::disallowed_methods, reason = "the one place where tests look at the environment")]
    std::env::var_os(name).map(PathBuf::from)
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The programs: `cargo test --workspace` builds them beside the folder of the tests.
pub fn programs() -> PathBuf {
    said(PROGRAMS).unwrap_or_else(|| {
        let exe = std::env::current_exe().expect("this test's own path");
        exe.parent().and_then(Path::parent).expect("a folder with the programs").to_path_buf()
    })
}

/// The reference data.
pub fn goldens() -> PathBuf {
    said(GOLDENS).unwrap_or_else(|| repository().join("goldens"))
}

/// Models that `cargo xtask fetch` obtains.
pub fn models() -> PathBuf {
    said(MODELS).unwrap_or_else(|| repository().join("../.cache/models"))
}

/// A model's folder with its configuration and no weights.
pub fn model_config(name: &str) -> PathBuf {
    goldens().with_file_name("configs").join(name)
}
