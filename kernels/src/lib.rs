//! The `Ops` contract and the code behind it.
//!
//! Owns what a device can compute: fine ops that each backend must have, and block ops whose default bodies compose them.
//! Models call block ops only, so fusing never touches a model. Knows no plan, no rank's process, no model's file.
//!
//! **Invariant:** every op writes into buffers planned beforehand; none allocates, and a forward reads no data back, so that
//! a device may record it. What an op leaves in a buffer depends only on its inputs, never on batch, threads or chunking.

mod contract;
pub mod cpu;
pub mod cuda;
mod error;
pub mod ops;
pub mod reference;

pub use contract::{
    AttentionLimits, AttentionShape, Collective, DeviceMemoryInfo, GateActivation, HostMatrix, InputLimits, KvShape,
    LAST_TOKEN, MatrixSource, Ops, Partial, RopeTable, SCORED_TOP_MAX, SampleEdits, SampleMask, SampleRow,
    SamplerFeatures, SamplerKind, ScoreRow, Scored, SeqInputs, StepInputs, StepPart, StepResult, VocabSlice,
    WarmUpStep,
};
pub use error::{CollectiveError, KernelError};
