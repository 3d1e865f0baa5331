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
/// Histograms that a pass fills side by side.
const NEIGHBOURS: usize = 4;
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
        // Neighbours go to histograms of their own: an addition need not wait for the one before it.
        let mut bins = [[0.0; NUM_BINS]; NEIGHBOURS];
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
            for (index, (logit, mass)) in block.logits.iter().zip(masses).enumerate() {
                let key = logit_key(*logit);
                if key >= least && u64::from(key ^ self.prefix) >> decided == 0 && *logit > f32::NEG_INFINITY {
                    bins[index % NEIGHBOURS][(key >> shift) as usize % NUM_BINS] += f64::from(mass);
                }
            }
        }
        for (bin, sum) in out.bins.iter_mut().enumerate() {
            *sum = bins.iter().map(|bins| bins[bin]).sum();
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
mod tests {
    use super::*;

    /// The reference data: `PHALANX_GOLDENS`, or `shared/goldens` beside or above the crate.
    #[expect(clippy::disallowed_methods, reason = "a test has no config.rs")]
    fn golden(name: &str) -> serde_json::Value {
        let above = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|p| p.join("shared/goldens"));
        let folder =
            std::env::var_os("PHALANX_GOLDENS").map(Into::into).or_else(|| above.into_iter().find(|p| p.is_dir()));
        let folder: std::path::PathBuf = folder.expect("reference data: set PHALANX_GOLDENS to the folder goldens");
        let text = std::fs::read_to_string(folder.join(name)).expect("reference data is readable");
        serde_json::from_str(&text).expect("reference data is JSON")
    }

    /// `logits` in `num` parts of nearly the same size, with their first ids.
    fn split(logits: &[f32], num: usize) -> Vec<(u32, &[f32])> {
        let len = logits.len().div_ceil(num);
        (0..num)
            .map(|i| ((i * len) as u32, &logits[(i * len).min(logits.len())..((i + 1) * len).min(logits.len())]))
            .collect()
    }

    /// The floor of a cut over `num` ranks, through the bytes that would be sent.
    fn cut(logits: &[f32], params: CutParams, num: usize) -> Cut {
        let parts = split(logits, num);
        let all = MaxSum::merge(parts.iter().map(|p| MaxSum::from_bytes(&MaxSum::of(p.1).to_bytes())));
        let mut cut = Cut::new(params, all.max);
        let (mut part, mut bytes) = (Histogram::default(), vec![0; Histogram::BYTES]);
        for pass in (0..Cut::NUM_PASSES).filter(|&p| Cut::new(params, 0.0).takes_part(p)) {
            let mut merged = Histogram::default();
            for (_, logits) in &parts {
                cut.histogram(pass, logits, &mut part);
                part.write_to(&mut bytes);
                merged.add_bytes(&bytes);
            }
            cut.apply(pass, &merged);
        }
        cut
    }

    fn probabilities(logits: &[f32], cut: &Cut) -> Vec<f64> {
        let masses: Vec<f64> = logits.iter().map(|&x| if cut.keeps(x) { cut.mass(x) } else { 0.0 }).collect();
        let sum: f64 = masses.iter().sum();
        masses.iter().map(|m| m / sum).collect()
    }

    fn winner(logits: &[f32], num: usize, temperature: f32, floor: u32, key: &RandomKey) -> u32 {
        let parts = split(logits, num);
        let drawn = parts.iter().map(|(first, part)| draw(part, *first, temperature, floor, key));
        Candidate::merge(drawn.map(|c| Candidate::from_bytes(&Candidate::to_bytes(c)))).expect("a winner").id
    }

    fn logits_of(record: &serde_json::Value) -> Vec<f32> {
        record["logits"].as_array().expect("logits").iter().map(|v| v.as_f64().expect("number") as f32).collect()
    }

    fn number(params: &serde_json::Value, name: &str, default: f64) -> f32 {
        params.get(name).map_or(default, |v| v.as_f64().expect("number")) as f32
    }

    #[test]
    fn cuts_have_the_reference_distributions_in_1_2_and_3_parts() {
        let known = ["temperature", "top_k", "top_p", "min_p"];
        let mut num_checked = 0;
        for record in golden("decoding/sampling-tiny-llama.json")["records"].as_array().expect("records") {
            let logits = logits_of(record);
            for case in record["cases"].as_array().expect("cases") {
                let p = &case["params"];
                if p.as_object().expect("params").keys().any(|k| !known.contains(&k.as_str())) {
                    continue;
                }
                let expected: Vec<f64> = match case["probs"].as_array() {
                    Some(all) => all.iter().map(|v| v.as_f64().expect("number")).collect(),
                    None => (0..logits.len()).map(|i| case["sparse"][i.to_string()].as_f64().unwrap_or(0.0)).collect(),
                };
                let params = CutParams {
                    temperature: number(p, "temperature", 1.0),
                    top_k: number(p, "top_k", 0.0) as u32,
                    top_p: number(p, "top_p", 1.0),
                    min_p: number(p, "min_p", 0.0),
                };
                for num in 1..=3 {
                    check(&logits, params, num, &expected);
                }
                num_checked += 1;
            }
        }
        assert_eq!(num_checked, 3 * 14);
    }

    fn check(logits: &[f32], params: CutParams, num: usize, expected: &[f64]) {
        if params.temperature == 0.0 {
            let best = Candidate::merge(split(logits, num).iter().map(|(first, part)| Candidate::best(part, *first)));
            assert_eq!(expected[best.expect("a best").id as usize], 1.0);
            return;
        }
        let got = probabilities(logits, &cut(logits, params, num));
        for (id, (got, expected)) in got.iter().zip(expected).enumerate() {
            assert_eq!(*got > 0.0, *expected > 0.0, "{params:?}, {num} parts, token {id}");
            assert!((got - expected).abs() < 1e-5, "{params:?}, {num} parts, token {id}: {got} {expected}");
        }
    }

    #[test]
    fn draws_follow_the_distribution_whatever_the_parts() {
        let record = &golden("decoding/sampling-tiny-llama.json")["records"][0];
        let logits = logits_of(record);
        let params = CutParams { temperature: 0.9, top_k: 12, top_p: 0.95, min_p: 0.0 };
        let cut = cut(&logits, params, 2);
        let expected = probabilities(&logits, &cut);
        let num_draws = 20_000;
        let mut counts = vec![0u32; logits.len()];
        for output_index in 0..num_draws {
            let key = RandomKey { seed: 42, output_index };
            let id = winner(&logits, 1, params.temperature, cut.floor(), &key);
            assert_eq!(id, winner(&logits, 3, params.temperature, cut.floor(), &key));
            counts[id as usize] += 1;
        }
        let kept = expected.iter().filter(|&&p| p > 0.0).count();
        let chi: f64 = (counts.iter().zip(&expected))
            .filter(|(_, p)| **p > 0.0)
            .map(|(&n, p)| (f64::from(n) - p * f64::from(num_draws)).powi(2) / (p * f64::from(num_draws)))
            .sum();
        assert!(kept > 4 && chi < 3.0 * kept as f64, "chi-square {chi} over {kept} tokens");
        assert!(counts.iter().zip(&expected).all(|(&n, &p)| n == 0 || p > 0.0));
    }

    #[test]
    fn log_sum_exp_and_ranks_are_those_of_the_whole_row() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1000) as f32 * 0.01 - 3.0).collect();
        let exact = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        for num in 1..=4 {
            let parts = split(&logits, num);
            let all = MaxSum::merge(parts.iter().map(|p| MaxSum::of(p.1)));
            assert!((all.log_sum_exp() - exact).abs() < 1e-6);
            let lists = parts.iter().flat_map(|(first, part)| top_n(part, *first, 20));
            let top = merge_top_n(lists, 20);
            assert_eq!(top, top_n(&logits, 0, 20));
            let rank = 1 + parts.iter().map(|p| num_above(p.1, top[7].value as f32)).sum::<u32>();
            assert_eq!(rank, 8);
        }
    }

    #[test]
    fn ties_go_to_the_lower_id_and_padding_never_wins() {
        let none = f32::NEG_INFINITY;
        assert_eq!(Candidate::best(&[none, none], 8), None);
        assert_eq!(Candidate::best(&[1.0, 3.0, 3.0], 5).map(|c| c.id), Some(6));
        let tied = [Candidate::best(&[3.0], 9), None, Candidate::best(&[3.0], 4)];
        assert_eq!(Candidate::merge(tied.into_iter()).map(|c| c.id), Some(4));
        assert_eq!(top_n(&[2.0, none, 2.0, 5.0], 0, 3).iter().map(|c| c.id).collect::<Vec<_>>(), [3, 0, 2]);
        let params = CutParams { temperature: 1.0, top_k: 2, top_p: 1.0, min_p: 0.0 };
        let tied = [0.0, -0.0, 1.0, none];
        assert_eq!(tied.map(|x| cut(&tied, params, 2).keeps(x)), [true, true, true, false]);
        let empty = MaxSum::merge([MaxSum::of(&[]), MaxSum::of(&[none])].into_iter());
        assert_eq!(empty, MaxSum { max: none, sum: 0.0 });
    }

    #[test]
    fn keys_keep_the_order_of_logits() {
        let ordered = [f32::NEG_INFINITY, f32::MIN, -1.5, -1e-40, 0.0, 1e-40, 1.0, 1.0f32.next_up(), f32::INFINITY];
        assert!(ordered.windows(2).all(|w| logit_key(w[0]) < logit_key(w[1])));
        assert_eq!(logit_key(-0.0), logit_key(0.0));
    }

    /// The draw, token by token.
    fn plain_draw(logits: &[f32], first_id: u32, temperature: f32, key: &RandomKey) -> Option<Candidate> {
        let value = |(id, &x): (u32, &f32)| Candidate {
            value: f64::from(x) / f64::from(temperature) + gumbel(random_word(key, id)),
            id,
        };
        let all = (first_id..).zip(logits).filter(|(_, x)| **x > f32::NEG_INFINITY).map(value);
        all.min_by(Candidate::better_first)
    }

    #[test]
    fn a_draw_skips_no_winner() {
        let mut state = 1u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        };
        for output_index in 0..300 {
            let (spread, temperature) = (30.0 * random(), 0.001f32.powf(random()) * 2.0);
            let mut logits: Vec<f32> = (0..1 + output_index as usize * 3).map(|_| spread * random() - 20.0).collect();
            logits[0] = f32::NEG_INFINITY;
            let key = RandomKey { seed: 7 << 33, output_index };
            let first_id = output_index * 37;
            let expected = plain_draw(&logits, first_id, temperature, &key);
            assert_eq!(draw(&logits, first_id, temperature, 0, &key), expected, "{spread} {temperature}");
        }
    }

    #[test]
    fn philox_gives_the_published_vectors() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox(pi, [0xa409_3822, 0x299f_31d0]), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }
}
