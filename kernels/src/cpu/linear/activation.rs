//! What is fused behind the gate and up products.
//!
//! **Invariant:** every tier runs this one piece of code, so that all give the same bits.

use super::{isa::Tier, packed::LANES};
use crate::GateActivation;

/// `out = act(gate) * up`.
pub(super) fn act_mul(tier: Tier, activation: GateActivation, gate: &[f32; LANES], up: &[f32; LANES], out: &mut [f32]) {
    match tier {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: this tier exists only where the CPU has these instructions.
        Tier::Avx512 => unsafe { act_mul_avx512(activation, gate, up, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Tier::Avx2 => unsafe { act_mul_avx2(activation, gate, up, out) },
        _ => act_mul_plain(activation, gate, up, out),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
fn act_mul_avx512(activation: GateActivation, gate: &[f32; LANES], up: &[f32; LANES], out: &mut [f32]) {
    act_mul_plain(activation, gate, up, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn act_mul_avx2(activation: GateActivation, gate: &[f32; LANES], up: &[f32; LANES], out: &mut [f32]) {
    act_mul_plain(activation, gate, up, out);
}

#[inline(always)]
fn act_mul_plain(activation: GateActivation, gate: &[f32; LANES], up: &[f32; LANES], out: &mut [f32]) {
    // `(1 + tanh(x)) / 2` is `1 / (1 + exp(-2 x))`: both forms divide the gate by one more than an exponential.
    const GELU: f32 = -2.0 * 0.797_884_6;
    let mut values = [0.0; LANES];
    match activation {
        GateActivation::Silu => {
            for ((value, gate), up) in values.iter_mut().zip(gate).zip(up) {
                *value = gate / (1.0 + exp(-gate)) * up;
            }
        }
        GateActivation::GeluTanh => {
            for ((value, gate), up) in values.iter_mut().zip(gate).zip(up) {
                let inner = GELU * (gate * gate * gate).mul_add(0.044_715, *gate);
                *value = gate / (1.0 + exp(inner)) * up;
            }
        }
    }
    out.copy_from_slice(&values[..out.len()]);
}

/// `exp(x)` to about a unit in the last place; beyond what f32 holds, the largest and smallest that it does.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding this rounds to the nearest whole number and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 as the nearest f32 and what that leaves.
    const LN_2_HIGH: f32 = std::f32::consts::LN_2;
    const LN_2_LOW: f32 = (std::f64::consts::LN_2 - std::f32::consts::LN_2 as f64) as f32;
    // 1/n! for n = 7 down to 2: beyond, terms are below the last bit for |r| <= ln(2) / 2.
    const TERMS: [f32; 6] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5];
    let x = if x > 88.0 { 88.0 } else { x };
    let x = if x < -87.0 { -87.0 } else { x };
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let whole = rounded - ROUND;
    let r = whole.mul_add(-LN_2_LOW, whole.mul_add(-LN_2_HIGH, x));
    let mut sum = TERMS[0];
    for term in &TERMS[1..] {
        sum = sum.mul_add(r, *term);
    }
    let sum = (sum * r).mul_add(r, r) + 1.0;
    let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    sum * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_near_the_exact_value() {
        let mut largest = 0.0f64;
        for step in -87_000..=88_000 {
            let x = step as f32 / 1000.0;
            let exact = f64::from(x).exp();
            largest = largest.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(largest < 1.5e-7, "{largest:e}");
    }

    #[test]
    fn ends_of_silu() {
        let gate = [f32::MAX, 1e4, -1e4, 0.0, -0.0, f32::NAN, 1.0, -1.0, 88.0, -88.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let mut out = [0.0; LANES];
        act_mul(Tier::Scalar, GateActivation::Silu, &gate, &[1.0; LANES], &mut out);
        assert_eq!(out[..2], gate[..2]);
        assert!(out[2].abs() < 1e-30 && out[3] == 0.0 && out[4] == 0.0 && out[5].is_nan());
        assert!((out[6] - 0.731_058_6).abs() < 1e-6 && (out[7] + 0.268_941_43).abs() < 1e-6);
    }
}
