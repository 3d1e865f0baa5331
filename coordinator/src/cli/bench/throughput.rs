//! `coordinator bench throughput`: everything at once, as fast as it goes.

use clap::Args;
use futures::StreamExt;
use serde::Serialize;

use super::load::{Lengths, Random};
use super::trace::{Summary, Trace};
use super::{CommonFlags, LengthFlags};
use crate::cli::Outcome;
use crate::cli::target::Target;

/// Measure how fast many requests are done that are all there at the start
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  coordinator bench throughput ./model --num-prompts 200 --input-len 256 --output-len 64\n  \
                        coordinator bench throughput ./model --lengths mixed_lengths.json"
)]
pub struct ThroughputFlags {
    #[command(flatten)]
    pub(super) common: CommonFlags,
    #[command(flatten)]
    pub(super) lengths: LengthFlags,
    /// Requests under way at once: enough to keep every batch full
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    max_concurrency: u32,
}

#[derive(Serialize)]
struct ThroughputResult<'a> {
    max_concurrency: u32,
    summary: &'a Summary,
}

pub(super) async fn run(target: &Target, flags: &ThroughputFlags, lengths: &[Lengths]) -> Outcome {
    let mut random = Random::new(flags.common.prompt_seed);
    let requests = flags.common.requests(target, lengths, &mut random)?;
    let calls = requests.iter().map(|request| Trace::record(&target.client, request));
    let ended = futures::stream::iter(calls).buffer_unordered(flags.max_concurrency as usize);
    let summary = Summary::collect(requests.len(), ended).await?;
    let result = ThroughputResult { max_concurrency: flags.max_concurrency, summary: &summary };
    flags.common.report("throughput", &summary.table(), &result)
}
