//! From weights in host memory to the device: converted where the stored type is another, through pinned memory in pieces.
//!
//! **Invariant:** what was taken in is on the device, or on its way there in the stream's order, when the call returns.

use half::{bf16, f16};
use phalanx_formats::StoredType;

use super::buffers::{CudaMatrix, Dtype};
use super::{CudaOps, STEP_DEADLINE};
use crate::cuda::{Context, CudaError, DeviceMemory, PinnedRing, Span};
use crate::reference::to_floats;
use crate::{HostMatrix, KernelError};

/// Bytes of one piece.
const PIECE_BYTES: usize = 16 << 20;
/// Pieces under way.
const NUM_PIECES: usize = 4;
/// Rows of gate, then rows of up.
const INTERLEAVE: usize = 16;

/// The way of weights to the device.
pub(super) struct Uploader {
    ring: PinnedRing,
}

impl Uploader {
    pub(super) fn new(context: &Context) -> Result<Self, CudaError> {
        Ok(Self { ring: PinnedRing::new(context, NUM_PIECES, PIECE_BYTES)? })
    }
}

impl CudaOps {
    /// Takes parts in, one below the other.
    pub(super) fn upload_matrix(&mut self, parts: Vec<HostMatrix>) -> Result<CudaMatrix, KernelError> {
        let cols = parts.first().map_or(0, |part| part.cols);
        let rows: usize = parts.iter().map(|part| part.rows).sum();
        check("matrix", cols, parts.iter().all(|part| part.cols == cols))?;
        let memory = DeviceMemory::alloc(&self.context, rows * cols * self.dtype.bytes())?;
        let mut at = 0;
        for part in parts {
            let bytes = typed_bytes(part, self.dtype)?;
            self.send(&bytes, memory.part(at..at + bytes.len())?)?;
            at += bytes.len();
        }
        Ok(CudaMatrix { memory, rows, cols })
    }

    /// Takes gate and up in, interleaved by 16 rows.
    pub(super) fn upload_gate_up(&mut self, gate: HostMatrix, up: HostMatrix) -> Result<CudaMatrix, KernelError> {
        let (rows, cols) = (gate.rows, gate.cols);
        check("gate_up_matrix", cols, (up.rows, up.cols) == (rows, cols) && rows.is_multiple_of(INTERLEAVE))?;
        let memory = DeviceMemory::alloc(&self.context, 2 * rows * cols * self.dtype.bytes())?;
        let (gate, up) = (typed_bytes(gate, self.dtype)?, typed_bytes(up, self.dtype)?);
        let run = INTERLEAVE * cols * self.dtype.bytes();
        let runs_per_piece = (PIECE_BYTES / (2 * run)).max(1);
        let mut at = 0;
        for (gates, ups) in gate.chunks(runs_per_piece * run).zip(up.chunks(runs_per_piece * run)) {
            let to = memory.part(at..at + 2 * gates.len())?;
            at += 2 * gates.len();
            if 2 * run > PIECE_BYTES {
                self.send(gates, to.part(0..gates.len())?)?;
                self.send(ups, to.part(gates.len()..2 * gates.len())?)?;
                continue;
            }
            let mut entry = self.uploader.ring.entry(STEP_DEADLINE)?;
            let both = gates.chunks(run).zip(ups.chunks(run));
            for (out, (gate, up)) in entry.bytes_mut().chunks_mut(2 * run).zip(both) {
                out[..run].copy_from_slice(gate);
                out[run..2 * run].copy_from_slice(up);
            }
            entry.send(&self.stream, &[(0..to.len(), to)])?;
        }
        Ok(CudaMatrix { memory, rows: 2 * rows, cols })
    }

    /// Copies floats to memory of their own.
    pub(super) fn upload_floats(&mut self, values: &[f32]) -> Result<DeviceMemory, KernelError> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let memory = DeviceMemory::alloc(&self.context, bytes.len())?;
        self.send(&bytes, memory.span())?;
        Ok(memory)
    }

    fn send(&mut self, bytes: &[u8], to: Span) -> Result<(), KernelError> {
        for (index, piece) in bytes.chunks(PIECE_BYTES).enumerate() {
            let begin = index * PIECE_BYTES;
            let mut entry = self.uploader.ring.entry(STEP_DEADLINE)?;
            entry.bytes_mut()[..piece.len()].copy_from_slice(piece);
            entry.send(&self.stream, &[(0..piece.len(), to.part(begin..begin + piece.len())?)])?;
        }
        Ok(())
    }
}

/// Kernels read rows by 16 bytes.
fn check(op: &'static str, cols: usize, same: bool) -> Result<(), KernelError> {
    if same && cols.is_multiple_of(8) {
        return Ok(());
    }
    Err(KernelError::Shape { op, reason: format!("parts of {cols} columns do not fit each other or the device") })
}

/// A matrix in the device's type.
fn typed_bytes(matrix: HostMatrix, dtype: Dtype) -> Result<Vec<u8>, KernelError> {
    if matrix.dtype == dtype.stored() {
        return Ok(matrix.data);
    }
    let halves = matrix.data.as_chunks::<2>().0.iter();
    let floats: Vec<f32> = match matrix.dtype {
        StoredType::F16 => halves.map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
        StoredType::BF16 => halves.map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
        _ => to_floats(&matrix)?,
    };
    Ok(match dtype {
        Dtype::F32 => floats.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Dtype::F16 => floats.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        Dtype::Bf16 => floats.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
    })
}
