//! The folder of one node, and where things lie in it.

use std::path::{Path, PathBuf};

use super::HeadAddress;

/// The folder of one node, and where things lie in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home(PathBuf);

impl Home {
    /// A home at this path, made absolute.
    pub fn new(path: &Path) -> Self {
        Self(std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf()))
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Records of running processes.
    pub fn run_dir(&self) -> PathBuf {
        self.0.join("run")
    }

    /// Keys and certificates between machines.
    pub fn trust_dir(&self) -> PathBuf {
        self.0.join("trust")
    }

    /// Whether the head at this address is the one that runs in this home.
    pub fn is_head_at(&self, head: &HeadAddress) -> bool {
        let Some(record) = head_of_home(self) else { return false };
        [&record["address"], &record["local_address"]].into_iter().any(|known| known.as_str() == Some(head.as_str()))
    }

    /// Logs.
    pub fn log_dir(&self) -> PathBuf {
        self.0.join("logs")
    }

    /// Device code that was compiled on this machine.
    pub fn kernel_cache_dir(&self) -> PathBuf {
        self.0.join("cache").join("kernels")
    }

    /// The record of the running agent.
    pub fn agent_record(&self) -> PathBuf {
        self.run_dir().join("agent.json")
    }

    /// Which head leads, for the ranks.
    pub fn head_note(&self) -> PathBuf {
        self.run_dir().join("leading-head.json")
    }

    /// Held by the running agent for as long as it lives.
    pub fn agent_lock(&self) -> PathBuf {
        self.run_dir().join("agent.lock")
    }

    /// The node's id.
    pub fn node_id(&self) -> PathBuf {
        self.0.join("node_id")
    }
}

/// What the head that runs in this home says of itself.
pub(super) fn head_of_home(home: &Home) -> Option<serde_json::Value> {
    let text = std::fs::read_to_string(home.path().join("run/head.json")).ok()?;
    serde_json::from_str(&text).ok()
}
