//! `coordinator bench serve`: requests that come one by one, as users do.

use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use futures::stream::FuturesUnordered;
use serde::Serialize;
use tokio::sync::Semaphore;

use super::load::{Lengths, Random};
use super::trace::{Summary, Trace};
use super::{BenchRequest, CommonFlags, LengthFlags};
use crate::cli::target::Target;
use crate::cli::{CliError, Outcome};

/// Measure a server under load: first token, time per token, stalls, tokens/s
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  coordinator bench serve ./model --num-prompts 200 --request-rate 4\n  coordinator bench serve \
                        ./model --max-concurrency 8 --input-len 256 --output-len 64"
)]
pub struct ServeFlags {
    #[command(flatten)]
    pub(super) common: CommonFlags,
    #[command(flatten)]
    pub(super) lengths: LengthFlags,
    /// Requests per second, at random times; inf: all at once
    #[arg(long, value_name = "RATE", default_value = "inf", value_parser = parse_rate)]
    request_rate: Rate,
    /// Most requests under way at once [default: no bound]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_concurrency: Option<u32>,
}

/// Requests per second; `None` is all at once.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(transparent)]
struct Rate(Option<f64>);

fn parse_rate(text: &str) -> Result<Rate, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate == f64::INFINITY => Ok(Rate(None)),
        Ok(rate) if rate > 0.0 => Ok(Rate(Some(rate))),
        _ => Err(format!("{text} is not a rate above 0, or inf")),
    }
}

#[derive(Serialize)]
struct ServeResult<'a> {
    request_rate: Rate,
    max_concurrency: Option<u32>,
    summary: &'a Summary,
}

pub(super) async fn run(target: &Target, flags: &ServeFlags, lengths: &[Lengths]) -> Outcome {
    let mut random = Random::new(flags.common.prompt_seed);
    let requests = flags.common.requests(target, lengths, &mut random)?;
    let arrivals = random.arrivals(requests.len(), flags.request_rate.0);
    let places = flags.max_concurrency.map_or(Semaphore::MAX_PERMITS, |num| num as usize);
    let places = Arc::new(Semaphore::new(places));
    let users: FuturesUnordered<_> = requests
        .iter()
        .zip(arrivals)
        .map(|(request, arrival)| user(target, request, arrival, Arc::clone(&places)))
        .collect();
    let summary = Summary::collect(requests.len(), users).await?;
    let mut table = summary.table();
    summary.latencies(&mut table);
    let (request_rate, max_concurrency) = (flags.request_rate, flags.max_concurrency);
    flags.common.report("serve", &table, &ServeResult { request_rate, max_concurrency, summary: &summary })
}

/// Comes at its time, waits for a place, asks. The wait for a place is not the server's and is not counted.
async fn user(
    target: &Target,
    request: &BenchRequest,
    arrival: Duration,
    places: Arc<Semaphore>,
) -> Result<Trace, CliError> {
    tokio::time::sleep(arrival).await;
    // The semaphore is never closed.
    let _place = places.acquire().await.map_err(|error| CliError::failed("internal", error.to_string()))?;
    Trace::record(&target.client, request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_numbers_or_inf() {
        let check = |text: &str, expected: Option<Option<f64>>| {
            assert_eq!(parse_rate(text).ok().map(|rate| rate.0), expected, "{text}");
        };
        check("inf", Some(None));
        check("2.5", Some(Some(2.5)));
        check("0", None);
        check("-1", None);
        check("NaN", None);
        check("fast", None);
    }
}
