//! What is measured of one output.
//!
//! **Invariant:** every output that was started is counted as finished exactly once, dropped ones as `abort`.

use std::sync::Arc;
use std::time::Instant;

use metrics::{Counter, Histogram};

use crate::metrics as names;

/// The meters of one model.
struct ModelMeters {
    model: String,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    first_token: Histogram,
    inter_token: Histogram,
    latency: Histogram,
}

/// Starts the meters of a request's outputs.
#[derive(Clone)]
pub struct RequestMeter {
    meters: Arc<ModelMeters>,
    received: Instant,
}

/// The meter of one output.
pub struct OutputMeter {
    request: RequestMeter,
    last_token: Option<Instant>,
    ended: bool,
}

impl RequestMeter {
    /// A request for `model` that was received at `received`.
    pub fn new(model: &str, received: Instant) -> Self {
        let counter = |name: &'static str| metrics::counter!(name, "model_name" => model.to_owned());
        let histogram = |name: &'static str| metrics::histogram!(name, "model_name" => model.to_owned());
        let meters = ModelMeters {
            model: model.to_owned(),
            prompt_tokens: counter(names::PROMPT_TOKENS),
            generation_tokens: counter(names::GENERATION_TOKENS),
            first_token: histogram(names::TIME_TO_FIRST_TOKEN),
            inter_token: histogram(names::INTER_TOKEN_LATENCY),
            latency: histogram(names::REQUEST_LATENCY),
        };
        Self { meters: Arc::new(meters), received }
    }

    /// One of its outputs was accepted.
    pub fn output(&self, prompt_tokens: usize) -> OutputMeter {
        self.meters.prompt_tokens.increment(prompt_tokens as u64);
        OutputMeter { request: self.clone(), last_token: None, ended: false }
    }
}

impl OutputMeter {
    /// A token came.
    pub fn token(&mut self, now: Instant) {
        let meters = &self.request.meters;
        meters.generation_tokens.increment(1);
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
        let model = meters.model.clone();
        metrics::counter!(names::REQUESTS_FINISHED, "model_name" => model, "finished_reason" => reason).increment(1);
    }
}

impl Drop for OutputMeter {
    fn drop(&mut self) {
        self.end("abort");
    }
}
