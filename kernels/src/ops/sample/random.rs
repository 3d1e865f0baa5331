//! Random numbers: of a token, its row and its place in the output alone.
//!
//! Source: Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

use super::blocks::BLOCK;
use crate::cpu::lanes::{Kernel, Lanes};

/// Random words of one Philox block; token ids share a block by fours.
const WORDS: u32 = 4;

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
pub(super) const GUMBEL_MAX: f64 = 22.9;
/// Values of a random word.
pub(super) const WORD_RANGE: f64 = 4_294_967_296.0;

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

/// The random words of a block.
pub(super) struct Words<'a> {
    pub key: &'a RandomKey,
    pub first_id: u32,
    pub out: &'a mut [u32; BLOCK],
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
