//! The commands of this repository: `cargo xtask demo | test | device-code | soak | simulate | tool-calls | document | fetch | gpu-test | bench`.
//!
//! Knows how to build, obtain what tests need, and drive the two binaries as a user does. Holds no product code.
//!
//! **Invariant:** whatever `test` needs and a machine with Rust, a C compiler and Python 3 lacks, `fetch` obtains.

mod bench;
mod demo;
mod device_code;
mod fetch;
mod gpu;
mod packages;
mod process;
mod test;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "The commands of this repository")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Builds, obtains a small model, serves it on two worker processes, asks a question, prints status, stops.
    Demo {
        /// Leave the cluster running and print its addresses.
        #[arg(long)]
        keep: bool,
        /// The question.
        #[arg(long, default_value = "Name the planets of the solar system.")]
        question: String,
    },
    /// Format, clippy and every test, those with real processes included.
    Test,
    /// Compiles all device code for every architecture, and fails on register spills that are not declared.
    DeviceCode,
    /// A cluster under load whose processes are killed and frozen and whose network is cut at random; every answer is compared.
    Soak {
        /// How long; 0: no load, only what else is asked for.
        #[arg(long, default_value_t = 60.0)]
        minutes: f64,
        /// Repeats a run: which process is hit when.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// First every cell of the fault matrix: each fault against each process at each moment.
        #[arg(long)]
        matrix: bool,
        /// Of the matrix only the cells with all of these words in their names, as `kill agent` or `cut agent decode`.
        #[arg(long, value_name = "WORDS")]
        cells: Option<String>,
        /// Where all figures are written [default: .cache/soak.json]
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Plays clusters and stores that go wrong as their seeds say, without a clock; names the seeds that end badly.
    Simulate {
        /// How many of each.
        #[arg(long, visible_alias = "seeds", default_value_t = 100_000)]
        count: u64,
        /// The first one: a run that was broken off says how far it came.
        #[arg(long, visible_alias = "first", default_value_t = 0)]
        from: u64,
        /// Threads that play.
        #[arg(long, default_value_t = 2)]
        threads: u64,
        /// Only `cluster` or only `store`.
        #[arg(long, value_parser = ["cluster", "store"])]
        what: Option<String>,
    },
    /// Holds a server to its own `/openapi.json` with thousands of requests, allowed and forbidden ones.
    Document {
        /// Cases for each operation and phase, at the most.
        #[arg(long, default_value_t = 400)]
        examples: u32,
    },
    /// A thousand answers that have to be tool calls, in every format, from random weights: each is held against its schema.
    ToolCalls {
        /// Write every call here as well, one JSON object a line, for another validator.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Obtains what tests use: a model and tokenizers, with their checksums, and etcd.
    Fetch,
    /// Builds what needs a GPU and runs it, or packs it for a machine without Rust.
    GpuTest {
        /// Write programs, tests, reference data and `run.sh` here, and run nothing.
        #[arg(long, value_name = "DIR")]
        pack: Option<PathBuf>,
        /// Profile of the build.
        #[arg(long, default_value = "release")]
        profile: String,
        /// What to run: as `run.sh` takes it.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        what: Vec<String>,
    },
    /// Builds, serves models with made-up weights on the GPUs here and measures them, or packs what does.
    Bench {
        /// Write programs, tests, reference data and `run.sh` here, and run nothing.
        #[arg(long, value_name = "DIR")]
        pack: Option<PathBuf>,
        /// Profile of the build.
        #[arg(long, default_value = "release")]
        profile: String,
        #[command(flatten)]
        flags: bench::BenchFlags,
    },
    /// What `run.sh bench` runs, with programs that were built elsewhere.
    #[command(hide = true)]
    BenchRun {
        #[command(flatten)]
        flags: bench::BenchFlags,
    },
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Demo { keep, question } => demo::run(keep, &question),
        Command::Test => test::run(),
        Command::DeviceCode => device_code::run(),
        Command::Soak { minutes, seed, matrix, cells, json } => {
            test::soak(minutes, seed, cells.or_else(|| matrix.then(String::new)).as_deref(), json)
        }
        Command::Simulate { count, from, threads, what } => test::simulate(count, from, threads, what.as_deref()),
        Command::Document { examples } => test::document(examples),
        Command::ToolCalls { out } => test::tool_calls(out.as_deref()),
        Command::Fetch => fetch::model().and(fetch::tokenizers()).and(packages::etcd()),
        Command::GpuTest { pack, profile, what } => gpu::run(pack.as_deref(), &profile, &what),
        Command::Bench { pack: Some(folder), profile, .. } => gpu::run(Some(&folder), &profile, &[]),
        Command::Bench { pack: None, profile, flags } => bench::run_here(&flags, &profile),
        Command::BenchRun { flags } => bench::run_packed(&flags),
    }
}
