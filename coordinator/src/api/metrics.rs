//! `/metrics`: counters and histograms from the recorder, gauges from the engines, aliases for boards that exist.

use std::fmt::Write;
use std::time::Instant;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::{Router, routing};
use phalanx_proto::RankStatus;

use super::ApiState;
use super::served_models::ServedModel;
use crate::metrics as names;

/// The route.
pub fn routes() -> Router<ApiState> {
    Router::new().route("/metrics", routing::get(scrape))
}

async fn scrape(State(state): State<ApiState>) -> Response {
    let mut text = match names::recorder() {
        Ok(recorder) => {
            recorder.upkeep(Instant::now());
            recorder.render()
        }
        Err(error) => {
            tracing::warn!(%error, "no metrics recorder");
            String::new()
        }
    };
    for model in &state.models.list() {
        push_gauges(&mut text, model);
    }
    push_ranks(&mut text, &(state.status)().ranks);
    let text = with_types_once(&text);
    let aliases = aliased(&text);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text + &aliases).into_response()
}

/// What an engine says of itself now.
fn push_gauges(text: &mut String, model: &ServedModel) {
    let snapshot = model.engine.snapshot();
    let used = snapshot.num_blocks.saturating_sub(snapshot.num_blocks_free);
    let usage = f64::from(used) / f64::from(snapshot.num_blocks.max(1));
    let gauges = [
        (names::REQUESTS_RUNNING, "gauge", f64::from(snapshot.running)),
        (names::REQUESTS_WAITING, "gauge", f64::from(snapshot.waiting)),
        (names::KV_BLOCKS, "gauge", f64::from(snapshot.num_blocks)),
        (names::KV_BLOCKS_FREE, "gauge", f64::from(snapshot.num_blocks_free)),
        (names::KV_CACHE_USAGE, "gauge", usage),
        (names::STEPS, "counter", snapshot.counters.steps as f64),
        (names::PREEMPTIONS, "counter", snapshot.counters.preemptions as f64),
        (names::REPLAYS, "counter", snapshot.counters.replays as f64),
        (names::EPOCH, "gauge", snapshot.epoch as f64),
        (names::PREFIX_CACHE_QUERIES, "counter", snapshot.counters.prompt_tokens as f64),
        (names::PREFIX_CACHE_HITS, "counter", snapshot.counters.cached_tokens as f64),
    ];
    let label = escaped(&model.name);
    for (name, kind, value) in gauges {
        // Writing to a string cannot fail.
        let _ = write!(text, "# TYPE {name} {kind}\n{name}{{model_name=\"{label}\"}} {value}\n");
    }
}

/// How far each rank is.
fn push_ranks(text: &mut String, ranks: &[RankStatus]) {
    for rank in ranks {
        let RankStatus { deployment, replica, rank, steps, .. } = rank;
        let (name, label) = (names::RANK_STEPS, escaped(deployment));
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "# TYPE {name} counter\n{name}{{deployment=\"{label}\",replica=\"{replica}\",rank=\"{rank}\"}} {steps}\n"
        );
    }
}

fn escaped(label: &str) -> String {
    label.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

/// The samples of a line: its name without labels and value.
fn family(line: &str) -> &str {
    line.split(['{', ' ']).next().unwrap_or_default()
}

/// Puts the samples of each family together, behind one `# TYPE` line: several models write the same families.
fn with_types_once(text: &str) -> String {
    let mut families: Vec<(&str, Vec<&str>)> = Vec::new();
    let mut current = 0;
    for line in text.lines().filter(|line| !line.is_empty()) {
        if line.starts_with("# TYPE ") {
            current = families.iter().position(|(head, _)| *head == line).unwrap_or_else(|| {
                families.push((line, Vec::new()));
                families.len() - 1
            });
        } else if let (false, Some((_, samples))) = (line.starts_with('#'), families.get_mut(current)) {
            samples.push(line);
        }
    }
    let mut out = String::with_capacity(text.len());
    for (head, samples) in families {
        for line in std::iter::once(head).chain(samples) {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

/// The same samples under the names that other tools know.
fn aliased(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let (head, name) = match line.strip_prefix("# TYPE ") {
            Some(rest) => ("# TYPE ", family(rest)),
            None => ("", family(line)),
        };
        let alias = names::ALIASES.iter().find_map(|(ours, theirs)| {
            let tail = name.strip_prefix(ours)?;
            matches!(tail, "" | "_bucket" | "_sum" | "_count").then(|| format!("{theirs}{tail}"))
        });
        if let Some(alias) = alias {
            out.push_str(head);
            out.push_str(&alias);
            out.push_str(&line[head.len() + name.len()..]);
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_stand_together_and_have_aliases() {
        let text = "# HELP x y\n# TYPE phalanx_requests_running gauge\nphalanx_requests_running{model_name=\"a\"} 1\n\
            # TYPE phalanx_time_to_first_token_seconds histogram\nphalanx_time_to_first_token_seconds_sum 2\n\
            # TYPE phalanx_requests_running gauge\nphalanx_requests_running{model_name=\"b\"} 0\n";
        let text = with_types_once(text);
        assert_eq!(
            text,
            "# TYPE phalanx_requests_running gauge\nphalanx_requests_running{model_name=\"a\"} 1\n\
             phalanx_requests_running{model_name=\"b\"} 0\n\
             # TYPE phalanx_time_to_first_token_seconds histogram\nphalanx_time_to_first_token_seconds_sum 2\n"
        );
        assert_eq!(
            aliased(&text),
            "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{model_name=\"a\"} 1\n\
             vllm:num_requests_running{model_name=\"b\"} 0\n\
             # TYPE vllm:time_to_first_token_seconds histogram\nvllm:time_to_first_token_seconds_sum 2\n"
        );
    }
}
