//! Token masks: which tokens a row may draw, and their way over the wire ahead of the plan that names them.
//!
//! **Invariant:** a mask that leaves [`MaskStaging::complete`] has words, and at least one bit of them is set.
//! **Invariant:** what a rank keeps of masks is bounded by [`MASK_BYTES_STAGED_MAX`].

use std::sync::Arc;

use prost::bytes::Bytes;

use crate::{SeqSlot, StepId, StepPlan, WireError, pb};

/// Most bytes of masks in one message: with its frame it stays under [`crate::PLAN_BYTES_MAX`].
const MASK_BYTES_MESSAGE_MAX: usize = 56 * 1024;
/// Most bytes of masks that a rank keeps for the next plan: a full batch with a large vocabulary.
const MASK_BYTES_STAGED_MAX: usize = 64 << 20;
/// Tokens in a word.
const WORD_BITS: u32 = u32::BITS;

/// Which tokens the row of a slot may draw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask {
    /// The sequence's slot.
    pub slot: SeqSlot,
    /// Token `t` is allowed where bit `t % 32` of word `t / 32` is set; tokens behind the last word are not.
    pub words: Arc<[u32]>,
}

impl TokenMask {
    /// True where a token may be drawn.
    pub fn allows(words: &[u32], token: u32) -> bool {
        words.get((token / WORD_BITS) as usize).is_some_and(|word| word >> (token % WORD_BITS) & 1 == 1)
    }

    /// A number that tells masks apart; not a defence.
    pub(crate) fn digest(&self) -> u64 {
        let step =
            |hash: u64, word: &u32| (hash ^ u64::from(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        self.words.iter().fold(self.words.len() as u64, step)
    }
}

/// The messages that carry the masks of a plan, none above [`crate::PLAN_BYTES_MAX`].
pub fn mask_messages(plan: &StepPlan) -> Vec<pb::HeadToRank> {
    let mut messages = Vec::new();
    let mut parts: Vec<pb::TokenMaskPart> = Vec::new();
    let mut room = MASK_BYTES_MESSAGE_MAX;
    let message = |masks| {
        let inputs = pb::SampleInputs { step: plan.step.0, masks };
        pb::HeadToRank { message: Some(pb::head_to_rank::Message::SampleInputs(inputs)) }
    };
    for mask in &plan.masks {
        let bytes: Bytes = mask.words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>().into();
        let mut start = 0;
        while start < bytes.len() {
            if room < size_of::<u32>() {
                messages.push(message(std::mem::take(&mut parts)));
                room = MASK_BYTES_MESSAGE_MAX;
            }
            let end = bytes.len().min(start + room / size_of::<u32>() * size_of::<u32>());
            let first_token = start as u32 * u8::BITS;
            parts.push(pb::TokenMaskPart { slot: mask.slot.0, first_token, allowed: bytes.slice(start..end) });
            // A part costs a few bytes beside its bits.
            room = room.saturating_sub(end - start + size_of::<pb::TokenMaskPart>());
            start = end;
        }
    }
    if !parts.is_empty() {
        messages.push(message(parts));
    }
    messages
}

/// Masks that have come and wait for their plan.
#[derive(Debug, Default)]
pub struct MaskStaging {
    step: StepId,
    masks: Vec<(SeqSlot, Vec<u32>)>,
    num_bytes: usize,
}

impl MaskStaging {
    /// Keeps parts of masks.
    ///
    /// # Errors
    /// Parts that do not follow each other, or more than may be kept.
    pub fn keep(&mut self, inputs: pb::SampleInputs) -> Result<(), WireError> {
        if self.step != StepId(inputs.step) {
            *self = Self { step: StepId(inputs.step), ..Self::default() };
        }
        for part in inputs.masks {
            self.num_bytes += part.allowed.len();
            if self.num_bytes > MASK_BYTES_STAGED_MAX {
                return Err(invalid("sample_inputs", self.num_bytes, "within the limit of staged masks"));
            }
            self.add(part)?;
        }
        Ok(())
    }

    fn add(&mut self, part: pb::TokenMaskPart) -> Result<(), WireError> {
        if !part.allowed.len().is_multiple_of(size_of::<u32>()) {
            return Err(invalid("masks.allowed", part.allowed.len(), "whole words of four bytes"));
        }
        let slot = SeqSlot(part.slot);
        if self.masks.last().is_none_or(|(last, _)| *last != slot) {
            self.masks.push((slot, Vec::new()));
        }
        let Some((_, words)) = self.masks.last_mut() else { return Ok(()) };
        if u64::from(part.first_token) != words.len() as u64 * u64::from(WORD_BITS) {
            return Err(invalid("masks.first_token", part.first_token as usize, "behind the part before it"));
        }
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << u8::BITS | u32::from(*byte));
        words.extend(part.allowed.chunks_exact(size_of::<u32>()).map(word));
        Ok(())
    }

    /// Gives a plan the masks that came before it.
    ///
    /// # Errors
    /// The plan names a mask that did not come, one that allows nothing, or leaves one out.
    pub fn complete(&mut self, plan: &mut StepPlan) -> Result<(), WireError> {
        let staged = std::mem::take(self);
        let fits = staged.masks.is_empty() || staged.step == plan.step;
        if !fits || !staged.masks.iter().map(|(slot, _)| slot).eq(plan.masks.iter().map(|mask| &mask.slot)) {
            return Err(invalid("masked_slots", plan.masks.len(), "the slots whose masks came before the plan"));
        }
        for (mask, (_, words)) in plan.masks.iter_mut().zip(staged.masks) {
            if words.iter().all(|word| *word == 0) {
                return Err(invalid("masks.allowed", 0, "a mask that allows a token"));
            }
            mask.words = words.into();
        }
        Ok(())
    }
}

fn invalid(field: &'static str, value: usize, expected: &'static str) -> WireError {
    WireError::Invalid { field, value: value.to_string(), expected }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::PLAN_BYTES_MAX;

    fn plan(num_masks: u32, num_words: usize) -> StepPlan {
        let mask =
            |slot| TokenMask { slot: SeqSlot(slot), words: (1..=num_words as u32).map(|at| at * 77 + slot).collect() };
        StepPlan { step: StepId(7), masks: (0..num_masks).map(mask).collect(), ..StepPlan::default() }
    }

    /// Sends a plan over the wire; gives how many messages its masks took.
    fn check(num_masks: u32, num_words: usize, num_messages: usize) {
        let plan = plan(num_masks, num_words);
        let messages = mask_messages(&plan);
        assert_eq!(messages.len(), num_messages, "{num_masks} masks of {num_words} words");
        let mut staging = MaskStaging::default();
        for message in messages {
            assert!(message.encoded_len() <= PLAN_BYTES_MAX);
            let Some(pb::head_to_rank::Message::SampleInputs(inputs)) = message.message else { panic!() };
            staging.keep(inputs).unwrap();
        }
        let mut received = StepPlan::try_from(pb::Plan::from(&plan)).unwrap();
        staging.complete(&mut received).unwrap();
        assert_eq!(received, plan);
    }

    #[test]
    fn masks_survive_the_wire_in_parts() {
        check(0, 0, 0);
        check(1, 1, 1);
        check(3, 4_748, 1);
        check(4, 4_748, 2);
        check(1, 20_000, 2);
        check(100, 1_536, 11);
    }

    #[test]
    fn lying_masks_are_refused() {
        let inputs = |first_token, allowed: &'static [u8]| pb::SampleInputs {
            step: 7,
            masks: vec![pb::TokenMaskPart { slot: 0, first_token, allowed: Bytes::from_static(allowed) }],
        };
        assert!(MaskStaging::default().keep(inputs(0, &[1, 0, 0])).is_err());
        assert!(MaskStaging::default().keep(inputs(32, &[1, 0, 0, 0])).is_err());
        let mut named = plan(1, 1);
        assert!(MaskStaging::default().complete(&mut named).is_err(), "no mask came");
        let mut staging = MaskStaging::default();
        staging.keep(inputs(0, &[0, 0, 0, 0])).unwrap();
        assert!(staging.complete(&mut named).is_err(), "nothing is allowed");
        let mut staging = MaskStaging::default();
        staging.keep(inputs(0, &[1, 0, 0, 0])).unwrap();
        assert!(staging.complete(&mut plan(0, 0)).is_err(), "a mask that no row takes");
    }

    #[test]
    fn bits_are_tokens() {
        let words = [0b1001, 1 << 31];
        let allowed: Vec<u32> = (0..100).filter(|token| TokenMask::allows(&words, *token)).collect();
        assert_eq!(allowed, [0, 3, 63]);
    }
}
