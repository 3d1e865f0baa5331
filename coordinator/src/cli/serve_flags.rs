//! Flags of `serve`: vLLM's names, so that habits carry over.
//!
//! **Invariant:** every flag is obeyed, refused with a reason, or named in one warning line; none is dropped in silence.

mod ignored;
mod own_head;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use clap::builder::PossibleValuesParser;

use super::CliError;
use super::connection::AddressFlag;
use super::launch::parse_pair;
use crate::cluster::strategy::Strategy;
use crate::cluster::{DeploymentSpec, ReplicaCount, TensorParallelSize};
use crate::config::{defaults, parse_duration};
use crate::engine::policy::Policy;
use crate::text::tools::ToolFormat;
use ignored::IgnoredFlags;
pub use own_head::OwnHeadFlags;

const DTYPES: [&str; 6] = ["auto", "float16", "half", "bfloat16", "float32", "float"];
const LOAD_FORMATS: [&str; 4] = ["auto", "safetensors", "gguf", "dummy"];

/// Serve a model; with no head running, start one here and stay in the foreground
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Examples:\n  coordinator serve ./Qwen2.5-7B-Instruct --tensor-parallel-size 2\n  coordinator serve \
                        ./model.gguf --served-model-name chat --wait 10m\n\nExample:\n  coordinator serve ./model.gguf"
)]
pub struct ServeFlags {
    /// Folder in Hugging Face layout, or .gguf file
    #[arg(value_name = "MODEL", required_unless_present = "model_flag")]
    model: Option<String>,
    /// The same as MODEL
    #[arg(long = "model", value_name = "MODEL", conflicts_with = "model")]
    model_flag: Option<String>,
    #[command(flatten)]
    pub engine: EngineFlags,
    #[command(flatten)]
    pub own_head: OwnHeadFlags,
    #[command(flatten)]
    pub address: AddressFlag,
    #[command(flatten)]
    ignored: IgnoredFlags,
    /// Print the deployment as one JSON object
    #[arg(long)]
    pub json: bool,
}

impl ServeFlags {
    /// The model as it was given.
    pub fn model(&self) -> &str {
        self.model.as_deref().or(self.model_flag.as_deref()).unwrap_or_default()
    }

    /// The flags that mean nothing here, for one warning line.
    pub fn ignored(&self) -> Vec<&'static str> {
        self.ignored.given()
    }
}

/// How a model is deployed: what `serve` shares with commands that serve a model for themselves.
#[derive(Debug, Clone, Args)]
pub struct EngineFlags {
    /// Ranks that share the model: a number, or auto for all free slots of one node
    #[arg(long, short = 't', visible_alias = "tp", value_name = "N|auto", default_value = "1", value_parser = parse_size)]
    pub tensor_parallel_size: TensorParallelSize,
    /// Copies of the model, each with its own ranks: a number, or auto for as many as the machines have room for
    #[arg(long, value_name = "N|auto", default_value = "1", value_parser = parse_replicas)]
    pub replicas: ReplicaCount,
    /// Names that the model answers to; the first is the deployment's
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub served_model_name: Vec<String>,
    /// Folder with other tokenizer files
    #[arg(long, value_name = "PATH")]
    pub tokenizer: Option<PathBuf>,
    /// File with another chat template
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// How the model writes calls of tools; normally found from its chat template
    #[arg(long, value_name = "FORMAT", value_parser = parse_tool_format)]
    pub tool_call_parser: Option<String>,
    /// How weights are read; dummy: random weights, for benchmarks
    #[arg(long, value_parser = PossibleValuesParser::new(LOAD_FORMATS), default_value = "auto")]
    pub load_format: String,
    /// Arithmetic of the model; auto: as stored
    #[arg(long, value_parser = PossibleValuesParser::new(DTYPES), default_value = "auto")]
    pub dtype: String,
    /// Storage of the KV cache
    #[arg(long, value_parser = PossibleValuesParser::new(DTYPES), default_value = "auto")]
    pub kv_cache_dtype: String,
    /// Longest sequence, prompt and output together [default: the model's]
    #[arg(long, value_name = "TOKENS")]
    pub max_model_len: Option<u32>,
    /// Share of device memory that may be used
    #[arg(long, value_name = "SHARE", default_value_t = defaults::MEMORY_UTILIZATION)]
    pub gpu_memory_utilization: f64,
    /// Tokens in a KV block, a multiple of 16
    #[arg(long, value_name = "TOKENS", default_value_t = defaults::BLOCK_SIZE)]
    pub block_size: u32,
    /// Fixed number of KV blocks in place of what fits
    #[arg(long, value_name = "N")]
    pub num_gpu_blocks_override: Option<u32>,
    /// Most sequences in a step
    #[arg(long, value_name = "N", default_value_t = defaults::MAX_NUM_SEQS)]
    pub max_num_seqs: u32,
    /// Most tokens in a step
    #[arg(long, value_name = "N", default_value_t = defaults::MAX_NUM_BATCHED_TOKENS)]
    pub max_num_batched_tokens: u32,
    /// Most requests that wait
    #[arg(long, value_name = "N", default_value_t = defaults::MAX_QUEUE)]
    pub max_queue: u32,
    /// Who runs next: priority: the lowest `priority` of a request, then who came first; fcfs: who came first
    #[arg(long, value_name = "POLICY", default_value_t, value_parser = |s: &str| s.parse::<Policy>())]
    pub scheduling_policy: Policy,
    /// Longest wait of a request in the queue; it is refused then [default: no limit]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub queue_timeout: Option<Duration>,
    /// Write no line of throughput and queues every ten seconds
    #[arg(long)]
    pub disable_log_stats: bool,
    /// Share KV blocks of equal prefixes (the default)
    #[arg(long, overrides_with = "no_enable_prefix_caching")]
    pub enable_prefix_caching: bool,
    /// Do not share KV blocks of equal prefixes
    #[arg(long)]
    pub no_enable_prefix_caching: bool,
    /// Never record graphs
    #[arg(long)]
    pub enforce_eager: bool,
    /// Sum over devices by NCCL alone, where they reach each other's memory too
    #[arg(long)]
    pub disable_custom_all_reduce: bool,
    /// Seed of dummy weights
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// How ranks lie on nodes: pack, spread, strict-pack, strict-spread
    #[arg(long, value_name = "STRATEGY", default_value_t, value_parser = |s: &str| s.parse::<Strategy>())]
    pub placement_strategy: Strategy,
    /// How long to wait for machines or slots that are not there [default: not at all]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub wait: Option<Duration>,
    /// Placement group whose slots to use: coordinator placement-group create makes one
    #[arg(long, value_name = "NAME")]
    pub placement_group: Option<String>,
    /// Environment of the ranks
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_pair)]
    pub env: Vec<(String, String)>,
    /// Network interface for collectives between nodes
    #[arg(long, value_name = "NAME", default_value = "")]
    pub collective_interface: String,
    /// Ports for collectives between nodes
    #[arg(long, value_name = "A-B", value_parser = parse_ports)]
    pub collective_ports: Option<(u16, u16)>,
}

/// The name of a tool format.
fn parse_tool_format(name: &str) -> Result<String, String> {
    match ToolFormat::named(name) {
        Some(format) => Ok(format.name.to_owned()),
        None => Err(format!("one of {}", ToolFormat::names().join(", "))),
    }
}

impl EngineFlags {
    /// The deployment of `model` that these flags ask for.
    ///
    /// # Errors
    /// A flag that cannot be obeyed, or a file that cannot be read.
    pub fn spec(&self, model: &str) -> Result<DeploymentSpec, CliError> {
        // What is not finite has no place in JSON; whether the share makes sense is the head's to say.
        if !self.gpu_memory_utilization.is_finite() {
            let message = format!(
                "--gpu-memory-utilization is {}; it must be above 0 and at most 1",
                self.gpu_memory_utilization
            );
            return Err(CliError::usage(message));
        }
        let mut names = self.served_model_name.iter().cloned();
        let name = names.next().unwrap_or_else(|| default_name(model));
        let template = self.chat_template.as_deref().map(read_template).transpose()?;
        let absolute = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        Ok(DeploymentSpec {
            aliases: names.collect(),
            model_path: absolute(Path::new(model)),
            tokenizer: self.tokenizer.as_deref().map(absolute),
            chat_template: template,
            tool_call_parser: self.tool_call_parser.clone(),
            tensor_parallel_size: self.tensor_parallel_size,
            replicas: if let ReplicaCount::Fixed(count) = self.replicas { count } else { 1 },
            replicas_auto: self.replicas == ReplicaCount::Auto,
            strategy: self.placement_strategy,
            placement_group: self.placement_group.clone(),
            wait: self.wait,
            load_format: self.load_format.clone(),
            dtype: dtype(&self.dtype),
            kv_cache_dtype: dtype(&self.kv_cache_dtype),
            max_model_len: self.max_model_len,
            memory_utilization: self.gpu_memory_utilization,
            block_size: self.block_size,
            num_blocks_override: self.num_gpu_blocks_override,
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            max_queue: self.max_queue,
            scheduling_policy: self.scheduling_policy,
            queue_timeout: self.queue_timeout,
            disable_log_stats: self.disable_log_stats,
            enable_prefix_caching: !self.no_enable_prefix_caching || self.enable_prefix_caching,
            enforce_eager: self.enforce_eager,
            disable_custom_all_reduce: self.disable_custom_all_reduce,
            seed: self.seed,
            env: self.env.iter().cloned().collect::<BTreeMap<_, _>>(),
            collective_interface: self.collective_interface.clone(),
            collective_ports: self.collective_ports.unwrap_or((0, 0)),
            ..DeploymentSpec::new(&name, model)
        })
    }
}

/// The last part of a path, without `.gguf`.
fn default_name(model: &str) -> String {
    let trimmed = model.trim_end_matches('/');
    let last = match Path::new(trimmed).file_name() {
        Some(last) => last.to_string_lossy().into_owned(),
        // `.` or `..`: the folder that it means has a name.
        None => std::fs::canonicalize(model)
            .ok()
            .and_then(|path| path.file_name().map(|last| last.to_string_lossy().into_owned()))
            .unwrap_or_default(),
    };
    last.strip_suffix(".gguf").unwrap_or(&last).to_owned()
}

fn read_template(path: &Path) -> Result<String, CliError> {
    std::fs::read_to_string(path)
        .map_err(|error| CliError::usage(format!("--chat-template {}: {error}", path.display())))
}

/// One word for each type.
fn dtype(name: &str) -> String {
    match name {
        "half" => "float16",
        "float" => "float32",
        other => other,
    }
    .to_owned()
}

fn parse_size(text: &str) -> Result<TensorParallelSize, String> {
    if text == "auto" {
        return Ok(TensorParallelSize::Auto);
    }
    let bad = || format!("{text} is neither a number of ranks nor auto");
    let size: u32 = text.parse().map_err(|_| bad())?;
    if size == 0 { Err(bad()) } else { Ok(TensorParallelSize::Fixed(size)) }
}

fn parse_replicas(text: &str) -> Result<ReplicaCount, String> {
    match text {
        "auto" => Ok(ReplicaCount::Auto),
        _ => {
            text.parse().map(ReplicaCount::Fixed).map_err(|_| format!("{text} is neither a number of copies nor auto"))
        }
    }
}

fn parse_ports(text: &str) -> Result<(u16, u16), String> {
    let bad = || format!("{text} is not a range of ports such as 20000-20100");
    let (first, last) = text.split_once('-').ok_or_else(bad)?;
    match (first.parse(), last.parse()) {
        (Ok(first), Ok(last)) if first > 0 && first <= last => Ok((first, last)),
        _ => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Only {
        #[command(flatten)]
        flags: ServeFlags,
    }

    fn parse(line: &str) -> ServeFlags {
        Only::try_parse_from(std::iter::once("serve").chain(line.split_whitespace())).expect(line).flags
    }

    #[test]
    fn vllms_habits_carry_over() {
        let flags = parse(
            "--model /m/Qwen1.5-0.5B-Chat/ --dtype half --tensor-parallel-size 4 --max-model-len 4096 --gpu-memory-utilization \
             0.95 --num-gpu-blocks-override 4096 --swap-space 0 --trust-remote-code --enable-chunked-prefill --env A=b=c",
        );
        let spec = flags.engine.spec(flags.model()).expect("a deployment");
        assert_eq!((spec.name.0.as_str(), spec.model.as_str()), ("Qwen1.5-0.5B-Chat", "/m/Qwen1.5-0.5B-Chat/"));
        assert_eq!((spec.dtype.as_str(), spec.max_model_len), ("float16", Some(4096)));
        assert_eq!(spec.tensor_parallel_size, TensorParallelSize::Fixed(4));
        assert_eq!(spec.num_blocks_override, Some(4096));
        assert_eq!(spec.env.get("A").map(String::as_str), Some("b=c"));
        assert_eq!(flags.ignored(), ["--trust-remote-code", "--swap-space"]);
        assert_eq!((spec.strategy, spec.wait), (Strategy::StrictPack, None));
    }

    #[test]
    fn names_are_short_and_further_ones_are_aliases() {
        assert_eq!(default_name("./smol.gguf"), "smol");
        assert_eq!(default_name("a/b//"), "b");
        let flags = parse("m --served-model-name one,two --served-model-name three");
        let spec = flags.engine.spec("m").expect("a deployment");
        assert_eq!((spec.name.0.as_str(), spec.aliases.join(" ")), ("one", "two three".to_owned()));
    }

    #[test]
    fn prefix_caching_is_on_unless_turned_off() {
        for (line, on) in [("m", true), ("m --enable-prefix-caching", true), ("m --no-enable-prefix-caching", false)] {
            assert_eq!(parse(line).engine.spec("m").expect(line).enable_prefix_caching, on, "{line}");
        }
    }

    #[test]
    fn what_cannot_be_obeyed_is_refused() {
        let error = parse("m --chat-template /nonexistent").engine.spec("m").expect_err("no such file");
        assert_eq!(error.exit, CliError::USAGE);
        assert!(error.message.contains("/nonexistent"));
        assert_eq!(parse("m --placement-group g").engine.spec("m").expect("a deployment").placement_group(), Some("g"));
    }

    #[test]
    fn a_head_of_its_own_offers_what_the_ranks_need() {
        let flags = parse("m --tensor-parallel-size 2 --replicas 2 --port 0");
        let spec = flags.engine.spec("m").expect("a deployment");
        assert_eq!(flags.own_head.devices(&spec).num_gpus, Some(4));
        assert_eq!((flags.own_head.head().http_port, flags.own_head.head().port), (0, defaults::CLUSTER_PORT));
        assert_eq!(flags.own_head.given(), ["--port"]);
    }
}
