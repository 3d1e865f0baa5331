//! The one thread that owns the device.
//!
//! Owns backend, communicator, model and KV cache from the first command to the last, and drives the rank's start-up.
//! Knows nothing of streams: commands come in through one bounded channel, events leave through another.

use phalanx_proto::{HeadMessage, Incarnation, NodeId, Rank, RankEvent};

use crate::backend::DeviceKind;
use crate::error::WorkerError;

/// What a device thread must know before the head's first message.
#[derive(Debug, Clone)]
pub struct RankSetup {
    /// Place in the group.
    pub rank: Rank,
    /// The set of processes that this one belongs to; plans of another are refused.
    pub incarnation: Incarnation,
    /// The node that this process runs on.
    pub node_id: NodeId,
    /// The device.
    pub device: DeviceKind,
    /// Threads that compute, 0 for this node's share of the CPUs.
    pub num_threads: usize,
}

/// The two ends of a device thread. Dropping it ends the thread after the step that runs.
#[derive(Debug)]
pub struct DeviceHandle {
    /// What the head says, in order.
    pub commands: std::sync::mpsc::SyncSender<HeadMessage>,
    /// What the rank answers; closed when the thread has ended.
    pub events: tokio::sync::mpsc::Receiver<RankEvent>,
}

/// Starts the device thread.
///
/// # Errors
/// The system gives no thread.
pub fn spawn(_setup: RankSetup) -> Result<DeviceHandle, WorkerError> {
    Err(WorkerError::Device { device: "cpu", reason: "not ready yet" })
}
