//! Rotary position embeddings, with the stretches that models ask for.
//!
//! Source: arXiv:2104.09864; linear stretch arXiv:2306.15595; Llama 3.1's stretch as its model card's code defines it.

use std::f64::consts::TAU;

use phalanx_formats::{Geometry, RopeScaling};
use phalanx_kernels::RopeTable;

/// Cosines and sines of positions `0..num_positions`, computed in f64 and rounded once.
pub fn rope_table(geometry: &Geometry, num_positions: usize) -> RopeTable {
    let frequencies = frequencies(geometry);
    let mut table = RopeTable {
        cos: Vec::with_capacity(num_positions * frequencies.len()),
        sin: Vec::with_capacity(num_positions * frequencies.len()),
        head_dim: geometry.head_dim,
    };
    for position in 0..num_positions {
        for frequency in &frequencies {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            table.cos.push(cos as f32);
            table.sin.push(sin as f32);
        }
    }
    table
}

/// Radians per position of each rotated pair, highest first.
fn frequencies(geometry: &Geometry) -> Vec<f64> {
    let theta = f64::from(geometry.rope_theta);
    let head_dim = geometry.head_dim as f64;
    (0..geometry.head_dim / 2)
        .map(|pair| stretched(theta.powf(-2.0 * pair as f64 / head_dim), pair, &geometry.rope_scaling))
        .collect()
}

fn stretched(frequency: f64, pair: usize, scaling: &RopeScaling) -> f64 {
    match *scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / f64::from(factor),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
            // Turns within the trained length: few for low frequencies, which are divided, many for high ones, which stay.
            let turns = f64::from(original_max_position) * frequency / TAU;
            let (low, high) = (f64::from(low_freq_factor), f64::from(high_freq_factor));
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            frequency * (kept + (1.0 - kept) / f64::from(factor))
        }
        RopeScaling::Factors { ref factors } => frequency / factors.get(pair).map_or(1.0, |factor| f64::from(*factor)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA3: RopeScaling =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 64 };

    fn check(frequency: f64, scaling: RopeScaling, expected: f64) {
        let got = stretched(frequency, 1, &scaling);
        assert!((got - expected).abs() < 1e-12, "{frequency} {scaling:?}: {got}, not {expected}");
    }

    #[test]
    fn stretches_are_those_of_their_sources() {
        check(0.3, RopeScaling::None, 0.3);
        check(0.3, RopeScaling::Linear { factor: 4.0 }, 0.3 / 4.0);
        check(0.3, RopeScaling::Factors { factors: vec![1.0, 2.0] }, 0.15);
        // 64 positions: 4 turns and more stay, 1 turn and fewer are divided by 8, 2.5 turns are half way between.
        check(5.0 * TAU / 64.0, LLAMA3, 5.0 * TAU / 64.0);
        check(0.5 * TAU / 64.0, LLAMA3, 0.5 * TAU / 64.0 / 8.0);
        check(2.5 * TAU / 64.0, LLAMA3, 2.5 * TAU / 64.0 * (0.5 + 0.5 / 8.0));
    }
}
