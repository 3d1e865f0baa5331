//! Running programs, and where things lie in this repository.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// What was obtained; not tracked by git.
pub fn cache() -> PathBuf {
    root().join(".cache")
}

/// A cargo of the same toolchain, in the repository.
pub fn cargo() -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root());
    command
}

/// Runs to the end; anything but success is an error.
pub fn check(command: &mut Command) -> anyhow::Result<()> {
    let line = format!("{command:?}");
    let status = command.status().with_context(|| format!("cannot start {line}"))?;
    if !status.success() {
        bail!("{line} ended with {status}");
    }
    Ok(())
}

/// Runs to the end and returns what it wrote to stdout.
pub fn output(command: &mut Command) -> anyhow::Result<String> {
    let line = format!("{command:?}");
    let out =
        command.stderr(std::process::Stdio::inherit()).output().with_context(|| format!("cannot start {line}"))?;
    if !out.status.success() {
        bail!("{line} ended with {}", out.status);
    }
    String::from_utf8(out.stdout).with_context(|| format!("{line} wrote something that is not text"))
}

/// Builds the two programs and returns the folder that they are in.
pub fn build_binaries() -> anyhow::Result<PathBuf> {
    build_with("dev")
}

/// The same in another profile.
pub fn build_with(profile: &str) -> anyhow::Result<PathBuf> {
    // The whole workspace: features of shared dependencies are then those of `cargo test --workspace`, and one build serves both.
    let what = ["build", "--workspace", "--bins", "--profile", profile, "--message-format", "json-render-diagnostics"];
    let messages = output(cargo().args(what))?;
    let executable = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .find(|path| path.file_stem().is_some_and(|name| name == "coordinator"));
    let path = executable.context("the build named no coordinator binary")?;
    path.parent().map(Path::to_path_buf).context("the coordinator binary lies in no folder")
}
