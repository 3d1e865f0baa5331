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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cpu::Waiting,
        ops::test_random::{Random, same_bits},
    };

    /// The plain form, in f64.
    fn reference(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
        let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / x.len() as f64;
        let factor = 1.0 / (mean + f64::from(eps)).sqrt();
        x.iter().zip(weight).map(|(&x, &w)| (f64::from(x) * factor * f64::from(w)) as f32).collect()
    }

    #[test]
    fn rows_are_the_references_and_the_same_bits_anywhere() {
        let mut random = Random(3);
        for width in [1, 8, 63, 64, 65, 576, 700] {
            let rows = 1 + random.below(90);
            let (x, weight) = (random.floats(rows * width), random.floats(width));
            let norm = |simd, num_threads, x: &[f32]| {
                let pool = Pool::new(num_threads, Waiting::Sleep).unwrap();
                let mut out = vec![f32::NAN; x.len()];
                rms_norm(simd, &pool, x, &weight, 1e-6, &mut out).unwrap();
                out
            };
            let whole = norm(Simd::best(), 3, &x);
            for (x, got) in x.chunks_exact(width).zip(whole.chunks_exact(width)) {
                let expected = reference(x, &weight, 1e-6);
                assert!(got.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 4e-7 * b.abs().max(0.1)), "{width}");
                assert!(Simd::all().into_iter().all(|simd| same_bits(&norm(simd, 1, x), got)), "{width}");
            }
        }
    }
}
