//! What a user asks to be served: the value that `serve` sends and the head keeps.
//!
//! **Invariant:** a [`DeploymentSpec`] that passed [`DeploymentSpec::check`] has a name, at least one rank and limits
//! that fit each other; nothing behind it checks again.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use phalanx_formats::Geometry;
use phalanx_proto::DeploymentName;
use phalanx_trust::variables;
use serde::{Deserialize, Serialize};

use super::strategy::Strategy;
use crate::config::defaults;
use crate::engine::policy::Policy;

/// How many ranks share one copy of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TensorParallelSize {
    /// As many as the roomiest node has free slots.
    Auto,
    /// This many.
    Fixed(u32),
}

/// How many copies of the model there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplicaCount {
    /// As many as the machines have room for, at least one.
    Auto,
    /// This many.
    Fixed(u32),
}

/// A deployment as it was asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeploymentSpec {
    /// Served name.
    pub name: DeploymentName,
    /// Further names that it answers to.
    pub aliases: Vec<String>,
    /// The model as it was given.
    pub model: String,
    /// The model's folder or file.
    pub model_path: PathBuf,
    /// Where tokenizer files lie, if not with the model.
    pub tokenizer: Option<PathBuf>,
    /// Text of a chat template in place of the model's own.
    pub chat_template: Option<String>,
    /// How the model writes calls of tools, where its template does not show it.
    #[serde(default)]
    pub tool_call_parser: Option<String>,
    /// Ranks of one replica.
    pub tensor_parallel_size: TensorParallelSize,
    /// Copies of the model; those that it begins with where they follow the machines.
    pub replicas: u32,
    /// Copies come with machines that join, and go with those that leave.
    #[serde(default)]
    pub replicas_auto: bool,
    /// How ranks lie on nodes.
    pub strategy: Strategy,
    /// Placement group whose slots it uses.
    #[serde(default)]
    pub placement_group: Option<String>,
    /// How long to wait for machines that are not there; `None`: not at all.
    pub wait: Option<Duration>,
    /// auto, safetensors, gguf or dummy.
    pub load_format: String,
    /// auto, float16, bfloat16 or float32.
    pub dtype: String,
    /// auto or a dtype.
    pub kv_cache_dtype: String,
    /// Longest sequence; `None`: the model's.
    pub max_model_len: Option<u32>,
    /// Share of device memory that may be used.
    pub memory_utilization: f64,
    /// Tokens in a KV block.
    pub block_size: u32,
    /// Fixed number of KV blocks.
    pub num_blocks_override: Option<u32>,
    /// Most sequences in a step.
    pub max_num_seqs: u32,
    /// Most tokens in a step.
    pub max_num_batched_tokens: u32,
    /// Most requests that wait.
    pub max_queue: u32,
    /// Who runs next.
    #[serde(default)]
    pub scheduling_policy: Policy,
    /// Longest wait of a request in the queue.
    #[serde(default)]
    pub queue_timeout: Option<Duration>,
    /// No line of throughput and queues in the log.
    #[serde(default)]
    pub disable_log_stats: bool,
    /// Blocks of equal prefixes are shared.
    pub enable_prefix_caching: bool,
    /// Never record graphs.
    pub enforce_eager: bool,
    /// Devices exchange through NCCL even where they reach each other's memory.
    #[serde(default)]
    pub disable_custom_all_reduce: bool,
    /// Seed of dummy weights.
    pub seed: u64,
    /// Environment of the ranks.
    pub env: BTreeMap<String, String>,
    /// Interface for collectives between nodes; empty: chosen by the rank.
    pub collective_interface: String,
    /// Ports for them; (0, 0): any.
    pub collective_ports: (u16, u16),
}

impl DeploymentSpec {
    /// A deployment of `model` with every default.
    pub fn new(name: &str, model: &str) -> Self {
        Self {
            name: DeploymentName(name.to_owned()),
            aliases: Vec::new(),
            model: model.to_owned(),
            model_path: PathBuf::from(model),
            tokenizer: None,
            chat_template: None,
            tool_call_parser: None,
            tensor_parallel_size: TensorParallelSize::Fixed(1),
            replicas: 1,
            replicas_auto: false,
            strategy: Strategy::default(),
            placement_group: None,
            wait: None,
            load_format: "auto".to_owned(),
            dtype: "auto".to_owned(),
            kv_cache_dtype: "auto".to_owned(),
            max_model_len: None,
            memory_utilization: defaults::MEMORY_UTILIZATION,
            block_size: defaults::BLOCK_SIZE,
            num_blocks_override: None,
            max_num_seqs: defaults::MAX_NUM_SEQS,
            max_num_batched_tokens: defaults::MAX_NUM_BATCHED_TOKENS,
            max_queue: defaults::MAX_QUEUE,
            scheduling_policy: Policy::default(),
            queue_timeout: None,
            disable_log_stats: false,
            enable_prefix_caching: true,
            enforce_eager: false,
            disable_custom_all_reduce: false,
            seed: 0,
            env: BTreeMap::new(),
            collective_interface: String::new(),
            collective_ports: (0, 0),
        }
    }

    /// The placement group whose slots it uses, by name.
    pub fn placement_group(&self) -> Option<&str> {
        self.placement_group.as_deref()
    }

    /// The environment of each rank: what was asked for, and NCCL's interface.
    ///
    /// NCCL wants a name, and an equals sign in front of a whole one; an address is turned into a name where it is one, by the node's agent.
    pub fn rank_env(&self) -> BTreeMap<String, String> {
        let mut env = self.env.clone();
        let interface = &self.collective_interface;
        if !interface.is_empty() {
            let is_address = interface.parse::<IpAddr>().is_ok();
            let value = if is_address { interface.clone() } else { format!("={interface}") };
            env.entry("NCCL_SOCKET_IFNAME".to_owned()).or_insert(value);
        }
        env
    }

    /// Refuses values that contradict each other or the model.
    ///
    /// # Errors
    /// A sentence that names the flag and what it may be.
    pub fn check(&self, geometry: &Geometry) -> Result<(), String> {
        if self.name.0.is_empty() {
            return Err("the served name is empty; give --served-model-name".to_owned());
        }
        let TensorParallelSize::Fixed(size) = self.tensor_parallel_size else { return self.check_limits(geometry) };
        if size == 0 || size > defaults::WORLD_SIZE_MAX {
            let max = defaults::WORLD_SIZE_MAX;
            return Err(format!("--tensor-parallel-size is {size}; it may be 1 to {max}, or auto"));
        }
        if size as usize > geometry.num_heads {
            let heads = geometry.num_heads;
            return Err(format!(
                "--tensor-parallel-size {size} is more than the model's {heads} attention heads: some ranks would have \
                 no work. Use at most {heads}"
            ));
        }
        self.check_limits(geometry)
    }

    /// Refuses variables that decide what a rank loads or runs: a deployment comes from the network.
    fn check_env(&self) -> Result<(), String> {
        let refused = self.env.keys().find_map(|name| Some((name, variables::refusal(name)?)));
        refused.map_or(Ok(()), |(name, why)| Err(format!("--env {name:?} is refused: {why}")))
    }

    fn check_limits(&self, geometry: &Geometry) -> Result<(), String> {
        self.check_env()?;
        if self.replicas == 0 || self.replicas > defaults::REPLICAS_MAX {
            return Err(format!("--replicas is {}; it may be 1 to {}", self.replicas, defaults::REPLICAS_MAX));
        }
        if self.block_size == 0 || !self.block_size.is_multiple_of(16) {
            return Err(format!("--block-size is {}; it must be a multiple of 16", self.block_size));
        }
        if !(self.memory_utilization > 0.0 && self.memory_utilization <= 1.0) {
            let value = self.memory_utilization;
            return Err(format!("--gpu-memory-utilization is {value}; it must be above 0 and at most 1"));
        }
        for (flag, value) in [
            ("--max-num-seqs", self.max_num_seqs),
            ("--max-num-batched-tokens", self.max_num_batched_tokens),
            ("--max-queue", self.max_queue),
            ("--max-model-len", self.max_model_len.unwrap_or(1)),
            ("--num-gpu-blocks-override", self.num_blocks_override.unwrap_or(1)),
        ] {
            if value == 0 {
                return Err(format!("{flag} is 0; it must be at least 1"));
            }
        }
        if self.max_num_batched_tokens < self.max_num_seqs {
            let (tokens, seqs) = (self.max_num_batched_tokens, self.max_num_seqs);
            return Err(format!("--max-num-batched-tokens {tokens} is less than --max-num-seqs {seqs}"));
        }
        match self.max_model_len {
            Some(len) if len as usize > geometry.max_position => {
                let max = geometry.max_position;
                Err(format!("--max-model-len {len} is more than the model's {max} positions. Use at most {max}"))
            }
            _ => Ok(()),
        }
    }

    /// Longest sequence, prompt and output together.
    pub fn max_model_len(&self, geometry: &Geometry) -> u32 {
        self.max_model_len.unwrap_or_else(|| u32::try_from(geometry.max_position).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use phalanx_formats::{Architecture, RopeScaling};

    use super::*;

    fn geometry() -> Geometry {
        Geometry {
            architecture: Architecture::Llama,
            hidden_size: 64,
            intermediate_size: 128,
            num_layers: 2,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 16,
            vocab_size: 515,
            max_position: 256,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            tied_embeddings: false,
            qkv_bias: false,
            sliding_window: None,
        }
    }

    #[track_caller]
    fn check(change: impl Fn(&mut DeploymentSpec), expected: &str) {
        let mut spec = DeploymentSpec::new("m", "/m");
        change(&mut spec);
        let error = spec.check(&geometry()).err().unwrap_or_default();
        assert!(error.contains(expected) && error.is_empty() == expected.is_empty(), "{error:?} lacks {expected:?}");
    }

    #[test]
    fn the_interface_of_collectives_is_nccls_too() {
        let named = |interface: &str, env: &[(&str, &str)]| {
            let mut spec = DeploymentSpec::new("m", "m");
            spec.collective_interface = interface.to_owned();
            spec.env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            spec.rank_env().remove("NCCL_SOCKET_IFNAME")
        };
        assert_eq!(named("", &[]), None);
        assert_eq!(named("eth0", &[]).as_deref(), Some("=eth0"));
        assert_eq!(named("10.0.0.5", &[]).as_deref(), Some("10.0.0.5"));
        assert_eq!(named("eth0", &[("NCCL_SOCKET_IFNAME", "ib")]).as_deref(), Some("ib"));
    }

    #[test]
    fn contradictions_are_named_by_their_flag() {
        check(|_| {}, "");
        check(|spec| drop(spec.env.insert("HF_ENDPOINT".into(), "http://m".into())), "");
        check(|spec| drop(spec.env.insert("LD_PRELOAD".into(), "/tmp/x.so".into())), "--env \"LD_PRELOAD\" is refused");
        check(|spec| spec.tensor_parallel_size = TensorParallelSize::Auto, "");
        check(|spec| spec.tensor_parallel_size = TensorParallelSize::Fixed(0), "--tensor-parallel-size is 0");
        check(|spec| spec.tensor_parallel_size = TensorParallelSize::Fixed(5), "4 attention heads");
        check(|spec| spec.max_model_len = Some(257), "--max-model-len 257");
        check(|spec| spec.max_model_len = Some(0), "--max-model-len is 0");
        check(|spec| spec.block_size = 8, "--block-size");
        check(|spec| spec.memory_utilization = f64::NAN, "--gpu-memory-utilization");
        check(|spec| spec.max_num_batched_tokens = 1, "--max-num-seqs");
        check(|spec| spec.replicas = 0, "--replicas");
    }

    #[test]
    fn a_specification_survives_json() {
        let mut spec = DeploymentSpec::new("m", "/m");
        spec.wait = Some(Duration::from_secs(60));
        let text = serde_json::to_string(&spec).expect("serializes");
        assert_eq!(serde_json::from_str::<DeploymentSpec>(&text).expect("parses"), spec);
        assert!(serde_json::from_str::<DeploymentSpec>(&text.replace("replicas", "replicants")).is_err());
    }
}
