//! Exact sampling over a vocabulary that is split over ranks: the host arithmetic, without communication.
//!
//! A rank sees the logits of its own tokens. What it sends is small (a maximum and a sum, a histogram, a best candidate), and
//! merging in rank order gives all ranks the same bits. The caller gathers; nothing here knows a collective or a sequence.
//!
//! Order of application: temperature, min-p, top-k, top-p over the survivors of top-k (renormalised), draw. Dividing by a
//! temperature keeps the order of logits, so cuts are thresholds on the raw logit: [`Cut`] narrows its lowest surviving
//! key by radix passes over histograms. Logits equal to the threshold all stay. The draw is a Gumbel-max: each token has a
//! random number of its own, so no rank needs another's logits. Source: Gumbel-max trick, arXiv:1411.0030; the counter
//! generator is Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
//!
//! **Invariant:** the sampled token depends only on logits, parameters, seed and output index, never on the number of ranks
//! (but for sums that end within one rounding of a top-p edge).

mod blocks;
mod cut;
mod random;

pub use cut::{Cut, CutParams, Histogram, NUM_BINS};
pub use random::{RandomKey, gumbel, philox, random_word};

use std::cmp::Ordering;

use crate::cpu::lanes::Simd;
use blocks::{BLOCK, Block, Largest, Masses, SumOf, blocks};
use random::{GUMBEL_MAX, WORD_RANGE, Words};

/// Maps a logit to a key of the same order: `a < b` exactly where `logit_key(a) < logit_key(b)`.
pub fn logit_key(logit: f32) -> u32 {
    // -0 + 0 is +0: equal logits have equal keys.
    let bits = (logit + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// The largest logit of a row and the sum of `exp(logit - max)`: what a log-sum-exp is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MaxSum {
    /// Largest logit; -inf where there is none.
    pub max: f32,
    /// Sum of `exp(logit - max)`.
    pub sum: f64,
}

impl MaxSum {
    /// Bytes on the wire.
    pub const BYTES: usize = 12;

    /// Of this rank's logits.
    pub fn of(logits: &[f32]) -> Self {
        let simd = Simd::best();
        let max = blocks(logits, 0).map(|block| simd.run(Largest(&block))).fold(f32::NEG_INFINITY, f32::max);
        if max == f32::NEG_INFINITY {
            return Self { max, sum: 0.0 };
        }
        let mass = |block: Block| f64::from(simd.run(SumOf { block: &block, max }));
        Self { max, sum: blocks(logits, 0).map(mass).sum() }
    }

    /// Of the whole row: the ranks' parts, in rank order.
    pub fn merge(parts: impl Iterator<Item = Self> + Clone) -> Self {
        let max = parts.clone().fold(f32::NEG_INFINITY, |a, p| if p.max > a { p.max } else { a });
        let mut sum = 0.0;
        for part in parts.filter(|p| p.max > f32::NEG_INFINITY) {
            sum += part.sum * f64::from(part.max - max).exp();
        }
        Self { max, sum }
    }

    /// `ln(sum(exp(logit)))`: subtracted from a raw logit it gives a log-probability.
    pub fn log_sum_exp(&self) -> f64 {
        f64::from(self.max) + self.sum.ln()
    }

    /// For the wire.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.max.to_le_bytes());
        bytes[4..].copy_from_slice(&self.sum.to_le_bytes());
        bytes
    }

    /// From the wire.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let [a, b, c, d, sum @ ..] = *bytes;
        Self { max: f32::from_le_bytes([a, b, c, d]), sum: f64::from_le_bytes(sum) }
    }
}

/// A token that may win, and by what.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// A logit, or a logit over temperature plus its Gumbel value.
    pub value: f64,
    /// Global token id.
    pub id: u32,
}

impl Candidate {
    /// Bytes on the wire.
    pub const BYTES: usize = 12;

    /// Better first: by value, then the lower id.
    fn better_first(a: &Self, b: &Self) -> Ordering {
        b.value.total_cmp(&a.value).then(a.id.cmp(&b.id))
    }

    /// The highest of this rank's logits; `None` where none is above -inf (a slice of padding).
    pub fn best(logits: &[f32], first_id: u32) -> Option<Self> {
        let mut max = f32::NEG_INFINITY;
        let mut best = None;
        for (id, &logit) in (first_id..).zip(logits) {
            if logit > max {
                max = logit;
                best = Some(Self { value: f64::from(logit), id });
            }
        }
        best
    }

    /// The winner among the ranks' candidates.
    pub fn merge(parts: impl Iterator<Item = Option<Self>>) -> Option<Self> {
        parts.flatten().min_by(Self::better_first)
    }

    /// For the wire.
    pub fn to_bytes(candidate: Option<Self>) -> [u8; Self::BYTES] {
        let Self { value, id } = candidate.unwrap_or(Self { value: f64::NEG_INFINITY, id: u32::MAX });
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&value.to_le_bytes());
        bytes[8..].copy_from_slice(&id.to_le_bytes());
        bytes
    }

    /// From the wire.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let [a, b, c, d, e, f, g, h, id @ ..] = *bytes;
        let value = f64::from_le_bytes([a, b, c, d, e, f, g, h]);
        (value > f64::NEG_INFINITY).then_some(Self { value, id: u32::from_le_bytes(id) })
    }
}

/// This rank's `num` highest logits, best first, ties to the lower id. Shorter where the slice is.
pub fn top_n(logits: &[f32], first_id: u32, num: usize) -> Vec<Candidate> {
    let mut kept: Vec<Candidate> = Vec::with_capacity(num + 1);
    for (id, &logit) in (first_id..).zip(logits) {
        let full = kept.len() == num;
        let beaten = kept.last().is_some_and(|last| f64::from(logit) <= last.value);
        if logit == f32::NEG_INFINITY || logit.is_nan() || num == 0 || (full && beaten) {
            continue;
        }
        let candidate = Candidate { value: f64::from(logit), id };
        let at = kept.partition_point(|c| Candidate::better_first(c, &candidate) == Ordering::Less);
        kept.insert(at, candidate);
        kept.truncate(num);
    }
    kept
}

/// The `num` best of all ranks' lists, best first.
pub fn merge_top_n(parts: impl Iterator<Item = Candidate>, num: usize) -> Vec<Candidate> {
    let mut all: Vec<Candidate> = parts.collect();
    all.sort_by(Candidate::better_first);
    all.truncate(num);
    all
}

/// How many of this rank's logits are above `logit`: summed over ranks, plus 1, the token's rank in the vocabulary.
pub fn num_above(logits: &[f32], logit: f32) -> u32 {
    logits.iter().map(|&x| u32::from(x > logit)).sum()
}

/// Draws a token of this rank from `logits / temperature`, or `None` where nothing survives here.
///
/// The merged winner over ranks is a draw from the softmax over the survivors. `floor` is [`Cut::floor`], or 0 for no cut.
pub fn draw(logits: &[f32], first_id: u32, temperature: f32, floor: u32, random: &RandomKey) -> Option<Candidate> {
    let simd = Simd::best();
    let mut best: Option<Candidate> = None;
    for block in blocks(logits, first_id) {
        let largest = simd.run(Largest(&block));
        let reach = f64::from(largest) / f64::from(temperature) + GUMBEL_MAX;
        let hopeless = best.is_some_and(|best| reach < best.value);
        if hopeless || largest == f32::NEG_INFINITY || logit_key(largest) < floor {
            continue;
        }
        let mut words = [0; BLOCK];
        simd.run(Words { key: random, first_id: block.first_id, out: &mut words });
        // A token wins where its exponential variate `-ln(u)` is below `exp(logit / temperature - best)`, and that variate is
        // never below `1 - u`: most tokens need no logarithm.
        let mut chances = [f32::INFINITY; BLOCK];
        if let Some(best) = best {
            let max = (best.value * f64::from(temperature)) as f32;
            simd.run(Masses { block: &block, max, rate: 1.0 / temperature, out: &mut chances });
            // More than rounding may have taken from a chance.
            let slack = 1.001 + 1e-6 * (max / temperature).abs();
            chances.iter_mut().for_each(|chance| *chance *= slack);
        }
        for (index, ((&logit, word), chance)) in block.logits.iter().zip(words).zip(chances).enumerate() {
            let away = (!word as f32) / WORD_RANGE as f32;
            if away > chance || logit_key(logit) < floor || logit == f32::NEG_INFINITY || logit.is_nan() {
                continue;
            }
            let value = f64::from(logit) / f64::from(temperature) + gumbel(word);
            if best.is_none_or(|best| value > best.value) {
                best = Some(Candidate { value, id: block.first_id + index as u32 });
            }
        }
    }
    best
}

#[cfg(test)]
mod tests;
