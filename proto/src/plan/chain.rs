//! Chains of hashes over plans and over tokens: how ranks and head see that they do not agree any more.

use super::{SamplingParams, StepOutput, StepPlan};
use crate::{Pooling, SeqSlot, StepId, TokenId};

/// 64-bit FNV-1a, over integers: enough to see a divergence, not a defence.
#[derive(Debug, Clone, Copy)]
pub struct Fnv(u64);

impl Fnv {
    /// Continues a chain from `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0xcbf2_9ce4_8422_2325)
    }

    /// Takes one value in.
    pub fn add(&mut self, value: u64) -> &mut Self {
        for byte in value.to_le_bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        self
    }

    /// The hash so far.
    pub fn finish(self) -> u64 {
        self.0
    }
}

impl StepPlan {
    /// The plan chain after this plan, where `previous` is the chain before it (0 at the start of an epoch).
    pub fn chain(&self, previous: u64) -> u64 {
        let mut hash = Fnv::new(previous);
        hash.add(self.step.0).add(self.sampler as u64);
        hash.add(self.released_slots.len() as u64);
        for slot in &self.released_slots {
            hash.add(u64::from(slot.0));
        }
        hash.add(self.new_sequences.len() as u64);
        for new in &self.new_sequences {
            hash.add(u64::from(new.slot.0)).add(new.seq_id.0).add(u64::from(new.num_prompt_tokens));
            new.sampling.add_to(&mut hash);
            hash.add(new.tokens.len() as u64);
            for token in &new.tokens {
                hash.add(u64::from(token.0));
            }
            for block in &new.blocks {
                hash.add(u64::from(block.0));
            }
        }
        hash.add(self.rows.len() as u64);
        for row in &self.rows {
            hash.add(u64::from(row.slot.0)).add(u64::from(row.start)).add(u64::from(row.num_tokens));
            hash.add(u64::from(row.samples) | u64::from(row.pools) << 1).add(row.consumes.map_or(0, |step| step.0));
            for block in &row.new_blocks {
                hash.add(u64::from(block.0));
            }
        }
        for mask in &self.masks {
            hash.add(u64::from(mask.slot.0)).add(mask.digest());
        }
        hash.finish()
    }
}

impl SamplingParams {
    fn add_to(&self, hash: &mut Fnv) {
        for number in [self.temperature, self.top_p, self.min_p] {
            // A zero loses its sign on the wire.
            hash.add(u64::from((number + 0.0).to_bits()));
        }
        hash.add(u64::from(self.top_k)).add(self.seed);
        for num_top in [self.logprobs, self.prompt_logprobs] {
            hash.add(num_top.map_or(0, |num| u64::from(num) + 1));
        }
        hash.add(self.edits.as_ref().map_or(0, |edits| edits.digest()));
        hash.add(u64::from(Pooling::to_wire(self.pooling)));
    }
}

impl StepOutput {
    /// The token chain after a step whose rows sampled `tokens`, in plan order.
    pub fn chain(previous: u64, step: StepId, tokens: impl IntoIterator<Item = (SeqSlot, TokenId)>) -> u64 {
        let mut hash = Fnv::new(previous);
        hash.add(step.0);
        for (slot, token) in tokens {
            hash.add(u64::from(slot.0)).add(u64::from(token.0));
        }
        hash.finish()
    }
}
