//! Random operations on scheduler and block manager against a simulated group and a sequential oracle.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::time::Duration;

use phalanx_proto::{BlockId, Pooling, SamplingParams, SeqId, TokenId};
use proptest::prelude::*;

use super::block_manager::BlockManager;
use super::constraint::tests::Listed;
use super::constraint::{Constraint, ConstraintWork, NextTokens};
use super::policy::Policy;
use super::request::{EngineError, EngineLimits, FinishReason, GenerateRequest, TokenEvent};
use super::scheduler::{Scheduler, SeqEvent};
use super::sequence::Sequence;
use super::simulation::{SimulatedGroup, VOCAB_SIZE, describe, masked, next_token, pooled};

pub(super) fn limits() -> EngineLimits {
    EngineLimits {
        num_blocks: 64,
        block_size: 4,
        max_model_len: 200,
        max_num_seqs: 4,
        max_num_batched_tokens: 32,
        max_queue: 1000,
        steps_in_flight_max: 2,
        vocab_size: VOCAB_SIZE,
        enable_prefix_caching: true,
        step_time_budget: Duration::from_millis(10),
        step_deadline_min: Duration::from_secs(5),
        policy: crate::engine::policy::Policy::default(),
        recovery: crate::engine::RecoveryLimits::default(),
        features: phalanx_proto::SamplerFeatures { masks: true, edits: true },
    }
}

pub(super) fn request(prompt: Vec<TokenId>, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        request_id: "test".into(),
        prompt,
        sampling: SamplingParams::default(),
        max_tokens: NonZeroU32::new(max_tokens).unwrap(),
        stop_token_ids: vec![],
        constraint: None,
        priority: 0,
        cache_salt: None,
    }
}

/// A prompt of one of a few families, so that prefixes are shared.
pub(super) fn prompt(family: u32, num_tokens: u32) -> Vec<TokenId> {
    (0..num_tokens).map(|at| TokenId((family * 7 + at * (family % 2)) % VOCAB_SIZE)).collect()
}

/// What the model says alone, one token after the other.
pub(super) fn oracle(request: &GenerateRequest, max_tokens: u32) -> (Vec<TokenId>, FinishReason) {
    let mut tokens = request.prompt.clone();
    let mut constraint = request.constraint.clone();
    loop {
        let token = masked(next_token(&tokens), words(constraint.as_ref()));
        tokens.push(token);
        constraint = constraint.map(|constraint| constraint.commit(token).unwrap());
        let output = tokens[request.prompt.len()..].to_vec();
        if request.stop_token_ids.contains(&token) {
            return (output, FinishReason::Stop(token));
        } else if output.len() == max_tokens as usize {
            return (output, FinishReason::Length);
        } else if constraint.as_ref().is_some_and(|constraint| *constraint.next() == NextTokens::Done) {
            return (output, FinishReason::Complete);
        }
    }
}

fn words(constraint: Option<&Constraint>) -> Option<&[u32]> {
    match constraint?.next() {
        NextTokens::Only(words) => Some(words),
        NextTokens::Any | NextTokens::Done => None,
    }
}

/// A constraint of so many tokens; every fifth may be any.
pub(super) fn constraint(num_tokens: u32) -> Constraint {
    let set = |at: u32| (0..VOCAB_SIZE).filter(|token| at % 5 != 4 && (token + at).is_multiple_of(3)).collect();
    Listed::constraint((0..num_tokens).map(set).collect())
}

#[derive(Debug, Clone)]
enum Operation {
    Submit {
        family: u32,
        num_prompt: u32,
        max_tokens: u32,
        stop: Option<u32>,
        prompt_logprobs: bool,
        constrained: Option<u32>,
        pooling: Option<bool>,
    },
    Cancel(usize),
    Answer,
    Plan,
    Commit,
    Break,
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        3 => (0..4u32, 1..60u32, 1..30u32, proptest::option::of(0..VOCAB_SIZE), proptest::bool::weighted(0.15), proptest::option::weighted(0.3, 1..30u32), proptest::option::weighted(0.2, any::<bool>())).prop_map(
            |(family, num_prompt, max_tokens, stop, prompt_logprobs, constrained, pooling)| Operation::Submit {
                family, num_prompt, max_tokens, stop, prompt_logprobs, constrained, pooling
            }
        ),
        1 => any::<usize>().prop_map(Operation::Cancel),
        8 => Just(Operation::Plan),
        8 => Just(Operation::Commit),
        4 => Just(Operation::Answer),
        1 => Just(Operation::Break),
    ]
}

#[derive(Debug, Clone, Copy)]
struct Setting {
    num_blocks: u32,
    max_num_seqs: u32,
    max_num_batched_tokens: u32,
    steps_in_flight: usize,
    caching: bool,
}

fn setting() -> impl Strategy<Value = Setting> {
    (16..40u32, 1..6u32, 4..64u32, 1..4usize, any::<bool>()).prop_map(
        |(num_blocks, max_num_seqs, max_num_batched_tokens, steps_in_flight, caching)| Setting {
            num_blocks,
            max_num_seqs,
            max_num_batched_tokens,
            steps_in_flight,
            caching,
        },
    )
}

/// One request and what came back for it.
struct Case {
    request: GenerateRequest,
    max_tokens: u32,
    tokens: Vec<TokenId>,
    num_prompt_logprobs: Option<usize>,
    pooled: Option<Vec<f32>>,
    end: Option<FinishReason>,
    cancelled: bool,
}

struct Harness {
    limits: EngineLimits,
    steps_in_flight: usize,
    scheduler: Scheduler,
    blocks: BlockManager,
    group: SimulatedGroup,
    cases: Vec<Case>,
    /// Constraints that are away.
    away: Vec<ConstraintWork>,
}

impl Harness {
    fn new(setting: Setting) -> Self {
        let limits = EngineLimits {
            num_blocks: setting.num_blocks,
            max_num_seqs: setting.max_num_seqs,
            max_num_batched_tokens: setting.max_num_batched_tokens,
            enable_prefix_caching: setting.caching,
            ..limits()
        };
        Self {
            scheduler: Scheduler::new(limits.clone()),
            blocks: BlockManager::new(limits.num_blocks, limits.block_size, setting.caching),
            group: SimulatedGroup::new(limits.num_blocks, limits.block_size),
            steps_in_flight: setting.steps_in_flight,
            cases: vec![],
            away: vec![],
            limits,
        }
    }

    fn apply(&mut self, operation: &Operation) {
        match *operation {
            Operation::Submit { family, num_prompt, max_tokens, stop, prompt_logprobs, constrained, pooling } => {
                let mut request = request(prompt(family, num_prompt), max_tokens);
                request.stop_token_ids = stop.map(TokenId).into_iter().collect();
                request.sampling.prompt_logprobs = prompt_logprobs.then_some(0);
                request.constraint = constrained.map(constraint);
                request.priority = family as i32 % 3 - 1;
                if let Some(is_mean) = pooling {
                    request.sampling.pooling = Some(if is_mean { Pooling::Mean } else { Pooling::Last });
                    (request.sampling.prompt_logprobs, request.constraint) = (None, None);
                }
                self.submit(request);
            }
            Operation::Answer => self.answer(),
            Operation::Cancel(index) if !self.cases.is_empty() => {
                let index = index % self.cases.len();
                self.cases[index].cancelled |= self.cases[index].end.is_none();
                self.scheduler.abort(SeqId(index as u64), &mut self.blocks);
            }
            Operation::Cancel(_) => {}
            Operation::Plan => {
                if self.group.num_in_flight() < self.steps_in_flight {
                    self.plan();
                }
            }
            Operation::Commit => {
                self.commit();
            }
            Operation::Break => self.break_group(u32::MAX, self.limits.num_blocks),
        }
        self.scheduler.check_invariants(&self.blocks);
    }

    fn submit(&mut self, request: GenerateRequest) {
        let id = SeqId(self.cases.len() as u64);
        let max_tokens = self.limits.admit(&request).unwrap();
        self.scheduler.enqueue(Sequence::new(id, request.clone(), max_tokens));
        let max_tokens = max_tokens.get();
        let (tokens, end, pooled) = (vec![], None, None);
        self.cases.push(Case { request, max_tokens, tokens, num_prompt_logprobs: None, pooled, end, cancelled: false });
    }

    /// The group is gone with all that was in flight; another one takes over.
    fn break_group(&mut self, replays_max: u32, num_blocks: u32) {
        self.scheduler.end_epoch(replays_max, &EngineError::GroupFailed { reason: "rank 1".into() });
        self.limits.num_blocks = num_blocks;
        self.blocks = BlockManager::new(num_blocks, self.limits.block_size, self.limits.enable_prefix_caching);
        self.group = SimulatedGroup::new(num_blocks, self.limits.block_size);
        self.scheduler.begin_epoch(num_blocks);
    }

    fn plan(&mut self) -> bool {
        let Some(step) = self.scheduler.plan(&mut self.blocks) else {
            let idle = self.group.num_in_flight() == 0;
            assert!(
                !idle || self.scheduler.is_empty() || !self.away.is_empty(),
                "sequences wait, and no step brings them on"
            );
            return false;
        };
        assert!(step.plan.num_tokens() <= self.limits.max_num_batched_tokens);
        assert!(step.plan.rows.len() <= self.limits.max_num_seqs as usize);
        self.group.launch(step);
        true
    }

    fn commit(&mut self) -> bool {
        let Some((step, output)) = self.group.finish() else { return false };
        let events = self.scheduler.commit(step, output, &mut self.blocks);
        self.away.extend(self.scheduler.take_constraint_work());
        self.read(events);
        true
    }

    /// Brings every constraint back that is away.
    fn answer(&mut self) {
        for work in std::mem::take(&mut self.away) {
            self.scheduler.resume(work.run(), &mut self.blocks);
        }
        let events = self.scheduler.take_events();
        self.read(events);
    }

    fn read(&mut self, events: Vec<SeqEvent>) {
        for (id, event) in events {
            let case = &mut self.cases[id.0 as usize];
            assert_eq!(case.end, None, "nothing comes after the last event");
            match event {
                TokenEvent::PromptLogprobs(all) => {
                    assert!(case.tokens.is_empty() && case.num_prompt_logprobs.is_none());
                    let expected: Vec<_> =
                        (1..case.request.prompt.len()).map(|at| describe(&case.request.prompt, at)).collect();
                    assert_eq!(all, expected);
                    case.num_prompt_logprobs = Some(all.len());
                }
                TokenEvent::Token { index, token, .. } => {
                    assert_eq!(index as usize, case.tokens.len(), "each index once, in order");
                    assert_eq!(case.num_prompt_logprobs.is_some(), case.request.sampling.prompt_logprobs.is_some());
                    case.tokens.push(token);
                }
                TokenEvent::Pooled(values) => assert_eq!(case.pooled.replace(values), None, "one vector"),
                TokenEvent::Finished { reason, usage } => {
                    case.end = Some(reason);
                    assert_eq!(usage.completion_tokens as usize, case.tokens.len());
                    assert!(usage.cached_tokens < usage.prompt_tokens.max(1));
                }
                TokenEvent::Failed(error) => panic!("{error}"),
            }
        }
    }

    fn run_out(&mut self) {
        for _ in 0..100_000 {
            while self.group.num_in_flight() < self.steps_in_flight && self.plan() {}
            self.scheduler.check_invariants(&self.blocks);
            if self.group.num_in_flight() == 0 && !self.away.is_empty() {
                self.answer();
                continue;
            }
            if !self.commit() {
                let events = self.scheduler.take_events();
                self.read(events);
                return self.check_end();
            }
        }
        panic!("the sequences do not end");
    }

    fn check_end(&self) {
        assert!(self.scheduler.is_empty());
        for case in &self.cases {
            let is_pooled = case.request.sampling.pooling.is_some();
            let (tokens, reason) = match is_pooled {
                true => (vec![], FinishReason::Complete),
                false => oracle(&case.request, case.max_tokens),
            };
            let is_whole = is_pooled && !case.cancelled;
            assert_eq!(case.pooled, is_whole.then(|| pooled(&case.request.prompt)));
            if case.cancelled {
                assert_eq!(case.end, Some(FinishReason::Aborted));
                assert_eq!(case.tokens, tokens[..case.tokens.len()]);
            } else {
                assert_eq!(case.end, Some(reason));
                assert_eq!(case.tokens, tokens);
            }
        }
        self.blocks.check_invariants(&HashMap::<BlockId, u32>::new());
        assert_eq!(self.blocks.num_available(), self.limits.num_blocks, "every block is free in the end");
        assert_eq!(self.scheduler.counters().finished as usize, self.cases.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        // More where PROPTEST_CASES says so.
        cases: ProptestConfig::default().cases.max(400),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]
    #[test]
    fn text_equals_that_of_the_oracle(
        setting in setting(),
        operations in proptest::collection::vec(operation(), 1..250),
    ) {
        let mut harness = Harness::new(setting);
        for operation in &operations {
            harness.apply(operation);
        }
        harness.run_out();
    }
}

const ROOMY: Setting =
    Setting { num_blocks: 64, max_num_seqs: 4, max_num_batched_tokens: 32, steps_in_flight: 2, caching: true };

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
        for message in super::group::to_messages(&step.plan) {
            assert!(prost::Message::encoded_len(&message) <= phalanx_proto::PLAN_BYTES_MAX);
        }
        let rows = step.plan.rows.iter().filter(|row| row.samples);
        let rows = rows.map(|row| phalanx_proto::SampledRow { slot: row.slot, token: TokenId(1), logprobs: None });
        let output = phalanx_proto::StepOutput { elapsed_us: 1, rows: rows.collect(), ..Default::default() };
        scheduler.commit(step, output, &mut blocks);
    }
    assert!(scheduler.is_empty());
}

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
