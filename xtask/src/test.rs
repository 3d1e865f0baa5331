//! `cargo xtask test`: what CI runs, in the order in which it fails soonest.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::device_code;
use crate::fetch;
use crate::packages;
use crate::process::{build_binaries, cache, cargo, check, root};

/// Checks licences, bans and sources.
const CARGO_DENY: &str = "0.20.2";

/// Format, lints, licences, device code, what tests need, every test.
pub fn run() -> anyhow::Result<()> {
    let started = Instant::now();
    let step = |name: &str| eprintln!("\n== {name} ({:.0} s)", started.elapsed().as_secs_f64());
    step("format");
    check(cargo().args(["fmt", "--all", "--check"]))?;
    step("lints");
    check(cargo().args(["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]))?;
    // Tests that need a GPU are no part of `--all-targets`; that they compile can be seen anywhere.
    let gpu_tests = [
        "clippy",
        "--workspace",
        "--test",
        "cuda",
        "--test",
        "gpu",
        "--test",
        "gpu_nodes",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ];
    check(cargo().args(gpu_tests))?;
    step("licences, bans, sources");
    deny()?;
    step("device code");
    device_code::run()?;
    step("what tests need");
    fetch::model()?;
    fetch::tokenizers()?;
    packages::etcd()?;
    // Builds the two programs as well: packages with tests of their own binaries have them built beside the tests.
    step("tests");
    check(cargo().args(["test", "--workspace", "--no-fail-fast"]))?;
    step("all green");
    Ok(())
}

/// Builds the programs, and runs the soak beside them, behind the cells of the fault matrix that have these words in their names.
pub fn soak(minutes: f64, seed: u64, cells: Option<&str>, json: Option<PathBuf>) -> anyhow::Result<()> {
    check(cargo().args(["build", "--workspace", "--bins", "--examples"]))?;
    let soak = build_binaries()?.join("examples/soak");
    let json = json.unwrap_or_else(|| cache().join("soak.json"));
    if let Some(folder) = json.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let matrix = if cells.is_some() { "matrix" } else { "no-matrix" };
    let (minutes, seed) = (minutes.to_string(), seed.to_string());
    check(Command::new(soak).args([&minutes, &seed, matrix]).arg(json).arg(cells.unwrap_or_default()))
}

/// Plays so many seeds of both simulations or of one, in the release profile.
pub fn simulate(count: u64, from: u64, threads: u64, what: Option<&str>) -> anyhow::Result<()> {
    let test = ["test", "--release", "--package", "phalanx-coordinator", "--lib", "--quiet", "--"];
    let which = [
        what.map_or_else(|| "stories_end_well".to_owned(), |what| format!("{what}_stories_end_well")),
        "--nocapture".to_owned(),
        "--test-threads=1".to_owned(),
    ];
    let mut command = cargo();
    command.args(test).args(which);
    for (name, value) in [("SEEDS", count), ("FIRST", from), ("THREADS", threads)] {
        command.env(format!("PHALANX_SIMULATION_{name}"), value.to_string());
    }
    check(&mut command)
}

/// Builds the programs, and runs schemathesis against them.
pub fn document(examples: u32) -> anyhow::Result<()> {
    check(cargo().args(["build", "--workspace", "--bins", "--examples"]))?;
    let document = build_binaries()?.join("examples/document");
    check(Command::new(document).arg(examples.to_string()))
}

/// Builds the programs, and runs the tool calls beside them.
pub fn tool_calls(out: Option<&Path>) -> anyhow::Result<()> {
    check(cargo().args(["build", "--workspace", "--bins", "--examples"]))?;
    let tool_calls = build_binaries()?.join("examples/tool_calls_1000");
    check(Command::new(tool_calls).args(out))
}

/// `cargo deny`, installed below `.cache` on first use. Advisories are left out: their database is not a package.
fn deny() -> anyhow::Result<()> {
    let tools = cache().join("tools");
    let program = tools.join("bin/cargo-deny");
    if !program.exists() {
        let install = ["install", "cargo-deny", "--version", CARGO_DENY, "--locked", "--quiet", "--root"];
        check(cargo().args(install).arg(&tools))?;
    }
    check(Command::new(program).current_dir(root()).args([
        "--log-level",
        "error",
        "check",
        "licenses",
        "bans",
        "sources",
    ]))
}
