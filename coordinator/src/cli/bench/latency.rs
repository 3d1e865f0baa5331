//! `coordinator bench latency`: one batch at a time, again and again.

use std::time::{Duration, Instant};

use clap::Args;
use futures::future::try_join_all;
use serde::Serialize;

use super::load::{Lengths, Random};
use super::stats::Distribution;
use super::trace::{Bar, Summary, Trace};
use super::{BenchRequest, CommonFlags};
use crate::cli::target::Target;
use crate::cli::{CliError, Outcome};

/// Measure one batch at a time: time to the end, to the first token, and between tokens
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  coordinator bench latency ./model --input-len 128 --output-len 128 --batch-size 8")]
pub struct LatencyFlags {
    #[command(flatten)]
    pub(super) common: CommonFlags,
    /// Tokens of a prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    input_len: u32,
    /// Tokens of an answer
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    output_len: u32,
    /// Requests of a batch
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
    /// Batches that are not counted
    #[arg(long, value_name = "N", default_value_t = 3)]
    num_iters_warmup: u32,
    /// Batches that are
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    num_iters: u32,
}

#[derive(Serialize)]
struct LatencyResult<'a> {
    input_len: u32,
    output_len: u32,
    batch_size: u32,
    num_iters: u32,
    batch_ms: &'a Distribution,
    summary: &'a Summary,
}

pub(super) async fn run(target: &Target, flags: &LatencyFlags) -> Outcome {
    let lengths = vec![Lengths { input: flags.input_len, output: flags.output_len }; flags.batch_size as usize];
    let mut random = Random::new(flags.common.prompt_seed);
    let mut bar = Bar::new((flags.num_iters * flags.batch_size) as usize);
    let (mut times, mut traces) = (Vec::new(), Vec::new());
    for iteration in 0..flags.num_iters_warmup + flags.num_iters {
        // New prompts for each batch: nothing of them is in the prefix cache.
        let requests = flags.common.requests(target, &lengths, &mut random)?;
        let (time, batch) = batch(target, &requests).await?;
        if iteration >= flags.num_iters_warmup {
            times.push(time);
            batch.iter().for_each(|trace| bar.add(trace));
            traces.extend(batch);
        }
    }
    drop(bar);
    let summary = Summary::new(&traces, times.iter().sum());
    let batch_ms = Distribution::of_ms(times);
    let mut table = summary.table();
    table.distribution("batch", "ms", &batch_ms);
    summary.latencies(&mut table);
    let (input_len, output_len, batch_size, num_iters) =
        (flags.input_len, flags.output_len, flags.batch_size, flags.num_iters);
    let result = LatencyResult { input_len, output_len, batch_size, num_iters, batch_ms: &batch_ms, summary: &summary };
    flags.common.report("latency", &table, &result)
}

async fn batch(target: &Target, requests: &[BenchRequest]) -> Result<(Duration, Vec<Trace>), CliError> {
    let started = Instant::now();
    let traces = try_join_all(requests.iter().map(|request| Trace::record(&target.client, request))).await?;
    Ok((started.elapsed(), traces))
}
