//! One request with the times of its tokens, and many of them as one result.

use std::time::{Duration, Instant};

use futures::{Stream, StreamExt};
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::Value;

use super::super::progress::counting_bar;
use super::BenchRequest;
use super::stats::Distribution;
use super::table::Table;
use crate::cli::CliError;
use crate::cli::api_client::ApiClient;

/// Longest wait for a whole answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(600);

/// Tokens of an answer, or of a piece of it.
fn num_tokens(answer: &Value) -> usize {
    answer.pointer("/choices/0/token_ids").and_then(Value::as_array).map_or(0, Vec::len)
}

/// What was seen of one request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Trace {
    /// Tokens of its prompt.
    pub input_tokens: u32,
    /// Tokens that came.
    pub output_tokens: u32,
    /// From the sending to the first token.
    pub first_token: Duration,
    /// Between tokens.
    pub gaps: Vec<Duration>,
    /// From the sending to the end.
    pub total: Duration,
}

impl Trace {
    /// Sends a request and watches its tokens.
    ///
    /// # Errors
    /// The server refuses or fails, or the answer has another length than was asked for.
    pub async fn record(client: &ApiClient, request: &BenchRequest) -> Result<Self, CliError> {
        let started = Instant::now();
        let mut trace = Self { input_tokens: request.lengths.input, ..Self::default() };
        if !request.is_streamed {
            let answer = client.post("/v1/completions", &request.body, ANSWER_DEADLINE).await?;
            trace.output_tokens = num_tokens(&answer) as u32;
            return trace.end(started, request);
        }
        let mut last = Duration::ZERO;
        let mut stream = client.stream("/v1/completions", &request.body).await?;
        while let Some(chunk) = stream.next().await? {
            for _ in 0..num_tokens(&chunk) {
                let now = started.elapsed();
                match trace.output_tokens {
                    0 => trace.first_token = now,
                    _ => trace.gaps.push(now - last),
                }
                last = now;
                trace.output_tokens += 1;
            }
        }
        trace.end(started, request)
    }

    fn end(mut self, started: Instant, request: &BenchRequest) -> Result<Self, CliError> {
        self.total = started.elapsed();
        if self.output_tokens == request.lengths.output {
            return Ok(self);
        }
        let message = format!("an answer has {} tokens in place of {}", self.output_tokens, request.lengths.output);
        Err(CliError::failed("length", message))
    }

    /// Mean time of a token behind the first.
    fn time_per_token(&self) -> Option<Duration> {
        (!self.gaps.is_empty()).then(|| self.gaps.iter().sum::<Duration>() / (self.output_tokens - 1))
    }
}

/// Many requests together.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    requests: usize,
    duration_s: f64,
    input_tokens: u64,
    output_tokens: u64,
    requests_per_s: f64,
    output_tokens_per_s: f64,
    total_tokens_per_s: f64,
    ttft_ms: Distribution,
    tpot_ms: Distribution,
    itl_ms: Distribution,
    e2e_ms: Distribution,
}

impl Summary {
    /// Of `count` requests that begin as soon as `calls` is asked, with a bar on the way.
    ///
    /// # Errors
    /// That of the first request that fails; the others are dropped.
    pub async fn collect(
        count: usize,
        mut calls: impl Stream<Item = Result<Trace, CliError>> + Unpin,
    ) -> Result<Self, CliError> {
        let (mut bar, mut traces) = (Bar::new(count), Vec::with_capacity(count));
        let started = Instant::now();
        while let Some(trace) = calls.next().await {
            let trace = trace?;
            bar.add(&trace);
            traces.push(trace);
        }
        Ok(Self::new(&traces, started.elapsed()))
    }

    /// Of requests that took `duration` together.
    pub fn new(traces: &[Trace], duration: Duration) -> Self {
        let seconds = duration.as_secs_f64().max(1e-9);
        let sum = |of: fn(&Trace) -> u32| traces.iter().map(|trace| u64::from(of(trace))).sum::<u64>();
        let (input_tokens, output_tokens) = (sum(|trace| trace.input_tokens), sum(|trace| trace.output_tokens));
        Self {
            requests: traces.len(),
            duration_s: duration.as_secs_f64(),
            input_tokens,
            output_tokens,
            requests_per_s: traces.len() as f64 / seconds,
            output_tokens_per_s: output_tokens as f64 / seconds,
            total_tokens_per_s: (input_tokens + output_tokens) as f64 / seconds,
            ttft_ms: Distribution::of_ms(
                traces.iter().filter(|trace| !trace.first_token.is_zero()).map(|t| t.first_token),
            ),
            tpot_ms: Distribution::of_ms(traces.iter().filter_map(Trace::time_per_token)),
            itl_ms: Distribution::of_ms(traces.iter().flat_map(|trace| trace.gaps.iter().copied())),
            e2e_ms: Distribution::of_ms(traces.iter().map(|trace| trace.total)),
        }
    }

    /// The rows of counts and rates.
    pub fn table(&self) -> Table {
        let mut table = Table::default();
        table
            .count("requests", self.requests as u64)
            .number("duration, s", self.duration_s)
            .count("input tokens", self.input_tokens)
            .count("output tokens", self.output_tokens)
            .number("requests/s", self.requests_per_s)
            .number("output tokens/s", self.output_tokens_per_s)
            .number("total tokens/s", self.total_tokens_per_s);
        table
    }

    /// The rows of latencies.
    pub fn latencies(&self, table: &mut Table) {
        table
            .distribution("TTFT", "ms", &self.ttft_ms)
            .distribution("TPOT", "ms", &self.tpot_ms)
            .distribution("ITL", "ms", &self.itl_ms)
            .distribution("end to end", "ms", &self.e2e_ms);
    }
}

/// A bar of requests with a rate of tokens.
pub struct Bar {
    bar: ProgressBar,
    started: Instant,
    tokens: u64,
}

impl Bar {
    /// A bar of `count` requests.
    pub fn new(count: usize) -> Self {
        Self { bar: counting_bar(count, "requests"), started: Instant::now(), tokens: 0 }
    }

    /// A request ended.
    pub fn add(&mut self, trace: &Trace) {
        self.tokens += u64::from(trace.output_tokens);
        let rate = self.tokens as f64 / self.started.elapsed().as_secs_f64().max(1e-9);
        self.bar.set_message(format!("{rate:.0} output tokens/s"));
        self.bar.inc(1);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_counts_tokens_and_times() {
        let ms = Duration::from_millis;
        let trace =
            Trace { input_tokens: 10, output_tokens: 3, first_token: ms(5), gaps: vec![ms(1), ms(3)], total: ms(9) };
        let single = Trace { input_tokens: 10, output_tokens: 1, first_token: ms(7), gaps: Vec::new(), total: ms(7) };
        let summary = Summary::new(&[trace, single], ms(500));
        assert_eq!((summary.input_tokens, summary.output_tokens), (20, 4));
        assert_eq!((summary.output_tokens_per_s, summary.total_tokens_per_s), (8.0, 48.0));
        assert_eq!((summary.ttft_ms.mean, summary.tpot_ms.mean, summary.itl_ms.max), (6.0, 2.0, 3.0));
        assert_eq!(summary.tpot_ms.count, 1);
    }
}
