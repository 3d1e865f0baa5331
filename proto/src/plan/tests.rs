//! Plans survive the wire, what lies is refused, and the chain sees what ranks act on.

use super::*;
use crate::{TokenMask, pb};

fn plan() -> StepPlan {
    StepPlan {
        step: StepId(7),
        new_sequences: vec![NewSequence {
            slot: SeqSlot(3),
            seq_id: SeqId(9),
            tokens: vec![TokenId(1), TokenId(2)],
            num_prompt_tokens: 2,
            blocks: vec![BlockId(5)],
            sampling: SamplingParams::default(),
        }],
        rows: vec![PlanRow {
            slot: SeqSlot(3),
            start: 0,
            num_tokens: 2,
            new_blocks: vec![BlockId(6)],
            samples: true,
            consumes: None,
            pools: false,
        }],
        ..StepPlan::default()
    }
}

#[test]
fn a_plan_survives_the_wire() {
    assert_eq!(StepPlan::try_from(pb::Plan::from(&plan())), Ok(plan()));
}

#[test]
fn lying_plans_are_refused() {
    let mut wire = pb::Plan::from(&plan());
    wire.rows[0].num_tokens = 0;
    assert!(StepPlan::try_from(wire).is_err());
    let mut wire = pb::Plan::from(&plan());
    wire.new_sequences[0].num_tokens = 3;
    assert!(StepPlan::try_from(wire).is_err());
    let mut wire = pb::Plan::from(&plan());
    wire.sampler = 9;
    assert!(StepPlan::try_from(wire).is_err());
}

#[test]
fn the_chain_sees_every_field_that_ranks_act_on() {
    let changes: [fn(&mut StepPlan); 23] = [
        |plan| plan.step = StepId(8),
        |plan| plan.sampler = SamplerVariant::Cut,
        |plan| plan.released_slots.push(SeqSlot(1)),
        |plan| plan.new_sequences.clear(),
        |plan| plan.new_sequences[0].slot = SeqSlot(4),
        |plan| plan.new_sequences[0].seq_id = SeqId(8),
        |plan| plan.new_sequences[0].tokens[1] = TokenId(3),
        |plan| plan.new_sequences[0].num_prompt_tokens = 1,
        |plan| plan.new_sequences[0].blocks[0] = BlockId(6),
        |plan| plan.new_sequences[0].sampling.temperature = 0.5,
        |plan| plan.new_sequences[0].sampling.top_k = 3,
        |plan| plan.new_sequences[0].sampling.top_p = 0.5,
        |plan| plan.new_sequences[0].sampling.seed = 5,
        |plan| plan.new_sequences[0].sampling.prompt_logprobs = Some(0),
        |plan| plan.new_sequences[0].sampling.edits = Some(Arc::default()),
        |plan| plan.new_sequences[0].sampling.pooling = Some(Pooling::Mean),
        |plan| plan.rows[0].slot = SeqSlot(4),
        |plan| plan.rows[0].start = 1,
        |plan| plan.rows[0].num_tokens = 1,
        |plan| plan.rows[0].new_blocks[0] = BlockId(7),
        |plan| plan.rows[0].samples = false,
        |plan| plan.rows[0].consumes = Some(StepId(6)),
        |plan| plan.masks.push(TokenMask { slot: SeqSlot(3), words: [1].into() }),
    ];
    let base = plan().chain(0);
    assert_ne!(base, plan().chain(1));
    for (number, change) in changes.iter().enumerate() {
        let mut other = plan();
        change(&mut other);
        assert_ne!(base, other.chain(0), "change {number}");
    }
}

#[test]
fn a_pure_decode_step_is_small() {
    use prost::Message;
    let mut small = plan();
    small.new_sequences.clear();
    small.rows = vec![PlanRow {
        slot: SeqSlot(3),
        start: 700,
        num_tokens: 1,
        new_blocks: vec![],
        samples: true,
        consumes: Some(StepId(6)),
        pools: false,
    }];
    assert!(pb::Plan::from(&small).encoded_len() < 80);
}
