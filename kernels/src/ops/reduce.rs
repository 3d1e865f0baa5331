//! Sums of all ranks' terms, alone and with what follows in a decoder layer. Collective.

use crate::{
    Collective, KernelError,
    cpu::{Pool, lanes::Simd, rows::for_row_pairs},
    ops::{add::add_row, fit, rms_norm::NormRow},
};

/// Sums `partial` over ranks, in rank order, into `out`; both `[rows, width]`.
pub(crate) fn reduce(collective: &mut dyn Collective, partial: &mut [f32], out: &mut [f32]) -> Result<(), KernelError> {
    fit("reduce", partial.len() == out.len(), || format!("{} values into {}", partial.len(), out.len()))?;
    collective.all_reduce_sum(partial)?;
    out.copy_from_slice(partial);
    Ok(())
}

/// What `reduce_add_norm` works on; all `[rows, weight.len()]`.
pub(crate) struct AddNorm<'a> {
    /// This rank's terms.
    pub(crate) partial: &'a mut [f32],
    /// The residual stream.
    pub(crate) residual: &'a mut [f32],
    /// Weight of the norm.
    pub(crate) weight: &'a [f32],
    /// Its epsilon.
    pub(crate) eps: f32,
    /// The residual stream, normalised.
    pub(crate) normed: &'a mut [f32],
}

/// Sums terms over ranks into the residual stream and normalises it, in one pass over the rows.
pub(crate) fn reduce_add_norm(
    simd: Simd,
    pool: &Pool,
    collective: &mut dyn Collective,
    operands: AddNorm<'_>,
) -> Result<(), KernelError> {
    let AddNorm { partial, residual, weight, eps, normed } = operands;
    let (len, width) = (partial.len(), weight.len());
    let fits = residual.len() == len && normed.len() == len && width > 0 && len.is_multiple_of(width);
    fit("reduce_add_norm", fits, || {
        format!("{len} terms, {} residuals, {width} weights, {} outputs", residual.len(), normed.len())
    })?;
    collective.all_reduce_sum(partial)?;
    for_row_pairs(pool, residual, normed, width, |row, residual, normed| {
        add_row(&partial[row * width..(row + 1) * width], residual);
        simd.run(NormRow { x: residual, weight, eps, out: normed });
    });
    Ok(())
}
