//! Messages of a rank's session that are not steps: hello, start-up, failure.

mod wire;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{
    DeploymentName, Epoch, Incarnation, NodeId, Rank, SeqId, StepId, StepOutput, StepPlan, Term, TokenId, WireError, pb,
};

/// Phases of a rank's start, in order. Each has a name, a deadline and a progress line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The process starts and dials the head.
    Connect,
    /// The device is opened.
    Device,
    /// The ranks find each other.
    Communicator,
    /// This rank's shard is read.
    Weights,
    /// KV blocks are allocated.
    KvCache,
    /// Steps are recorded (devices with graphs).
    Graphs,
    /// A first step runs.
    WarmUp,
    /// Steps are served.
    Ready,
}

impl Phase {
    /// The name on the wire and in `status`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Device => "device",
            Self::Communicator => "communicator",
            Self::Weights => "weights",
            Self::KvCache => "kv_cache",
            Self::Graphs => "graphs",
            Self::WarmUp => "warm_up",
            Self::Ready => "ready",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Phase {
    type Err = WireError;

    fn from_str(name: &str) -> Result<Self, WireError> {
        let all = [
            Self::Connect,
            Self::Device,
            Self::Communicator,
            Self::Weights,
            Self::KvCache,
            Self::Graphs,
            Self::WarmUp,
            Self::Ready,
        ];
        all.into_iter().find(|phase| phase.as_str() == name).ok_or_else(|| WireError::Invalid {
            field: "phase",
            value: name.into(),
            expected: "a phase of a rank's start",
        })
    }
}

/// First message of a rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankHello {
    /// The deployment that it was started for.
    pub deployment: DeploymentName,
    /// Which replica of it.
    pub replica: u32,
    /// Place in the group.
    pub rank: Rank,
    /// The set of processes that it belongs to.
    pub incarnation: Incarnation,
    /// The node whose agent started it.
    pub node_id: NodeId,
    /// Process id on that node.
    pub pid: u32,
    /// Proof that this rank was asked for.
    pub launch_token: String,
    /// Version of the program.
    pub version: String,
    /// The device in words.
    pub device: String,
    /// What it still holds, where it was ready under an earlier head.
    pub resumes: Option<RankResumes>,
}

/// What a rank that waited for a head has kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankResumes {
    /// Its memory, as it was when the weights were loaded.
    pub capacity: RankCapacity,
    /// KV blocks that are allocated.
    pub num_blocks: u32,
    /// The last plan that it was given; none before the first.
    pub last_plan: Option<PlanMark>,
}

/// Names a plan among all that a rank is ever given; later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PlanMark {
    /// Life of the head.
    pub term: Term,
    /// Epoch of the group.
    pub epoch: Epoch,
    /// Step of the epoch.
    pub step: StepId,
}

impl PlanMark {
    /// The plan that a message carries, where it does carry one.
    pub fn of(message: &pb::HeadToRank) -> Option<Self> {
        match &message.message {
            Some(pb::head_to_rank::Message::Plan(plan)) => {
                Some(Self { term: Term(plan.term), epoch: Epoch(plan.epoch), step: StepId(plan.step) })
            }
            _ => None,
        }
    }
}

/// What fits on a rank once its weights are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankCapacity {
    /// KV blocks that fit.
    pub num_blocks: u64,
    /// Bytes of this rank's weights, as held.
    pub weight_bytes: u64,
    /// Bytes of one KV block over all layers.
    pub block_bytes: u64,
    /// Device bytes free.
    pub free_bytes: u64,
    /// What its sampler can do beside drawing.
    pub features: SamplerFeatures,
}

/// What a sampler can do beside drawing: a head asks for no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SamplerFeatures {
    /// Rows that may draw certain tokens only.
    pub masks: bool,
    /// Rows whose logits are edited.
    pub edits: bool,
}

impl SamplerFeatures {
    /// What several samplers can do together.
    pub fn and(self, other: Self) -> Self {
        Self { masks: self.masks && other.masks, edits: self.edits && other.edits }
    }
}

/// Why a rank gives up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankFailure {
    /// In which phase.
    pub phase: Phase,
    /// A lower-case word: `model`, `device`, `communicator`, `divergence`, `deadline`, `internal`.
    pub code: String,
    /// A sentence for a person.
    pub message: String,
}

/// What a rank tells the head.
#[derive(Debug, Clone, PartialEq)]
pub enum RankEvent {
    /// First message.
    Hello(RankHello),
    /// A phase began or went on.
    Progress {
        /// Which.
        phase: Phase,
        /// 0 to 1 within it, where known.
        fraction: Option<f32>,
        /// More words, may be empty.
        detail: String,
    },
    /// Where the rank's collective listens; empty for shared memory.
    Listening(String),
    /// Weights are loaded.
    Capacity(RankCapacity),
    /// Steps may come.
    Ready {
        /// KV blocks that were allocated.
        num_blocks: u32,
    },
    /// A step is done.
    Output(StepOutput),
    /// A message of an earlier head about a step that is not finished, as it came; none where there is none.
    Recalled(pb::RecalledPart),
    /// The rank gives up; it ends after this.
    Failure(RankFailure),
}

/// What a rank needs to load its shard.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadModel {
    /// Life of the head.
    pub term: Term,
    /// First epoch.
    pub epoch: Epoch,
    /// Folder or `.gguf` file on the rank's machine.
    pub model_path: String,
    /// auto, safetensors, gguf or dummy.
    pub load_format: String,
    /// auto, float16, bfloat16 or float32.
    pub dtype: String,
    /// auto or a dtype.
    pub kv_cache_dtype: String,
    /// Ranks in the group.
    pub world_size: u32,
    /// Tokens in a KV block, a multiple of 16.
    pub block_size: u32,
    /// Longest sequence.
    pub max_model_len: u32,
    /// Most sequences in a step.
    pub max_num_seqs: u32,
    /// Most tokens in a step.
    pub max_num_batched_tokens: u32,
    /// Share of device memory that may be used.
    pub memory_utilization: f64,
    /// Fixed number of KV blocks instead of what fits.
    pub num_blocks_override: Option<u32>,
    /// For dummy weights.
    pub seed: u64,
    /// Names shared memory, authenticates TCP connections.
    pub group_key: Vec<u8>,
    /// Node of each rank, in rank order.
    pub rank_nodes: Vec<NodeId>,
    /// Most plans queued at a rank.
    pub steps_in_flight_max: u32,
    /// Never record graphs.
    pub enforce_eager: bool,
    /// Devices exchange through NCCL even where they reach each other's memory.
    pub disable_custom_all_reduce: bool,
    /// Interface for collectives between nodes; empty: chosen by the rank.
    pub collective_interface: String,
    /// Ports for it; (0, 0): any.
    pub collective_ports: (u16, u16),
}

/// What the head tells a rank.
#[derive(Debug, Clone, PartialEq)]
pub enum HeadMessage {
    /// Load a shard.
    Load(LoadModel),
    /// Addresses of all ranks' collectives, in rank order.
    Connect(Vec<String>),
    /// Allocate KV blocks: the minimum over ranks.
    InitKvCache {
        /// How many.
        num_blocks: u32,
    },
    /// Part of a long prompt, ahead of its plan. The receiver keeps it until `Plan` names the sequence.
    Stage {
        /// The sequence that will be born.
        seq_id: SeqId,
        /// Next part of its tokens.
        tokens: Vec<TokenId>,
    },
    /// A step. Tokens that were staged are already in place.
    Plan(StepPlan),
    /// Forget all sequences and begin an epoch; the answer is that the rank is ready.
    BeginEpoch {
        /// Life of the head.
        term: Term,
        /// The epoch.
        epoch: Epoch,
    },
    /// Give back the plans of an earlier head that are not finished.
    RecallPlans,
    /// End.
    Shutdown(String),
}
