//! What models hold on the device: activations, weights, vectors, tables and the cache.
//!
//! **Invariant:** a buffer has rows for the padded size of what was planned, so padding never leaves it.

use phalanx_formats::StoredType;

use super::buckets::padded;
use crate::cuda::{DeviceMemory, Scalar, Span};
use crate::{KernelError, KvShape};

/// Element type of activations and weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// 32 bits; products never in TF32.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
}

impl Dtype {
    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The end of a kernel's name.
    pub(super) fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// As the matrix library names it.
    pub(super) fn scalar(self) -> Scalar {
        match self {
            Self::F32 => Scalar::F32,
            Self::F16 => Scalar::F16,
            Self::Bf16 => Scalar::Bf16,
        }
    }

    /// The type of stored values of this kind.
    pub fn stored(self) -> StoredType {
        match self {
            Self::F32 => StoredType::F32,
            Self::F16 => StoredType::F16,
            Self::Bf16 => StoredType::BF16,
        }
    }
}

/// Activations, `[rows, width]`.
#[derive(Debug)]
pub struct CudaBuffer {
    pub(super) memory: DeviceMemory,
    pub(super) rows_max: usize,
    pub(super) width: usize,
    /// F32 in wide buffers.
    pub(super) dtype: Dtype,
}

impl CudaBuffer {
    /// Bytes of a buffer, rows padded.
    pub(super) fn bytes(rows_max: usize, width: usize, dtype: Dtype) -> usize {
        padded(rows_max) * width * dtype.bytes()
    }

    /// Where its rows are, if it has so many.
    pub(super) fn rows(&self, op: &'static str, rows: usize) -> Result<Span, KernelError> {
        let fits = rows <= padded(self.rows_max);
        let reason = || format!("{rows} rows in a buffer of {}", self.rows_max);
        fits.then(|| self.memory.span()).ok_or_else(|| KernelError::Shape { op, reason: reason() })
    }

    /// The same, of activations in the type that kernels of `dtype` take.
    pub(super) fn typed(&self, op: &'static str, rows: usize, dtype: Dtype) -> Result<Span, KernelError> {
        if self.dtype != dtype {
            return Err(KernelError::Shape { op, reason: format!("{:?} where {dtype:?} is taken", self.dtype) });
        }
        self.rows(op, rows)
    }
}

/// A weight matrix `[N, K]`, row-major; gate and up interleaved by 16 rows.
#[derive(Debug)]
pub struct CudaMatrix {
    pub(super) memory: DeviceMemory,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// A norm's weight or a bias, in f32.
#[derive(Debug)]
pub struct CudaVector {
    pub(super) memory: DeviceMemory,
    pub(super) len: usize,
}

/// Rotary tables, f32 `[max_position, head_dim / 2]` each.
#[derive(Debug)]
pub struct CudaRope {
    pub(super) cos: DeviceMemory,
    pub(super) sin: DeviceMemory,
    pub(super) head_dim: usize,
}

/// K and V of one layer, block by block: `[block][K/V][kv head][slot][head dim]`.
#[derive(Debug)]
pub struct CudaKvLayer {
    pub(super) memory: DeviceMemory,
    pub(super) shape: KvShape,
}

impl CudaKvLayer {
    /// Values of a block.
    pub(super) fn block_stride(shape: &KvShape) -> usize {
        2 * shape.num_kv_heads * shape.block_size * shape.head_dim
    }
}
