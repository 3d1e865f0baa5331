//! The span of one request, as it is told to a collector when all its outputs have ended.
//!
//! Names are those of vLLM and of OpenTelemetry's conventions for generative models, so that boards which exist show it.
//!
//! **Invariant:** a request has at most one span, sent when nothing of the request is left.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::caller::Caller;
use crate::traces::{Span, SpanPlace};

/// What a request asks for, as far as its span tells it.
#[derive(Debug, Clone, Copy, Default)]
pub struct RequestFacts {
    /// Outputs of each prompt.
    pub num_choices: Option<u32>,
    /// Most tokens of an output.
    pub max_tokens: Option<u32>,
    /// How it is drawn.
    pub temperature: Option<f32>,
    /// Among which share of the probability.
    pub top_p: Option<f32>,
}

/// What has come of a request so far.
#[derive(Debug)]
pub struct RequestSpan {
    place: SpanPlace,
    model: String,
    id: String,
    received: Instant,
    facts: RequestFacts,
    prompt_tokens: AtomicU64,
    completion_tokens: AtomicU64,
    outputs: AtomicU64,
    failed: AtomicBool,
    aborted: AtomicBool,
    first_token: OnceLock<Instant>,
    /// Nanoseconds from the first token to the last one.
    decode: AtomicU64,
}

impl RequestSpan {
    /// Nothing has come yet.
    pub fn new(place: SpanPlace, model: &str, caller: &Caller, facts: RequestFacts) -> Self {
        Self {
            place,
            model: model.to_owned(),
            id: caller.request_id.clone(),
            received: caller.received,
            facts,
            prompt_tokens: AtomicU64::new(0),
            completion_tokens: AtomicU64::new(0),
            outputs: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            aborted: AtomicBool::new(false),
            first_token: OnceLock::new(),
            decode: AtomicU64::new(0),
        }
    }

    /// A prompt was accepted.
    pub fn prompt(&self, num_tokens: usize) {
        self.prompt_tokens.fetch_add(num_tokens as u64, Relaxed);
    }

    /// A token came.
    pub fn token(&self, now: Instant) {
        self.completion_tokens.fetch_add(1, Relaxed);
        let first = *self.first_token.get_or_init(|| now);
        self.decode.fetch_max(now.saturating_duration_since(first).as_nanos() as u64, Relaxed);
    }

    /// An output ended.
    pub fn output(&self, reason: &'static str) {
        self.outputs.fetch_add(1, Relaxed);
        match reason {
            "error" => self.failed.store(true, Relaxed),
            "abort" => self.aborted.store(true, Relaxed),
            _ => {}
        }
    }

    fn span(&self) -> Span {
        let elapsed = self.received.elapsed();
        let RequestFacts { num_choices, max_tokens, temperature, top_p } = self.facts;
        let mut span = Span::ending_now("llm_request", elapsed)
            .with("gen_ai.request.id", self.id.as_str())
            .with("gen_ai.response.model", self.model.as_str())
            .with("gen_ai.usage.prompt_tokens", self.prompt_tokens.load(Relaxed))
            .with("gen_ai.usage.completion_tokens", self.completion_tokens.load(Relaxed))
            .with("gen_ai.usage.num_sequences", self.outputs.load(Relaxed))
            .with("gen_ai.latency.e2e", elapsed);
        let counts = [("gen_ai.request.n", num_choices), ("gen_ai.request.max_tokens", max_tokens)];
        for (key, count) in counts {
            span = count.into_iter().fold(span, |span, count| span.with(key, u64::from(count)));
        }
        for (key, number) in [("gen_ai.request.temperature", temperature), ("gen_ai.request.top_p", top_p)] {
            span = number.into_iter().fold(span, |span, number| span.with(key, number));
        }
        if let Some(first) = self.first_token.get() {
            span = span
                .with("gen_ai.latency.time_to_first_token", first.saturating_duration_since(self.received))
                .with("gen_ai.latency.time_in_model_decode", Duration::from_nanos(self.decode.load(Relaxed)));
        }
        match (self.failed.load(Relaxed), self.aborted.load(Relaxed)) {
            (true, _) => span.failed("the request failed"),
            (false, true) => span.failed("the client went away"),
            (false, false) => span,
        }
    }
}

impl Drop for RequestSpan {
    fn drop(&mut self) {
        self.place.send(self.span());
    }
}
