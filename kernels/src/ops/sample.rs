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

use std::cmp::Ordering;

use crate::cpu::{
    lanes::{Kernel, Lanes, Simd},
    math::exp,
};

/// Bins of a radix pass.
pub const NUM_BINS: usize = 256;
/// Bits of a key that one pass decides.
const PASS_BITS: u32 = 8;
/// Passes that decide a whole key.
const PASSES_OF_A_CUT: usize = 4;
/// Random words of one Philox block; token ids share a block by fours.
const WORDS: u32 = 4;

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

/// What a row's random numbers depend on beside the token id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RandomKey {
    /// The sequence's seed.
    pub seed: u64,
    /// Index of the output token that is drawn.
    pub output_index: u32,
}

impl RandomKey {
    fn halves(&self) -> [u32; 2] {
        [self.seed as u32, (self.seed >> 32) as u32]
    }
}

/// No Gumbel value is above this: `-ln(-ln(1 - 2^-33))` is 22.87.
const GUMBEL_MAX: f64 = 22.9;
/// Values of a random word.
const WORD_RANGE: f64 = 4_294_967_296.0;

/// A random word as a Gumbel variate: `-ln(-ln(u))`, `u` the middle of the word's interval in (0, 1).
pub fn gumbel(word: u32) -> f64 {
    let u = (f64::from(word) + 0.5) / WORD_RANGE;
    -(-u.ln()).ln()
}

/// A token's random word.
pub fn random_word(key: &RandomKey, id: u32) -> u32 {
    philox([id / WORDS, key.output_index, 0, 0], key.halves())[(id % WORDS) as usize]
}

/// Philox4x32-10: ten rounds on a counter under a key.
#[inline(always)]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// Tokens that are looked at together.
const BLOCK: usize = 64;

/// Logits of the ids from `first_id` on, a multiple of `BLOCK`; -inf where this rank has no token.
struct Block {
    first_id: u32,
    logits: [f32; BLOCK],
}

/// The blocks of a slice.
fn blocks(logits: &[f32], first_id: u32) -> impl Iterator<Item = Block> {
    let lead = first_id as usize % BLOCK;
    (0..(lead + logits.len()).div_ceil(BLOCK)).map(move |index| {
        let mut block =
            Block { first_id: first_id - lead as u32 + (index * BLOCK) as u32, logits: [f32::NEG_INFINITY; BLOCK] };
        let start = (index * BLOCK).saturating_sub(lead);
        let end = ((index + 1) * BLOCK - lead).min(logits.len());
        let at = start + lead - index * BLOCK;
        block.logits[at..at + end - start].copy_from_slice(&logits[start..end]);
        block
    })
}

/// The largest logit of a block, NaN left out.
struct Largest<'a>(&'a Block);

impl Kernel for Largest<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) -> f32 {
        let mut largest = simd.splat(f32::NEG_INFINITY);
        for chunk in self.0.logits.as_chunks().0 {
            largest = simd.max(simd.load(chunk), largest);
        }
        simd.max_lane(largest)
    }
}

/// The sum of `exp(logit - max)` over a block.
struct SumOf<'a> {
    block: &'a Block,
    max: f32,
}

impl Kernel for SumOf<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) -> f32 {
        let mut sum = simd.zero();
        for chunk in self.block.logits.as_chunks().0 {
            sum = simd.add(sum, exp(simd, simd.sub(simd.load(chunk), simd.splat(self.max))));
        }
        simd.sum(sum)
    }
}

/// `exp((logit - max) * rate)` of a block.
struct Masses<'a> {
    block: &'a Block,
    max: f32,
    rate: f32,
    out: &'a mut [f32; BLOCK],
}

impl Kernel for Masses<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        for (out, chunk) in self.out.as_chunks_mut().0.iter_mut().zip(self.block.logits.as_chunks().0) {
            let x = simd.sub(simd.load(chunk), simd.splat(self.max));
            simd.store(exp(simd, simd.mul(x, simd.splat(self.rate))), out);
        }
    }
}

/// The random words of a block.
struct Words<'a> {
    key: &'a RandomKey,
    first_id: u32,
    out: &'a mut [u32; BLOCK],
}

impl Kernel for Words<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        let key = self.key.halves();
        for (block, out) in (self.first_id / WORDS..).zip(self.out.as_chunks_mut().0) {
            *out = philox([block, self.key.output_index, 0, 0], key);
        }
    }
}

#[cfg(test)]
mod tests;
