//! Names of the head's metrics, and the recorder behind `/metrics`.
//!
//! Names are subject, unit, and `_total` for counters. Counters and histograms are recorded where things happen; gauges are
//! read from the engines when somebody asks.
//!
//! **Invariant:** each name stands here once; there is one recorder in a process.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

/// HTTP requests, by `endpoint` and `status`.
pub const HTTP_REQUESTS: &str = "phalanx_http_requests_total";
/// Seconds until a handler answered; for a stream, until its headers. By `endpoint`.
pub const HTTP_RESPONSE_SECONDS: &str = "phalanx_http_response_seconds";
/// Outputs that ended, by `model_name` and `finished_reason` (stop, length, abort, error).
pub const REQUESTS_FINISHED: &str = "phalanx_requests_finished_total";
/// Prompt tokens of sequences that were accepted.
pub const PROMPT_TOKENS: &str = "phalanx_prompt_tokens_total";
/// Tokens generated.
pub const GENERATION_TOKENS: &str = "phalanx_generation_tokens_total";
/// Prompt tokens that were looked up in the prefix cache.
pub const PREFIX_CACHE_QUERIES: &str = "phalanx_prefix_cache_queries_total";
/// Of these, tokens whose KV blocks were there.
pub const PREFIX_CACHE_HITS: &str = "phalanx_prefix_cache_hits_total";
/// Seconds from the request to its first token.
pub const TIME_TO_FIRST_TOKEN: &str = "phalanx_time_to_first_token_seconds";
/// Seconds between two tokens of a sequence.
pub const INTER_TOKEN_LATENCY: &str = "phalanx_inter_token_latency_seconds";
/// Seconds from the request to the end of the sequence.
pub const REQUEST_LATENCY: &str = "phalanx_request_latency_seconds";

/// Requests that were turned away, by `reason` (queue_full, queue_timeout, key_unknown, key_scope, key_rate, key_quota).
pub const ADMISSION_REJECTIONS: &str = "phalanx_admission_rejections_total";
/// Prompt tokens by `key`: the name of an API key.
pub const KEY_PROMPT_TOKENS: &str = "phalanx_key_prompt_tokens_total";
/// Tokens generated, by `key`.
pub const KEY_GENERATION_TOKENS: &str = "phalanx_key_generation_tokens_total";
/// Requests that generate, by `key`.
pub const KEY_REQUESTS: &str = "phalanx_key_requests_total";
/// Prompt tokens of a request.
pub const REQUEST_PROMPT_TOKENS: &str = "phalanx_request_prompt_tokens";
/// Tokens generated for a request.
pub const REQUEST_GENERATION_TOKENS: &str = "phalanx_request_generation_tokens";
/// Seconds from a sequence's first token to its last, over the tokens after the first.
pub const TIME_PER_OUTPUT_TOKEN: &str = "phalanx_request_time_per_output_token_seconds";

/// Sequences in the batch.
pub const REQUESTS_RUNNING: &str = "phalanx_requests_running";
/// Sequences that wait.
pub const REQUESTS_WAITING: &str = "phalanx_requests_waiting";
/// KV blocks of a deployment.
pub const KV_BLOCKS: &str = "phalanx_kv_blocks";
/// Of these, free; cached prefixes count as free.
pub const KV_BLOCKS_FREE: &str = "phalanx_kv_blocks_free";
/// Share of KV blocks in use, 0 to 1.
pub const KV_CACHE_USAGE: &str = "phalanx_kv_cache_usage_ratio";
/// Steps done, in all epochs.
pub const STEPS: &str = "phalanx_steps_total";
/// Sequences that gave their KV blocks back and started again, in all epochs.
pub const PREEMPTIONS: &str = "phalanx_preemptions_total";
/// Sequences that went on in a new epoch after their group broke.
pub const REPLAYS: &str = "phalanx_replays_total";
/// The epoch: grows with each group that was started again.
pub const EPOCH: &str = "phalanx_epoch";
/// Steps that a rank has answered, by `deployment`, `replica` and `rank`.
pub const RANK_STEPS: &str = "phalanx_rank_steps_total";

/// Names of another server that boards and autoscalers know, and ours that they stand for.
pub const ALIASES: &[(&str, &str)] = &[
    (REQUESTS_RUNNING, "vllm:num_requests_running"),
    (REQUESTS_WAITING, "vllm:num_requests_waiting"),
    (KV_CACHE_USAGE, "vllm:kv_cache_usage_perc"),
    (PROMPT_TOKENS, "vllm:prompt_tokens_total"),
    (GENERATION_TOKENS, "vllm:generation_tokens_total"),
    (PREEMPTIONS, "vllm:num_preemptions_total"),
    (PREFIX_CACHE_QUERIES, "vllm:prefix_cache_queries_total"),
    (PREFIX_CACHE_HITS, "vllm:prefix_cache_hits_total"),
    (REQUESTS_FINISHED, "vllm:request_success_total"),
    (TIME_TO_FIRST_TOKEN, "vllm:time_to_first_token_seconds"),
    (INTER_TOKEN_LATENCY, "vllm:inter_token_latency_seconds"),
    (REQUEST_LATENCY, "vllm:e2e_request_latency_seconds"),
    (ADMISSION_REJECTIONS, "vllm:admission_rejections_total"),
    (REQUEST_PROMPT_TOKENS, "vllm:request_prompt_tokens"),
    (REQUEST_GENERATION_TOKENS, "vllm:request_generation_tokens"),
    (TIME_PER_OUTPUT_TOKEN, "vllm:request_time_per_output_token_seconds"),
];

/// Buckets of latencies, seconds: from a quarter of a millisecond to ten minutes.
const LATENCY_BUCKETS: &[f64] = &[
    0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5,
    1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0,
];

/// Buckets of token counts.
const TOKEN_BUCKETS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6];

/// Samples are folded into buckets at least this often while requests come.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// The process's recorder.
pub struct Recorder {
    handle: PrometheusHandle,
    folded: Mutex<Instant>,
}

/// Installs the recorder on the first call.
///
/// # Errors
/// Another recorder is installed in this process; metrics cannot be shown.
pub fn recorder() -> Result<&'static Recorder, &'static BuildError> {
    static RECORDER: OnceLock<Result<Recorder, BuildError>> = OnceLock::new();
    let install = || {
        let builder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), LATENCY_BUCKETS)?
            .set_buckets_for_metric(Matcher::Full(REQUEST_PROMPT_TOKENS.into()), TOKEN_BUCKETS)?
            .set_buckets_for_metric(Matcher::Full(REQUEST_GENERATION_TOKENS.into()), TOKEN_BUCKETS)?;
        Ok(Recorder { handle: builder.install_recorder()?, folded: Mutex::new(Instant::now()) })
    };
    RECORDER.get_or_init(install).as_ref()
}

impl Recorder {
    /// Counters and histograms as Prometheus text.
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Folds samples into buckets if that was long ago, so that they take no memory without end.
    pub fn upkeep(&self, now: Instant) {
        {
            let mut folded = self.folded.lock().unwrap_or_else(PoisonError::into_inner);
            if now.duration_since(*folded) < UPKEEP_INTERVAL {
                return;
            }
            *folded = now;
        }
        self.handle.run_upkeep();
    }
}
