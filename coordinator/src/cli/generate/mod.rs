//! `coordinator generate`: many prompts at once, JSONL out.
//!
//! **Invariant:** each line of the input has one line of the output, in the same order, with its outputs or its error.

mod input;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use futures::StreamExt;
use indicatif::ProgressBar;
use serde_json::{Map, Value, json};

use super::api_client::{ApiClient, ClientError};
use super::launch::runtime;
use super::progress::counting_bar;
use super::sampling_flags::SamplingFlags;
use super::target::{Target, TargetFlags};
use super::{CliError, Outcome, Surroundings};
use input::{Defaults, InputFormat, Item};

/// Generate for many prompts: text or JSONL in, JSONL out
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Each line of output has `index`, the prompt, `outputs` and `usage`, or `error`.\n\nExample:\n  coordinator \
                        generate ./model.gguf --prompts prompts.txt --max-tokens 64\n  coordinator generate \
                        ./model --prompts requests.jsonl --output answers.jsonl"
)]
pub struct GenerateFlags {
    #[command(flatten)]
    target: TargetFlags,
    /// Prompts; - reads stdin
    #[arg(long, value_name = "FILE", default_value = "-")]
    prompts: PathBuf,
    /// How prompts are written
    #[arg(long, value_enum, default_value_t)]
    input_format: InputFormat,
    /// Where answers go [default: stdout]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Lines of text are messages to a chat model
    #[arg(long)]
    chat: bool,
    /// System message of such conversations
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingFlags,
    /// Most tokens of an output
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    max_tokens: u32,
    /// Outputs of each prompt
    #[arg(long, short, value_name = "N")]
    n: Option<u32>,
    /// Go on behind the model's end token
    #[arg(long)]
    ignore_eos: bool,
    /// Requests under way at once
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    max_concurrency: u32,
    /// Longest time for one request, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    timeout: u64,
}

impl GenerateFlags {
    fn defaults(&self) -> Defaults {
        let mut fields = self.sampling.fields();
        fields.insert("max_tokens".into(), self.max_tokens.into());
        if let Some(n) = self.n {
            fields.insert("n".into(), n.into());
        }
        if self.ignore_eos {
            fields.insert("ignore_eos".into(), true.into());
        }
        Defaults { fields, as_chat: self.chat, system: self.system.clone() }
    }
}

pub(super) fn run(surroundings: &Surroundings, flags: &GenerateFlags) -> Outcome {
    // Read before anything is started: a bad line costs nothing.
    let items = input::read(&flags.prompts, flags.input_format, &flags.defaults())?;
    let output = Output::open(flags.output.as_deref())?;
    if items.is_empty() {
        eprintln!("warning: there are no prompts");
        return Ok(());
    }
    runtime()?.block_on(async {
        let target = flags.target.open(surroundings).await?;
        let outcome = generate(&target, items, output, flags).await;
        target.end_with(outcome).await
    })
}

async fn generate(target: &Target, items: Vec<Item>, mut output: Output, flags: &GenerateFlags) -> Outcome {
    let started = Instant::now();
    let limit = Duration::from_secs(flags.timeout);
    let mut tally = Tally::new(items.len());
    let calls = items.into_iter().enumerate().map(|(index, item)| async move {
        let answer = ask(&target.client, &target.model, &item, limit).await;
        (index, line(index, item.echo, answer))
    });
    let mut answers = futures::stream::iter(calls).buffer_unordered(flags.max_concurrency as usize);
    while let Some((index, line)) = answers.next().await {
        tally.add(&line, started.elapsed());
        output.write(index, line)?;
    }
    output.finish()?;
    tally.finish(started.elapsed())
}

/// Asks, again where the server's queue was full, within the limit.
async fn ask(client: &ApiClient, model: &str, item: &Item, limit: Duration) -> Result<Value, ClientError> {
    let mut body = item.fields.clone();
    body.insert("model".into(), model.into());
    let body = Value::from(body);
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match client.post(item.path, &body, left).await {
            Err(error) => match error.retry_after() {
                Some(wait) if wait < left => tokio::time::sleep(wait).await,
                _ => return Err(error),
            },
            answer => return answer,
        }
    }
}

/// A line of the output.
fn line(index: usize, echo: Map<String, Value>, answer: Result<Value, ClientError>) -> Map<String, Value> {
    let mut line = Map::new();
    line.insert("index".into(), index.into());
    line.extend(echo);
    match answer {
        Ok(mut answer) => {
            let choices = answer["choices"].take();
            let outputs: Vec<Value> = choices.as_array().into_iter().flatten().map(output_of).collect();
            line.insert("outputs".into(), outputs.into());
            line.insert("usage".into(), answer["usage"].take());
        }
        Err(error) => drop(line.insert("error".into(), json!({"message": error.to_string()}))),
    }
    line
}

/// A choice with its text in the same place for chat and completions, without what is null.
fn output_of(choice: &Value) -> Value {
    let mut output = Map::new();
    let text = choice.pointer("/message/content").or_else(|| choice.get("text"));
    output.insert("text".into(), text.cloned().unwrap_or_default());
    for (name, value) in choice.as_object().into_iter().flatten() {
        if !value.is_null() && !matches!(name.as_str(), "index" | "text" | "message") {
            output.insert(name.clone(), value.clone());
        }
    }
    output.into()
}

/// Where lines go, in the order of their prompts.
struct Output {
    file: BufWriter<Box<dyn Write>>,
    next: usize,
    early: BTreeMap<usize, Map<String, Value>>,
}

impl Output {
    fn open(path: Option<&std::path::Path>) -> Result<Self, CliError> {
        let file: Box<dyn Write> = match path {
            None => Box::new(std::io::stdout()),
            Some(path) => {
                let named = |error| CliError::failed("io", format!("{}: {error}", path.display()));
                Box::new(File::create(path).map_err(named)?)
            }
        };
        Ok(Self { file: BufWriter::new(file), next: 0, early: BTreeMap::new() })
    }

    fn write(&mut self, index: usize, line: Map<String, Value>) -> Outcome {
        self.early.insert(index, line);
        while let Some(line) = self.early.remove(&self.next) {
            writeln!(self.file, "{}", Value::from(line))?;
            self.next += 1;
        }
        Ok(())
    }

    fn finish(&mut self) -> Outcome {
        Ok(self.file.flush()?)
    }
}

/// What was done so far, and its bar.
struct Tally {
    bar: ProgressBar,
    num_lines: usize,
    num_failed: usize,
    tokens: u64,
}

impl Tally {
    fn new(num_lines: usize) -> Self {
        Self { bar: counting_bar(num_lines, "prompts"), num_lines, num_failed: 0, tokens: 0 }
    }

    fn add(&mut self, line: &Map<String, Value>, elapsed: Duration) {
        self.num_failed += usize::from(line.contains_key("error"));
        let usage = line.get("usage").and_then(|usage| usage.get("completion_tokens"));
        self.tokens += usage.and_then(Value::as_u64).unwrap_or_default();
        self.bar.set_message(format!("{:.0} tokens/s", self.rate(elapsed)));
        self.bar.inc(1);
    }

    fn rate(&self, elapsed: Duration) -> f64 {
        self.tokens as f64 / elapsed.as_secs_f64().max(1e-9)
    }

    fn finish(self, elapsed: Duration) -> Outcome {
        self.bar.finish_and_clear();
        let (prompts, tokens, seconds) = (self.num_lines, self.tokens, elapsed.as_secs_f64());
        eprintln!("{prompts} prompts, {tokens} tokens in {seconds:.2} s: {:.1} tokens/s", self.rate(elapsed));
        if self.num_failed == 0 {
            return Ok(());
        }
        Err(CliError::failed(
            "requests",
            format!("{} of {prompts} prompts failed; see `error` in their lines", self.num_failed),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_out_in_order_whatever_ends_first() {
        let path = std::env::temp_dir().join(format!("phalanx-generate-{}.jsonl", std::process::id()));
        let mut output = Output::open(Some(&path)).unwrap();
        for index in [2, 0, 1] {
            output.write(index, line(index, Map::new(), Err(ClientError::BadUrl { url: "x".into() }))).unwrap();
        }
        output.finish().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let order: Vec<u64> =
            text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["index"].as_u64().unwrap()).collect();
        assert_eq!(order, [0, 1, 2]);
    }

    fn check(answer: Value, expected: &str) {
        assert_eq!(Value::from(line(0, Map::new(), Ok(answer))).to_string(), expected);
    }

    #[test]
    fn chat_and_completions_give_the_same_lines() {
        check(
            json!({"choices": [{"index": 0, "text": "a", "logprobs": null, "finish_reason": "stop"}], "usage": {"x": 1}}),
            r#"{"index":0,"outputs":[{"text":"a","finish_reason":"stop"}],"usage":{"x":1}}"#,
        );
        check(
            json!({"choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}, "token_ids": [1]}], "usage": {}}),
            r#"{"index":0,"outputs":[{"text":"a","token_ids":[1]}],"usage":{}}"#,
        );
    }
}
