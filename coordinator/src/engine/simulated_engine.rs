//! An engine in the hands of a simulation: the real scheduler, real blocks and a real handle; a simulated group, and no thread.
//!
//! **Invariant:** every token that is emitted is checked, and so is that each request has one end.

use std::num::NonZeroU32;
use std::sync::Arc;

use phalanx_proto::{SamplingParams, SeqId, TokenId};
use tokio::sync::mpsc;

use super::block_manager::BlockManager;
use super::handle::{Command, NextGroup, Shared};
use super::scheduler::{Scheduler, SeqEvent};
use super::sequence::Sequence;
use super::simulation::{SimulatedGroup, VOCAB_SIZE, next_token};
use super::{EngineError, EngineHandle, EngineLimits, EngineSnapshot, GenerateRequest, TokenEvent};

/// Steps that may be in flight.
const STEPS_IN_FLIGHT: usize = 2;

/// A request, and what came back for it.
struct Case {
    tokens: Vec<TokenId>,
    num_prompt: usize,
    max_tokens: usize,
    has_ended: bool,
}

pub(crate) struct SimulatedEngine {
    handle: EngineHandle,
    shared: Arc<Shared>,
    _inbox: mpsc::Receiver<Command>,
    next_groups: mpsc::Receiver<NextGroup>,
    limits: EngineLimits,
    scheduler: Scheduler,
    blocks: BlockManager,
    group: Option<SimulatedGroup>,
    epoch: u64,
    cases: Vec<Case>,
    has_ended: bool,
}

impl SimulatedEngine {
    /// An engine with its first group.
    pub(crate) fn new(epoch: u64, num_blocks: u32) -> Self {
        let limits = EngineLimits { num_blocks, max_num_seqs: 3, ..super::scheduler_tests::limits() };
        let shared = Shared::new(limits.clone(), EngineSnapshot::default());
        let (handle, inbox, next_groups) = EngineHandle::new(Arc::clone(&shared));
        Self {
            handle,
            shared,
            _inbox: inbox,
            next_groups,
            scheduler: Scheduler::new(limits.clone()),
            blocks: BlockManager::new(num_blocks, limits.block_size, true),
            group: Some(SimulatedGroup::new(num_blocks, limits.block_size)),
            limits,
            epoch,
            cases: Vec::new(),
            has_ended: false,
        }
    }

    pub(crate) fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }

    /// Whether this is the engine of a handle.
    pub(crate) fn is(&self, handle: &EngineHandle) -> bool {
        Arc::ptr_eq(&self.shared, &handle.shared)
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// Nothing runs, nothing waits, and no step is on its way: one may be, whose sequence ended in the step before it.
    pub(crate) fn is_idle(&self) -> bool {
        self.scheduler.is_empty() && self.group.as_ref().is_none_or(|group| group.num_in_flight() == 0)
    }

    /// Takes a request in.
    pub(crate) fn submit(&mut self, first: u32, num_prompt: u32, max_tokens: u32) {
        let prompt: Vec<TokenId> = (0..num_prompt).map(|at| TokenId((first + at * (first % 3)) % VOCAB_SIZE)).collect();
        let request = GenerateRequest {
            request_id: String::new(),
            prompt: prompt.clone(),
            sampling: SamplingParams::default(),
            max_tokens: NonZeroU32::new(max_tokens).expect("some"),
            stop_token_ids: Vec::new(),
            constraint: None,
            priority: 0,
            cache_salt: None,
        };
        let Ok(max_tokens) = self.limits.admit(&request) else { return };
        let id = SeqId(self.cases.len() as u64);
        self.scheduler.enqueue(Sequence::new(id, request, max_tokens));
        let (num_prompt, max_tokens) = (prompt.len(), max_tokens.get() as usize);
        self.cases.push(Case { tokens: prompt, num_prompt, max_tokens, has_ended: false });
    }

    /// The client of some request goes away.
    pub(crate) fn cancel(&mut self, pick: u64) {
        if !self.cases.is_empty() {
            self.scheduler.abort(SeqId(pick % self.cases.len() as u64), &mut self.blocks);
            self.read_events();
        }
    }

    /// One thing that a step loop does: another plan, or the oldest answer.
    pub(crate) fn step(&mut self, commits: bool) {
        let Some(group) = &mut self.group else { return };
        if commits {
            let Some((step, output)) = group.finish() else { return };
            let events = self.scheduler.commit(step, output, &mut self.blocks);
            self.read(events);
        } else if group.num_in_flight() < STEPS_IN_FLIGHT
            && let Some(step) = self.scheduler.plan(&mut self.blocks)
        {
            group.launch(step);
        }
        let counters = self.scheduler.counters();
        self.shared.snapshot.send_replace(EngineSnapshot { counters, ..EngineSnapshot::default() });
    }

    /// The group is gone with all that was in flight.
    pub(crate) fn break_group(&mut self) {
        let error = EngineError::GroupFailed { reason: "simulated".into() };
        if self.group.take().is_some() {
            self.scheduler.end_epoch(self.limits.recovery.replays_max, &error);
            self.blocks = BlockManager::new(0, self.limits.block_size, false);
            self.read_events();
        }
    }

    /// Another group takes over.
    pub(crate) fn adopt(&mut self, epoch: u64, num_blocks: u32) {
        assert!(self.group.is_none(), "a group takes over from one that is broken");
        assert!(epoch > self.epoch, "epoch {epoch} comes after {}", self.epoch);
        self.epoch = epoch;
        self.blocks = BlockManager::new(num_blocks, self.limits.block_size, true);
        self.scheduler.begin_epoch(num_blocks);
        self.group = Some(SimulatedGroup::new(num_blocks, self.limits.block_size));
        self.read_events();
    }

    /// Hears what the cluster has told the handle: whether there will be no other group.
    pub(crate) fn listen(&mut self) {
        if let Ok(NextGroup::None(error)) = self.next_groups.try_recv() {
            self.end(&error);
        }
    }

    /// Ends every request.
    pub(crate) fn end(&mut self, error: &EngineError) {
        self.group = None;
        self.has_ended = true;
        self.scheduler.fail_all(error, &mut self.blocks);
        self.read_events();
        self.check_end();
    }

    /// The same, as an engine that is stopped.
    pub(crate) fn stop(&mut self) {
        self.end(&EngineError::Stopping);
    }

    pub(crate) fn check(&self) {
        if self.group.is_some() {
            self.scheduler.check_invariants(&self.blocks);
        }
    }

    /// Nothing is left, and nothing has leaked.
    pub(crate) fn check_end(&self) {
        assert!(self.scheduler.is_empty());
        assert!(self.cases.iter().all(|case| case.has_ended), "every request ends");
        if self.group.is_some() {
            assert_eq!(self.blocks.num_available(), self.blocks.num_blocks(), "every block is free in the end");
        }
    }

    fn read_events(&mut self) {
        let events = self.scheduler.take_events();
        self.read(events);
    }

    fn read(&mut self, events: Vec<SeqEvent>) {
        for (id, event) in events {
            let case = &mut self.cases[id.0 as usize];
            assert!(!case.has_ended, "nothing comes after the last event");
            match event {
                TokenEvent::Token { index, token, .. } => {
                    assert_eq!(case.num_prompt + index as usize, case.tokens.len(), "each index once, in order");
                    assert_eq!(token, next_token(&case.tokens), "the text is that of a run without a fault");
                    case.tokens.push(token);
                }
                TokenEvent::Finished { .. } => {
                    assert!(case.tokens.len() <= case.num_prompt + case.max_tokens);
                    case.has_ended = true;
                }
                TokenEvent::Failed(_) => case.has_ended = true,
                TokenEvent::PromptLogprobs(_) | TokenEvent::Pooled(_) => panic!("nobody asked for them"),
            }
        }
    }
}
