//! The contract between models and devices.
//!
//! Owns the `Ops` trait; what it speaks of is in the files beside it: weights, sizes, steps, groups.

mod group;
mod matrix;
mod shapes;
mod step;

pub use group::{Collective, Partial};
pub use matrix::{HostMatrix, MatrixSource};
pub use shapes::{AttentionLimits, AttentionShape, DeviceMemoryInfo, GateActivation, InputLimits, KvShape, RopeTable};
pub use step::{
    LAST_TOKEN, SCORED_TOP_MAX, SampleEdits, SampleMask, SampleRow, SamplerFeatures, SamplerKind, ScoreRow, Scored,
    SeqInputs, StepInputs, StepPart, StepResult, VocabSlice, WarmUpStep,
};

use std::ops::Range;

use phalanx_formats::StoredType;

use crate::KernelError;

/// What a backend computes. Buffers are `[rows_max, width]`; `rows` of them are in use, as `Inputs` says.
pub trait Ops {
    /// Activations, `[rows_max, width]`.
    type Buffer;
    /// A weight matrix `[N, K]`, in the backend's layout.
    type Matrix;
    /// A one-dimensional parameter: a norm's weight or a bias.
    type Vector;
    /// K and V of one layer.
    type KvLayer;
    /// The step's inputs on the device.
    type Inputs;
    /// Rotary tables on the device.
    type Rope;

    // ---- planning: before the first step ----

    /// Plans a zeroed buffer of the device's activation type.
    ///
    /// # Errors
    /// No memory.
    fn buffer(&mut self, rows_max: usize, width: usize) -> Result<Self::Buffer, KernelError>;
    /// Plans a zeroed buffer in f32, whatever the activation type: the residual stream and logits.
    ///
    /// # Errors
    /// No memory.
    fn wide_buffer(&mut self, rows_max: usize, width: usize) -> Result<Self::Buffer, KernelError> {
        self.buffer(rows_max, width)
    }
    /// Takes a matrix in, parts one below the other.
    ///
    /// # Errors
    /// A format that this backend lacks, parts of different widths, no memory.
    fn matrix<'a>(&mut self, parts: Vec<impl Into<MatrixSource<'a>>>) -> Result<Self::Matrix, KernelError>;
    /// Takes gate and up in, in the layout that `gate_up_act` wants.
    ///
    /// # Errors
    /// As `matrix`; both must have the same shape.
    fn gate_up_matrix<'a>(
        &mut self,
        gate: impl Into<MatrixSource<'a>>,
        up: impl Into<MatrixSource<'a>>,
    ) -> Result<Self::Matrix, KernelError>;
    /// Bytes that a matrix holds on the device.
    fn matrix_bytes(&self, matrix: &Self::Matrix) -> u64;
    /// Takes a vector in.
    ///
    /// # Errors
    /// No memory.
    fn vector(&mut self, values: &[f32]) -> Result<Self::Vector, KernelError>;
    /// Takes rotary tables in.
    ///
    /// # Errors
    /// No memory.
    fn rope_table(&mut self, table: RopeTable) -> Result<Self::Rope, KernelError>;
    /// Allocates one layer's K and V.
    ///
    /// # Errors
    /// No memory.
    fn kv_layer(&mut self, shape: KvShape) -> Result<Self::KvLayer, KernelError>;
    /// Plans the inputs.
    ///
    /// # Errors
    /// No memory.
    fn inputs(&mut self, limits: InputLimits) -> Result<Self::Inputs, KernelError>;

    /// Memory of the device; `None` where it is the host's.
    ///
    /// # Errors
    /// The device does not say.
    fn memory(&self) -> Result<Option<DeviceMemoryInfo>, KernelError> {
        Ok(None)
    }
    /// Element type that a cache has where nothing else is asked for.
    fn kv_dtype(&self) -> StoredType {
        StoredType::F32
    }
    /// Steps to run before the first real one, the same on all ranks. They may write into block 0.
    fn warm_up_steps(&self, _limits: &InputLimits) -> Vec<WarmUpStep> {
        vec![WarmUpStep { num_prompt_tokens: 4, ..WarmUpStep::default() }]
    }

    /// Whether those steps are recorded, to be replayed later.
    fn records_steps(&self) -> bool {
        false
    }

    // ---- around a forward ----

    /// Begins a step: puts its inputs on the device.
    ///
    /// # Errors
    /// More than the planned limits.
    fn load_inputs(&mut self, step: &StepInputs, inputs: &mut Self::Inputs) -> Result<(), KernelError>;
    /// Runs a part of the step. A device may record what `work` asks for, and later replay it where shapes are the same.
    ///
    /// # Errors
    /// What `work` returns, or a device fault.
    fn run(
        &mut self,
        inputs: &Self::Inputs,
        part: StepPart,
        work: &mut dyn FnMut(&mut Self) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let _ = (inputs, part);
        work(self)
    }
    /// Draws a token for each of the step's sampled rows: kept in the row's slot for later steps, and reported. Collective. Where
    /// the sampler keeps no logits ([`SamplerFeatures::keeps_logits`]), those of masked and edited rows are others afterwards.
    ///
    /// # Errors
    /// A device fault or a broken group.
    fn sample(
        &mut self,
        inputs: &Self::Inputs,
        logits: &Self::Buffer,
        vocab: &VocabSlice,
        kind: SamplerKind,
    ) -> Result<(), KernelError>;
    /// What [`Self::sample`] can do beside drawing; a step never asks for more.
    fn sampler_features(&self) -> SamplerFeatures {
        SamplerFeatures::default()
    }
    /// Scores the step's scored rows. Collective.
    ///
    /// # Errors
    /// A device fault or a broken group.
    fn score(&mut self, inputs: &Self::Inputs, logits: &Self::Buffer, vocab: &VocabSlice) -> Result<(), KernelError>;
    /// Ends the step: what it sampled and scored can be taken when the device has done it.
    ///
    /// # Errors
    /// More steps than were planned, or a device fault.
    fn submit(&mut self, inputs: &Self::Inputs) -> Result<(), KernelError>;
    /// Whether [`Ops::take`] would not wait.
    ///
    /// # Errors
    /// A device fault.
    fn is_done(&mut self) -> Result<bool, KernelError>;
    /// Waits for the oldest submitted step and gives its results.
    ///
    /// # Errors
    /// None was submitted, a device fault, a broken group or a passed deadline.
    fn take(&mut self) -> Result<StepResult, KernelError>;
    /// Waits for the device and shows the first `rows` of a buffer, `[rows, width]`.
    ///
    /// # Errors
    /// A device fault or a passed deadline.
    fn read<'a>(&'a mut self, buffer: &'a Self::Buffer, rows: usize) -> Result<&'a [f32], KernelError>;

    /// The same for some rows of a buffer, the first of them first.
    ///
    /// # Errors
    /// As `read`.
    fn read_rows<'a>(&'a mut self, buffer: &'a Self::Buffer, rows: Range<usize>) -> Result<&'a [f32], KernelError> {
        let all = self.read(buffer, rows.end)?;
        let width = all.len().checked_div(rows.end).unwrap_or(0);
        Ok(all.get(rows.start * width..).unwrap_or_default())
    }

    // ---- fine ops ----

    /// `out[t] = table[token_ids[t] - first_id]`, zero where the id is outside the table. `out` `[T, hidden]`.
    ///
    /// # Errors
    /// Shapes that do not fit (this holds for all ops below).
    fn embed(
        &mut self,
        inputs: &Self::Inputs,
        table: &Self::Matrix,
        first_id: u32,
        out: &mut Partial<Self::Buffer>,
    ) -> Result<(), KernelError>;
    /// `out = x / rms(x) * weight`, row by row. Source: arXiv:1910.07467.
    fn rms_norm(
        &mut self,
        inputs: &Self::Inputs,
        x: &Self::Buffer,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;
    /// `out = x W^T + bias`. `x` `[T, K]`, `out` `[T, N]`.
    fn linear(
        &mut self,
        inputs: &Self::Inputs,
        x: &Self::Buffer,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;
    /// Rotates q in place, and stores rotated k, and v; what k's columns hold afterwards is the backend's affair.
    /// `qkv` `[T, (kv * group + 2 kv) * head_dim]`: q, then k, then v.
    /// Source: arXiv:2104.09864.
    fn rope_store(
        &mut self,
        inputs: &Self::Inputs,
        shape: &AttentionShape,
        rope: &Self::Rope,
        qkv: &mut Self::Buffer,
        kv: &mut Self::KvLayer,
    ) -> Result<(), KernelError>;
    /// Causal attention of the step's queries over the paged cache. `out` `[T, width]`, see `AttentionShape::out_column`.
    fn attend(
        &mut self,
        inputs: &Self::Inputs,
        shape: &AttentionShape,
        qkv: &Self::Buffer,
        kv: &Self::KvLayer,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;
    /// `out = act(gate(x)) * up(x)`. `x` `[T, K]`, `out` `[T, inner]`.
    fn gate_up_act(
        &mut self,
        inputs: &Self::Inputs,
        x: &Self::Buffer,
        gate_up: &Self::Matrix,
        activation: GateActivation,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;
    /// `out = x W^T`, this rank's term of a row-parallel linear layer. Source: arXiv:1909.08053, section 3.
    fn linear_partial(
        &mut self,
        inputs: &Self::Inputs,
        x: &Self::Buffer,
        weight: &Self::Matrix,
        out: &mut Partial<Self::Buffer>,
    ) -> Result<(), KernelError>;
    /// Sums the terms of all ranks. Collective. `out` `[T, width]`.
    fn reduce(
        &mut self,
        inputs: &Self::Inputs,
        partial: &mut Partial<Self::Buffer>,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;
    /// `x += y`.
    fn add(&mut self, inputs: &Self::Inputs, y: &Self::Buffer, x: &mut Self::Buffer) -> Result<(), KernelError>;
    /// `out[i] = x[logit_rows[i]] W^T`. `out` `[logit_rows, vocab on this rank]`.
    fn logits(
        &mut self,
        inputs: &Self::Inputs,
        x: &Self::Buffer,
        head: &Self::Matrix,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;

    // ---- block ops: default bodies compose the fine ops ----

    /// Sums the terms of all ranks into the residual stream and normalises it. Collective.
    fn reduce_add_norm(
        &mut self,
        inputs: &Self::Inputs,
        partial: &mut Partial<Self::Buffer>,
        residual: &mut Self::Buffer,
        weight: &Self::Vector,
        eps: f32,
        normed: &mut Self::Buffer,
    ) -> Result<(), KernelError> {
        self.reduce(inputs, partial, normed)?;
        self.add(inputs, normed, residual)?;
        self.rms_norm(inputs, residual, weight, eps, normed)
    }
    /// QKV projection, rotary embedding, storage of K and V. `x` `[T, hidden]`, `qkv` as in `rope_store`.
    #[expect(clippy::too_many_arguments, reason = "one fused block: its operands are what it is")]
    fn qkv_rope_store(
        &mut self,
        inputs: &Self::Inputs,
        shape: &AttentionShape,
        x: &Self::Buffer,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        rope: &Self::Rope,
        qkv: &mut Self::Buffer,
        kv: &mut Self::KvLayer,
    ) -> Result<(), KernelError> {
        self.linear(inputs, x, weight, bias, qkv)?;
        self.rope_store(inputs, shape, rope, qkv, kv)
    }
}
