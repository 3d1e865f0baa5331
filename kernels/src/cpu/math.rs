//! Functions of a vector of lanes: each is computed in one way everywhere.
//!
//! **Invariant:** a value's result does not depend on the lane or the position where it stands.

use super::lanes::Lanes;

/// Below this, `exp` is 0: the result would not be a normal number.
const EXP_LEAST: f32 = -87.33;
/// Above this, `exp` stays where it is: the next power of two would not be finite.
const EXP_MOST: f32 = 88.02;

/// `exp(x)`, relative error below 2e-7; 0 below -87.33, and 1.68e38 from 88.02 on. NaN stays NaN.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`; a polynomial for `exp(r)`, and `n` goes into the exponent.
#[inline(always)]
pub(crate) fn exp<S: Lanes>(simd: S, x: S::V) -> S::V {
    // Adding this rounds to an integer, and leaves `n + 127`, the biased exponent, in the low bits.
    let shift = simd.splat(12_582_912.0 + 127.0);
    let x = simd.min(simd.splat(EXP_MOST), x);
    let shifted = simd.fma(x, simd.splat(std::f32::consts::LOG2_E), shift);
    let n = simd.sub(shifted, shift);
    // ln 2 in two parts: the first times n is exact.
    let r = simd.fma(n, simd.splat(-0.693_359_4), x);
    let r = simd.fma(n, simd.splat(2.121_944_4e-4), r);
    let mut p = simd.splat(1.987_569_1e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = simd.fma(p, r, simd.splat(coefficient));
    }
    let p = simd.fma(p, simd.mul(r, r), r);
    let p = simd.add(p, simd.splat(1.0));
    simd.zero_below(x, EXP_LEAST, simd.mul(p, simd.low_bits_as_exponent(shifted)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::lanes::{Kernel, LANES, Simd};

    struct Exp<'a>(&'a mut [f32]);

    impl Kernel for Exp<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Lanes>(self, simd: S) {
            for chunk in self.0.as_chunks_mut::<LANES>().0 {
                let y = exp(simd, simd.load(chunk));
                simd.store(y, chunk);
            }
        }
    }

    #[test]
    fn exp_is_exact_to_two_ten_millionths_on_every_instruction_set() {
        let x: Vec<f32> = (0..1_600_000).map(|i| -87.3 + i as f32 * (175.3 / 1_600_000.0)).collect();
        let mut portable = x.clone();
        Simd::Portable.run(Exp(&mut portable));
        for (&x, &y) in x.iter().zip(&portable) {
            let exact = f64::from(x).exp();
            assert!((f64::from(y) / exact - 1.0).abs() < 2e-7, "exp({x}) = {y}");
        }
        for simd in Simd::all() {
            let mut y = x.clone();
            simd.run(Exp(&mut y));
            assert!(y.iter().zip(&portable).all(|(a, b)| a.to_bits() == b.to_bits()), "{simd:?}");
        }
    }

    #[test]
    fn exp_saturates_and_keeps_nan() {
        for simd in Simd::all() {
            let mut x = [0.0, f32::NEG_INFINITY, -1e30, -88.0, 89.0, f32::INFINITY, f32::NAN, -0.0].repeat(2);
            simd.run(Exp(&mut x));
            assert_eq!(&x[..4], [1.0, 0.0, 0.0, 0.0]);
            assert!(x[4] > 1.6e38 && x[4].is_finite() && x[5] == x[4] && x[6].is_nan() && x[7] == 1.0, "{x:?}");
        }
    }
}
