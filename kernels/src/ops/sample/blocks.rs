//! A row in blocks of a fixed width, and what is computed of a block at once.

use crate::cpu::lanes::{Kernel, Lanes};
use crate::cpu::math::exp;

/// Tokens that are looked at together.
pub(super) const BLOCK: usize = 64;

/// Logits of the ids from `first_id` on, a multiple of `BLOCK`; -inf where this rank has no token.
pub(super) struct Block {
    pub first_id: u32,
    pub logits: [f32; BLOCK],
}

/// The blocks of a slice.
pub(super) fn blocks(logits: &[f32], first_id: u32) -> impl Iterator<Item = Block> {
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
pub(super) struct Largest<'a>(pub &'a Block);

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
pub(super) struct SumOf<'a> {
    pub block: &'a Block,
    pub max: f32,
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
pub(super) struct Masses<'a> {
    pub block: &'a Block,
    pub max: f32,
    pub rate: f32,
    pub out: &'a mut [f32; BLOCK],
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
