//! From weights where they lie to the device: read by several threads into pinned memory, piece by piece, converted where the
//! stored type is another.
//!
//! **Invariant:** no matrix is ever whole in host memory; what was taken in is on the device, or on its way there in the
//! stream's order, when the call returns.

use std::num::NonZero;
use std::ops::Range;
use std::thread;

use half::{bf16, f16};
use phalanx_formats::StoredType;

use super::buffers::{CudaMatrix, Dtype};
use super::{CudaOps, STEP_DEADLINE};
use crate::cuda::{Context, CudaError, DeviceMemory, PinnedRing, Span};
use crate::reference::to_floats;
use crate::{HostMatrix, KernelError, MatrixSource};

/// Bytes of one piece.
const PIECE_BYTES: usize = 32 << 20;
/// Pieces under way.
const NUM_PIECES: usize = 4;
/// Rows of gate, then as many of up.
const INTERLEAVE: usize = 16;
/// Most threads that read.
const READERS_MAX: usize = 8;
/// Fewest bytes that are worth a thread.
const READER_BYTES_MIN: usize = 1 << 20;

/// The way of weights to the device.
pub(super) struct Uploader {
    ring: PinnedRing,
    num_readers: usize,
}

impl Uploader {
    pub(super) fn new(context: &Context) -> Result<Self, CudaError> {
        let num_readers = thread::available_parallelism().map_or(1, NonZero::get).min(READERS_MAX);
        Ok(Self { ring: PinnedRing::new(context, NUM_PIECES, PIECE_BYTES)?, num_readers })
    }
}

impl CudaOps {
    /// Takes parts in, one below the other.
    pub(super) fn upload_matrix(&mut self, parts: &[MatrixSource<'_>]) -> Result<CudaMatrix, KernelError> {
        let cols = parts.first().map_or(0, |part| part.cols);
        let rows: usize = parts.iter().map(|part| part.rows).sum();
        check("matrix", cols, parts.iter().all(|part| part.cols == cols))?;
        let (dtype, row_bytes) = (self.dtype, cols * self.dtype.bytes());
        let memory = DeviceMemory::alloc(&self.context, rows * row_bytes)?;
        let mut at = 0;
        for part in parts {
            let to = memory.part(at..at + part.rows * row_bytes)?;
            at += to.len();
            self.send(to, row_bytes, &|range, out| read_typed(part, dtype, range, out))?;
        }
        Ok(CudaMatrix { memory, rows, cols })
    }

    /// Takes gate and up in, interleaved by 16 rows.
    pub(super) fn upload_gate_up(
        &mut self,
        gate: &MatrixSource<'_>,
        up: &MatrixSource<'_>,
    ) -> Result<CudaMatrix, KernelError> {
        let (rows, cols) = (gate.rows, gate.cols);
        check("gate_up_matrix", cols, (up.rows, up.cols) == (rows, cols) && rows.is_multiple_of(INTERLEAVE))?;
        let (dtype, run) = (self.dtype, INTERLEAVE * cols * self.dtype.bytes());
        let memory = DeviceMemory::alloc(&self.context, 2 * rows * cols * dtype.bytes())?;
        // A unit is a run of gate and the run of up beside it.
        self.send(memory.span(), 2 * run, &|units, out| {
            for (unit, out) in units.zip(out.chunks_exact_mut(2 * run)) {
                let rows = unit * INTERLEAVE..(unit + 1) * INTERLEAVE;
                let (gates, ups) = out.split_at_mut(run);
                read_typed(gate, dtype, rows.clone(), gates)?;
                read_typed(up, dtype, rows, ups)?;
            }
            Ok(())
        })?;
        Ok(CudaMatrix { memory, rows: 2 * rows, cols })
    }

    /// Copies floats to memory of their own.
    pub(super) fn upload_floats(&mut self, values: &[f32]) -> Result<DeviceMemory, KernelError> {
        let memory = DeviceMemory::alloc(&self.context, size_of_val(values))?;
        self.send(memory.span(), 4, &|range, out| {
            for (value, out) in values[range].iter().zip(out.as_chunks_mut::<4>().0) {
                *out = value.to_le_bytes();
            }
            Ok(())
        })?;
        Ok(memory)
    }

    /// Fills `to` with units of `unit_bytes`, which `read` writes by ranges, from several threads at once.
    fn send(
        &mut self,
        to: Span,
        unit_bytes: usize,
        read: &(dyn Fn(Range<usize>, &mut [u8]) -> Result<(), KernelError> + Sync),
    ) -> Result<(), KernelError> {
        if to.is_empty() {
            return Ok(());
        }
        let num_units = to.len() / unit_bytes;
        let units_per_piece = PIECE_BYTES / unit_bytes;
        if units_per_piece == 0 {
            let reason = format!("rows of {unit_bytes} bytes are longer than a piece of {PIECE_BYTES}");
            return Err(KernelError::Shape { op: "matrix", reason });
        }
        for begin in (0..num_units).step_by(units_per_piece) {
            let units = begin..(begin + units_per_piece).min(num_units);
            let mut entry = self.uploader.ring.entry(STEP_DEADLINE)?;
            let len = units.len() * unit_bytes;
            let out = &mut entry.bytes_mut()[..len];
            read_parallel(self.uploader.num_readers, units.clone(), unit_bytes, out, read)?;
            let at = units.start * unit_bytes;
            entry.send(&self.stream, &[(0..len, to.part(at..at + len)?)])?;
        }
        Ok(())
    }
}

/// Shares a piece's units among threads.
fn read_parallel(
    num_readers: usize,
    units: Range<usize>,
    unit_bytes: usize,
    out: &mut [u8],
    read: &(dyn Fn(Range<usize>, &mut [u8]) -> Result<(), KernelError> + Sync),
) -> Result<(), KernelError> {
    let readers = num_readers.min(out.len() / READER_BYTES_MIN).max(1);
    let share = units.len().div_ceil(readers);
    if readers == 1 {
        return read(units, out);
    }
    thread::scope(|scope| {
        let parts = out.chunks_mut(share * unit_bytes).enumerate().map(|(index, out)| {
            let begin = units.start + index * share;
            let range = begin..begin + out.len() / unit_bytes;
            scope.spawn(move || read(range, out))
        });
        let threads: Vec<_> = parts.collect();
        let panicked = |_| Err(KernelError::Shape { op: "matrix", reason: "a reader panicked".into() });
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(panicked))
    })
}

/// Kernels read rows by 16 bytes.
fn check(op: &'static str, cols: usize, same: bool) -> Result<(), KernelError> {
    if same && cols.is_multiple_of(8) {
        return Ok(());
    }
    Err(KernelError::Shape { op, reason: format!("parts of {cols} columns do not fit each other or the device") })
}

/// Reads rows in the device's type.
fn read_typed(source: &MatrixSource<'_>, dtype: Dtype, rows: Range<usize>, out: &mut [u8]) -> Result<(), KernelError> {
    if source.dtype == dtype.stored() {
        source.read(rows, out);
        return Ok(());
    }
    let floats = floats(&source.load_rows(rows))?;
    let (quads, halves) = (out.len() / 4, out.len() / 2);
    match dtype {
        Dtype::F32 => floats.iter().zip(out.as_chunks_mut().0).take(quads).for_each(|(x, out)| *out = x.to_le_bytes()),
        Dtype::F16 => {
            let out = out.as_chunks_mut().0;
            floats.iter().zip(out).take(halves).for_each(|(x, out)| *out = f16::from_f32(*x).to_le_bytes());
        }
        Dtype::Bf16 => {
            let out = out.as_chunks_mut().0;
            floats.iter().zip(out).take(halves).for_each(|(x, out)| *out = bf16::from_f32(*x).to_le_bytes());
        }
    }
    Ok(())
}

fn floats(matrix: &HostMatrix) -> Result<Vec<f32>, KernelError> {
    let halves = matrix.data.as_chunks::<2>().0.iter();
    match matrix.dtype {
        StoredType::F16 => Ok(halves.map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect()),
        StoredType::BF16 => Ok(halves.map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect()),
        _ => to_floats(matrix),
    }
}
