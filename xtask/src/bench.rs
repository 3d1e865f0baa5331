//! `cargo xtask bench`: the figures that are kept in `docs/benchmarks.md`, by `coordinator bench` against a served model.
//!
//! Each model is served once with made-up weights and measured in every way; one table and one JSON object come out.
//!
//! **Invariant:** nothing is measured here: the product's own command measures, through the API that everybody uses.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::process::{build_with, output, root};

/// Prompt and answer of the decode figures.
const LENGTH: u32 = 128;
/// Batches of the decode figures.
const BATCHES: [u32; 5] = [1, 8, 32, 128, 256];
/// Prompts, and tokens of each, of the prefill figure.
const PREFILL: (u32, u32) = (32, 2048);

/// What is measured, and with what.
#[derive(Debug, Args)]
pub struct BenchFlags {
    /// Folder of the programs
    #[arg(long, value_name = "DIR", hide = true)]
    programs: Option<PathBuf>,
    /// Folder of model configurations
    #[arg(long, value_name = "DIR", hide = true)]
    configs: Option<PathBuf>,
    /// Models and tensor-parallel sizes
    #[arg(
        long,
        value_name = "NAME:SIZE",
        value_delimiter = ',',
        default_value = "qwen1.5-0.5b:1,llama-3-8b:1,llama-3-8b:2"
    )]
    models: Vec<String>,
    /// Batches of the decode figures
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = BATCHES)]
    batches: Vec<u32>,
    /// Lengths of the mixed job: {"prompt": [...], "output": [...]}; without it there is none
    #[arg(long, value_name = "FILE")]
    lengths: Option<PathBuf>,
    /// Kind of device
    #[arg(long, default_value = "cuda")]
    device: String,
    /// Data type
    #[arg(long, default_value = "bfloat16")]
    dtype: String,
    /// Counted batches of each decode figure
    #[arg(long, value_name = "N", default_value_t = 3)]
    iterations: u32,
    /// Also write the figures as JSON
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// More flags of `coordinator serve`, one string
    #[arg(long, value_name = "FLAGS", default_value = "", allow_hyphen_values = true)]
    serve_flags: String,
}

/// A line of the table.
struct Figure {
    model: String,
    what: String,
    value: f64,
    unit: &'static str,
}

/// What was found so far.
#[derive(Default)]
struct Results {
    figures: Vec<Figure>,
    /// All that `coordinator bench` said.
    details: Vec<Value>,
    failures: Vec<String>,
}

/// A head of its own; it ends with this value.
struct Head {
    coordinator: PathBuf,
    home: PathBuf,
    http: String,
}

impl Head {
    fn start(programs: &Path, device: &str, slots: u32) -> anyhow::Result<Self> {
        let home = std::env::temp_dir().join(format!("phalanx-bench-{}", std::process::id()));
        fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
        let mut head = Self { coordinator: programs.join("coordinator"), home, http: String::new() };
        let ports = ["--port", "0", "--http-port", "0", "--dashboard-port", "0"];
        let slots = slots.to_string();
        let start = ["start", "--head", "--device", device, "--num-gpus", &slots, "--json"];
        let line: Value = serde_json::from_str(&output(head.command(&start).args(ports))?)
            .context("the coordinator did not start; its words are above")?;
        head.http = line["http"].as_str().unwrap_or_default().to_owned();
        Ok(head)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.coordinator);
        command.args(arguments).env("PHALANX_HOME", &self.home);
        command
    }

    /// Runs `coordinator bench`, and gives its result.
    fn bench(&self, arguments: &[String]) -> anyhow::Result<Value> {
        let text = output(self.command(&["bench"]).args(arguments).args(["--base-url", &self.http, "--json"]))?;
        let result: Value = serde_json::from_str(&text).context("bench --json is not JSON")?;
        Ok(result["result"].clone())
    }
}

impl Drop for Head {
    fn drop(&mut self) {
        let _ = self.command(&["stop"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        // Logs are of use only where something went wrong, and then the error names them.
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.home);
        }
    }
}

/// Builds, and measures here.
pub fn run_here(flags: &BenchFlags, profile: &str) -> anyhow::Result<()> {
    run(flags, &build_with(profile)?, &root().join("tests/configs"))
}

/// Measures with programs that lie where the flags say.
pub fn run_packed(flags: &BenchFlags) -> anyhow::Result<()> {
    let (Some(programs), Some(configs)) = (&flags.programs, &flags.configs) else {
        bail!("bench-run needs --programs and --configs: `cargo xtask bench` builds and knows them");
    };
    run(flags, programs, configs)
}

/// Measures, prints the table, writes the figures.
fn run(flags: &BenchFlags, programs: &Path, configs: &Path) -> anyhow::Result<()> {
    let mut results = Results::default();
    for model in &flags.models {
        let parsed = model.split_once(':').and_then(|(name, size)| Some((name, size.parse::<u32>().ok()?)));
        let (name, size) = parsed.with_context(|| format!("{model:?} is not like llama-3-8b:2"))?;
        if let Err(error) = measure(flags, programs, &configs.join(name), (name, size), &mut results) {
            results.fail(model, "serve", &error);
        }
    }
    print_table(&results.figures);
    let all = results.to_json();
    if let Some(path) = &flags.output {
        fs::write(path, format!("{all:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("\n{all}");
    if results.failures.is_empty() { Ok(()) } else { bail!("{} figures failed", results.failures.len()) }
}

/// Every figure of one served model; what one of them cannot do must not cost the others.
fn measure(
    flags: &BenchFlags,
    programs: &Path,
    config: &Path,
    (name, size): (&str, u32),
    results: &mut Results,
) -> anyhow::Result<()> {
    let head = Head::start(programs, &flags.device, size)?;
    let path = config.to_str().context("a folder whose name cannot be typed")?;
    let size = size.to_string();
    let serve = ["serve", path, "--served-model-name", name, "--load-format", "dummy", "--dtype", &flags.dtype];
    let limits = ["--tensor-parallel-size", &size, "--max-model-len", "4096", "--max-num-seqs", "256"];
    let started = Instant::now();
    let more = flags.serve_flags.split_whitespace();
    output(head.command(&serve).args(limits).args(more)).context("the model is not served")?;
    let model = format!("{name} TP {size}");
    results.add(&model, "ready, cold", started.elapsed().as_secs_f64(), "s");
    for batch in &flags.batches {
        let what = format!("decode, batch {batch}");
        let arguments = latency(LENGTH, LENGTH, *batch, flags.iterations);
        if let Some(result) = results.attempt(&model, &what, head.bench(&arguments)) {
            results.add(&model, &format!("{what}, per token"), number(&result, "/summary/tpot_ms/mean"), "ms");
            results.add(&model, &what, number(&result, "/summary/output_tokens_per_s"), "tok/s");
        }
    }
    let (prompts, tokens) = PREFILL;
    let what = format!("prefill, {prompts} x {tokens}");
    if let Some(result) = results.attempt(&model, &what, head.bench(&latency(tokens, 1, prompts, 3))) {
        let seconds = number(&result, "/batch_ms/mean") / 1e3;
        results.add(&model, &what, f64::from(prompts * tokens) / seconds, "tok/s");
    }
    if let Some(lengths) = &flags.lengths {
        let arguments = ["throughput", "--lengths", &lengths.to_string_lossy()].map(str::to_owned);
        if let Some(result) = results.attempt(&model, "mixed job", head.bench(&arguments)) {
            results.add(&model, "mixed job, all tokens", number(&result, "/summary/total_tokens_per_s"), "tok/s");
            results.add(&model, "mixed job, answers", number(&result, "/summary/output_tokens_per_s"), "tok/s");
        }
    }
    Ok(())
}

/// One batch at a time, after one that is not counted.
fn latency(input: u32, output: u32, batch: u32, iterations: u32) -> Vec<String> {
    let flags = [("input-len", input), ("output-len", output), ("batch-size", batch), ("num-iters", iterations)];
    let flags = flags.into_iter().chain([("num-iters-warmup", 1)]);
    let words = flags.flat_map(|(name, value)| [format!("--{name}"), value.to_string()]);
    std::iter::once("latency".to_owned()).chain(words).collect()
}

fn number(result: &Value, at: &str) -> f64 {
    result.pointer(at).and_then(Value::as_f64).unwrap_or(f64::NAN)
}

impl Results {
    fn add(&mut self, model: &str, what: &str, value: f64, unit: &'static str) {
        eprintln!("{model}: {what}: {value:.3} {unit}");
        self.figures.push(Figure { model: model.to_owned(), what: what.to_owned(), value, unit });
    }

    /// Keeps the whole of a result, or what went wrong.
    fn attempt(&mut self, model: &str, what: &str, result: anyhow::Result<Value>) -> Option<Value> {
        match result {
            Ok(result) => {
                self.details.push(json!({"model": model, "what": what, "result": &result}));
                Some(result)
            }
            Err(error) => {
                self.fail(model, what, &error);
                None
            }
        }
    }

    fn fail(&mut self, model: &str, what: &str, error: &anyhow::Error) {
        eprintln!("{model}: {what}: {error:#}");
        self.failures.push(format!("{model}: {what}: {error:#}"));
    }

    fn to_json(&self) -> Value {
        let figure = |Figure { model, what, value, unit }: &Figure| json!({"model": model, "what": what, "value": value, "unit": unit});
        let figures: Vec<Value> = self.figures.iter().map(figure).collect();
        json!({"figures": figures, "failures": self.failures, "details": self.details})
    }
}

fn print_table(figures: &[Figure]) {
    let width = |of: fn(&Figure) -> usize| figures.iter().map(of).max().unwrap_or(0);
    let (models, whats) = (width(|figure| figure.model.len()), width(|figure| figure.what.len()));
    println!();
    for Figure { model, what, value, unit } in figures {
        println!("{model:models$}  {what:whats$}  {value:>12.2} {unit}");
    }
}
