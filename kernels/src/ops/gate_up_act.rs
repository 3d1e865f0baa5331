//! `out = act(x G^T) * (x U^T)`: `x` `[rows, K]`, `out` `[rows, inner]`. Source: arXiv:2002.05202.

use crate::{
    GateActivation, KernelError,
    cpu::{self, CpuMatrix, Pool, Scratch},
};

/// Multiplies by gate and up at once and joins them; see the matrix kernels for the arithmetic.
pub(crate) fn gate_up_act(
    pool: &Pool,
    scratch: &mut Scratch,
    x: &[f32],
    gate_up: &CpuMatrix,
    activation: GateActivation,
    out: &mut [f32],
) -> Result<(), KernelError> {
    cpu::gate_up(pool, scratch, x, gate_up, activation, out)
}
