//! Root mean square normalisation of the residual stream. Source: arXiv:1910.07467.

use phalanx_kernels::{KernelError, Ops};

use super::{Activations, Build, BuildError};

/// `x / rms(x) * weight`, whole on every rank.
pub struct RmsNorm<B: Ops> {
    weight: B::Vector,
    eps: f32,
}

impl<B: Ops> RmsNorm<B> {
    /// Reads the weight `[hidden]`.
    ///
    /// # Errors
    /// The tensor is absent or has another shape; no memory.
    pub fn load(build: &mut Build<'_, B>, name: &str) -> Result<Self, BuildError> {
        Ok(Self { weight: build.replicated(name, build.geometry.hidden_size)?, eps: build.geometry.norm_eps })
    }

    /// Normalises the residual stream into `normed`.
    ///
    /// # Errors
    /// A device fault.
    pub fn forward(&self, ops: &mut B, inputs: &B::Inputs, act: &mut Activations<B>) -> Result<(), KernelError> {
        ops.rms_norm(inputs, &act.residual, &self.weight, self.eps, &mut act.normed)
    }

    /// Adds the sum of all ranks' terms to the residual stream, then normalises it into `normed`. Collective.
    ///
    /// # Errors
    /// A device fault or a broken group.
    pub fn add_reduced(&self, ops: &mut B, inputs: &B::Inputs, act: &mut Activations<B>) -> Result<(), KernelError> {
        ops.reduce_add_norm(inputs, &mut act.term, &mut act.residual, &self.weight, self.eps, &mut act.normed)
    }
}
