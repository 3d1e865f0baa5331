//! Layers of a decoder, as a rank holds them.
//!
//! Owns how each layer's weights are cut from the checkpoint and which block ops it is made of. Knows no architecture, no
//! plan and no file format.
//!
//! **Invariant:** a layer's forward allocates nothing and reads no data back; its buffers were planned when it was built.
//! Local shapes are the same on all ranks; what a rank does not own is zero in its weights, so sums over ranks are exact.

mod attention;
mod decoder;
mod embedding;
mod linear;
mod mlp;
mod norm;
mod rotary;

pub use attention::Attention;
pub use decoder::DecoderLayer;
pub use embedding::Vocabulary;
pub use linear::{GateUpLinear, QkvLinear, RowParallelLinear};
pub use mlp::Mlp;
pub use norm::RmsNorm;
pub use rotary::rope_table;

use phalanx_formats::{Geometry, ModelError, ShardPlan};
use phalanx_kernels::{InputLimits, KernelError, MatrixSource, Ops, Partial};

use crate::weights::{Rows, ShardLoader};

/// What layers are built from: the device, this rank's part of the checkpoint, and its shape.
pub struct Build<'a, B: Ops> {
    /// The device.
    pub ops: &'a mut B,
    /// The checkpoint.
    pub weights: &'a ShardLoader<'a>,
    /// The model's shape.
    pub geometry: &'a Geometry,
    /// This rank's part of it.
    pub plan: &'a ShardPlan,
    /// Largest step.
    pub limits: InputLimits,
    /// Longest sequence.
    pub max_model_len: usize,
    /// Bytes of the matrices built so far, as held on the device.
    pub weight_bytes: u64,
}

/// A weight that cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// It cannot be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device does not take it.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl<B: Ops> Build<'_, B> {
    /// Takes a matrix to the device, parts one below the other.
    ///
    /// # Errors
    /// The device does not take it.
    pub fn matrix(&mut self, parts: Vec<MatrixSource<'_>>) -> Result<B::Matrix, BuildError> {
        let matrix = self.ops.matrix(parts)?;
        self.weight_bytes += self.ops.matrix_bytes(&matrix);
        Ok(matrix)
    }

    /// Takes a whole vector, the same on all ranks, to the device.
    ///
    /// # Errors
    /// It is absent, or the device does not take it.
    pub fn replicated(&mut self, name: &str, len: usize) -> Result<B::Vector, BuildError> {
        let values = self.weights.vector(name, &[Rows::Take(0..len)])?;
        self.weight_bytes += values.len() as u64 * 4;
        Ok(self.ops.vector(&values)?)
    }
}

/// The buffers of a forward, shared by all layers.
pub struct Activations<B: Ops> {
    /// `[T, hidden]`: the residual stream.
    pub residual: B::Buffer,
    /// `[T, hidden]`: its normalised copy, which blocks read.
    pub normed: B::Buffer,
    /// `[T, (kv * group + 2 kv) * head_dim]`: local q, k and v.
    pub qkv: B::Buffer,
    /// `[T, attention.padded]`: outputs of the local heads; columns of no owned head stay zero.
    pub heads: B::Buffer,
    /// `[T, inner.padded]`: the MLP's inner activations.
    pub inner: B::Buffer,
    /// `[T, hidden]`: this rank's term of a block's output.
    pub term: Partial<B::Buffer>,
    /// `[logit rows, vocab.padded]`: local logits.
    pub logits: B::Buffer,
}

impl<B: Ops> Activations<B> {
    /// Plans the buffers for the largest step.
    ///
    /// # Errors
    /// No memory.
    pub fn new(build: &mut Build<'_, B>) -> Result<Self, BuildError> {
        let (plan, hidden, rows) = (build.plan, build.geometry.hidden_size, build.limits.tokens_max);
        let qkv_width = plan.local_kv_heads * (plan.group + 2) * build.geometry.head_dim;
        Ok(Self {
            residual: build.ops.wide_buffer(rows, hidden)?,
            normed: build.ops.buffer(rows, hidden)?,
            qkv: build.ops.buffer(rows, qkv_width)?,
            heads: build.ops.buffer(rows, plan.attention.padded)?,
            inner: build.ops.buffer(rows, plan.inner.padded)?,
            term: Partial::new(build.ops.buffer(rows, hidden)?),
            logits: build.ops.wide_buffer(build.limits.logit_rows_max, plan.vocab.padded)?,
        })
    }
}
