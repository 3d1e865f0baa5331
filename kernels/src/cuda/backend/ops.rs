//! The contract's ops, one launch or a few each.

use std::ops::Range;

use super::attention::{AttentionScratch, planner};
use super::buckets::warm_up_steps;
use super::buffers::{CudaBuffer, CudaKvLayer, CudaMatrix, CudaRope, CudaVector, Dtype};
use super::editing::Editing;
use super::group::Rows;
use super::inputs::CudaInputs;
use super::linear::{Product, row_config};
use super::sampling::Sampling;
use super::{CudaOps, STEP_DEADLINE};
use crate::cuda::linear_plan::Epilogue;
use crate::cuda::{DeviceMemory, LaunchConfig};
use crate::ops::fit;
use crate::{
    AttentionShape, DeviceMemoryInfo, GateActivation, InputLimits, KernelError, KvShape, MatrixSource, Ops, Partial,
    RopeTable, SamplerFeatures, SamplerKind, StepInputs, StepPart, StepResult, VocabSlice, WarmUpStep, kernel_args,
};
use phalanx_formats::StoredType;

impl CudaOps {
    fn planned(&mut self, rows_max: usize, width: usize, dtype: Dtype) -> Result<CudaBuffer, KernelError> {
        // Kernels that read by 16 bytes may touch the ones behind the last row.
        let bytes = CudaBuffer::bytes(rows_max, width, dtype).next_multiple_of(16);
        let memory = DeviceMemory::alloc(&self.context, bytes)?;
        self.stream.fill(memory.span(), 0)?;
        Ok(CudaBuffer { memory, rows_max, width, dtype })
    }
}

impl Ops for CudaOps {
    type Buffer = CudaBuffer;
    type Matrix = CudaMatrix;
    type Vector = CudaVector;
    type KvLayer = CudaKvLayer;
    type Inputs = CudaInputs;
    type Rope = CudaRope;

    fn buffer(&mut self, rows_max: usize, width: usize) -> Result<CudaBuffer, KernelError> {
        self.planned(rows_max, width, self.dtype)
    }

    fn wide_buffer(&mut self, rows_max: usize, width: usize) -> Result<CudaBuffer, KernelError> {
        self.planned(rows_max, width, Dtype::F32)
    }

    fn matrix<'a>(&mut self, parts: Vec<impl Into<MatrixSource<'a>>>) -> Result<CudaMatrix, KernelError> {
        self.upload_matrix(&parts.into_iter().map(Into::into).collect::<Vec<_>>())
    }

    fn gate_up_matrix<'a>(
        &mut self,
        gate: impl Into<MatrixSource<'a>>,
        up: impl Into<MatrixSource<'a>>,
    ) -> Result<CudaMatrix, KernelError> {
        self.upload_gate_up(&gate.into(), &up.into())
    }

    fn matrix_bytes(&self, matrix: &CudaMatrix) -> u64 {
        matrix.memory.len() as u64
    }

    fn vector(&mut self, values: &[f32]) -> Result<CudaVector, KernelError> {
        Ok(CudaVector { memory: self.upload_floats(values)?, len: values.len() })
    }

    fn rope_table(&mut self, table: RopeTable) -> Result<CudaRope, KernelError> {
        let (cos, sin) = (self.upload_floats(&table.cos)?, self.upload_floats(&table.sin)?);
        Ok(CudaRope { cos, sin, head_dim: table.head_dim })
    }

    fn kv_layer(&mut self, shape: KvShape) -> Result<CudaKvLayer, KernelError> {
        let own = self.dtype.stored();
        if shape.dtype != own {
            let what = format!("a cache of {:?} beside activations of {own:?}", shape.dtype);
            return Err(KernelError::Unsupported { backend: "cuda", op: "kv_layer", what });
        }
        fit("kv_layer", shape.block_size.is_multiple_of(16) && shape.head_dim.is_multiple_of(8), || {
            format!("{shape:?}")
        })?;
        let bytes = shape.num_blocks * CudaKvLayer::block_stride(&shape) * self.dtype.bytes();
        let memory = DeviceMemory::alloc(&self.context, bytes)?;
        self.stream.fill(memory.span(), 0)?;
        Ok(CudaKvLayer { memory, shape })
    }

    fn inputs(&mut self, limits: InputLimits) -> Result<CudaInputs, KernelError> {
        let planner = planner(&self.context, &limits);
        self.attention = Some(AttentionScratch::new(&self.context, &self.stream, &planner)?);
        self.sampling = Some(Sampling::new(&self.context, &limits, self.group.world_size())?);
        self.editing = Some(Editing::new(&self.context, &limits)?);
        Ok(CudaInputs::new(&self.context, limits, planner)?)
    }

    fn memory(&self) -> Result<Option<DeviceMemoryInfo>, KernelError> {
        let bytes = self.context.memory()?;
        Ok(Some(DeviceMemoryInfo { total: bytes.total, free: bytes.free }))
    }

    fn kv_dtype(&self) -> StoredType {
        self.dtype.stored()
    }

    fn warm_up_steps(&self, limits: &InputLimits) -> Vec<WarmUpStep> {
        warm_up_steps(limits, planner(&self.context, limits).split_context() as usize)
    }

    fn records_steps(&self) -> bool {
        !self.enforce_eager
    }

    fn load_inputs(&mut self, step: &StepInputs, inputs: &mut CudaInputs) -> Result<(), KernelError> {
        crate::cpu::inputs::check(step, &inputs.limits)?;
        let stream = std::rc::Rc::clone(&self.stream);
        inputs.load(step, &stream, STEP_DEADLINE, |argument, num_blocks| {
            let config = LaunchConfig::linear(num_blocks, 256);
            // SAFETY: the argument's addresses are those of the arrays and of the blob that is lent.
            unsafe { self.launch(&self.kernels.load_step, config, kernel_args![argument]) }
        })?;
        self.load_edits(step, inputs.shape.logit_rows)
    }

    fn run(
        &mut self,
        inputs: &CudaInputs,
        part: StepPart,
        work: &mut dyn FnMut(&mut Self) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        self.run_part(&inputs.shape, part, work)
    }

    fn sample(
        &mut self,
        inputs: &CudaInputs,
        logits: &CudaBuffer,
        vocab: &VocabSlice,
        kind: SamplerKind,
    ) -> Result<(), KernelError> {
        self.sample_rows(inputs, logits, vocab, kind)
    }

    fn sampler_features(&self) -> SamplerFeatures {
        self.planned_features()
    }

    fn score(&mut self, inputs: &CudaInputs, logits: &CudaBuffer, vocab: &VocabSlice) -> Result<(), KernelError> {
        self.score_rows(inputs, logits, vocab)
    }

    fn submit(&mut self, inputs: &CudaInputs) -> Result<(), KernelError> {
        self.submit_results(inputs)
    }

    fn is_done(&mut self) -> Result<bool, KernelError> {
        self.has_ended()
    }

    fn take(&mut self) -> Result<StepResult, KernelError> {
        self.awaited_since = None;
        self.take_results()
    }

    fn read<'a>(&'a mut self, buffer: &'a CudaBuffer, rows: usize) -> Result<&'a [f32], KernelError> {
        self.read_rows(buffer, 0..rows)
    }

    fn read_rows<'a>(&'a mut self, buffer: &'a CudaBuffer, rows: Range<usize>) -> Result<&'a [f32], KernelError> {
        buffer.rows("read", rows.end)?;
        let row_bytes = buffer.width * buffer.dtype.bytes();
        let mut bytes = vec![0; rows.len() * row_bytes];
        let part = buffer.memory.part(rows.start * row_bytes..rows.end * row_bytes)?;
        self.stream.download(part, &mut bytes, STEP_DEADLINE)?;
        self.group.check()?;
        let halves = bytes.as_chunks::<2>().0.iter();
        self.read_back = match buffer.dtype {
            Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect(),
            Dtype::F16 => halves.map(|value| half::f16::from_le_bytes(*value).to_f32()).collect(),
            Dtype::Bf16 => halves.map(|value| half::bf16::from_le_bytes(*value).to_f32()).collect(),
        };
        Ok(&self.read_back)
    }

    fn embed(
        &mut self,
        inputs: &CudaInputs,
        table: &CudaMatrix,
        first_id: u32,
        out: &mut Partial<CudaBuffer>,
    ) -> Result<(), KernelError> {
        let rows = inputs.shape.tokens;
        fit("embed", out.0.width == table.cols, || format!("{} columns into {}", table.cols, out.0.width))?;
        let args = kernel_args![
            inputs.arrays.token_ids,
            &table.memory,
            first_id,
            table.rows as u32,
            out.0.typed("embed", rows, self.dtype)?,
            table.cols as u32,
        ];
        // SAFETY: shapes were checked; ids outside the table are zero rows.
        unsafe { self.launch(&self.kernels.embed, row_config(rows, table.cols), args) }
    }

    fn rms_norm(
        &mut self,
        inputs: &CudaInputs,
        x: &CudaBuffer,
        weight: &CudaVector,
        eps: f32,
        out: &mut CudaBuffer,
    ) -> Result<(), KernelError> {
        let rows = inputs.shape.tokens;
        fit("rms_norm", x.width == weight.len && out.width == weight.len, || format!("{} of {}", x.width, weight.len))?;
        let (x, out) = (x.typed("rms_norm", rows, Dtype::F32)?, out.typed("rms_norm", rows, self.dtype)?);
        let args = kernel_args![x, &weight.memory, eps, out, weight.len as u32];
        // SAFETY: shapes were checked.
        unsafe { self.launch(&self.kernels.rms_norm, row_config(rows, weight.len), args) }
    }

    fn linear(
        &mut self,
        inputs: &CudaInputs,
        x: &CudaBuffer,
        weight: &CudaMatrix,
        bias: Option<&CudaVector>,
        out: &mut CudaBuffer,
    ) -> Result<(), KernelError> {
        let (op, m) = ("linear", inputs.shape.tokens);
        fit(op, x.width == weight.cols && out.width == weight.rows, || shapes(x, weight, out.width))?;
        fit(op, bias.is_none_or(|bias| bias.len == weight.rows), || "a bias of another length".into())?;
        self.product(&Product {
            op,
            x: x.typed(op, m, self.dtype)?,
            weight,
            bias: bias.map(|bias| bias.memory.span()),
            rows: None,
            y: out.typed(op, m, self.dtype)?,
            m,
            epilogue: Epilogue::Plain,
        })
    }

    fn rope_store(
        &mut self,
        inputs: &CudaInputs,
        shape: &AttentionShape,
        rope: &CudaRope,
        qkv: &mut CudaBuffer,
        kv: &mut CudaKvLayer,
    ) -> Result<(), KernelError> {
        self.rotate_and_store(inputs, shape, rope, None, qkv, kv)
    }

    fn attend(
        &mut self,
        inputs: &CudaInputs,
        shape: &AttentionShape,
        qkv: &CudaBuffer,
        kv: &CudaKvLayer,
        out: &mut CudaBuffer,
    ) -> Result<(), KernelError> {
        self.attend_items(inputs, shape, qkv, kv, out)
    }

    fn gate_up_act(
        &mut self,
        inputs: &CudaInputs,
        x: &CudaBuffer,
        gate_up: &CudaMatrix,
        activation: GateActivation,
        out: &mut CudaBuffer,
    ) -> Result<(), KernelError> {
        let (op, m) = ("gate_up_act", inputs.shape.tokens);
        fit(op, x.width == gate_up.cols && out.width * 2 == gate_up.rows, || shapes(x, gate_up, out.width))?;
        if m > super::linear::STREAMED_ROWS_MAX && self.dtype != Dtype::F32 {
            self.plan_gate_up(out.rows_max, gate_up.rows)?;
        }
        self.product(&Product {
            op,
            x: x.typed(op, m, self.dtype)?,
            weight: gate_up,
            bias: None,
            rows: None,
            y: out.typed(op, m, self.dtype)?,
            m,
            epilogue: activation.into(),
        })
    }

    fn linear_partial(
        &mut self,
        inputs: &CudaInputs,
        x: &CudaBuffer,
        weight: &CudaMatrix,
        out: &mut Partial<CudaBuffer>,
    ) -> Result<(), KernelError> {
        self.linear(inputs, x, weight, None, &mut out.0)
    }

    fn reduce(
        &mut self,
        inputs: &CudaInputs,
        partial: &mut Partial<CudaBuffer>,
        out: &mut CudaBuffer,
    ) -> Result<(), KernelError> {
        let (op, rows, partial) = ("reduce", inputs.shape.tokens, &partial.0);
        fit(op, partial.width == out.width, || format!("{} columns into {}", partial.width, out.width))?;
        let length = rows * partial.width;
        let terms = partial.typed(op, rows, self.dtype)?.part(0..length * self.dtype.bytes())?;
        self.all_reduce(terms)?;
        let to = out.rows(op, rows)?;
        if out.dtype != Dtype::F32 || self.dtype == Dtype::F32 {
            return Ok(self.stream.copy(terms, to.part(0..terms.len())?)?);
        }
        let eights = (length / 8) as u64;
        let config = LaunchConfig::linear(eights.div_ceil(256) as u32, 256);
        // SAFETY: both have `length` values.
        unsafe { self.launch(&self.kernels.to_residual, config, kernel_args![terms, to, eights]) }
    }

    fn add(&mut self, inputs: &CudaInputs, y: &CudaBuffer, x: &mut CudaBuffer) -> Result<(), KernelError> {
        let rows = inputs.shape.tokens;
        fit("add", x.width == y.width, || format!("{} columns to {}", y.width, x.width))?;
        let eights = (rows * x.width / 8) as u64;
        let args = kernel_args![y.typed("add", rows, self.dtype)?, x.typed("add", rows, Dtype::F32)?, eights];
        // SAFETY: both have as many values.
        unsafe { self.launch(&self.kernels.add, LaunchConfig::linear(eights.div_ceil(256) as u32, 256), args) }
    }

    fn logits(
        &mut self,
        inputs: &CudaInputs,
        x: &CudaBuffer,
        head: &CudaMatrix,
        out: &mut CudaBuffer,
    ) -> Result<(), KernelError> {
        let (op, m) = ("logits", inputs.shape.logit_rows);
        fit(op, x.width == head.cols && out.width == head.rows, || shapes(x, head, out.width))?;
        self.plan_gathered(inputs.limits.logit_rows_max, head.cols)?;
        self.product(&Product {
            op,
            x: x.typed(op, inputs.shape.tokens, self.dtype)?,
            weight: head,
            bias: None,
            rows: Some(inputs.arrays.logit_rows),
            y: out.typed(op, m, Dtype::F32)?,
            m,
            epilogue: Epilogue::Float,
        })
    }

    fn reduce_add_norm(
        &mut self,
        inputs: &CudaInputs,
        partial: &mut Partial<CudaBuffer>,
        residual: &mut CudaBuffer,
        weight: &CudaVector,
        eps: f32,
        normed: &mut CudaBuffer,
    ) -> Result<(), KernelError> {
        let (op, rows, width) = ("reduce_add_norm", inputs.shape.tokens, weight.len);
        let same = [partial.0.width, residual.width, normed.width].iter().all(|other| *other == width);
        fit(op, same, || format!("{} and {} beside a weight of {width}", partial.0.width, residual.width))?;
        let terms = partial.0.typed(op, rows, self.dtype)?.part(0..rows * width * self.dtype.bytes())?;
        let (residual, normed) = (residual.typed(op, rows, Dtype::F32)?, normed.typed(op, rows, self.dtype)?);
        let at_once = Rows { terms, residual, weight: weight.memory.span(), normed, rows, hidden: width, eps };
        if self.reduce_add_norm_at_once(&at_once)? {
            return Ok(());
        }
        self.all_reduce(terms)?;
        let args = kernel_args![terms, residual, &weight.memory, eps, normed, width as u32];
        // SAFETY: shapes were checked.
        unsafe { self.launch(&self.kernels.add_norm, row_config(rows, width), args) }
    }

    fn qkv_rope_store(
        &mut self,
        inputs: &CudaInputs,
        shape: &AttentionShape,
        x: &CudaBuffer,
        weight: &CudaMatrix,
        bias: Option<&CudaVector>,
        rope: &CudaRope,
        qkv: &mut CudaBuffer,
        kv: &mut CudaKvLayer,
    ) -> Result<(), KernelError> {
        self.linear(inputs, x, weight, None, qkv)?;
        self.rotate_and_store(inputs, shape, rope, bias, qkv, kv)
    }
}

fn shapes(x: &CudaBuffer, weight: &CudaMatrix, out: usize) -> String {
    format!("{} columns by {} x {} into {out}", x.width, weight.rows, weight.cols)
}
