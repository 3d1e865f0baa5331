//! Top-k, top-p and min-p as the lowest logit that survives, found by radix passes over histograms.

use super::blocks::{BLOCK, Largest, Masses, blocks};
use super::logit_key;
use crate::cpu::lanes::Simd;

/// Bins of a radix pass.
pub const NUM_BINS: usize = 256;
/// Bits of a key that one pass decides.
const PASS_BITS: u32 = 8;
/// Passes that decide a whole key.
const PASSES_OF_A_CUT: usize = 4;
/// Counts or masses of one radix pass: one bin for each value of the digit that the pass decides.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    bins: [f64; NUM_BINS],
}

impl Default for Histogram {
    fn default() -> Self {
        Self { bins: [0.0; NUM_BINS] }
    }
}

impl Histogram {
    /// Bytes on the wire.
    pub const BYTES: usize = NUM_BINS * 8;

    /// Writes it for the wire; `out` holds [`Self::BYTES`].
    pub fn write_to(&self, out: &mut [u8]) {
        for (bytes, bin) in out.chunks_exact_mut(8).zip(&self.bins) {
            bytes.copy_from_slice(&bin.to_le_bytes());
        }
    }

    /// Adds a rank's part as it came from the wire. Called in rank order, so that all ranks hold the same sum.
    pub fn add_bytes(&mut self, part: &[u8]) {
        for (bin, bytes) in self.bins.iter_mut().zip(part.as_chunks::<8>().0) {
            *bin += f64::from_le_bytes(*bytes);
        }
    }
}

/// What limits the set of tokens that a row may draw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CutParams {
    /// Above 0.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// In (0, 1]; 1 is off.
    pub top_p: f32,
    /// In [0, 1]; 0 is off.
    pub min_p: f32,
}

/// Finds the lowest key that a row's cut lets survive. The same on all ranks, as it learns from merged histograms only.
///
/// For each `pass` of `0..Cut::NUM_PASSES` in which the row [takes part](Self::takes_part): fill a histogram with this
/// rank's logits, gather, add the parts in rank order, [`apply`](Self::apply) the sum. Then [`floor`](Self::floor) is final.
#[derive(Debug, Clone)]
pub struct Cut {
    params: CutParams,
    max: f32,
    floor: u32,
    // The search for the floor of the current cut: the digits found so far, and what is still wanted below them.
    prefix: u32,
    wanted: f64,
}

impl Cut {
    /// Passes of a whole cut: first those of top-k, then those of top-p.
    pub const NUM_PASSES: usize = 2 * PASSES_OF_A_CUT;

    /// A row whose largest logit over all ranks is `max`. Min-p needs no pass.
    pub fn new(params: CutParams, max: f32) -> Self {
        let mut floor = logit_key(f32::NEG_INFINITY);
        if params.min_p > 0.0 {
            let least = f64::from(max) + f64::from(params.temperature) * f64::from(params.min_p).ln();
            floor = logit_key(round_up(least).min(max));
        }
        Self { params, max, floor, prefix: 0, wanted: 0.0 }
    }

    /// Whether this row takes part in a pass. The same on all ranks: it depends on the parameters only.
    pub fn takes_part(&self, pass: usize) -> bool {
        if pass < PASSES_OF_A_CUT { self.params.top_k > 0 } else { self.params.top_p < 1.0 }
    }

    /// Fills `out` with this rank's part: counts for top-k, masses `exp((logit - max) / temperature)` for top-p.
    pub fn histogram(&self, pass: usize, logits: &[f32], out: &mut Histogram) {
        out.bins.fill(0.0);
        let simd = Simd::best();
        let (shift, decided) = digit(pass);
        let by_count = pass < PASSES_OF_A_CUT;
        // Digits found so far are a lower bound, except in the first pass of a cut.
        let least = if decided == u32::BITS { self.floor } else { self.floor.max(self.prefix) };
        for block in blocks(logits, 0) {
            if logit_key(simd.run(Largest(&block))) < least {
                continue;
            }
            let mut masses = [1.0; BLOCK];
            if !by_count {
                simd.run(Masses {
                    block: &block,
                    max: self.max,
                    rate: 1.0 / self.params.temperature,
                    out: &mut masses,
                });
            }
            for (logit, mass) in block.logits.iter().zip(masses) {
                let key = logit_key(*logit);
                if key >= least && u64::from(key ^ self.prefix) >> decided == 0 && *logit > f32::NEG_INFINITY {
                    out.bins[(key >> shift) as usize % NUM_BINS] += f64::from(mass);
                }
            }
        }
    }

    /// Takes in the sum over ranks of a pass.
    pub fn apply(&mut self, pass: usize, merged: &Histogram) {
        let (shift, _) = digit(pass);
        if pass.is_multiple_of(PASSES_OF_A_CUT) {
            self.prefix = 0;
            self.wanted = if pass == 0 {
                f64::from(self.params.top_k)
            } else {
                f64::from(self.params.top_p) * merged.bins.iter().rev().sum::<f64>()
            };
        }
        let bin = self.edge_bin(merged);
        self.prefix |= (bin as u32) << shift;
        if shift == 0 {
            self.floor = self.floor.max(self.prefix);
        }
    }

    /// The bin that holds the edge, from the top: the first that brings what is wanted, or the lowest that holds anything.
    fn edge_bin(&mut self, merged: &Histogram) -> usize {
        let lowest = merged.bins.iter().position(|&b| b > 0.0).unwrap_or(0);
        for bin in (lowest + 1..NUM_BINS).rev() {
            if merged.bins[bin] >= self.wanted {
                return bin;
            }
            self.wanted -= merged.bins[bin];
        }
        lowest
    }

    /// Lowest key that survives.
    pub fn floor(&self) -> u32 {
        self.floor
    }

    /// Whether a logit survives.
    pub fn keeps(&self, logit: f32) -> bool {
        logit_key(logit) >= self.floor && logit > f32::NEG_INFINITY
    }

    /// `exp((logit - max) / temperature)`: probabilities before their common divisor.
    pub fn mass(&self, logit: f32) -> f64 {
        ((f64::from(logit) - f64::from(self.max)) / f64::from(self.params.temperature)).exp()
    }
}

/// Lowest bit of the digit that a pass decides, and the lowest bit decided before it.
fn digit(pass: usize) -> (u32, u32) {
    let decided = u32::BITS - PASS_BITS * (pass % PASSES_OF_A_CUT) as u32;
    (decided - PASS_BITS, decided)
}

/// The smallest f32 that is not below `value`.
fn round_up(value: f64) -> f32 {
    let near = value as f32;
    if f64::from(near) < value { near.next_up() } else { near }
}
