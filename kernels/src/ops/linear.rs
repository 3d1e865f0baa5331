//! `out = x W^T + bias`: `x` `[rows, K]`, `W` `[N, K]` in any stored formats, `out` `[rows, N]`.
//!
//! `linear_partial` is the same on a rank's columns, without a bias: its result is a term of a sum over ranks.
//! Source: arXiv:1909.08053, section 3.

use crate::{
    KernelError,
    cpu::{self, CpuMatrix, Pool, Scratch},
};

/// Multiplies; see the matrix kernels for the arithmetic.
pub(crate) fn linear(
    pool: &Pool,
    scratch: &mut Scratch,
    x: &[f32],
    weight: &CpuMatrix,
    bias: Option<&[f32]>,
    out: &mut [f32],
) -> Result<(), KernelError> {
    cpu::linear(pool, scratch, x, weight, bias, out)
}
