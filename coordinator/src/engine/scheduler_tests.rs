//! Random operations on scheduler and block manager against a simulated group and a sequential oracle.

mod epochs;
mod planning;

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
        block_size: 4,
        max_model_len: 200,
        max_num_seqs: 4,
        max_num_batched_tokens: 32,
        max_queue: 1000,
        vocab_size: VOCAB_SIZE,
        ..EngineLimits::for_tests()
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
