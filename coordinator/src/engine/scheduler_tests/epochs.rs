//! What becomes of sequences when their group breaks.

use super::*;

#[test]
fn what_ran_when_the_group_broke_goes_on_first_and_in_its_order() {
    let mut harness = Harness::new(Setting { max_num_seqs: 3, ..ROOMY });
    for family in 0..6 {
        harness.submit(request(prompt(family, 4), 28));
    }
    for _ in 0..6 {
        harness.plan();
        harness.commit();
    }
    assert_eq!((harness.scheduler.num_running(), harness.scheduler.num_waiting()), (3, 3));
    harness.plan();
    harness.break_group(9, 64);
    assert_eq!((harness.scheduler.num_running(), harness.scheduler.num_waiting()), (0, 6));
    assert_eq!(harness.scheduler.counters().replays, 3);
    let step = harness.scheduler.plan(&mut harness.blocks).unwrap();
    assert_eq!(step.plan.step, phalanx_proto::StepId(1), "an epoch counts its steps from the first");
    assert_eq!(step.sequences, [SeqId(0), SeqId(1), SeqId(2)]);
    assert!(step.plan.new_sequences.iter().all(|new| new.tokens.len() > new.num_prompt_tokens as usize));
    harness.group.launch(step);
    harness.run_out();
}

#[test]
fn sequences_in_two_broken_batches_have_their_steps_for_themselves_for_a_while() {
    let mut harness = Harness::new(ROOMY);
    for family in 0..3 {
        harness.submit(request(prompt(family, 4), 28));
    }
    for _ in 0..2 {
        harness.plan();
        harness.break_group(9, 64);
    }
    let mut alone = Vec::new();
    for _ in 0..100 {
        let Some(step) = harness.scheduler.plan(&mut harness.blocks) else { break };
        if step.sequences.len() > 1 {
            harness.group.launch(step);
            break;
        }
        alone.push(step.sequences[0].0);
        harness.group.launch(step);
        assert!(harness.commit());
    }
    assert_eq!(alone, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]);
    harness.run_out();
}

#[test]
fn a_sequence_that_breaks_every_group_fails_alone() {
    let mut harness = Harness::new(ROOMY);
    for family in 0..3 {
        harness.submit(request(prompt(family, 4), 28));
    }
    // Sequence 1 ends every group that has it in its batch.
    let mut failed = Vec::new();
    for _ in 0..1000 {
        let Some(step) = harness.scheduler.plan(&mut harness.blocks) else { break };
        let is_poisoned = step.sequences.contains(&SeqId(1));
        harness.group.launch(step);
        if is_poisoned {
            harness.break_group(3, 64);
            failed.append(&mut harness.scheduler.take_events());
        } else {
            harness.commit();
        }
    }
    assert!(matches!(failed[..], [(SeqId(1), TokenEvent::Failed(EngineError::GroupFailed { .. }))]), "{failed:?}");
    for case in [0, 2] {
        assert_eq!(harness.cases[case].end, Some(FinishReason::Length), "the others go on");
        assert_eq!(harness.cases[case].tokens, oracle(&harness.cases[case].request, 28).0);
    }
}

#[test]
fn a_smaller_group_ends_sequences_sooner_and_fails_what_cannot_fit() {
    let mut harness = Harness::new(ROOMY);
    harness.submit(request(prompt(1, 40), 100));
    harness.submit(request(prompt(2, 10), 100));
    harness.plan();
    harness.break_group(9, 8);
    let events = harness.scheduler.take_events();
    let too_few = EngineError::TooFewBlocks { needed: 10, total: 8 };
    assert!(matches!(&events[..], [(SeqId(0), TokenEvent::Failed(error))] if *error == too_few), "{events:?}");
    (harness.cases[0].cancelled, harness.cases[0].end) = (true, Some(FinishReason::Aborted));
    harness.cases[1].max_tokens = 8 * 4 + 1 - 10;
    harness.run_out();
}

#[test]
fn a_broken_group_ends_every_sequence_once() {
    let mut harness = Harness::new(ROOMY);
    for family in 0..6 {
        harness.submit(request(prompt(family, 12), 28));
    }
    harness.plan();
    let error = EngineError::GroupFailed { reason: "rank 1".into() };
    harness.scheduler.fail_all(&error, &mut harness.blocks);
    let events = harness.scheduler.take_events();
    assert_eq!(events.len(), 6);
    assert!(events.iter().all(|(_, event)| matches!(event, TokenEvent::Failed(_))));
    assert!(harness.scheduler.is_empty());
}

#[test]
fn a_sequence_that_runs_alone_is_not_preempted_for_one_that_rests() {
    let mut harness = Harness::new(Setting { num_blocks: 20, ..ROOMY });
    harness.submit(request(prompt(0, 30), 30));
    harness.submit(request(prompt(1, 31), 30));
    for _ in 0..3 {
        while harness.scheduler.num_running() < 2 {
            harness.plan();
            harness.commit();
        }
        harness.plan();
        harness.break_group(9, 20);
    }
    harness.run_out();
}
