//! The pre-norm decoder layer: attention, then a gated MLP, each added to the residual stream.

use phalanx_formats::LayerNames;
use phalanx_kernels::{KernelError, Ops};

use super::{Activations, Attention, Build, BuildError, Mlp, RmsNorm};

/// One layer. Its residual additions are fused with the norm that follows, so the next layer's norm is its last step.
pub struct DecoderLayer<B: Ops> {
    input_norm: RmsNorm<B>,
    attention: Attention<B>,
    mlp_norm: RmsNorm<B>,
    mlp: Mlp<B>,
}

impl<B: Ops> DecoderLayer<B> {
    /// Reads this rank's part of a layer.
    ///
    /// # Errors
    /// A tensor is absent or has another shape; no memory.
    pub fn load(build: &mut Build<'_, B>, names: &LayerNames) -> Result<Self, BuildError> {
        Ok(Self {
            input_norm: RmsNorm::load(build, &names.input_norm)?,
            attention: Attention::load(build, names)?,
            mlp_norm: RmsNorm::load(build, &names.mlp_norm)?,
            mlp: Mlp::load(build, names)?,
        })
    }

    /// The norm that the layer's input must have passed.
    pub fn input_norm(&self) -> &RmsNorm<B> {
        &self.input_norm
    }

    /// From `normed` to `normed`, through `next`: the norm of what follows. Two reductions over the ranks.
    ///
    /// # Errors
    /// A device fault or a broken group.
    pub fn forward(
        &self,
        ops: &mut B,
        inputs: &B::Inputs,
        rope: &B::Rope,
        kv: &mut B::KvLayer,
        next: &RmsNorm<B>,
        act: &mut Activations<B>,
    ) -> Result<(), KernelError> {
        self.attention.forward(ops, inputs, rope, kv, act)?;
        self.mlp_norm.add_reduced(ops, inputs, act)?;
        self.mlp.forward(ops, inputs, act)?;
        next.add_reduced(ops, inputs, act)
    }
}
