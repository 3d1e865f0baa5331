//! What a product looks like, and its settled algorithm.

use std::cell::Cell;
use std::ffi::c_int;
use std::ptr::null_mut;

use super::library::{Algorithm, Candidate, Handle, Lt, check};
use crate::cuda::context::Context;
use crate::cuda::error::CudaError;
use crate::cuda::memory::Span;

const COMPUTE_F32: c_int = 68;
const ATTRIBUTE_TRANSPOSE_A: c_int = 3;
const ATTRIBUTE_EPILOGUE: c_int = 7;
const ATTRIBUTE_BIAS: c_int = 8;
const TRANSPOSED: i32 = 1;
const EPILOGUE_BIAS: u32 = 4;

/// Type of an operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scalar {
    /// 32-bit float.
    F32,
    /// 16-bit float of IEEE.
    F16,
    /// The upper half of a 32-bit float.
    Bf16,
}

impl Scalar {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// `cudaDataType`.
    fn code(self) -> c_int {
        match self {
            Self::F32 => 0,
            Self::F16 => 2,
            Self::Bf16 => 14,
        }
    }
}

/// What a product looks like; each has one plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MatmulShape {
    /// Rows of `x` and `y`: the token bucket.
    pub rows: usize,
    /// Columns of `y`, rows of `w`.
    pub n: usize,
    /// Columns of `x` and `w`.
    pub k: usize,
    /// Type of `x` and `w`.
    pub input: Scalar,
    /// Type of `y`: that of `x`, or f32.
    pub output: Scalar,
    /// A bias `[n]` of the output's type is added.
    pub has_bias: bool,
}

/// Operands of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatmulOperands {
    /// `[rows, k]`.
    pub x: Span,
    /// `[n, k]`.
    pub w: Span,
    /// `[n]`, where the shape has one.
    pub bias: Option<Span>,
    /// `[rows, n]`.
    pub y: Span,
    /// `y` is added to instead of written.
    pub accumulate: bool,
}

/// A shape with its settled algorithm.
#[derive(Debug)]
pub struct MatmulPlan {
    pub(super) shape: MatmulShape,
    lt: &'static Lt,
    pub(super) desc: Handle,
    /// Of `w`, `x` and `y`.
    pub(super) layouts: [Handle; 3],
    pub(super) algorithm: Cell<Algorithm>,
    pub(super) workspace_bytes: Cell<usize>,
}

impl MatmulPlan {
    /// Describes a product; the algorithm is settled later.
    pub(super) fn new(context: &Context, lt: &'static Lt, shape: MatmulShape) -> Result<Self, CudaError> {
        if shape.rows == 0 || shape.n == 0 || shape.k == 0 {
            return Err(CudaError::refused("matmul", format!("{shape:?} is empty")));
        }
        // Handles are filled in one by one; those that are still null are not destroyed.
        let mut plan = Self {
            shape,
            lt,
            desc: null_mut(),
            layouts: [null_mut(); 3],
            algorithm: Cell::new(Algorithm::NOTHING),
            workspace_bytes: Cell::new(0),
        };
        // SAFETY: writes one handle.
        let code = unsafe { (lt.desc_create)(&raw mut plan.desc, COMPUTE_F32, Scalar::F32.code()) };
        check(context, "cublasLtMatmulDescCreate", code)?;
        plan.set(context, ATTRIBUTE_TRANSPOSE_A, &TRANSPOSED)?;
        if shape.has_bias {
            plan.set(context, ATTRIBUTE_EPILOGUE, &EPILOGUE_BIAS)?;
        }
        let sizes =
            [(shape.input, shape.k, shape.n), (shape.input, shape.k, shape.rows), (shape.output, shape.n, shape.rows)];
        for (layout, (scalar, rows, columns)) in plan.layouts.iter_mut().zip(sizes) {
            // SAFETY: writes one handle.
            let code = unsafe { (lt.layout_create)(layout, scalar.code(), rows as u64, columns as u64, rows as i64) };
            check(context, "cublasLtMatrixLayoutCreate", code)?;
        }
        Ok(plan)
    }

    /// The shape.
    pub fn shape(&self) -> MatmulShape {
        self.shape
    }

    /// Keeps an algorithm.
    pub(super) fn settle(&self, candidate: &Candidate) {
        self.algorithm.set(candidate.algorithm);
        self.workspace_bytes.set(candidate.workspace_bytes);
    }

    /// Gives the address of the bias of the next product.
    pub(super) fn set_bias(&self, context: &Context, address: u64) -> Result<(), CudaError> {
        self.set(context, ATTRIBUTE_BIAS, &address)
    }

    fn set<T: Copy>(&self, context: &Context, attribute: c_int, value: &T) -> Result<(), CudaError> {
        // SAFETY: reads the value, whose size is given.
        let code =
            unsafe { (self.lt.desc_set)(self.desc, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) };
        check(context, "cublasLtMatmulDescSetAttribute", code)
    }

    /// Refuses operands that are too small for the shape.
    pub(super) fn check(&self, operands: &MatmulOperands) -> Result<(), CudaError> {
        let MatmulShape { rows, n, k, input, output, has_bias } = self.shape;
        let needs = [
            ("x", operands.x.len(), rows * k * input.bytes()),
            ("w", operands.w.len(), n * k * input.bytes()),
            ("y", operands.y.len(), rows * n * output.bytes()),
            ("bias", operands.bias.map_or(0, |bias| bias.len()), if has_bias { n * output.bytes() } else { 0 }),
        ];
        for (name, has, needs) in needs {
            if has < needs {
                let reason = format!("{name} has {has} bytes, {:?} needs {needs}", self.shape);
                return Err(CudaError::refused("matmul", reason));
            }
        }
        if operands.bias.is_some() != has_bias {
            return Err(CudaError::refused(
                "matmul",
                "a bias is given that the shape does not have, or the other way round",
            ));
        }
        Ok(())
    }
}

impl Drop for MatmulPlan {
    fn drop(&mut self) {
        for layout in self.layouts.into_iter().filter(|layout| !layout.is_null()) {
            // SAFETY: created in `new`, destroyed once.
            unsafe { (self.lt.layout_destroy)(layout) };
        }
        if !self.desc.is_null() {
            // SAFETY: as above.
            unsafe { (self.lt.desc_destroy)(self.desc) };
        }
    }
}
