//! `ReferenceOps`: the contract on candle-core in f32, the oracle for every other backend.
//!
//! Owns plain forms of all ops and readers of all stored formats. Slow: it makes new tensors in every op, and dequantises
//! matrices as they come in (candle's own quantised products use a pool that collapses where cores are shared).
//!
//! **Invariant:** nothing of this backend but its inputs' checks is shared with the backends that it judges.

mod attention;
mod dequantize;

use candle_core::{D, Device, Tensor};
use dequantize::dequantize;

use crate::{
    AttentionShape, Collective, GateActivation, HostMatrix, InputLimits, KernelError, KvShape, MatrixSource, Ops,
    Partial, RopeTable, SamplerFeatures, SamplerKind, StepInputs, StepResult, VocabSlice,
    cpu::inputs::check,
    ops::{fit, host_sampler::HostSampler},
};

/// The reference backend.
pub struct ReferenceOps {
    collective: Box<dyn Collective>,
    sampler: HostSampler,
}

impl ReferenceOps {
    /// A rank of the group that `collective` joins.
    pub fn new(collective: Box<dyn Collective>) -> Self {
        Self { collective, sampler: HostSampler::default() }
    }
}

/// Activations, `[rows_max, width]`.
pub struct ReferenceBuffer {
    data: Vec<f32>,
    rows_max: usize,
    width: usize,
}

impl ReferenceBuffer {
    /// The first `rows` rows.
    fn tensor(&self, rows: usize) -> Result<Tensor, KernelError> {
        Ok(Tensor::from_slice(self.rows(rows)?, (rows, self.width), &Device::Cpu)?)
    }

    /// The first `rows` rows.
    fn rows(&self, rows: usize) -> Result<&[f32], KernelError> {
        self.fits(rows)?;
        Ok(&self.data[..rows * self.width])
    }

    /// Replaces the first rows.
    fn write(&mut self, values: &Tensor) -> Result<(), KernelError> {
        let (rows, width) = values.dims2()?;
        self.fits(rows)?;
        fit("write", width == self.width, || format!("width {width} into {}", self.width))?;
        self.data[..rows * width].copy_from_slice(&values.flatten_all()?.to_vec1()?);
        Ok(())
    }

    fn fits(&self, rows: usize) -> Result<(), KernelError> {
        fit("buffer", rows <= self.rows_max, || format!("{rows} rows in a buffer of {}", self.rows_max))
    }
}

/// A matrix `[N, K]` in f32. Gate and up are one below the other.
pub struct ReferenceMatrix(Tensor);

/// K and V of one layer: `[kv head][slot][head_dim]` each, rounded as they are stored.
pub struct ReferenceKvLayer {
    shape: KvShape,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// A step's inputs.
pub struct ReferenceInputs {
    limits: InputLimits,
    step: StepInputs,
}

impl ReferenceInputs {
    fn rows(&self) -> usize {
        self.step.token_ids.len()
    }
}

/// A matrix's values, row by row.
pub(crate) fn to_floats(matrix: &HostMatrix) -> Result<Vec<f32>, KernelError> {
    Ok(dequantize(matrix)?.flatten_all()?.to_vec1()?)
}

fn stack(parts: Vec<HostMatrix>) -> Result<ReferenceMatrix, KernelError> {
    let parts: Vec<Tensor> = parts.iter().map(dequantize).collect::<Result<_, _>>()?;
    Ok(ReferenceMatrix(Tensor::cat(&parts, 0)?))
}

fn product(x: &Tensor, weight: &ReferenceMatrix) -> Result<Tensor, KernelError> {
    Ok(x.matmul(&weight.0.t()?)?)
}

impl Ops for ReferenceOps {
    type Buffer = ReferenceBuffer;
    type Matrix = ReferenceMatrix;
    type Vector = Tensor;
    type KvLayer = ReferenceKvLayer;
    type Inputs = ReferenceInputs;
    type Rope = RopeTable;

    fn buffer(&mut self, rows_max: usize, width: usize) -> Result<ReferenceBuffer, KernelError> {
        Ok(ReferenceBuffer { data: vec![0.0; rows_max * width], rows_max, width })
    }

    fn matrix<'a>(&mut self, parts: Vec<impl Into<MatrixSource<'a>>>) -> Result<ReferenceMatrix, KernelError> {
        stack(parts.into_iter().map(|part| part.into().load()).collect())
    }

    fn gate_up_matrix<'a>(
        &mut self,
        gate: impl Into<MatrixSource<'a>>,
        up: impl Into<MatrixSource<'a>>,
    ) -> Result<ReferenceMatrix, KernelError> {
        let (gate, up) = (gate.into().load(), up.into().load());
        let same = (gate.rows, gate.cols) == (up.rows, up.cols);
        fit("gate_up_matrix", same, || format!("{} x {} beside {} x {}", gate.rows, gate.cols, up.rows, up.cols))?;
        stack(vec![gate, up])
    }

    fn matrix_bytes(&self, matrix: &ReferenceMatrix) -> u64 {
        (matrix.0.elem_count() * size_of::<f32>()) as u64
    }

    fn vector(&mut self, values: &[f32]) -> Result<Tensor, KernelError> {
        Ok(Tensor::from_slice(values, values.len(), &Device::Cpu)?)
    }

    fn rope_table(&mut self, table: RopeTable) -> Result<RopeTable, KernelError> {
        Ok(table)
    }

    fn kv_layer(&mut self, shape: KvShape) -> Result<ReferenceKvLayer, KernelError> {
        attention::kv_layer(shape)
    }

    fn inputs(&mut self, limits: InputLimits) -> Result<ReferenceInputs, KernelError> {
        self.sampler.plan(&limits);
        Ok(ReferenceInputs { limits, step: StepInputs::default() })
    }

    fn load_inputs(&mut self, step: &StepInputs, inputs: &mut ReferenceInputs) -> Result<(), KernelError> {
        check(step, &inputs.limits)?;
        inputs.step = step.clone();
        self.sampler.resolve(&mut inputs.step.token_ids)
    }

    fn sampler_features(&self) -> SamplerFeatures {
        HostSampler::FEATURES
    }

    fn sample(
        &mut self,
        inputs: &ReferenceInputs,
        logits: &ReferenceBuffer,
        vocab: &VocabSlice,
        kind: SamplerKind,
    ) -> Result<(), KernelError> {
        let logits = logits.rows(inputs.step.logit_rows.len())?;
        self.sampler.sample(&mut *self.collective, logits, vocab, kind, &inputs.step)
    }

    fn score(
        &mut self,
        inputs: &ReferenceInputs,
        logits: &ReferenceBuffer,
        vocab: &VocabSlice,
    ) -> Result<(), KernelError> {
        let logits = logits.rows(inputs.step.logit_rows.len())?;
        self.sampler.score(&mut *self.collective, logits, vocab, &inputs.step)
    }

    fn submit(&mut self, _: &ReferenceInputs) -> Result<(), KernelError> {
        self.sampler.submit()
    }

    fn is_done(&mut self) -> Result<bool, KernelError> {
        Ok(self.sampler.is_done())
    }

    fn take(&mut self) -> Result<StepResult, KernelError> {
        self.sampler.take()
    }

    fn read<'a>(&'a mut self, buffer: &'a ReferenceBuffer, rows: usize) -> Result<&'a [f32], KernelError> {
        buffer.rows(rows)
    }

    fn embed(
        &mut self,
        inputs: &ReferenceInputs,
        table: &ReferenceMatrix,
        first_id: u32,
        out: &mut Partial<ReferenceBuffer>,
    ) -> Result<(), KernelError> {
        let (num_rows, width) = table.0.dims2()?;
        let row = |id: &u32| match id.checked_sub(first_id).filter(|row| (*row as usize) < num_rows) {
            Some(row) => table.0.get(row as usize),
            None => Tensor::zeros(width, table.0.dtype(), &Device::Cpu),
        };
        let rows: Vec<Tensor> = inputs.step.token_ids.iter().map(row).collect::<Result<_, _>>()?;
        if rows.is_empty() { Ok(()) } else { out.0.write(&Tensor::stack(&rows, 0)?) }
    }

    fn rms_norm(
        &mut self,
        inputs: &ReferenceInputs,
        x: &ReferenceBuffer,
        weight: &Tensor,
        eps: f32,
        out: &mut ReferenceBuffer,
    ) -> Result<(), KernelError> {
        let x = x.tensor(inputs.rows())?;
        let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?;
        out.write(&x.broadcast_div(&rms)?.broadcast_mul(weight)?)
    }

    fn linear(
        &mut self,
        inputs: &ReferenceInputs,
        x: &ReferenceBuffer,
        weight: &ReferenceMatrix,
        bias: Option<&Tensor>,
        out: &mut ReferenceBuffer,
    ) -> Result<(), KernelError> {
        let y = product(&x.tensor(inputs.rows())?, weight)?;
        match bias {
            Some(bias) => out.write(&y.broadcast_add(bias)?),
            None => out.write(&y),
        }
    }

    fn rope_store(
        &mut self,
        inputs: &ReferenceInputs,
        shape: &AttentionShape,
        rope: &RopeTable,
        qkv: &mut ReferenceBuffer,
        kv: &mut ReferenceKvLayer,
    ) -> Result<(), KernelError> {
        let rotated = attention::rotate(&inputs.step, shape, rope, &qkv.tensor(inputs.rows())?)?;
        attention::store(&inputs.step, shape, &rotated, kv)?;
        qkv.write(&rotated)
    }

    fn attend(
        &mut self,
        inputs: &ReferenceInputs,
        shape: &AttentionShape,
        qkv: &ReferenceBuffer,
        kv: &ReferenceKvLayer,
        out: &mut ReferenceBuffer,
    ) -> Result<(), KernelError> {
        let heads = attention::attend(&inputs.step, shape, &qkv.tensor(inputs.rows())?, kv)?;
        let columns = heads.dim(1)?;
        let end = shape.out_column + columns;
        fit("attend", end <= out.width, || format!("columns to {end} of {}", out.width))?;
        out.fits(inputs.rows())?;
        for (row, values) in out.data.chunks_exact_mut(out.width).zip(heads.to_vec2::<f32>()?) {
            row[shape.out_column..end].copy_from_slice(&values);
        }
        Ok(())
    }

    fn gate_up_act(
        &mut self,
        inputs: &ReferenceInputs,
        x: &ReferenceBuffer,
        gate_up: &ReferenceMatrix,
        activation: GateActivation,
        out: &mut ReferenceBuffer,
    ) -> Result<(), KernelError> {
        let both = product(&x.tensor(inputs.rows())?, gate_up)?;
        let inner = both.dim(1)? / 2;
        let (gate, up) = (both.narrow(1, 0, inner)?, both.narrow(1, inner, inner)?);
        // candle's `gelu` is the form with tanh.
        let gate = match activation {
            GateActivation::Silu => gate.silu()?,
            GateActivation::GeluTanh => gate.gelu()?,
        };
        out.write(&(gate * up)?)
    }

    fn linear_partial(
        &mut self,
        inputs: &ReferenceInputs,
        x: &ReferenceBuffer,
        weight: &ReferenceMatrix,
        out: &mut Partial<ReferenceBuffer>,
    ) -> Result<(), KernelError> {
        out.0.write(&product(&x.tensor(inputs.rows())?, weight)?)
    }

    fn reduce(
        &mut self,
        inputs: &ReferenceInputs,
        partial: &mut Partial<ReferenceBuffer>,
        out: &mut ReferenceBuffer,
    ) -> Result<(), KernelError> {
        let Partial(partial) = partial;
        partial.fits(inputs.rows())?;
        self.collective.all_reduce_sum(&mut partial.data[..inputs.rows() * partial.width])?;
        out.write(&partial.tensor(inputs.rows())?)
    }

    fn add(
        &mut self,
        inputs: &ReferenceInputs,
        y: &ReferenceBuffer,
        x: &mut ReferenceBuffer,
    ) -> Result<(), KernelError> {
        x.write(&(x.tensor(inputs.rows())? + y.tensor(inputs.rows())?)?)
    }

    fn logits(
        &mut self,
        inputs: &ReferenceInputs,
        x: &ReferenceBuffer,
        head: &ReferenceMatrix,
        out: &mut ReferenceBuffer,
    ) -> Result<(), KernelError> {
        let rows = &inputs.step.logit_rows;
        if rows.is_empty() {
            return Ok(());
        }
        let wanted = Tensor::from_slice(rows, rows.len(), &Device::Cpu)?;
        out.write(&product(&x.tensor(inputs.rows())?.index_select(&wanted, 0)?, head)?)
    }
}
