//! The command line: one file per subcommand.
//!
//! **Invariant:** a command ends with 0 where it is done, 1 where it failed and 2 on wrong usage. Data goes to stdout, all else to
//! stderr.

mod cuda_check;
mod doctor;
mod join;
mod leave;
mod reduce_bench;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use self::cuda_check::{CudaCheckArgs, cuda_check};
use self::doctor::{DoctorArgs, doctor};
use self::join::{JoinArgs, join};
use self::leave::{LeaveArgs, leave};
use self::reduce_bench::{ReduceBenchArgs, reduce_bench, reduce_bench_rank};
use crate::agent::devices::{Devices, Machine};
use crate::agent::node;
use crate::backend::{self, presence};
use crate::config::{Config, ConfigError, Environment, Flags, LogFormat, defaults};
use crate::logging::{self, LogTarget};
use crate::rank;

/// Wrong usage, as for clap's own errors.
const EXIT_USAGE: u8 = 2;

#[derive(Parser)]
#[command(
    name = "worker",
    version,
    about = "Adds this machine's devices to a Phalanx cluster",
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    command: Subcommands,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Args)]
struct CommonArgs {
    /// Folder of this node's files [default: PHALANX_HOME, else the user's state folder]
    #[arg(long, global = true, value_name = "DIR")]
    home: Option<PathBuf>,
    /// JSON file with the same settings as the flags [default: worker.json in the home]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// error, warn, info, debug, trace, or a list of target=level
    #[arg(long, global = true, value_name = "LEVEL")]
    log_level: Option<String>,
    /// text or json
    #[arg(long, global = true, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
}

#[derive(Subcommand)]
enum Subcommands {
    /// Adds this machine's devices to a cluster; waits for a head that is not there yet
    #[command(after_help = "Example:\n  worker join --address 10.0.0.5:8001 --num-gpus 2 --token phxt-...")]
    Join(JoinArgs),
    /// Takes this machine out of its cluster: its ranks end, then its agent
    #[command(after_help = "Example:\n  worker leave\n  worker leave --drain")]
    Leave(LeaveArgs),
    /// Tries what a rank needs of a CUDA device, one line for each thing; fails if one fails
    #[command(hide = true)]
    CudaCheck(CudaCheckArgs),
    /// Says whether this machine can serve, and what to do where it cannot; fails where something does
    #[command(after_help = "Example:\n  worker doctor\n  worker doctor --json")]
    Doctor(DoctorArgs),
    /// Times sums over this machine's devices; `coordinator bench allreduce` shows them
    #[command(hide = true)]
    ReduceBench(ReduceBenchArgs),
    /// One process of those sums; started by the two above
    #[command(hide = true)]
    ReduceBenchRank,
    /// One rank; started by the agent
    #[command(hide = true)]
    Rank {
        /// For people who look at the list of processes.
        name: Option<String>,
    },
}

/// Runs the command that was given.
pub fn main() -> ExitCode {
    let Cli { command, common } = Cli::parse();
    let flags = Flags {
        home: common.home,
        config: common.config,
        log_level: common.log_level,
        log_format: common.log_format,
        ..Flags::default()
    };
    let (result, as_json) = match command {
        Subcommands::Join(args) => (join(&args, flags), args.json),
        Subcommands::Leave(args) => (leave(&args, flags), false),
        Subcommands::CudaCheck(args) => (cuda_check(&args, flags), false),
        Subcommands::Doctor(args) => (doctor(&args, flags), false),
        Subcommands::ReduceBench(args) => (reduce_bench(&args, flags), false),
        Subcommands::ReduceBenchRank => (reduce_bench_rank(), false),
        Subcommands::Rank { .. } => end_rank(run_rank(flags)),
    };
    let Err(error) = result else { return ExitCode::SUCCESS };
    let is_usage = error.chain().any(|cause| cause.is::<ConfigError>());
    if as_json {
        let code = if is_usage { "usage" } else { "failed" };
        eprintln!("{}", serde_json::json!({"error": {"code": code, "message": format!("{error:#}"), "hint": ""}}));
    } else {
        eprintln!("error: {error:#}");
    }
    ExitCode::from(if is_usage { EXIT_USAGE } else { 1 })
}

/// The devices of this machine that the configuration offers.
fn offer(config: &Config) -> anyhow::Result<Devices> {
    let machine = Machine {
        count: &|kind| presence::count(kind, defaults::PROBE_DEADLINE),
        serves: &presence::serves,
        cpu_name: node::cpu_name(),
        cuda_visible: config.cuda_visible.clone(),
        hip_visible: config.hip_visible.clone(),
    };
    Ok(machine.offer(config.device, config.num_gpus)?)
}

fn run_rank(flags: Flags) -> anyhow::Result<()> {
    let launch = rank::bind_to_agent()?;
    let config = Config::load(flags, Environment::read())?;
    start_logging(&config, LogTarget::stderr())?;
    rank::run(launch)?;
    Ok(())
}

/// Says what went wrong and is gone, whatever the device is at.
fn end_rank(ended: anyhow::Result<()>) -> ! {
    if let Err(error) = &ended {
        eprintln!("error: {error:#}");
    }
    backend::end_process(u8::from(ended.is_err()))
}

fn start_logging(config: &Config, target: LogTarget) -> anyhow::Result<()> {
    let expected = "error, warn, info, debug, trace, or a list of target=level";
    let refused = |_| ConfigError::Value { key: "--log-level", value: config.log_level.clone(), expected };
    Ok(logging::start(&config.log_level, config.log_format, target).map_err(refused)?)
}
