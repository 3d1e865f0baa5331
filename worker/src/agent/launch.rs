//! What an agent tells the process that it starts: one line of JSON on its standard input, which then stays open.
//!
//! **Invariant:** a secret never stands in arguments or environment. When the pipe ends, so does the rank.

use std::path::PathBuf;
use std::time::Duration;

use phalanx_proto::{DeviceKind, NodeId, RankKey};
use serde::{Deserialize, Serialize};

/// Everything that a rank must know to dial its head.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankLaunch {
    /// The agent's process id: a rank with another parent ends.
    pub agent_pid: u32,
    /// Which rank it is.
    pub key: RankKey,
    /// The node.
    pub node_id: NodeId,
    /// The head, `host:port`.
    pub head: String,
    /// The head's Unix socket, where it is on this machine.
    pub head_socket: Option<String>,
    /// Where the agent notes which head leads.
    pub head_note: PathBuf,
    /// Folder of this node's certificate; absent: plain text (`--insecure`).
    pub trust_dir: Option<PathBuf>,
    /// What proves to the head that this rank was asked for.
    pub launch_token: String,
    /// What the rank computes on.
    pub device: DeviceKind,
    /// The device in words.
    pub device_name: String,
    /// Threads that compute.
    pub num_threads: u32,
    /// Folder that keeps device code which was compiled here.
    pub kernel_cache_dir: PathBuf,
    /// The toolkit that the user has named.
    pub cuda_home: Option<PathBuf>,
    /// How long the rank outlives a lost head, milliseconds.
    pub head_grace_ms: u64,
}

impl RankLaunch {
    /// How long the rank outlives a lost head.
    pub fn head_grace(&self) -> Duration {
        Duration::from_millis(self.head_grace_ms)
    }
}
