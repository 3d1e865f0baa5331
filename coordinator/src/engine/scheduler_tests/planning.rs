//! Single plans: what is in them, in which order, and who gives way.

use super::*;

#[test]
fn a_cached_prompt_still_computes_its_last_token() {
    let mut harness = Harness::new(ROOMY);
    harness.submit(request(prompt(1, 16), 3));
    harness.run_out();
    harness.submit(request(prompt(1, 16), 3));
    let step = harness.scheduler.plan(&mut harness.blocks).unwrap();
    assert_eq!((step.plan.rows[0].start, step.plan.rows[0].num_tokens), (12, 4));
    assert_eq!(step.plan.new_sequences[0].blocks.len(), 3);
    harness.group.launch(step);
    harness.run_out();
}

#[test]
fn a_decode_row_ahead_names_the_step_that_it_consumes() {
    let mut harness = Harness::new(ROOMY);
    harness.submit(request(prompt(1, 5), 3));
    let first = harness.scheduler.plan(&mut harness.blocks).unwrap();
    assert!(first.plan.rows[0].samples && first.plan.rows[0].consumes.is_none());
    let second = harness.scheduler.plan(&mut harness.blocks).unwrap();
    assert_eq!(second.plan.rows[0].consumes, Some(first.plan.step));
    let third = harness.scheduler.plan(&mut harness.blocks).unwrap();
    assert_eq!(third.plan.rows[0].consumes, Some(second.plan.step));
    assert!(harness.scheduler.plan(&mut harness.blocks).is_none(), "max_tokens is known ahead");
    for step in [first, second, third] {
        harness.group.launch(step);
    }
    harness.run_out();
}

#[test]
fn others_run_ahead_of_a_sequence_whose_mask_is_not_there() {
    let mut harness = Harness::new(Setting { steps_in_flight: 2, ..ROOMY });
    harness.submit(GenerateRequest { constraint: Some(constraint(6)), ..request(prompt(1, 4), 20) });
    harness.submit(request(prompt(2, 4), 20));
    harness.plan();
    let ahead = harness.scheduler.plan(&mut harness.blocks).unwrap();
    assert_eq!(ahead.sequences, [SeqId(1)], "one token of the constrained sequence is in flight");
    harness.group.launch(ahead);
    harness.commit();
    let meanwhile = harness.scheduler.plan(&mut harness.blocks).unwrap();
    assert_eq!(meanwhile.sequences, [SeqId(1)], "its mask is not there yet");
    harness.group.launch(meanwhile);
    harness.answer();
    harness.commit();
    let both = harness.scheduler.plan(&mut harness.blocks).unwrap();
    assert_eq!((both.sequences.len(), both.plan.masks.len()), (2, 1));
    harness.group.launch(both);
    harness.run_out();
    assert_eq!(harness.cases[0].end, Some(FinishReason::Complete));
}

#[test]
fn constraints_go_on_in_the_next_epoch_wherever_they_were() {
    let mut harness = Harness::new(Setting { steps_in_flight: 1, ..ROOMY });
    for family in 0..2 {
        harness.submit(GenerateRequest { constraint: Some(constraint(6)), ..request(prompt(family, 4), 20) });
    }
    harness.plan();
    harness.commit();
    // One mask is known and its token in flight, the other one is still computed.
    let work = harness.away.remove(0);
    harness.scheduler.resume(work.run(), &mut harness.blocks);
    assert_eq!(harness.scheduler.plan(&mut harness.blocks).map(|step| step.sequences.len()), Some(1));
    harness.break_group(9, 64);
    let replayed = harness.scheduler.plan(&mut harness.blocks).unwrap();
    assert_eq!(
        (replayed.sequences.len(), replayed.plan.masks.len()),
        (1, 1),
        "the lost token is drawn by the same mask"
    );
    harness.group.launch(replayed);
    harness.commit();
    harness.run_out();
    assert!(harness.cases.iter().all(|case| case.end == Some(FinishReason::Complete)));
}

#[test]
fn a_constraint_that_fails_ends_its_sequence_alone() {
    let mut harness = Harness::new(ROOMY);
    harness.submit(request(prompt(2, 4), 20));
    harness.scheduler.enqueue(Sequence::new(
        SeqId(7),
        GenerateRequest { constraint: Some(constraint(6)), ..request(prompt(1, 4), 20) },
        NonZeroU32::new(20).unwrap(),
    ));
    harness.plan();
    let (step, mut output) = harness.group.finish().unwrap();
    output.rows[1].token = TokenId(1);
    let events = harness.scheduler.commit(step, output, &mut harness.blocks);
    assert_eq!(events.len(), 2);
    harness.read(events[..1].to_vec());
    let work = harness.scheduler.take_constraint_work().remove(0);
    harness.scheduler.resume(work.run(), &mut harness.blocks);
    let mut events = harness.scheduler.take_events();
    let (id, failed) = events.remove(0);
    assert_eq!(id, SeqId(7));
    assert!(matches!(failed, TokenEvent::Failed(EngineError::Constraint { .. })), "{failed:?}");
    assert!(events.is_empty());
    harness.scheduler.check_invariants(&harness.blocks);
}

#[test]
fn blocks_that_run_out_cost_the_youngest_its_place_and_no_text() {
    let mut harness = Harness::new(Setting { num_blocks: 16, ..ROOMY });
    for family in 0..4 {
        harness.submit(request(prompt(family, 12), 28));
    }
    harness.run_out();
    assert!(harness.scheduler.counters().preemptions > 0);
}

#[test]
fn a_step_in_flight_that_gives_blocks_back_spares_the_others() {
    let mut harness = Harness::new(Setting { num_blocks: 16, steps_in_flight: 3, ..ROOMY });
    for family in 0..4 {
        harness.submit(request(prompt(family, 16), 28));
    }
    while harness.scheduler.counters().preemptions == 0 {
        while harness.group.num_in_flight() < 3 && harness.plan() {}
        harness.commit();
    }
    assert_eq!(harness.scheduler.counters().preemptions, 1, "its blocks come back, and others wait for them");
    harness.run_out();
}

/// The order in which requests of these priorities start, one at a time.
fn order_of_starts(policy: Policy, priorities: &[i32]) -> Vec<u64> {
    let limits = EngineLimits { max_num_seqs: 1, policy, ..limits() };
    let mut blocks = BlockManager::new(limits.num_blocks, limits.block_size, true);
    let mut scheduler = Scheduler::new(limits);
    for (id, priority) in (1..).zip(priorities) {
        let request = GenerateRequest { priority: *priority, ..request(prompt(1, 4), 1) };
        scheduler.enqueue(Sequence::new(SeqId(id), request, NonZeroU32::MIN));
    }
    let mut order = Vec::new();
    while let Some(step) = scheduler.plan(&mut blocks) {
        order.extend(step.sequences.iter().map(|id| id.0));
        let row = |slot| phalanx_proto::SampledRow { slot, token: TokenId(1), logprobs: None };
        let rows = step.plan.rows.iter().map(|planned| row(planned.slot)).collect();
        scheduler.commit(step, phalanx_proto::StepOutput { elapsed_us: 1, rows, ..Default::default() }, &mut blocks);
        scheduler.check_invariants(&blocks);
    }
    order
}

#[test]
fn the_lowest_priority_number_starts_first_where_the_policy_looks_at_it() {
    assert_eq!(order_of_starts(Policy::Priority, &[0, 5, -3, 0, -3]), [3, 5, 1, 4, 2]);
    assert_eq!(order_of_starts(Policy::Priority, &[0; 4]), [1, 2, 3, 4]);
    assert_eq!(order_of_starts(Policy::Fcfs, &[0, 5, -3, 0, -3]), [1, 2, 3, 4, 5]);
}

#[test]
fn blocks_that_run_out_cost_the_highest_priority_number_its_place() {
    for (policy, expected) in [(Policy::Priority, 2), (Policy::Fcfs, 4)] {
        let limits = EngineLimits { num_blocks: 16, policy, ..limits() };
        let mut blocks = BlockManager::new(limits.num_blocks, limits.block_size, false);
        let mut scheduler = Scheduler::new(limits);
        for (id, priority) in [(1, 0), (2, 7), (3, 0), (4, 6)] {
            let request = GenerateRequest { priority, ..request(prompt(id, 12), 28) };
            scheduler.enqueue(Sequence::new(SeqId(id.into()), request, NonZeroU32::new(28).unwrap()));
        }
        let mut last = Vec::new();
        while scheduler.counters().preemptions == 0 {
            let step = scheduler.plan(&mut blocks).expect("work");
            last = step.sequences.iter().map(|id| id.0).collect();
            let rows = step.plan.rows.iter().filter(|row| row.samples);
            let rows = rows.map(|row| phalanx_proto::SampledRow { slot: row.slot, token: TokenId(1), logprobs: None });
            let rows = rows.collect();
            scheduler.commit(
                step,
                phalanx_proto::StepOutput { elapsed_us: 1, rows, ..Default::default() },
                &mut blocks,
            );
        }
        assert_eq!(last, [1, 2, 3, 4].into_iter().filter(|id| *id != expected).collect::<Vec<u64>>());
    }
}

#[test]
fn equal_prompts_that_come_together_are_computed_once() {
    let mut harness = Harness::new(ROOMY);
    for _ in 0..3 {
        harness.submit(request(prompt(1, 100), 2));
    }
    harness.run_out();
    assert_eq!(harness.scheduler.counters().cached_tokens, 2 * 96);
    harness.submit(request(prompt(1, 100), 2));
    harness.run_out();
    assert_eq!(harness.scheduler.counters().cached_tokens, 3 * 96);
}

#[test]
fn long_prompts_mix_with_decode_in_chunks() {
    let mut harness = Harness::new(ROOMY);
    harness.submit(request(prompt(1, 4), 20));
    harness.plan();
    harness.commit();
    harness.submit(request(prompt(3, 100), 2));
    let step = harness.scheduler.plan(&mut harness.blocks).unwrap();
    assert_eq!(step.plan.rows.iter().map(|row| row.num_tokens).collect::<Vec<_>>(), [1, 31]);
    assert!(!step.plan.rows[1].samples);
    harness.group.launch(step);
    harness.run_out();
}

#[test]
fn a_plan_of_long_prompts_stays_small() {
    let limits = EngineLimits {
        num_blocks: 20_000,
        max_model_len: 100_000,
        max_num_batched_tokens: 200_000,
        max_num_seqs: 8,
        vocab_size: VOCAB_SIZE,
        step_time_budget: Duration::from_secs(100_000),
        ..limits()
    };
    let mut scheduler = Scheduler::new(limits.clone());
    let mut blocks = BlockManager::new(limits.num_blocks, limits.block_size, true);
    for (id, num_tokens) in [(1, 9_000), (2, 9_000), (3, 3_000), (4, 10)] {
        let request = request(prompt(id as u32, num_tokens), 2);
        scheduler.enqueue(Sequence::new(SeqId(id), request, NonZeroU32::new(2).unwrap()));
    }
    while let Some(step) = scheduler.plan(&mut blocks) {
        for message in crate::engine::group::to_messages(&step.plan) {
            assert!(prost::Message::encoded_len(&message) <= phalanx_proto::PLAN_BYTES_MAX);
        }
        let rows = step.plan.rows.iter().filter(|row| row.samples);
        let rows = rows.map(|row| phalanx_proto::SampledRow { slot: row.slot, token: TokenId(1), logprobs: None });
        let output = phalanx_proto::StepOutput { elapsed_us: 1, rows: rows.collect(), ..Default::default() };
        scheduler.commit(step, output, &mut blocks);
    }
    assert!(scheduler.is_empty());
}
