//! `coordinator run-batch`: a file of requests in OpenAI's batch format, a file of answers out.
//!
//! **Invariant:** each line of the input has one line of the output, in the same order, with its answer or its error.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use futures::StreamExt;
use serde_json::{Value, json};

use super::api_client::{ApiClient, ClientError, RawAnswer};
use super::connection::AddressFlag;
use super::launch::runtime;
use super::progress::counting_bar;
use super::serve::{EngineFlags, OwnHeadFlags, Served, ensure_served};
use super::{CliError, Outcome, Surroundings};
use crate::head::running_head;

/// Answer a file of requests in OpenAI's batch format
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Each line of input: {\"custom_id\", \"method\": \"POST\", \"url\": \"/v1/chat/completions\", \"body\"}.\n\n\
                        Example:\n  coordinator run-batch -i requests.jsonl -o answers.jsonl\n  coordinator run-batch -i \
                        in.jsonl -o out.jsonl --model ./model.gguf"
)]
pub struct RunBatchFlags {
    /// Requests, one a line
    #[arg(long, short, value_name = "FILE")]
    input_file: PathBuf,
    /// Answers, one a line
    #[arg(long, short, value_name = "FILE")]
    output_file: PathBuf,
    /// A model to serve for this, where none is served
    #[arg(long, value_name = "MODEL", conflicts_with = "base_url")]
    model: Option<String>,
    /// A server that runs [default: the head of this PHALANX_HOME]
    #[arg(long, value_name = "URL")]
    base_url: Option<String>,
    /// Key that the server wants
    #[arg(long, value_name = "KEY", env = "OPENAI_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Requests under way at once
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    max_concurrency: u32,
    /// Longest time for one request, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    timeout: u64,
    #[command(flatten)]
    address: AddressFlag,
    #[command(flatten)]
    engine: EngineFlags,
}

/// One line of the input.
#[derive(Debug, PartialEq)]
struct BatchRequest {
    custom_id: String,
    url: String,
    body: Value,
}

pub(super) fn run(surroundings: &Surroundings, flags: &RunBatchFlags) -> Outcome {
    // Read before anything is started: a bad line costs nothing.
    let requests = read(&flags.input_file)?;
    let named = |error| CliError::failed("io", format!("{}: {error}", flags.output_file.display()));
    let output = BufWriter::new(File::create(&flags.output_file).map_err(named)?);
    runtime()?.block_on(async {
        let (base, served) = open(surroundings, flags).await?;
        let outcome = match ApiClient::new(&base, flags.api_key.as_deref()) {
            Ok(client) => answer_all(client, requests, output, flags).await,
            Err(error) => Err(error.into()),
        };
        match served {
            Some(served) => outcome.and(served.end().await),
            None => outcome,
        }
    })
}

/// The server: named, or one that serves the model, or the head of this home.
async fn open(surroundings: &Surroundings, flags: &RunBatchFlags) -> Result<(String, Option<Served>), CliError> {
    if let Some(url) = &flags.base_url {
        return Ok((url.clone(), None));
    }
    if let Some(model) = &flags.model {
        let spec = flags.engine.spec(model)?;
        let address = flags.address.address.as_deref();
        let served = ensure_served(surroundings, address, &spec, &OwnHeadFlags::private()).await?;
        return Ok((served.http.clone(), Some(served)));
    }
    let head = running_head(&surroundings.environment.home).ok_or_else(|| {
        CliError::no_head("no head runs here", "Name a server with --base-url, or a model with --model")
    })?;
    Ok((head.http, None))
}

fn read(path: &Path) -> Result<Vec<BatchRequest>, CliError> {
    let named = |error| CliError::failed("io", format!("{}: {error}", path.display()));
    let file = BufReader::new(File::open(path).map_err(named)?);
    let mut requests = Vec::new();
    for (number, line) in (1..).zip(file.lines()) {
        let line = line.map_err(named)?;
        if line.trim().is_empty() {
            continue;
        }
        let bad = |why: String| CliError::usage(format!("{}, line {number}: {why}", path.display()));
        requests.push(parse(&line).map_err(bad)?);
    }
    Ok(requests)
}

fn parse(line: &str) -> Result<BatchRequest, String> {
    let mut value: Value = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let text = |name: &str| value[name].as_str().map(str::to_owned).ok_or_else(|| format!("{name} must be a string"));
    let (custom_id, url) = (text("custom_id")?, text("url")?);
    if value.get("method").is_some_and(|method| method != "POST") {
        return Err("method must be POST".into());
    }
    if !url.starts_with('/') {
        return Err("url must be a path such as /v1/chat/completions".into());
    }
    let body = value["body"].take();
    if !body.is_object() {
        return Err("body must be an object".into());
    }
    if body.get("stream").is_some_and(|stream| stream != false) {
        return Err("a batch cannot be streamed".into());
    }
    Ok(BatchRequest { custom_id, url, body })
}

async fn answer_all(
    client: ApiClient,
    requests: Vec<BatchRequest>,
    mut output: BufWriter<File>,
    flags: &RunBatchFlags,
) -> Outcome {
    let (started, num_requests) = (Instant::now(), requests.len());
    let bar = counting_bar(num_requests, "requests");
    let limit = Duration::from_secs(flags.timeout);
    let client = &client;
    let calls = requests.into_iter().map(async |request| {
        let answer = ask(client, &request, limit).await;
        line(&request.custom_id, answer)
    });
    let mut lines = std::pin::pin!(futures::stream::iter(calls).buffered(flags.max_concurrency as usize));
    let mut num_failed = 0;
    while let Some(line) = lines.next().await {
        num_failed += usize::from(line["response"]["status_code"] != 200);
        writeln!(output, "{line}")?;
        bar.inc(1);
    }
    output.flush()?;
    bar.finish_and_clear();
    eprintln!("{num_requests} requests in {:.2} s, {num_failed} failed", started.elapsed().as_secs_f64());
    if num_failed == 0 {
        return Ok(());
    }
    Err(CliError::failed("requests", format!("{num_failed} of {num_requests} requests failed; see their lines")))
}

/// Asks, again where the server says when, within the limit.
async fn ask(client: &ApiClient, request: &BatchRequest, limit: Duration) -> Result<RawAnswer, ClientError> {
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let answer = client.post_raw(&request.url, &request.body, left).await?;
        match answer.retry_after {
            Some(wait) if wait < left && matches!(answer.status, 429 | 503) => tokio::time::sleep(wait).await,
            _ => return Ok(answer),
        }
    }
}

fn line(custom_id: &str, answer: Result<RawAnswer, ClientError>) -> Value {
    let id = format!("batch_req_{}", uuid::Uuid::new_v4().simple());
    match answer {
        Ok(RawAnswer { status, request_id, body, .. }) => json!({
            "id": id, "custom_id": custom_id, "error": null,
            "response": {"status_code": status, "request_id": request_id, "body": body},
        }),
        Err(error) => json!({
            "id": id, "custom_id": custom_id, "response": null,
            "error": {"code": "no_answer", "message": error.to_string()},
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(line: &str, expected: &str) {
        let told = parse(line).map(|request| format!("{} {} {}", request.custom_id, request.url, request.body));
        assert_eq!(told.unwrap_or_else(|error| error), expected, "{line}");
    }

    #[test]
    fn lines_are_checked_before_anything_starts() {
        check(
            r#"{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":"x"}}"#,
            r#"a /v1/completions {"prompt":"x"}"#,
        );
        check(r#"{"url":"/v1/completions","body":{}}"#, "custom_id must be a string");
        check(r#"{"custom_id":"a","method":"GET","url":"/x","body":{}}"#, "method must be POST");
        check(r#"{"custom_id":"a","url":"x","body":{}}"#, "url must be a path such as /v1/chat/completions");
        check(r#"{"custom_id":"a","url":"/x"}"#, "body must be an object");
        check(r#"{"custom_id":"a","url":"/x","body":{"stream":true}}"#, "a batch cannot be streamed");
    }
}
