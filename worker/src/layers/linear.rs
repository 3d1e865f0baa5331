//! Linear layers, split along their output or along their input.
//!
//! Source: Megatron-LM, arXiv:1909.08053, section 3.

use phalanx_formats::Split;
use phalanx_kernels::{AttentionShape, GateActivation, KernelError, Ops, Partial};

use super::{Build, BuildError};

/// Q, K and V projections fused, split by heads.
///
/// Rows: the rank's query heads, zero heads up to `local_kv_heads * group`, its K heads, its V heads, each padded alike.
pub struct QkvLinear<B: Ops> {
    weight: B::Matrix,
    bias: Option<B::Vector>,
}

impl<B: Ops> QkvLinear<B> {
    /// Reads this rank's rows of the three projections, named by their prefix (without `.weight`).
    ///
    /// # Errors
    /// A tensor is absent or has another shape; no memory.
    pub fn load(build: &mut Build<'_, B>, names: &[String; 3], with_bias: bool) -> Result<Self, BuildError> {
        let parts = [build.weights.query_rows(), build.weights.kv_rows(), build.weights.kv_rows()];
        let (mut matrices, mut biases) = (Vec::with_capacity(parts.len()), Vec::new());
        for (name, rows) in names.iter().zip(&parts) {
            matrices.push(build.weights.rows(&format!("{name}.weight"), rows)?);
            if with_bias {
                biases.extend(build.weights.vector(&format!("{name}.bias"), rows)?);
            }
        }
        let bias = if with_bias { Some(build.ops.vector(&biases)?) } else { None };
        Ok(Self { weight: build.matrix(matrices)?, bias })
    }

    /// Projects `x` `[T, hidden]`, rotates q and k, stores k and v. `qkv` is local.
    ///
    /// # Errors
    /// A device fault.
    #[expect(clippy::too_many_arguments, reason = "one fused block: its operands are what it is")]
    pub fn forward(
        &self,
        ops: &mut B,
        inputs: &B::Inputs,
        shape: &AttentionShape,
        x: &B::Buffer,
        rope: &B::Rope,
        qkv: &mut B::Buffer,
        kv: &mut B::KvLayer,
    ) -> Result<(), KernelError> {
        ops.qkv_rope_store(inputs, shape, x, &self.weight, self.bias.as_ref(), rope, qkv, kv)
    }
}

/// Gate and up projections fused, split along their output.
pub struct GateUpLinear<B: Ops> {
    weight: B::Matrix,
}

impl<B: Ops> GateUpLinear<B> {
    /// Reads this rank's rows of both, named with `.weight`.
    ///
    /// # Errors
    /// A tensor is absent or has another shape; no memory.
    pub fn load(build: &mut Build<'_, B>, gate: &str, up: &str) -> Result<Self, BuildError> {
        let rows = build.weights.inner_rows();
        let weight = build.ops.gate_up_matrix(build.weights.rows(gate, &rows)?, build.weights.rows(up, &rows)?)?;
        build.weight_bytes += build.ops.matrix_bytes(&weight);
        Ok(Self { weight })
    }

    /// `out = silu(gate(x)) * up(x)`, `[T, inner.padded]`; zero outside the owned columns, whose rows are zero.
    ///
    /// # Errors
    /// A device fault.
    pub fn forward(
        &self,
        ops: &mut B,
        inputs: &B::Inputs,
        x: &B::Buffer,
        out: &mut B::Buffer,
    ) -> Result<(), KernelError> {
        ops.gate_up_act(inputs, x, &self.weight, GateActivation::Silu, out)
    }
}

/// Linear layer split along its input: this rank's term of `y = sum over ranks of x_r W_r^T`.
pub struct RowParallelLinear<B: Ops> {
    weight: B::Matrix,
}

impl<B: Ops> RowParallelLinear<B> {
    /// Reads the columns of `split`, named with `.weight`: whole quantisation blocks, so some belong to a neighbour.
    ///
    /// # Errors
    /// The tensor is absent or has another shape; no memory.
    pub fn load(build: &mut Build<'_, B>, name: &str, split: &Split) -> Result<Self, BuildError> {
        let columns = build.weights.cols(name, split)?;
        Ok(Self { weight: build.matrix(vec![columns])? })
    }

    /// `x` `[T, split.padded]`, zero outside the owned columns. The result is a term of a sum over ranks.
    ///
    /// # Errors
    /// A device fault.
    pub fn forward(
        &self,
        ops: &mut B,
        inputs: &B::Inputs,
        x: &B::Buffer,
        out: &mut Partial<B::Buffer>,
    ) -> Result<(), KernelError> {
        ops.linear_partial(inputs, x, &self.weight, out)
    }
}
