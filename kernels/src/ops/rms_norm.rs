//! `out = x / sqrt(mean(x^2) + eps) * weight`, row by row. Source: arXiv:1910.07467.

use crate::{
    KernelError,
    cpu::{
        Pool,
        lanes::{Kernel, LANES, Lanes, Simd},
        rows::for_rows,
    },
    ops::fit,
};

/// Running sums of a row: so many vectors, added in order at its end.
const SUMS: usize = 4;

/// Normalises rows of `x`, `[rows, weight.len()]`.
pub(crate) fn rms_norm(
    simd: Simd,
    pool: &Pool,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let width = weight.len();
    fit("rms_norm", width > 0 && x.len() == out.len() && x.len().is_multiple_of(width), || {
        format!("{} values by {width} weights into {}", x.len(), out.len())
    })?;
    for_rows(pool, out, width, |row, out| {
        simd.run(NormRow { x: &x[row * width..(row + 1) * width], weight, eps, out });
    });
    Ok(())
}

/// One row: `x`, `weight` and `out` have the same length.
pub(crate) struct NormRow<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for NormRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let mean = sum_of_squares(simd, self.x) / self.x.len() as f32;
        let factor = 1.0 / (mean + self.eps).sqrt();
        for ((out, x), weight) in self.out.iter_mut().zip(self.x).zip(self.weight) {
            *out = x * factor * weight;
        }
    }
}

/// The sum of squares, in one order for every row of a width.
#[inline(always)]
fn sum_of_squares<S: Lanes>(simd: S, x: &[f32]) -> f32 {
    let mut sums = [simd.zero(); SUMS];
    let (blocks, rest) = x.as_chunks::<{ SUMS * LANES }>();
    for block in blocks {
        for (sum, chunk) in sums.iter_mut().zip(block.as_chunks().0) {
            let v = simd.load(chunk);
            *sum = simd.fma(v, v, *sum);
        }
    }
    let mut last = [0.0; SUMS * LANES];
    last[..rest.len()].copy_from_slice(rest);
    for (sum, chunk) in sums.iter_mut().zip(last.as_chunks().0) {
        let v = simd.load(chunk);
        *sum = simd.fma(v, v, *sum);
    }
    simd.sum(simd.add(simd.add(sums[0], sums[1]), simd.add(sums[2], sums[3])))
}
