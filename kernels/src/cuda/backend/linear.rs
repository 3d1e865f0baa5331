//! Matrix products: few rows through the kernels that stream weights, many through cuBLASLt, f32 through the plain kernel.
//!
//! **Invariant:** which way a product goes depends on its padded shape only.

use super::CudaOps;
use super::buffers::{CudaMatrix, Dtype};
use crate::KernelError;
use crate::cuda::linear_plan::{Chip, Epilogue, LinearPlan, plan};
use crate::cuda::{DeviceMemory, LaunchConfig, MatmulOperands, MatmulShape, Scalar, Span};
use crate::kernel_args;

/// Most rows that go through the streaming kernels: above, the library is as fast (H200, shapes of 0.5B and 8B models).
pub(super) const STREAMED_ROWS_MAX: usize = 8;

/// A product `y = x W^T`.
pub(super) struct Product<'a> {
    pub op: &'static str,
    /// `[m, K]`, or more rows where `rows` picks.
    pub x: Span,
    pub weight: &'a CudaMatrix,
    /// `[N]`, f32.
    pub bias: Option<Span>,
    /// Which rows of `x` to take.
    pub rows: Option<Span>,
    /// `[m, width]` behind the epilogue.
    pub y: Span,
    /// Padded rows.
    pub m: usize,
    pub epilogue: Epilogue,
}

impl Product<'_> {
    fn width(&self) -> usize {
        match self.epilogue {
            Epilogue::Plain | Epilogue::Float => self.weight.rows,
            Epilogue::SiluMul | Epilogue::GeluTanhMul => self.weight.rows / 2,
        }
    }
}

/// Memory for what lies between two kernels of one op; grown while models are planned.
#[derive(Default)]
pub(super) struct Scratch {
    pub gate_up: Option<DeviceMemory>,
    pub gathered: Option<DeviceMemory>,
}

impl CudaOps {
    /// Puts a product into the stream.
    pub(super) fn product(&self, product: &Product<'_>) -> Result<(), KernelError> {
        let needed =
            product.m * product.width() * if product.epilogue == Epilogue::Float { 4 } else { self.dtype.bytes() };
        if needed > product.y.len() {
            let reason = format!("{needed} bytes into {}", product.y.len());
            return Err(KernelError::Shape { op: product.op, reason });
        }
        match self.streamed(product) {
            Some(plan) => self.stream_product(product, &plan),
            None if self.dtype == Dtype::F32 || product.bias.is_some() => self.tiled_product(product),
            None => self.library_product(product),
        }
    }

    fn streamed(&self, product: &Product<'_>) -> Option<LinearPlan> {
        let CudaMatrix { rows, cols, .. } = *product.weight;
        if self.dtype == Dtype::F32 || product.m > STREAMED_ROWS_MAX {
            return None;
        }
        let device = self.context.device();
        let chip = Chip {
            num_sms: device.num_multiprocessors,
            shared_bytes_max: device.shared_bytes_max,
            has_clusters: device.capability.0 >= 9,
        };
        plan(product.m as u32, rows as u32, cols as u32, chip, product.epilogue)
    }

    fn stream_product(&self, product: &Product<'_>, plan: &LinearPlan) -> Result<(), KernelError> {
        let CudaMatrix { memory, rows, cols } = product.weight;
        let kernel = &self.kernels.linear_stream[plan.padded_rows as usize / 8 - 1];
        let mut config = LaunchConfig::linear(plan.grid, plan.block).shared(plan.shared_bytes);
        if plan.split > 1 {
            config = config.cluster([plan.split, 1, 1]);
        }
        let args = kernel_args![
            product.y,
            product.x,
            memory,
            product.bias,
            product.rows,
            product.m as u32,
            *rows as u32,
            *cols as u32,
            product.width() as u32,
            product.epilogue as u32,
            plan.warp_rows,
            plan.warp_cols,
            plan.stages,
            plan.split,
            plan.ahead,
        ];
        // SAFETY: operands were checked against the shape, and live as long as the backend.
        unsafe { self.launch(kernel, config, args) }
    }

    fn tiled_product(&self, product: &Product<'_>) -> Result<(), KernelError> {
        let CudaMatrix { memory, rows, cols } = product.weight;
        let grid = [rows.div_ceil(64) as u32, product.m.div_ceil(64) as u32, 1];
        let args = kernel_args![
            product.y,
            product.x,
            memory,
            product.bias,
            product.rows,
            product.m as u32,
            *rows as u32,
            *cols as u32,
            product.width() as u32,
            product.epilogue as u32,
        ];
        // SAFETY: as in `stream_product`.
        unsafe { self.launch(&self.kernels.linear_tiled, LaunchConfig::new(grid, [256, 1, 1]), args) }
    }

    fn library_product(&self, product: &Product<'_>) -> Result<(), KernelError> {
        let CudaMatrix { memory, rows, cols } = product.weight;
        let gated = product.width() != *rows;
        let x = match product.rows {
            Some(picked) => self.gather_rows(product, picked)?,
            None => product.x,
        };
        let y = match &self.scratch.gate_up {
            Some(scratch) if gated => scratch.part(0..product.m * rows * self.dtype.bytes())?,
            None if gated => {
                return Err(KernelError::Shape { op: product.op, reason: "no scratch was planned".into() });
            }
            _ => product.y.part(0..needed_bytes(product, self.dtype))?,
        };
        let input = self.dtype.scalar();
        let output = if product.epilogue == Epilogue::Float { Scalar::F32 } else { input };
        let shape = MatmulShape { rows: product.m, n: *rows, k: *cols, input, output, has_bias: false };
        let x = x.part(0..product.m * cols * self.dtype.bytes())?;
        let w = memory.part(0..rows * cols * self.dtype.bytes())?;
        let blas = self.blas()?;
        let plan = blas.plan(shape)?;
        blas.matmul(&self.stream, &plan, &MatmulOperands { x, w, bias: None, y, accumulate: false })?;
        if !gated {
            return Ok(());
        }
        let inner = rows / 2;
        let grid = [product.m as u32, inner.div_ceil(1024) as u32, 1];
        let args = kernel_args![y, product.y, inner as u32];
        let kernels = &self.kernels;
        let is_gelu = product.epilogue == Epilogue::GeluTanhMul;
        let act_mul = if is_gelu { &kernels.gelu_tanh_mul } else { &kernels.silu_mul };
        // SAFETY: scratch was planned for the largest step, `product.y` was checked.
        unsafe { self.launch(act_mul, LaunchConfig::new(grid, [128, 1, 1]), args) }
    }

    /// Gathers the picked rows of `x` for the library, which takes rows as they lie.
    fn gather_rows(&self, product: &Product<'_>, picked: Span) -> Result<Span, KernelError> {
        let cols = product.weight.cols;
        let bytes = product.m * cols * self.dtype.bytes();
        let Some(scratch) = self.scratch.gathered.as_ref().filter(|scratch| scratch.len() >= bytes) else {
            return Err(KernelError::Shape { op: product.op, reason: "no scratch was planned".into() });
        };
        let args = kernel_args![product.x, picked, scratch, cols as u32];
        // SAFETY: scratch holds `m` rows; rows were checked when the step was loaded.
        unsafe { self.launch(&self.kernels.gather_rows, row_config(product.m, cols), args)? };
        Ok(scratch.span())
    }

    /// Grows a scratch memory.
    pub(super) fn plan_gate_up(&mut self, rows: usize, width: usize) -> Result<(), KernelError> {
        let bytes = super::buffers::CudaBuffer::bytes(rows, width, self.dtype);
        if self.scratch.gate_up.as_ref().is_none_or(|scratch| scratch.len() < bytes) {
            self.scratch.gate_up = None;
            self.scratch.gate_up = Some(DeviceMemory::alloc(&self.context, bytes)?);
        }
        Ok(())
    }

    /// Grows the memory for gathered rows.
    pub(super) fn plan_gathered(&mut self, rows: usize, width: usize) -> Result<(), KernelError> {
        let bytes = super::buffers::CudaBuffer::bytes(rows, width, self.dtype);
        if self.scratch.gathered.as_ref().is_none_or(|scratch| scratch.len() < bytes) {
            self.scratch.gathered = None;
            self.scratch.gathered = Some(DeviceMemory::alloc(&self.context, bytes)?);
        }
        Ok(())
    }
}

fn needed_bytes(product: &Product<'_>, dtype: Dtype) -> usize {
    product.m * product.width() * if product.epilogue == Epilogue::Float { 4 } else { dtype.bytes() }
}

/// One block a row, eight values a thread.
pub(super) fn row_config(rows: usize, width: usize) -> LaunchConfig {
    LaunchConfig::linear(rows as u32, (32 * width.div_ceil(256) as u32).min(1024))
}
