//! `coordinator bench`: measures a served model from outside, through the API that everybody uses; and sums over devices.
//!
//! Prompts are random token ids; end tokens are ignored, so that every answer has the length that was asked for.
//!
//! **Invariant:** what is reported was measured by this client; a run in which a request failed is an error.

mod allreduce;
mod latency;
mod load;
mod serve;
mod stats;
mod table;
mod throughput;
mod trace;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::{Value, json};

use super::launch::runtime;
use super::target::{Target, TargetFlags};
use super::{CliError, Outcome, Surroundings};
use load::{Lengths, Random};
use table::Table;

/// Measure latency, throughput, a server under load, or sums over devices
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  coordinator bench latency ./model --input-len 512 --output-len 128\n  coordinator bench \
                        throughput ./model --num-prompts 200\n  coordinator bench serve ./model --request-rate 4\n  \
                        coordinator bench allreduce --world 2"
)]
pub struct BenchFlags {
    #[command(subcommand)]
    what: What,
}

/// What is measured.
#[derive(Debug, Clone, Subcommand)]
enum What {
    Latency(Box<latency::LatencyFlags>),
    Throughput(Box<throughput::ThroughputFlags>),
    Serve(Box<serve::ServeFlags>),
    Allreduce(allreduce::AllreduceFlags),
}

/// Flags of every benchmark.
#[derive(Debug, Clone, Args)]
pub(super) struct CommonFlags {
    #[command(flatten)]
    target: TargetFlags,
    /// Seed of the random prompts and arrivals
    #[arg(long, value_name = "N", default_value_t = 0)]
    prompt_seed: u64,
    /// 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,
    /// Also write the result as JSON
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print the result as JSON in place of the table
    #[arg(long)]
    json: bool,
}

/// Lengths of the requests of a benchmark with many of them.
#[derive(Debug, Clone, Args)]
pub(super) struct LengthFlags {
    /// Tokens of a prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    input_len: u32,
    /// Tokens of an answer
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    output_len: u32,
    /// Number of requests [default: 100, or all of --lengths]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    num_prompts: Option<u32>,
    /// File of lengths: {"prompt": [...], "output": [...]} or [[input, output], ...]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["input_len", "output_len"])]
    lengths: Option<PathBuf>,
}

impl LengthFlags {
    fn read(&self) -> Result<Vec<Lengths>, CliError> {
        let num = self.num_prompts.map(|num| num as usize);
        Ok(match &self.lengths {
            Some(path) => {
                let lengths = load::read_lengths(path)?;
                let num = num.unwrap_or(lengths.len());
                lengths.into_iter().cycle().take(num).collect()
            }
            None => vec![Lengths { input: self.input_len, output: self.output_len }; num.unwrap_or(100)],
        })
    }
}

/// A request of a benchmark.
#[derive(Debug, Clone)]
struct BenchRequest {
    lengths: Lengths,
    body: Value,
}

impl CommonFlags {
    /// Requests of these lengths, random and each different.
    fn requests(
        &self,
        target: &Target,
        lengths: &[Lengths],
        random: &mut Random,
    ) -> Result<Vec<BenchRequest>, CliError> {
        let vocab_size = target.vocab_size().ok_or_else(|| {
            CliError::failed(
                "no_vocabulary",
                "the server does not tell its vocabulary; bench needs another head of this kind",
            )
        })?;
        if let (Some(context), Some(longest)) =
            (target.max_model_len(), lengths.iter().map(|lengths| lengths.input + lengths.output).max())
            && longest > context
        {
            let message = format!("the longest request has {longest} tokens; the model's context is {context}");
            return Err(CliError::usage(message));
        }
        let request = |lengths: &Lengths| BenchRequest {
            lengths: *lengths,
            body: json!({
                "model": target.model,
                "prompt": random.prompt(lengths.input, vocab_size),
                "max_tokens": lengths.output,
                "temperature": self.temperature,
                "ignore_eos": true,
                "stream": true,
                "return_token_ids": true,
            }),
        };
        Ok(lengths.iter().map(request).collect())
    }

    /// Shows a result, and writes it where that was asked for.
    fn report(&self, title: &str, table: &Table, result: &impl Serialize) -> Outcome {
        report_as(title, &table.render(title), result, self.output.as_deref(), self.json)
    }
}

/// Prints a result as a table, or as JSON, and writes it where that was asked for.
fn report_as(title: &str, table: &str, result: &impl Serialize, output: Option<&Path>, as_json: bool) -> Outcome {
    let object = json!({"benchmark": title, "version": phalanx_proto::VERSION, "result": result});
    let text = serde_json::to_string_pretty(&object).map_err(std::io::Error::other)?;
    if let Some(path) = output {
        let named = |error| CliError::failed("io", format!("{}: {error}", path.display()));
        std::fs::write(path, format!("{text}\n")).map_err(named)?;
    }
    if as_json {
        println!("{text}")
    } else {
        print!("{table}")
    }
    Ok(())
}

pub(super) fn run(surroundings: &Surroundings, flags: &BenchFlags) -> Outcome {
    runtime()?.block_on(async {
        match &flags.what {
            What::Latency(flags) => {
                let target = flags.common.target.open(surroundings).await?;
                let outcome = latency::run(&target, flags).await;
                target.end_with(outcome).await
            }
            What::Throughput(flags) => {
                let lengths = flags.lengths.read()?;
                let target = flags.common.target.open(surroundings).await?;
                let outcome = throughput::run(&target, flags, &lengths).await;
                target.end_with(outcome).await
            }
            What::Serve(flags) => {
                let lengths = flags.lengths.read()?;
                let target = flags.common.target.open(surroundings).await?;
                let outcome = serve::run(&target, flags, &lengths).await;
                target.end_with(outcome).await
            }
            What::Allreduce(flags) => allreduce::run(surroundings, flags),
        }
    })
}
