//! `cargo xtask gpu-test`: what needs a device, here or in a folder that is carried to a machine without Rust.
//!
//! The folder holds the programs, the test programs, the reference data, the benchmarked configurations, the scripts of
//! `tests/reference` and `run.sh`; tests find all of it through three variables of the environment, which only `run.sh` sets.
//!
//! **Invariant:** what is packed runs from wherever the folder lies, and nothing outside it is needed but a driver; the scripts want
//! Python, and the comparison with transformers wants that.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde_json::Value;

use crate::process::{cache, cargo, check, output, root};

/// Most bytes that are worth carrying.
const PACK_BYTES_MAX: u64 = 50 << 20;
/// What runs in a pack.
const RUN: &str = include_str!("../run.sh");
/// Scripts of `tests/reference`.
const SCRIPTS: [&str; 4] = ["cluster.py", "compare.py", "kill.py", "repeat.py"];
/// The model that does not fit into a pack; put beside it, it is found.
const MODEL: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Builds everything, then runs `what` of `run.sh` here, or packs it.
pub fn run(pack: Option<&Path>, profile: &str, what: &[String]) -> anyhow::Result<()> {
    let folder = pack.map_or_else(|| cache().join("gpu"), Path::to_path_buf);
    let programs = build(profile)?;
    write(&folder, &programs)?;
    if pack.is_some() {
        println!("packed into {}: carry it to a machine with GPUs, and run `sh run.sh` there", folder.display());
        return Ok(());
    }
    let model = cache().join("models").join(MODEL);
    if model.exists() {
        place(&model, &folder.join("models").join(MODEL))?;
    }
    check(Command::new("sh").arg(folder.join("run.sh")).args(what))
}

/// The programs and tests, by name.
fn build(profile: &str) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let messages = ["--workspace", "--profile", profile, "--message-format", "json-render-diagnostics"];
    let mut built = executables(&output(cargo().args(["build", "--bins"]).args(messages))?);
    let tests = ["test", "--no-run", "--test", "cuda", "--test", "gpu", "--test", "gpu_nodes"];
    built.extend(executables(&output(cargo().args(tests).args(messages))?));
    for name in ["coordinator", "worker", "xtask", "cuda", "gpu", "gpu_nodes"] {
        if !built.iter().any(|(built, _)| built == name) {
            bail!("the build named no program {name}");
        }
    }
    Ok(built)
}

/// Programs that cargo says it built, by the name of their target.
fn executables(messages: &str) -> Vec<(String, PathBuf)> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let program = |message: Value| {
        let path = message["executable"].as_str()?;
        Some((message["target"]["name"].as_str()?.to_owned(), PathBuf::from(path)))
    };
    messages.filter_map(program).collect()
}

fn write(folder: &Path, programs: &[(String, PathBuf)]) -> anyhow::Result<()> {
    let bin = folder.join("bin");
    for sub in [&bin, &folder.join("models")] {
        fs::create_dir_all(sub).with_context(|| format!("cannot make {}", sub.display()))?;
    }
    for (name, path) in programs {
        let to = bin.join(name);
        place(path, &to)?;
        // Smaller to carry; without binutils it stays as it is.
        let _ = Command::new("strip").arg(&to).stderr(Stdio::null()).status();
    }
    let goldens = root().join("tests/goldens");
    let wanted =
        |name: &OsStr| name.to_string_lossy().starts_with("tiny-") || name == "smollm2" || name == "embeddings";
    for entry in fs::read_dir(&goldens).with_context(|| format!("cannot read {}", goldens.display()))? {
        let entry = entry?;
        if wanted(&entry.file_name()) {
            place_folder(&entry.path(), &folder.join("goldens").join(entry.file_name()))?;
        }
    }
    // Beside the place of the model: whoever does not put it there means to go without.
    fs::write(folder.join("models/unavailable"), "not packed\n").context("cannot write models/unavailable")?;
    place_folder(&root().join("tests/configs"), &folder.join("configs"))?;
    let scripts = folder.join("reference");
    fs::create_dir_all(&scripts).with_context(|| format!("cannot make {}", scripts.display()))?;
    for name in SCRIPTS {
        place(&root().join("tests/reference").join(name), &scripts.join(name))?;
    }
    let script = folder.join("run.sh");
    fs::write(&script, RUN).with_context(|| format!("cannot write {}", script.display()))?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let bytes = size(folder)?.saturating_sub(size(&folder.join("models"))?);
    println!("{}: {:.1} MB", folder.display(), bytes as f64 / 1e6);
    if bytes > PACK_BYTES_MAX {
        eprintln!("that is more than {} MB: build in the release profile", PACK_BYTES_MAX >> 20);
    }
    Ok(())
}

fn place(from: &Path, to: &Path) -> anyhow::Result<()> {
    // A program that runs cannot be written to, but its name can be given to another file.
    if to.exists() {
        fs::remove_file(to).with_context(|| format!("cannot replace {}", to.display()))?;
    }
    let copied = fs::copy(from, to);
    copied.with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    let mode = fs::metadata(to)?.permissions().mode();
    Ok(fs::set_permissions(to, fs::Permissions::from_mode(mode | 0o600))?)
}

fn place_folder(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let (entry, target) = entry.map(|entry| (entry.path(), to.join(entry.file_name())))?;
        if entry.is_dir() { place_folder(&entry, &target)? } else { place(&entry, &target)? }
    }
    Ok(())
}

/// Bytes of all files in a folder.
fn size(folder: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        bytes += if entry.file_type()?.is_dir() { size(&entry.path())? } else { entry.metadata()?.len() };
    }
    Ok(bytes)
}
