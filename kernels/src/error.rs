//! What can go wrong in an op or a collective.

use crate::cuda::CudaError;

/// An op that cannot run.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A backend lacks an op or a format.
    #[error("{backend} has no {op} for {what}")]
    Unsupported {
        /// The backend.
        backend: &'static str,
        /// The op.
        op: &'static str,
        /// Format or shape.
        what: String,
    },
    /// Shapes that do not fit each other.
    #[error("{op}: {reason}")]
    Shape {
        /// The op.
        op: &'static str,
        /// What does not fit.
        reason: String,
    },
    /// Memory could not be had.
    #[error("{bytes} bytes of {device} memory could not be allocated")]
    OutOfMemory {
        /// The device.
        device: &'static str,
        /// How much was asked for.
        bytes: u64,
    },
    /// A device, its driver or one of its libraries failed.
    #[error(transparent)]
    Device(CudaError),
    /// A thread could not be started.
    #[error("compute thread {index} could not be started")]
    Thread {
        /// Which of the pool's threads.
        index: usize,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A collective failed inside a block op.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The reference library refused.
    #[error("reference: {0}")]
    Reference(#[from] candle_core::Error),
}

impl From<CudaError> for KernelError {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::OutOfMemory { bytes, .. } => Self::OutOfMemory { device: "GPU", bytes },
            other => Self::Device(other),
        }
    }
}

/// A collective that did not complete.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// A peer did not arrive in time.
    #[error("{op}: rank {rank} waited {waited_ms} ms for rank {peer}")]
    Deadline {
        /// The collective.
        op: &'static str,
        /// Who waited.
        rank: usize,
        /// For whom.
        peer: usize,
        /// How long.
        waited_ms: u64,
    },
    /// A kernel gave up waiting for another device: its limit passed, or this rank's part in the group ended.
    #[error("{op}: rank {rank} on {device} {} for rank {peer}", waited(*limit_ms))]
    DeviceWait {
        /// The kernel of the collective.
        op: &'static str,
        /// Who waited.
        rank: usize,
        /// The device that waited.
        device: String,
        /// For whom.
        peer: usize,
        /// How long; `None` where the group was ended meanwhile.
        limit_ms: Option<u64>,
    },
    /// A peer's connection ended.
    #[error("{op}: rank {peer} is gone: {reason}")]
    PeerGone {
        /// The collective.
        op: &'static str,
        /// Who is gone.
        peer: usize,
        /// How it was seen.
        reason: String,
    },
    /// The group was told to stop.
    #[error("{op}: aborted")]
    Aborted {
        /// The collective.
        op: &'static str,
    },
    /// Setting the group up failed.
    #[error("communicator: {reason}")]
    Setup {
        /// What failed.
        reason: String,
    },
}

fn waited(limit_ms: Option<u64>) -> String {
    limit_ms.map_or_else(|| "was told to end while it waited".into(), |limit| format!("waited {limit} ms"))
}
