//! The command line: one file per subcommand.
//!
//! Parses flags, asks a head through `HeadClient`, prints. Data goes to stdout, everything else to stderr.
//!
//! **Invariant:** a command ends with the exit code of its outcome: 0 done, 1 failed, 2 wrong usage, 3 cannot be placed,
//! 4 no head answers. No command acts on a process by name.

mod api_client;
mod bench;
mod chat;
mod completions;
mod connection;
mod doctor;
mod events;
mod failure;
pub mod frames;
mod generate;
mod head_process;
mod key;
mod launch;
mod logs;
mod placement_group;
mod progress;
mod restart;
mod run_batch;
mod sampling_flags;
pub mod serve;
mod serve_flags;
mod start;
mod status;
mod status_text;
mod stop;
mod target;
mod token;
mod undeploy;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

pub use failure::{CliError, Outcome};

use crate::config::Environment;
use crate::logging::{self, LogFormat};

/// A distributed inference server: one head, any number of machines.
#[derive(Debug, Parser)]
#[command(name = "coordinator", version, propagate_version = true, max_term_width = 110)]
#[command(after_help = "Example:\n  coordinator start --head --num-gpus 2\n  coordinator serve ./Qwen2.5-7B-Instruct \
                        --tensor-parallel-size 2\n  coordinator status")]
pub struct Cli {
    #[command(flatten)]
    global: GlobalFlags,
    #[command(subcommand)]
    command: Command,
}

/// Flags of every subcommand.
#[derive(Debug, Clone, Args)]
pub struct GlobalFlags {
    /// Log filter: error, warn, info, debug, trace, or a list of target=level
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// How log lines look
    #[arg(long, global = true, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// Token with the scope admin, for a head elsewhere [env: PHALANX_TOKEN] [default: the one in this PHALANX_HOME]
    #[arg(long, global = true, value_name = "TOKEN")]
    pub token: Option<String>,
    /// Plain text between machines, no tokens: whoever reaches the cluster port joins and commands
    #[arg(long, global = true)]
    pub insecure: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
enum Command {
    Start(start::StartFlags),
    Serve(Box<serve_flags::ServeFlags>),
    Status(status::StatusFlags),
    Undeploy(undeploy::UndeployFlags),
    Restart(restart::RestartFlags),
    Stop(stop::StopFlags),
    Events(events::EventsFlags),
    Logs(logs::LogsFlags),
    Generate(Box<generate::GenerateFlags>),
    RunBatch(Box<run_batch::RunBatchFlags>),
    Chat(Box<chat::ChatFlags>),
    #[command(visible_alias = "pg")]
    PlacementGroup(placement_group::PlacementGroupFlags),
    Key(key::KeyFlags),
    Token(token::TokenFlags),
    Bench(bench::BenchFlags),
    Doctor(doctor::DoctorFlags),
    Completions(completions::CompletionsFlags),
    #[command(hide = true)]
    HeadProcess(head_process::HeadProcessFlags),
}

/// What every subcommand is given.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// What the environment says.
    pub environment: Environment,
    /// Flags of every subcommand.
    pub global: GlobalFlags,
}

/// Runs the program.
pub fn main() -> ExitCode {
    let Cli { global, command } = Cli::parse();
    let environment = Environment::read();
    let quiet = if matches!(command, Command::HeadProcess(_)) { "info" } else { "warn" };
    let filter = global.log_level.clone().or_else(|| environment.log.clone()).unwrap_or_else(|| quiet.to_owned());
    if let Err(message) = logging::install(&filter, global.log_format) {
        return CliError::usage(message).report(false);
    }
    let surroundings = Surroundings { environment, global };
    let (json, result) = match command {
        Command::Start(flags) => (flags.json, start::run(&surroundings, &flags)),
        Command::Serve(flags) => (flags.json, serve::run(&surroundings, &flags)),
        Command::Status(flags) => (flags.json, status::run(&surroundings, &flags)),
        Command::Undeploy(flags) => (flags.json, undeploy::run(&surroundings, &flags)),
        Command::Restart(flags) => (flags.json, restart::run(&surroundings, &flags)),
        Command::Events(flags) => (flags.json, events::run(&surroundings, &flags)),
        Command::Logs(flags) => (false, logs::run(&surroundings, &flags)),
        Command::Stop(flags) => (flags.json, stop::run(&surroundings, &flags)),
        Command::Generate(flags) => (false, generate::run(&surroundings, &flags)),
        Command::RunBatch(flags) => (false, run_batch::run(&surroundings, &flags)),
        Command::PlacementGroup(flags) => (flags.json(), placement_group::run(&surroundings, &flags)),
        Command::Key(flags) => (flags.json(), key::run(&surroundings, &flags)),
        Command::Token(flags) => (flags.json(), token::run(&surroundings, &flags)),
        Command::Chat(flags) => (false, chat::run(&surroundings, &flags)),
        Command::Bench(flags) => (false, bench::run(&surroundings, &flags)),
        Command::Doctor(flags) => (flags.json, doctor::run(&surroundings, &flags)),
        Command::Completions(flags) => (false, completions::run(&flags)),
        Command::HeadProcess(flags) => (true, head_process::run(&surroundings, &flags)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(json),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_subcommand_has_an_example() {
        for command in Cli::command().get_subcommands_mut().filter(|command| !command.is_hide_set()) {
            let name = command.get_name().to_owned();
            let help = command.render_long_help().to_string();
            assert!(help.contains("Example:") && help.contains(&format!("coordinator {name}")), "{name}: {help}");
        }
    }

    #[test]
    fn the_commands_of_the_manual_parse() {
        for line in [
            "start --head --num-gpus=2",
            "start --head --num-gpus 2 --json --port 0 --http-port 0 --dashboard-port 0 --block --device cpu",
            "serve ./m --tensor-parallel-size 4 --placement-strategy pack --wait 60s",
            "serve --model ./m --tensor-parallel-size auto --dtype float16 --gpu-memory-utilization 0.95",
            "serve ./m --trust-remote-code --worker-use-ray --swap-space 0 --num-gpu-blocks-override 4096 --port 0",
            "serve ./m --enable-prefix-caching --disable-log-stats --max-model-len 4096 --env A=b --env C=d",
            "status --json --watch",
            "undeploy m",
            "restart m --json",
            "events --follow --deployment m --json --tail 5",
            "logs",
            "logs m/0/1 --follow --tail 20",
            "stop --log-level debug --log-format json",
            "completions bash",
            "generate ./m --prompts p.txt --max-tokens 64 --temperature 0 --tensor-parallel-size 2",
            "generate --base-url http://h:8000 --chat --system x --top-k -1 --sampling-seed 3 -n 2 -o out.jsonl",
            "chat ./m --temperature 0.7 --stop a --stop b --max-tokens 128",
            "placement-group create --name g --bundle cpu=1,gpu=1 --bundle gpu=2,label.zone=a --strategy STRICT_SPREAD",
            "placement-group create --name g --bundle gpu=1 --selector zone=a --label owner=me --wait 10m --json",
            "placement-group wait g --timeout 30s",
            "pg list --label owner=me",
            "placement-group show g --json",
            "placement-group remove g --force",
            "serve ./m --placement-group g --tensor-parallel-size 2",
            "key create --name a --scopes inference,metrics --rate 60/min --tokens-per-day 1000 --json",
            "key revoke a",
            "key list --json",
            "token create --ttl 1h --scope join,admin --note rack-7 --json",
            "token create --ttl never",
            "token list",
            "token revoke 1f2e3d4c --address h:8001 --token t",
            "token revoke --node a-1",
            "start --head --insecure --join-token-file /join/token",
            "status --address h --token phxt",
            "run-batch -i in.jsonl -o out.jsonl",
            "run-batch --input-file in.jsonl --output-file out.jsonl --model ./m --tensor-parallel-size 2",
            "serve ./m --replicas auto --tensor-parallel-size 2",
            "serve ./m --max-queue 8 --queue-timeout 30s --api-key a --api-key b",
            "bench latency ./m --input-len 512 --output-len 128 --batch-size 1 --num-iters 3 --load-format dummy",
            "bench throughput ./m --num-prompts 200 --lengths l.json --json",
            "bench allreduce --world 4 --json --output r.json --device cuda",
            "doctor --json",
            "bench serve --base-url h:8000 --request-rate 2.5 --max-concurrency 8 --output r.json",
        ] {
            let words = std::iter::once("coordinator").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
    }

    #[test]
    fn wrong_usage_is_exit_code_two() {
        for line in [
            "start",
            "serve",
            "serve m --block-size x",
            "undeploy",
            "serve m --wait soon",
            "frobnicate",
            "chat",
            "bench serve m --request-rate 0",
            "key create",
            "token revoke",
            "token create --scope everything",
            "token create --ttl soon",
            "placement-group create --name g",
            "placement-group create --name g --bundle tpu=1",
            "placement-group create --name g --bundle gpu=1 --strategy loose",
            "key create --name a --rate often",
            "key create --name a --scopes everything",
            "run-batch -i x",
            "bench allreduce --world 1",
        ] {
            let words = std::iter::once("coordinator").chain(line.split(' '));
            let error = Cli::try_parse_from(words).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
