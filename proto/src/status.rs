//! What `status` prints: one snapshot for the CLI, the dashboard, gRPC and HTTP.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The whole cluster at one moment. Keys may be added, never renamed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StatusSnapshot {
    /// The head itself.
    pub head: HeadStatus,
    /// Machines, in order of joining.
    pub nodes: Vec<NodeStatus>,
    /// Placement groups.
    pub placement_groups: Vec<PlacementGroupStatus>,
    /// Deployments.
    pub deployments: Vec<DeploymentStatus>,
    /// Rank processes.
    pub ranks: Vec<RankStatus>,
    /// Requests of all deployments.
    pub queue: QueueStatus,
}

/// The head.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HeadStatus {
    /// Cluster address.
    pub address: String,
    /// OpenAI-compatible HTTP.
    pub http: String,
    /// Dashboard.
    pub dashboard: String,
    /// Version of the program.
    pub version: String,
    /// Seconds since the start.
    pub uptime_s: f64,
    /// Process id.
    pub pid: u32,
    /// `leading` or `standby`.
    #[serde(default)]
    pub state: String,
    /// Cluster address of the head that leads, as far as this one knows.
    #[serde(default)]
    pub leader: String,
    /// Cluster addresses of all heads; none where there is only one store, in this head's home.
    #[serde(default)]
    pub heads: Vec<String>,
    /// What is wrong with the store, else empty.
    #[serde(default)]
    pub reason: String,
    /// Plain text between machines, and everybody may join and command (`--insecure`).
    #[serde(default)]
    pub insecure: bool,
}

/// One machine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its id.
    pub id: String,
    /// Where it came from.
    pub address: String,
    /// `alive`, `suspect`, `dead` or `left`.
    pub state: String,
    /// Device slots offered.
    pub slots: u32,
    /// Device slots taken.
    pub slots_used: u32,
    /// The device in words.
    pub device: String,
    /// The agent's process id.
    pub pid: u32,
    /// Why it is not alive, or what is wrong with it; else empty.
    pub reason: String,
    /// The way to the head and back, milliseconds; none before it was measured.
    #[serde(default)]
    pub round_trip_ms: Option<f64>,
    /// What it was labelled with.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// One placement group.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PlacementGroupStatus {
    /// Its id.
    pub id: String,
    /// pack, spread, strict-pack or strict-spread.
    pub strategy: String,
    /// `pending`, `created`, `rescheduling`, `removed` or `infeasible`.
    pub state: String,
    /// The arithmetic of what is not met, else empty.
    pub reason: String,
    /// One for each rank, or as they were asked for.
    pub bundles: Vec<BundleStatus>,
    /// Its name, where it was made by hand; else empty.
    #[serde(default)]
    pub name: String,
    /// What runs in it.
    #[serde(default)]
    pub deployments: Vec<String>,
    /// Words of whoever made it.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// When it was made, or got its slots, as words.
    #[serde(default)]
    pub since: String,
}

/// One bundle.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BundleStatus {
    /// Place in the group.
    pub index: u32,
    /// The node, once placed.
    pub node: Option<String>,
    /// What it takes.
    pub resources: BTreeMap<String, f64>,
    /// `pending` or `created`.
    pub state: String,
    /// The slots that it holds there.
    #[serde(default)]
    pub slots: Vec<u32>,
    /// Labels that its node must have.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// One deployment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DeploymentStatus {
    /// Served name.
    pub name: String,
    /// Model as it was given.
    pub model: String,
    /// `pending`, `starting`, `ready`, `recovering`, `failed` or `stopping`.
    pub state: String,
    /// Why it is not ready, else empty.
    pub reason: String,
    /// While it starts: which rank is furthest behind, and in which phase; else empty.
    #[serde(default)]
    pub progress: String,
    /// Ranks of one replica.
    pub tensor_parallel_size: u32,
    /// Copies.
    pub replicas: u32,
    /// Life of sequences and KV blocks.
    pub epoch: u64,
    /// Set of rank processes.
    pub incarnation: u64,
    /// KV blocks of one replica.
    pub num_blocks: u32,
    /// Of these, free (cached prefixes count as free).
    pub num_blocks_free: u32,
    /// Longest sequence.
    pub max_model_len: u32,
    /// Requests in the batch.
    pub running: u32,
    /// Requests that wait.
    pub waiting: u32,
}

/// One rank process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RankStatus {
    /// Its deployment.
    pub deployment: String,
    /// Its replica.
    pub replica: u32,
    /// Its place.
    pub rank: u32,
    /// Its node.
    pub node: String,
    /// Its process id, 0 before it is known.
    pub pid: u32,
    /// Its device in words.
    pub device: String,
    /// `starting`, `ready`, `failed` or `exited`.
    pub state: String,
    /// Phase of the start.
    pub phase: String,
    /// Seconds in that phase.
    pub elapsed_s: f64,
    /// Bytes of weights held, 0 before they are loaded.
    pub weight_bytes: u64,
    /// Bytes of KV cache held.
    pub kv_cache_bytes: u64,
    /// Steps done.
    pub steps: u64,
    /// Why it failed, or what it does; may be empty.
    pub detail: String,
}

/// Requests.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct QueueStatus {
    /// In a batch.
    pub running: u32,
    /// Not yet.
    pub waiting: u32,
}

/// Something that happened to the cluster, in plain words.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EventRecord {
    /// Grows with each event of a cluster.
    pub sequence: u64,
    /// When, `2026-11-22T10:02:11.123Z`.
    pub at: String,
    /// `info`, `warn` or `error`.
    pub level: String,
    /// Which kind, a word for scripts.
    pub kind: String,
    /// What happened.
    pub text: String,
    /// The deployment, where it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deployment: Option<String>,
    /// Its replica.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replica: Option<u32>,
    /// The replica's set of processes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<u64>,
    /// The replica's life of sequences.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// The rank.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<u32>,
    /// Steps that had been taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// The machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The placement group that was made by hand.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placement_group: Option<String>,
}
