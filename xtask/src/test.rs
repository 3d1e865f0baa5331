//! `cargo xtask test`: what CI runs, in the order in which it fails soonest.

use std::time::Instant;

use crate::fetch;
use crate::process::{build_binaries, cargo, check};

/// Format, lints, what tests need, every test.
pub fn run() -> anyhow::Result<()> {
    let started = Instant::now();
    let step = |name: &str| eprintln!("\n== {name} ({:.0} s)", started.elapsed().as_secs_f64());
    step("format");
    check(cargo().args(["fmt", "--all", "--check"]))?;
    step("lints");
    check(cargo().args(["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]))?;
    step("what tests need");
    fetch::model()?;
    fetch::tokenizers()?;
    step("programs");
    build_binaries()?;
    step("tests");
    check(cargo().args(["test", "--workspace", "--no-fail-fast"]))?;
    step("all green");
    Ok(())
}
