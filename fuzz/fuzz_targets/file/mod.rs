//! A folder in memory for the file that is being tried, one for each process.

use std::fs;
use std::path::{Path, PathBuf};

use phalanx_formats::{ModelFiles, ShardPlan};

/// The folder.
pub fn folder() -> PathBuf {
    let base = if Path::new("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
    let folder = base.join(format!("phalanx-fuzz-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    folder
}

/// Writes a file into it.
pub fn write(name: &str, data: &[u8]) -> PathBuf {
    let path = folder().join(name);
    fs::write(&path, data).expect("a file");
    path
}

/// Opens a model and touches every byte of every tensor that it has.
pub fn open(path: &Path) -> Option<ModelFiles> {
    let files = ModelFiles::open(path).ok()?;
    for spec in files.geometry().tensors() {
        let Ok(tensor) = files.tensor(&spec.name) else { continue };
        let rows = 0..tensor.num_rows();
        let sum: u64 = rows.map(|row| tensor.row(row).iter().map(|byte| u64::from(*byte)).sum::<u64>()).sum();
        std::hint::black_box(sum);
    }
    let plan: ShardPlan = files.shard_plan(1, 0);
    std::hint::black_box(files.weight_bytes(&plan));
    Some(files)
}
