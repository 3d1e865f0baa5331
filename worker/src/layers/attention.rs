//! Grouped-query attention over the paged cache, split by heads.
//!
//! Source: arXiv:1706.03762 (attention), arXiv:2305.13245 (groups), arXiv:2309.06180 (paged cache).

use phalanx_formats::LayerNames;
use phalanx_kernels::{AttentionShape, KernelError, Ops};

use super::{Activations, Build, BuildError, QkvLinear, RowParallelLinear};

/// Attention of one decoder layer.
pub struct Attention<B: Ops> {
    qkv: QkvLinear<B>,
    shape: AttentionShape,
    output: RowParallelLinear<B>,
}

impl<B: Ops> Attention<B> {
    /// Reads this rank's heads.
    ///
    /// # Errors
    /// A tensor is absent or has another shape; no memory.
    pub fn load(build: &mut Build<'_, B>, names: &LayerNames) -> Result<Self, BuildError> {
        let (geometry, plan) = (build.geometry, build.plan);
        let shape = AttentionShape {
            num_kv_heads: plan.local_kv_heads,
            group: plan.group,
            num_heads_owned: plan.heads.len(),
            head_dim: geometry.head_dim,
            out_column: plan.attention.lead,
            scale: 1.0 / (geometry.head_dim as f32).sqrt(),
            window: geometry.sliding_window,
            soft_cap: None,
        };
        let qkv = QkvLinear::load(build, &names.qkv, geometry.qkv_bias)?;
        let output = RowParallelLinear::load(build, &names.attention_output, &plan.attention)?;
        Ok(Self { qkv, shape, output })
    }

    /// From `normed` to this rank's term of the block's output.
    ///
    /// # Errors
    /// A device fault.
    pub fn forward(
        &self,
        ops: &mut B,
        inputs: &B::Inputs,
        rope: &B::Rope,
        kv: &mut B::KvLayer,
        act: &mut Activations<B>,
    ) -> Result<(), KernelError> {
        self.qkv.forward(ops, inputs, &self.shape, &act.normed, rope, &mut act.qkv, kv)?;
        ops.attend(inputs, &self.shape, &act.qkv, kv, &mut act.heads)?;
        self.output.forward(ops, inputs, &act.heads, &mut act.term)
    }
}
