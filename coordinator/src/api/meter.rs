//! What is measured of one output.
//!
//! **Invariant:** every output that was started is counted as finished exactly once, dropped ones as `abort`; the span of their
//! request ends with the last of them.

use std::sync::Arc;
use std::time::Instant;

use metrics::{Counter, Histogram};

use super::caller::Caller;
use super::request_span::{RequestFacts, RequestSpan};
use crate::metrics as names;
use crate::security::keys::KeyEntry;

/// The meters of one request: its model's, and its key's where it has one.
struct Meters {
    model: String,
    key: Option<KeyMeters>,
    request_prompt: Histogram,
    request_generation: Histogram,
    per_output_token: Histogram,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    first_token: Histogram,
    inter_token: Histogram,
    latency: Histogram,
    span: Option<RequestSpan>,
}

/// What a key has used.
struct KeyMeters {
    entry: Arc<KeyEntry>,
    prompt_tokens: Counter,
    generation_tokens: Counter,
}

impl KeyMeters {
    fn new(entry: Arc<KeyEntry>) -> Self {
        let counter = |name: &'static str| metrics::counter!(name, "key" => entry.name().to_owned());
        counter(names::KEY_REQUESTS).increment(1);
        let (prompt_tokens, generation_tokens) =
            (counter(names::KEY_PROMPT_TOKENS), counter(names::KEY_GENERATION_TOKENS));
        Self { entry, prompt_tokens, generation_tokens }
    }
}

/// Starts the meters of a request's outputs.
#[derive(Clone)]
pub struct RequestMeter {
    meters: Arc<Meters>,
    received: Instant,
}

/// The meter of one output.
pub struct OutputMeter {
    request: RequestMeter,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    num_tokens: u32,
    ended: bool,
}

impl RequestMeter {
    /// A request of `caller` for `model`.
    pub fn new(model: &str, caller: &Caller, facts: RequestFacts) -> Self {
        let counter = |name: &'static str| metrics::counter!(name, "model_name" => model.to_owned());
        let histogram = |name: &'static str| metrics::histogram!(name, "model_name" => model.to_owned());
        let meters = Meters {
            model: model.to_owned(),
            key: caller.key.clone().map(KeyMeters::new),
            request_prompt: histogram(names::REQUEST_PROMPT_TOKENS),
            request_generation: histogram(names::REQUEST_GENERATION_TOKENS),
            per_output_token: histogram(names::TIME_PER_OUTPUT_TOKEN),
            prompt_tokens: counter(names::PROMPT_TOKENS),
            generation_tokens: counter(names::GENERATION_TOKENS),
            first_token: histogram(names::TIME_TO_FIRST_TOKEN),
            inter_token: histogram(names::INTER_TOKEN_LATENCY),
            latency: histogram(names::REQUEST_LATENCY),
            span: caller.span.clone().map(|place| RequestSpan::new(place, model, caller, facts)),
        };
        Self { meters: Arc::new(meters), received: caller.received }
    }

    /// One of its prompts was accepted, however many outputs come behind it.
    pub fn prompt(&self, prompt_tokens: usize) {
        self.meters.prompt_tokens.increment(prompt_tokens as u64);
        if let Some(span) = &self.meters.span {
            span.prompt(prompt_tokens);
        }
        self.meters.request_prompt.record(prompt_tokens as f64);
        if let Some(key) = &self.meters.key {
            key.prompt_tokens.increment(prompt_tokens as u64);
            key.entry.add_tokens(prompt_tokens as u64);
        }
    }

    /// One of its outputs was accepted.
    pub fn output(&self) -> OutputMeter {
        OutputMeter { request: self.clone(), first_token: None, last_token: None, num_tokens: 0, ended: false }
    }
}

impl OutputMeter {
    /// A token came.
    pub fn token(&mut self, now: Instant) {
        let meters = &self.request.meters;
        meters.generation_tokens.increment(1);
        if let Some(key) = &meters.key {
            key.generation_tokens.increment(1);
            key.entry.add_tokens(1);
        }
        if let Some(span) = &meters.span {
            span.token(now);
        }
        self.num_tokens += 1;
        self.first_token.get_or_insert(now);
        match self.last_token.replace(now) {
            None => meters.first_token.record(now.duration_since(self.request.received)),
            Some(last) => meters.inter_token.record(now.duration_since(last)),
        }
    }

    /// The output ended.
    pub fn end(&mut self, reason: &'static str) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let meters = &self.request.meters;
        meters.latency.record(self.request.received.elapsed());
        if let Some(span) = &meters.span {
            span.output(reason);
        }
        meters.request_generation.record(f64::from(self.num_tokens));
        if let (Some(first), Some(last), 2..) = (self.first_token, self.last_token, self.num_tokens) {
            meters.per_output_token.record(last.duration_since(first).as_secs_f64() / f64::from(self.num_tokens - 1));
        }
        let model = meters.model.clone();
        metrics::counter!(names::REQUESTS_FINISHED, "model_name" => model, "finished_reason" => reason).increment(1);
    }
}

impl Drop for OutputMeter {
    fn drop(&mut self) {
        self.end("abort");
    }
}
