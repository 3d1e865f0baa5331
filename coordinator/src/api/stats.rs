//! One log line for each model every ten seconds, in the shape that people's scripts look for.
//!
//! **Invariant:** an idle model is silent.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use super::served_models::ServedModels;
use crate::engine::{Counters, EngineSnapshot};

/// Time between two lines.
const INTERVAL: Duration = Duration::from_secs(10);

/// Writes lines until it is dropped.
pub async fn log(models: ServedModels) {
    let mut last: HashMap<String, Counters> = HashMap::new();
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let served = models.list();
        last.retain(|name, _| served.iter().any(|model| model.name == *name));
        for model in served.iter().filter(|model| model.log_stats) {
            let now = model.engine.snapshot();
            let before = last.insert(model.name.clone(), now.counters).unwrap_or_default();
            if let Some(line) = Line::new(&before, &now) {
                tracing::info!(model = model.name, "{line}");
            }
        }
    }
}

/// What happened in one interval.
struct Line {
    prompt_rate: f64,
    generation_rate: f64,
    running: u32,
    waiting: u32,
    cache_usage: f64,
    hit_rate: f64,
}

impl Line {
    /// None where nothing happened. After a new epoch counters begin again.
    fn new(before: &Counters, now: &EngineSnapshot) -> Option<Self> {
        let grown = |before: u64, now: u64| if now >= before { now - before } else { now };
        let counters = &now.counters;
        let steps = grown(before.steps, counters.steps);
        if steps == 0 && now.running == 0 && now.waiting == 0 {
            return None;
        }
        let rate = |tokens: u64| tokens as f64 / INTERVAL.as_secs_f64();
        let used = now.num_blocks.saturating_sub(now.num_blocks_free);
        let percent = |part: f64, whole: f64| if whole > 0.0 { 100.0 * part / whole } else { 0.0 };
        Some(Self {
            prompt_rate: rate(grown(before.prompt_tokens, counters.prompt_tokens)),
            generation_rate: rate(grown(before.generated_tokens, counters.generated_tokens)),
            running: now.running,
            waiting: now.waiting,
            cache_usage: percent(f64::from(used), f64::from(now.num_blocks)),
            hit_rate: percent(counters.cached_tokens as f64, counters.prompt_tokens as f64),
        })
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Engine 000: Avg prompt throughput: {:.1} tokens/s, Avg generation throughput: {:.1} tokens/s, Running: {} reqs, \
             Waiting: {} reqs, GPU KV cache usage: {:.1}%, Prefix cache hit rate: {:.1}%",
            self.prompt_rate, self.generation_rate, self.running, self.waiting, self.cache_usage, self.hit_rate
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_model_has_a_line_and_an_idle_one_none() {
        let counters =
            Counters { steps: 5, prompt_tokens: 100, cached_tokens: 44, generated_tokens: 250, ..Counters::default() };
        let now =
            EngineSnapshot { running: 2, num_blocks: 100, num_blocks_free: 75, counters, ..EngineSnapshot::default() };
        assert_eq!(
            Line::new(&Counters::default(), &now).expect("a line").to_string(),
            "Engine 000: Avg prompt throughput: 10.0 tokens/s, Avg generation throughput: 25.0 tokens/s, Running: 2 reqs, \
             Waiting: 0 reqs, GPU KV cache usage: 25.0%, Prefix cache hit rate: 44.0%"
        );
        assert!(Line::new(&counters, &EngineSnapshot { running: 0, ..now }).is_none());
    }
}
