//! A weight matrix in memory.

use super::packed::Part;
use crate::{HostMatrix, KernelError};

/// What activations are turned into before they meet quantised weights. Weights of F32, F16 and BF16 always meet f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activations {
    /// f32: weights are dequantised exactly.
    Float32,
    /// int8 in blocks of 32, each with its f32 scale.
    Int8,
}

/// A weight matrix `[rows, cols]`: parts of several formats one below the other, or gate and up side by side.
///
/// Quantised weights stay quantised. A tied embedding and output head share one.
pub struct CpuMatrix {
    pub(super) parts: Vec<Part>,
    pub(super) activations: Activations,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Gate and up: two parts of the same shape.
    pub(super) is_gate_up: bool,
}

impl CpuMatrix {
    /// Packs parts one below the other; all have the same width.
    ///
    /// # Errors
    /// No part, parts of different widths, bytes that are no such matrix, no memory.
    pub fn pack(parts: Vec<HostMatrix>, activations: Activations) -> Result<Self, KernelError> {
        let cols = parts.first().map(|part| part.cols).filter(|cols| *cols > 0);
        let Some(cols) = cols.filter(|cols| parts.iter().all(|part| part.cols == *cols)) else {
            let widths: Vec<usize> = parts.iter().map(|part| part.cols).collect();
            return Err(KernelError::Shape { op: "matrix", reason: format!("parts of widths {widths:?}") });
        };
        let mut packed = Vec::with_capacity(parts.len());
        // Each part's source goes as soon as it is packed: memory peaks at one part more.
        for part in parts {
            packed.push(Part::pack(&part)?);
        }
        let rows = packed.iter().map(|part| part.rows).sum();
        Ok(Self { parts: packed, activations, rows, cols, is_gate_up: false })
    }

    /// Packs gate and up for `gate_up`; rows are gate's, then up's.
    ///
    /// # Errors
    /// As `pack`; both must have the same shape. Their formats may differ.
    pub fn pack_gate_up(gate: HostMatrix, up: HostMatrix, activations: Activations) -> Result<Self, KernelError> {
        if gate.rows != up.rows {
            let reason = format!("gate has {} rows, up {}", gate.rows, up.rows);
            return Err(KernelError::Shape { op: "gate_up_matrix", reason });
        }
        Ok(Self { is_gate_up: true, ..Self::pack(vec![gate, up], activations)? })
    }

    /// Output width N.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input width K.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.parts.iter().map(Part::bytes).sum()
    }

    /// Writes row `index`, dequantised exactly, to `out` `[cols]`.
    ///
    /// # Errors
    /// No such row, or `out` of another width.
    pub fn row(&self, index: usize, out: &mut [f32]) -> Result<(), KernelError> {
        let mut first = 0;
        for part in &self.parts {
            if (first..first + part.rows).contains(&index) && out.len() == self.cols {
                part.row(index - first, out);
                return Ok(());
            }
            first += part.rows;
        }
        let reason = format!("row {index} of {} x {} into {} values", self.rows, self.cols, out.len());
        Err(KernelError::Shape { op: "row", reason })
    }
}
