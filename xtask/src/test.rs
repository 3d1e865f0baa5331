//! `cargo xtask test`: what CI runs, in the order in which it fails soonest.

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

/// Builds the programs, and runs the soak beside them.
pub fn soak(minutes: f64, seed: u64) -> anyhow::Result<()> {
    check(cargo().args(["build", "--workspace", "--bins", "--examples"]))?;
    let soak = build_binaries()?.join("examples/soak");
    check(Command::new(soak).args([minutes.to_string(), seed.to_string()]))
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
