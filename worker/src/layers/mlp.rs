//! The gated MLP, split along its inner dimension. Source: arXiv:2002.05202.

use phalanx_formats::LayerNames;
use phalanx_kernels::{KernelError, Ops};

use super::{Activations, Build, BuildError, GateUpLinear, RowParallelLinear};

/// `down(silu(gate(x)) * up(x))`.
pub struct Mlp<B: Ops> {
    gate_up: GateUpLinear<B>,
    down: RowParallelLinear<B>,
}

impl<B: Ops> Mlp<B> {
    /// Reads this rank's inner rows and columns.
    ///
    /// # Errors
    /// A tensor is absent or has another shape; no memory.
    pub fn load(build: &mut Build<'_, B>, names: &LayerNames) -> Result<Self, BuildError> {
        let plan = build.plan;
        Ok(Self {
            gate_up: GateUpLinear::load(build, &names.gate, &names.up)?,
            down: RowParallelLinear::load(build, &names.down, &plan.inner)?,
        })
    }

    /// From `normed` to this rank's term of the block's output.
    ///
    /// # Errors
    /// A device fault.
    pub fn forward(&self, ops: &mut B, inputs: &B::Inputs, act: &mut Activations<B>) -> Result<(), KernelError> {
        self.gate_up.forward(ops, inputs, &act.normed, &mut act.inner)?;
        self.down.forward(ops, inputs, &act.inner, &mut act.term)
    }
}
