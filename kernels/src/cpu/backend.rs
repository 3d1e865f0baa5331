//! `CpuOps`: the contract on the host.
//!
//! Owns pool, scratch memory and the collective, and joins ops to them. The ops themselves are in [`crate::ops`].
//!
//! **Invariant:** scratch memory is planned from the buffers and matrices that were planned, before the first op.

use phalanx_formats::StoredType;

use super::{Activations, CpuBuffer, CpuInputs, CpuKvLayer, CpuMatrix, Pool, Scratch, lanes::Simd, memory::AlignedVec};
use crate::{
    AttentionShape, Collective, GateActivation, InputLimits, KernelError, KvShape, MatrixSource, Ops, Partial,
    RopeTable, SamplerFeatures, SamplerKind, StepInputs, StepResult, VocabSlice,
    ops::{
        add, attend, embed, gate_up_act, host_sampler::HostSampler, linear as linear_op, logits, reduce, rms_norm,
        rope_store,
    },
};

/// The CPU backend.
pub struct CpuOps {
    simd: Simd,
    pool: Pool,
    collective: Box<dyn Collective>,
    products: Products,
    attend: attend::AttendScratch,
    gathered: AlignedVec<f32>,
    logit_rows_max: usize,
    sampler: HostSampler,
}

/// Scratch memory of matrix products, made at the first one for the largest buffer and the widest matrix.
struct Products {
    activations: Activations,
    rows_max: usize,
    cols_max: usize,
    scratch: Option<Scratch>,
}

impl Products {
    fn plan(&mut self, rows_max: usize, cols_max: usize) {
        if rows_max > self.rows_max || cols_max > self.cols_max {
            self.rows_max = self.rows_max.max(rows_max);
            self.cols_max = self.cols_max.max(cols_max);
            self.scratch = None;
        }
    }

    fn scratch(&mut self) -> Result<&mut Scratch, KernelError> {
        match &mut self.scratch {
            Some(scratch) => Ok(scratch),
            none => Ok(none.insert(Scratch::new(self.rows_max, self.cols_max, self.activations)?)),
        }
    }
}

impl CpuOps {
    /// A backend on these threads. `activations` says what meets quantised weights.
    ///
    /// # Errors
    /// No memory.
    pub fn new(pool: Pool, activations: Activations, collective: Box<dyn Collective>) -> Result<Self, KernelError> {
        Ok(Self {
            simd: Simd::best(),
            pool,
            collective,
            products: Products { activations, rows_max: 0, cols_max: 0, scratch: None },
            attend: attend::AttendScratch::new()?,
            gathered: AlignedVec::zeroed(0)?,
            logit_rows_max: 0,
            sampler: HostSampler::default(),
        })
    }

    fn planned(&mut self, matrix: CpuMatrix) -> CpuMatrix {
        self.products.plan(0, matrix.cols());
        matrix
    }
}

impl Ops for CpuOps {
    type Buffer = CpuBuffer;
    type Matrix = CpuMatrix;
    type Vector = Vec<f32>;
    type KvLayer = CpuKvLayer;
    type Inputs = CpuInputs;
    type Rope = RopeTable;

    fn buffer(&mut self, rows_max: usize, width: usize) -> Result<CpuBuffer, KernelError> {
        self.products.plan(rows_max, 0);
        CpuBuffer::new(rows_max, width)
    }

    fn matrix<'a>(&mut self, parts: Vec<impl Into<MatrixSource<'a>>>) -> Result<CpuMatrix, KernelError> {
        let parts = parts.into_iter().map(|part| part.into().load()).collect();
        let matrix = CpuMatrix::pack(parts, self.products.activations)?;
        Ok(self.planned(matrix))
    }

    fn gate_up_matrix<'a>(
        &mut self,
        gate: impl Into<MatrixSource<'a>>,
        up: impl Into<MatrixSource<'a>>,
    ) -> Result<CpuMatrix, KernelError> {
        let matrix = CpuMatrix::pack_gate_up(gate.into().load(), up.into().load(), self.products.activations)?;
        Ok(self.planned(matrix))
    }

    fn matrix_bytes(&self, matrix: &CpuMatrix) -> u64 {
        matrix.bytes()
    }

    fn vector(&mut self, values: &[f32]) -> Result<Vec<f32>, KernelError> {
        Ok(values.to_vec())
    }

    fn rope_table(&mut self, table: RopeTable) -> Result<RopeTable, KernelError> {
        Ok(table)
    }

    fn kv_layer(&mut self, shape: KvShape) -> Result<CpuKvLayer, KernelError> {
        CpuKvLayer::new(shape)
    }

    fn inputs(&mut self, limits: InputLimits) -> Result<CpuInputs, KernelError> {
        self.logit_rows_max = self.logit_rows_max.max(limits.logit_rows_max);
        self.sampler.plan(&limits);
        Ok(CpuInputs::new(limits))
    }

    fn load_inputs(&mut self, step: &StepInputs, inputs: &mut CpuInputs) -> Result<(), KernelError> {
        inputs.load(step)?;
        self.sampler.resolve(&mut inputs.step.token_ids)
    }

    fn kv_dtype(&self) -> StoredType {
        match self.products.activations {
            Activations::Float32 => StoredType::F32,
            Activations::Int8 => StoredType::F16,
        }
    }

    fn sampler_features(&self) -> SamplerFeatures {
        HostSampler::FEATURES
    }

    fn sample(
        &mut self,
        inputs: &CpuInputs,
        logits: &CpuBuffer,
        vocab: &VocabSlice,
        kind: SamplerKind,
    ) -> Result<(), KernelError> {
        let logits = logits.rows("sample", inputs.step.logit_rows.len())?;
        self.sampler.sample(&mut *self.collective, logits, vocab, kind, &inputs.step)
    }

    fn score(&mut self, inputs: &CpuInputs, logits: &CpuBuffer, vocab: &VocabSlice) -> Result<(), KernelError> {
        let logits = logits.rows("score", inputs.step.logit_rows.len())?;
        self.sampler.score(&mut *self.collective, logits, vocab, &inputs.step)
    }

    fn submit(&mut self, _: &CpuInputs) -> Result<(), KernelError> {
        self.sampler.submit()
    }

    fn is_done(&mut self) -> Result<bool, KernelError> {
        Ok(self.sampler.is_done())
    }

    fn take(&mut self) -> Result<StepResult, KernelError> {
        self.sampler.take()
    }

    fn read<'a>(&'a mut self, buffer: &'a CpuBuffer, rows: usize) -> Result<&'a [f32], KernelError> {
        buffer.rows("read", rows)
    }

    fn embed(
        &mut self,
        inputs: &CpuInputs,
        table: &CpuMatrix,
        first_id: u32,
        out: &mut Partial<CpuBuffer>,
    ) -> Result<(), KernelError> {
        let out = out.0.rows_mut("embed", inputs.num_rows())?;
        embed::embed(&self.pool, &inputs.step.token_ids, table, first_id, out)
    }

    fn rms_norm(
        &mut self,
        inputs: &CpuInputs,
        x: &CpuBuffer,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut CpuBuffer,
    ) -> Result<(), KernelError> {
        let (x, out) = (x.rows("rms_norm", inputs.num_rows())?, out.rows_mut("rms_norm", inputs.num_rows())?);
        rms_norm::rms_norm(self.simd, &self.pool, x, weight, eps, out)
    }

    fn linear(
        &mut self,
        inputs: &CpuInputs,
        x: &CpuBuffer,
        weight: &CpuMatrix,
        bias: Option<&Vec<f32>>,
        out: &mut CpuBuffer,
    ) -> Result<(), KernelError> {
        let (x, out) = (x.rows("linear", inputs.num_rows())?, out.rows_mut("linear", inputs.num_rows())?);
        linear_op::linear(&self.pool, self.products.scratch()?, x, weight, bias.map(|b| &b[..]), out)
    }

    fn rope_store(
        &mut self,
        inputs: &CpuInputs,
        shape: &AttentionShape,
        rope: &RopeTable,
        qkv: &mut CpuBuffer,
        kv: &mut CpuKvLayer,
    ) -> Result<(), KernelError> {
        let qkv = qkv.rows_mut("rope_store", inputs.num_rows())?;
        rope_store::rope_store(self.simd, &self.pool, &inputs.step, shape, rope, qkv, kv)
    }

    fn attend(
        &mut self,
        inputs: &CpuInputs,
        shape: &AttentionShape,
        qkv: &CpuBuffer,
        kv: &CpuKvLayer,
        out: &mut CpuBuffer,
    ) -> Result<(), KernelError> {
        let out_width = out.width;
        let (qkv, out) = (qkv.rows("attend", inputs.num_rows())?, out.rows_mut("attend", inputs.num_rows())?);
        let operands = attend::Operands { qkv, out, out_width };
        attend::attend(self.simd, &self.pool, &mut self.attend, &inputs.step, shape, kv, operands)
    }

    fn gate_up_act(
        &mut self,
        inputs: &CpuInputs,
        x: &CpuBuffer,
        gate_up: &CpuMatrix,
        activation: GateActivation,
        out: &mut CpuBuffer,
    ) -> Result<(), KernelError> {
        let (x, out) = (x.rows("gate_up_act", inputs.num_rows())?, out.rows_mut("gate_up_act", inputs.num_rows())?);
        gate_up_act::gate_up_act(&self.pool, self.products.scratch()?, x, gate_up, activation, out)
    }

    fn linear_partial(
        &mut self,
        inputs: &CpuInputs,
        x: &CpuBuffer,
        weight: &CpuMatrix,
        out: &mut Partial<CpuBuffer>,
    ) -> Result<(), KernelError> {
        self.linear(inputs, x, weight, None, &mut out.0)
    }

    fn reduce(
        &mut self,
        inputs: &CpuInputs,
        partial: &mut Partial<CpuBuffer>,
        out: &mut CpuBuffer,
    ) -> Result<(), KernelError> {
        let rows = inputs.num_rows();
        reduce::reduce(&mut *self.collective, partial.0.rows_mut("reduce", rows)?, out.rows_mut("reduce", rows)?)
    }

    fn add(&mut self, inputs: &CpuInputs, y: &CpuBuffer, x: &mut CpuBuffer) -> Result<(), KernelError> {
        let width = x.width;
        let rows = inputs.num_rows();
        add::add(&self.pool, y.rows("add", rows)?, x.rows_mut("add", rows)?, width)
    }

    fn logits(
        &mut self,
        inputs: &CpuInputs,
        x: &CpuBuffer,
        head: &CpuMatrix,
        out: &mut CpuBuffer,
    ) -> Result<(), KernelError> {
        let rows = &inputs.step.logit_rows;
        if self.gathered.len() < self.logit_rows_max * head.cols() {
            self.gathered = AlignedVec::zeroed(self.logit_rows_max * head.cols())?;
        }
        let (x, out) = (x.rows("logits", inputs.num_rows())?, out.rows_mut("logits", rows.len())?);
        logits::logits(&self.pool, self.products.scratch()?, (x, rows), head, &mut self.gathered, out)
    }

    fn reduce_add_norm(
        &mut self,
        inputs: &CpuInputs,
        partial: &mut Partial<CpuBuffer>,
        residual: &mut CpuBuffer,
        weight: &Vec<f32>,
        eps: f32,
        normed: &mut CpuBuffer,
    ) -> Result<(), KernelError> {
        let (op, rows) = ("reduce_add_norm", inputs.num_rows());
        let operands = reduce::AddNorm {
            partial: partial.0.rows_mut(op, rows)?,
            residual: residual.rows_mut(op, rows)?,
            weight,
            eps,
            normed: normed.rows_mut(op, rows)?,
        };
        reduce::reduce_add_norm(self.simd, &self.pool, &mut *self.collective, operands)
    }
}
