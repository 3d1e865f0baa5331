//! From a plan to the inputs of a forward: the persistent batch of a rank.
//!
//! Owns one slot per running sequence: tokens, block table, how far it is computed. Plans are deltas against it. Knows no
//! device and no model.
//!
//! A token that a step in flight samples is not known here yet: it holds its place in the sequence, and the device finds it
//! by the sequence's slot.
//!
//! **Invariant:** a plan that does not fit the batch is refused before anything is computed; the inputs that leave here name
//! blocks, positions and tokens that exist, or will when the step before has run.

mod sequence;

use std::collections::HashMap;

use phalanx_kernels::{SampleMask, StepInputs};
use phalanx_proto::{NewSequence, POOLED_ROWS_MAX, PlanRow, SeqSlot, StepId, StepPlan, TokenId};

use self::sequence::Sequence;
use crate::error::Divergence;
use crate::pooling::PoolChunk;
use crate::scoring::{NamedTokens, PromptChunk};

/// What was agreed when the group started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// KV blocks that exist.
    pub num_blocks: usize,
    /// Tokens in a block.
    pub block_size: usize,
    /// Longest sequence.
    pub max_model_len: usize,
    /// Most sequences in a step.
    pub max_num_seqs: usize,
    /// Most tokens in a step.
    pub max_num_batched_tokens: usize,
    /// Tokens that exist.
    pub vocab_size: usize,
}

/// Slots for each sequence of a step: some sequences wait in the batch for a later step.
pub const SLOTS_PER_SEQUENCE_MAX: usize = 4;

/// One step's work. Reused from step to step.
#[derive(Debug, Default)]
pub struct StepWork {
    /// Inputs of the forward; their logit rows are those that sample.
    pub inputs: StepInputs,
    /// Prompt chunks to score, in plan order.
    pub prompts: Vec<PromptChunk>,
    /// Tokens to score beside drawn ones, in the order of those.
    pub named: Vec<NamedTokens>,
    /// Rows whose hidden states are pooled, in plan order.
    pub pools: Vec<PoolChunk>,
}

impl StepWork {
    fn clear(&mut self) {
        let StepInputs {
            token_ids,
            positions,
            kv_slots,
            seqs,
            block_tables,
            logit_rows,
            samples,
            masks,
            edits,
            scores,
        } = &mut self.inputs;
        for list in [token_ids, positions, kv_slots, block_tables, logit_rows] {
            list.clear();
        }
        seqs.clear();
        samples.clear();
        masks.clear();
        edits.clear();
        scores.clear();
        self.prompts.clear();
        self.named.clear();
        self.pools.clear();
    }
}

/// Gives each masked row its mask.
fn write_masks(plan: &StepPlan, inputs: &mut StepInputs) -> Result<(), Divergence> {
    for mask in &plan.masks {
        let row = inputs.samples.iter().position(|sample| sample.slot == mask.slot.0);
        let row = row.ok_or(Divergence::Mask(mask.slot))? as u32;
        inputs.masks.push(SampleMask { row, words: mask.words.clone() });
    }
    Ok(())
}

/// The sequences that run on this rank.
#[derive(Debug)]
pub struct Batch {
    limits: BatchLimits,
    sequences: HashMap<SeqSlot, Sequence>,
}

impl Batch {
    /// An empty batch.
    pub fn new(limits: BatchLimits) -> Self {
        Self { limits, sequences: HashMap::new() }
    }

    /// Drops all sequences.
    pub fn clear(&mut self) {
        self.sequences.clear();
    }

    /// Takes a plan in and writes its work.
    ///
    /// # Errors
    /// The plan does not fit the batch; the rank leaves its epoch.
    pub fn apply(&mut self, plan: &StepPlan, work: &mut StepWork) -> Result<(), Divergence> {
        work.clear();
        for slot in &plan.released_slots {
            self.sequences.remove(slot).ok_or(Divergence::UnknownSlot(*slot))?;
        }
        for new in &plan.new_sequences {
            self.admit(new)?;
        }
        at_most("rows", plan.rows.len(), self.limits.max_num_seqs)?;
        let num_tokens = plan.rows.iter().fold(0usize, |sum, row| sum.saturating_add(row.num_tokens as usize));
        at_most("pooled rows", plan.rows.iter().filter(|row| row.pools).count(), POOLED_ROWS_MAX)?;
        at_most("tokens in a step", num_tokens, self.limits.max_num_batched_tokens)?;
        let first_of = |(index, row): (usize, &PlanRow)| !plan.rows[..index].iter().any(|other| other.slot == row.slot);
        if let Some(twice) = plan.rows.iter().enumerate().find(|entry| !first_of(*entry)) {
            return Err(Divergence::SlotTwice(twice.1.slot));
        }
        for row in &plan.rows {
            let sequence = self.sequences.get_mut(&row.slot).ok_or(Divergence::UnknownSlot(row.slot))?;
            sequence.advance(row, &self.limits)?;
            sequence.write(row, self.limits.block_size as u32, work);
            if row.samples {
                sequence.expect_token(plan.step);
            }
            if !sequence.is_served(row, plan.sampler) {
                return Err(Divergence::Sampler(row.slot));
            }
        }
        write_masks(plan, &mut work.inputs)
    }

    /// Takes in the tokens that a step sampled; those of sequences that have left meanwhile are dropped.
    pub fn commit(&mut self, step: StepId, tokens: &[(SeqSlot, TokenId)]) {
        for (slot, token) in tokens {
            if let Some(sequence) = self.sequences.get_mut(slot) {
                sequence.commit(step, *token);
            }
        }
    }

    /// Slots that a device must keep a last token for.
    pub fn slots_max(max_num_seqs: usize) -> usize {
        max_num_seqs.saturating_mul(SLOTS_PER_SEQUENCE_MAX)
    }

    fn admit(&mut self, new: &NewSequence) -> Result<(), Divergence> {
        let slot = new.slot;
        at_most("slots", slot.0 as usize + 1, Self::slots_max(self.limits.max_num_seqs))?;
        at_most("tokens in a sequence", new.tokens.len(), self.limits.max_model_len)?;
        if let Some(token) = new.tokens.iter().find(|token| token.0 as usize >= self.limits.vocab_size) {
            return Err(Divergence::Token { slot, token: *token, vocab_size: self.limits.vocab_size });
        }
        if self.sequences.contains_key(&slot) {
            return Err(Divergence::SlotTaken(slot));
        }
        let sequence = Sequence::new(new, &self.limits)?;
        self.sequences.insert(slot, sequence);
        Ok(())
    }
}

fn at_most(what: &'static str, found: usize, max: usize) -> Result<(), Divergence> {
    if found > max { Err(Divergence::TooMany { what, found, max }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use phalanx_kernels::LAST_TOKEN;
    use phalanx_proto::{BlockId, SamplerVariant, SamplingParams, SeqId};

    use super::*;

    const SLOT: SeqSlot = SeqSlot(3);

    fn batch() -> Batch {
        Batch::new(BatchLimits {
            num_blocks: 8,
            block_size: 16,
            max_model_len: 64,
            max_num_seqs: 2,
            max_num_batched_tokens: 32,
            vocab_size: 100,
        })
    }

    fn sequence(num_tokens: u32, blocks: &[u32]) -> NewSequence {
        NewSequence {
            slot: SLOT,
            seq_id: SeqId(1),
            tokens: (0..num_tokens).map(TokenId).collect(),
            num_prompt_tokens: num_tokens,
            blocks: blocks.iter().copied().map(BlockId).collect(),
            sampling: SamplingParams { temperature: 0.0, prompt_logprobs: Some(1), ..SamplingParams::default() },
        }
    }

    fn row(start: u32, num_tokens: u32, new_blocks: &[u32], samples: bool) -> PlanRow {
        let new_blocks = new_blocks.iter().copied().map(BlockId).collect();
        PlanRow { slot: SLOT, start, num_tokens, new_blocks, samples, consumes: None, pools: false }
    }

    fn plan(new: Option<NewSequence>, rows: &[PlanRow]) -> StepPlan {
        StepPlan { new_sequences: new.into_iter().collect(), rows: rows.to_vec(), ..StepPlan::default() }
    }

    #[test]
    fn chunks_cross_blocks_and_predict_across_their_border() {
        let (mut batch, mut work) = (batch(), StepWork::default());
        batch.apply(&plan(Some(sequence(20, &[5])), &[row(14, 3, &[2], false)]), &mut work).expect("fits");
        assert_eq!(work.inputs.kv_slots, [5 * 16 + 14, 5 * 16 + 15, 2 * 16]);
        assert_eq!(work.inputs.block_tables, [5, 2]);
        assert_eq!((work.inputs.positions.as_slice(), work.inputs.samples.len()), ([14, 15, 16].as_slice(), 0));
        assert_eq!((work.prompts[0].start, work.prompts[0].tokens.as_slice()), (15, &[15, 16, 17].map(TokenId)[..]));
        let last_chunk = StepPlan { step: StepId(7), ..plan(None, &[row(17, 3, &[], true)]) };
        batch.apply(&last_chunk, &mut work).expect("fits");
        assert_eq!((work.inputs.logit_rows.as_slice(), work.inputs.samples[0].output_index), ([2].as_slice(), 0));
        assert_eq!(work.prompts[0].tokens, [18, 19].map(TokenId), "nothing is predicted beyond the prompt");
        let decode = |start, step| {
            let row = PlanRow { consumes: Some(StepId(step - 1)), ..row(start, 1, &[], true) };
            StepPlan { step: StepId(step), ..plan(None, &[row]) }
        };
        batch.apply(&decode(20, 8), &mut work).expect("fits");
        assert_eq!(work.inputs.token_ids, [LAST_TOKEN | SLOT.0], "the device knows what step 7 samples");
        assert_eq!(work.inputs.samples[0].output_index, 1);
        assert!(work.prompts.is_empty());
        batch.commit(StepId(7), &[(SLOT, TokenId(42))]);
        batch.commit(StepId(8), &[(SLOT, TokenId(43))]);
        batch.apply(&decode(21, 9), &mut work).expect("fits");
        assert_eq!((work.inputs.token_ids.as_slice(), work.inputs.samples[0].output_index), ([43].as_slice(), 2));
    }

    #[test]
    fn tokens_of_a_sequence_that_left_do_not_reach_the_next_in_its_slot() {
        let (mut batch, mut work) = (batch(), StepWork::default());
        let first = StepPlan { step: StepId(1), ..plan(Some(sequence(3, &[])), &[row(0, 3, &[1], true)]) };
        batch.apply(&first, &mut work).expect("fits");
        let second = StepPlan { released_slots: vec![SLOT], step: StepId(2), ..plan(Some(sequence(2, &[])), &[]) };
        batch.apply(&second, &mut work).expect("fits");
        batch.commit(StepId(1), &[(SLOT, TokenId(42))]);
        batch.apply(&plan(None, &[row(0, 2, &[2], true)]), &mut work).expect("fits");
        assert_eq!(work.inputs.token_ids, [0, 1]);
    }

    #[test]
    fn plans_that_do_not_fit_are_refused() {
        let refused = |new: Option<NewSequence>, rows: &[PlanRow]| {
            batch().apply(&plan(new, rows), &mut StepWork::default()).expect_err("does not fit")
        };
        let fine = || Some(sequence(20, &[5]));
        let table = |num_blocks, num_tokens| Divergence::Table { slot: SLOT, num_blocks, num_tokens, block_size: 16 };
        assert_eq!(refused(None, &[row(0, 1, &[1], false)]), Divergence::UnknownSlot(SLOT));
        assert_eq!(
            refused(fine(), &[row(17, 1, &[1], false)]),
            Divergence::Start { slot: SLOT, expected: 16, found: 17 }
        );
        assert_eq!(refused(fine(), &[row(0, 20, &[], true)]), table(1, 20));
        assert_eq!(refused(fine(), &[row(16, 4, &[1, 2, 3, 4], true)]), table(5, 64));
        assert_eq!(refused(fine(), &[row(16, 5, &[1], true)]), Divergence::End { slot: SLOT, end: 21, num_tokens: 20 });
        assert_eq!(refused(fine(), &[row(16, 3, &[1], true)]), Divergence::End { slot: SLOT, end: 19, num_tokens: 20 });
        let block = Divergence::Block { slot: SLOT, block: BlockId(8), num_blocks: 8 };
        assert_eq!(refused(fine(), &[row(16, 4, &[8], true)]), block);
        assert_eq!(refused(fine(), &[row(0, 16, &[], false), row(16, 4, &[1], true)]), Divergence::SlotTwice(SLOT));
        let consumes = PlanRow { consumes: Some(StepId(4)), ..row(16, 4, &[1], true) };
        assert_eq!(refused(fine(), &[consumes]), Divergence::Consumes { slot: SLOT, last: None, found: StepId(4) });
        let tokens = Divergence::TooMany { what: "tokens in a step", found: 33, max: 32 };
        assert_eq!(refused(Some(sequence(40, &[])), &[row(0, 33, &[0, 1, 2], false)]), tokens);
        let long = Divergence::TooMany { what: "tokens in a sequence", found: 65, max: 64 };
        assert_eq!(refused(Some(sequence(65, &[])), &[]), long);
        let unknown = NewSequence { tokens: vec![TokenId(100)], ..sequence(1, &[]) };
        assert_eq!(refused(Some(unknown), &[]), Divergence::Token { slot: SLOT, token: TokenId(100), vocab_size: 100 });
        let drawn = NewSequence { sampling: SamplingParams::default(), ..sequence(1, &[]) };
        assert_eq!(refused(Some(drawn), &[row(0, 1, &[1], true)]), Divergence::Sampler(SLOT));
        assert_eq!(StepPlan::default().sampler, SamplerVariant::Greedy);
    }

    #[test]
    fn slots_are_taken_and_released() {
        let (mut batch, mut work) = (batch(), StepWork::default());
        let enter = plan(Some(sequence(4, &[])), &[]);
        batch.apply(&enter, &mut work).expect("fits");
        assert_eq!(batch.apply(&enter, &mut work), Err(Divergence::SlotTaken(SLOT)));
        let leave = StepPlan { released_slots: vec![SLOT], ..StepPlan::default() };
        batch.apply(&leave, &mut work).expect("fits");
        assert_eq!(batch.apply(&leave, &mut work), Err(Divergence::UnknownSlot(SLOT)));
        batch.apply(&enter, &mut work).expect("the slot is free again");
    }
}
