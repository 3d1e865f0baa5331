//! `x += y`, `[rows, width]`.

use crate::{
    KernelError,
    cpu::{Pool, rows::for_rows},
    ops::fit,
};

/// Adds `y` to `x`, both `[rows, width]`.
pub(crate) fn add(pool: &Pool, y: &[f32], x: &mut [f32], width: usize) -> Result<(), KernelError> {
    fit("add", y.len() == x.len(), || format!("{} values onto {}", y.len(), x.len()))?;
    for_rows(pool, x, width, |row, x| add_row(&y[row * width..(row + 1) * width], x));
    Ok(())
}

/// One row.
#[inline(always)]
pub(crate) fn add_row(y: &[f32], x: &mut [f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}
