//! The commands of this repository: `cargo xtask demo | test | device-code | fetch`.
//!
//! Knows how to build, obtain what tests need, and drive the two binaries as a user does. Holds no product code.
//!
//! **Invariant:** whatever `test` needs and a machine with Rust, a C compiler and Python 3 lacks, `fetch` obtains.

mod demo;
mod device_code;
mod fetch;
mod process;
mod test;

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
    /// Obtains the model and the tokenizers that tests use, with their checksums.
    Fetch,
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Demo { keep, question } => demo::run(keep, &question),
        Command::Test => test::run(),
        Command::DeviceCode => device_code::run(),
        Command::Fetch => fetch::model().and(fetch::tokenizers()).map(|_| ()),
    }
}
