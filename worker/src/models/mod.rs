//! Architectures, one file each: configuration, layers, weight names.
//!
//! Owns the registry. Knows no plan, no session and no file format: weights come by their Hugging Face names.
//!
//! **Invariant:** a model calls block ops only, so that fusing never touches it; its forward allocates nothing and reads
//! no data back.

mod llama;
mod qwen2;

pub use llama::Llama;
pub use qwen2::Qwen2;

use phalanx_formats::Architecture;
use phalanx_kernels::{KernelError, Ops};

use crate::layers::{Build, BuildError};

/// A decoder-only transformer on one rank.
pub trait Model<B: Ops> {
    /// From the step's tokens to their normalised hidden states; stores their K and V. Collective.
    ///
    /// # Errors
    /// A device fault or a broken group.
    fn forward(&mut self, ops: &mut B, inputs: &B::Inputs, kv: &mut [B::KvLayer]) -> Result<(), KernelError>;

    /// Computes logits for the step's logit rows from the hidden states of the last forward.
    ///
    /// # Errors
    /// A device fault.
    fn project(&mut self, ops: &mut B, inputs: &B::Inputs) -> Result<(), KernelError>;

    /// What `project` wrote last: logits of this rank's tokens, `[logit rows, vocab.padded]`.
    fn logits(&self) -> &B::Buffer;

    /// What `forward` wrote last: normalised hidden states, whole on every rank, `[tokens, hidden]`.
    fn hidden(&self) -> &B::Buffer;
}

/// Reads this rank's shard of a model.
///
/// # Errors
/// A tensor is absent or has another shape; the device does not take it.
pub fn load<B: Ops + 'static>(build: &mut Build<'_, B>) -> Result<Box<dyn Model<B>>, BuildError> {
    Ok(match build.geometry.architecture {
        Architecture::Llama => Box::new(Llama::load(build)?),
        Architecture::Qwen2 => Box::new(Qwen2::load(build)?),
    })
}
