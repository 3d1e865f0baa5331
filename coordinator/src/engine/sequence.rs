//! One sequence: its tokens, how far plans reach, where it stands.
//!
//! Knows no other sequence, no queue and no block but its own table.
//!
//! **Invariant:** only a running sequence owns a slot and KV blocks.
//! **Invariant:** `num_planned` never passes the known tokens plus those in flight.
//! **Invariant:** a constrained sequence has at most one token in flight, drawn by the mask of all tokens before it.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use phalanx_proto::{
    PlanRow, Pooling, PromptLogprobs, SamplingParams, SeqId, SeqSlot, StepId, TokenId, TokenLogprobs, TokenMask,
};

use super::block_manager::{BlockHash, BlockTable};
use super::constraint::{Constraint, ConstraintState, ConstraintWork, NextTokens};
use super::handle::Places;
use super::moving::Route;
use super::policy::Turn;
use super::request::{FinishReason, GenerateRequest, TokenEvent, Usage};

/// With so many broken epochs behind it a sequence runs alone for a while.
const BREAKS_UNTIL_ALONE: u32 = 2;
/// Tokens that it generates alone beyond those that it had: what broke its group twice has shown itself by then.
const TOKENS_ALONE: usize = 4;

/// Where a sequence stands. A finished one is no longer a `Sequence`.
#[derive(Debug)]
pub enum Phase {
    /// In the queue, new or preempted.
    Waiting,
    /// In the batch that the ranks hold.
    Running(Residence),
}

/// What a sequence owns while it is in the batch.
#[derive(Debug)]
pub struct Residence {
    /// Where the ranks keep it.
    pub slot: SeqSlot,
    /// Its KV blocks.
    pub blocks: BlockTable,
    /// Blocks of the table that plans have told the ranks.
    pub num_blocks_sent: usize,
    /// Tokens that were known when it entered: a row that reaches behind them is a decode row.
    pub num_entry_tokens: u32,
    /// Positions whose KV is computed by the plans so far.
    pub num_planned: u32,
    /// The last plan with a row of this sequence.
    pub last_planned: StepId,
    /// The last plan that samples a token of it.
    pub last_sampled: Option<StepId>,
}

/// A request in the engine.
#[derive(Debug)]
pub struct Sequence {
    /// Its name; grows with arrival.
    pub id: SeqId,
    /// When its turn comes.
    pub turn: Turn,
    /// How it is sampled.
    pub sampling: SamplingParams,
    /// Where it stands.
    pub phase: Phase,
    tokens: Vec<TokenId>,
    num_prompt_tokens: u32,
    num_tokens_max: u32,
    stop_token_ids: Vec<TokenId>,
    /// Sampled by plans in flight, not yet committed.
    num_in_flight: u32,
    /// Prompt tokens found in the cache at the first admission; none before it.
    num_cached_tokens: Option<u32>,
    /// Descriptions of the prompt from position 1 on, until they are emitted.
    prompt_logprobs: Option<Vec<TokenLogprobs>>,
    hashes: Vec<BlockHash>,
    /// Stands before the first of them.
    salt: Option<BlockHash>,
    constraint: Option<ConstraintState>,
    /// Epochs that ended while it was in the batch.
    num_breaks: u32,
    /// It has its steps for itself until it has so many tokens.
    alone_until: usize,
    /// True once it has been in the batch; the stream's side reads it.
    started: Arc<AtomicBool>,
    /// Its place in the engine, given back when it is gone; absent where nobody counts.
    places: Option<Arc<Places>>,
    /// Where its stream looks for it; absent where it has none.
    route: Option<Arc<Route>>,
}

impl Sequence {
    /// A waiting sequence. `max_tokens` was clamped to the context by [`super::EngineLimits::admit`].
    pub fn new(id: SeqId, request: GenerateRequest, max_tokens: NonZeroU32) -> Self {
        let num_prompt_tokens = request.prompt.len() as u32;
        Self {
            id,
            turn: Turn { priority: request.priority, arrival: id, id },
            prompt_logprobs: request.sampling.prompt_logprobs.map(|_| Vec::new()),
            sampling: request.sampling,
            phase: Phase::Waiting,
            tokens: request.prompt,
            num_prompt_tokens,
            num_tokens_max: num_prompt_tokens + max_tokens.get(),
            stop_token_ids: request.stop_token_ids,
            num_in_flight: 0,
            num_cached_tokens: None,
            hashes: Vec::new(),
            salt: request.cache_salt,
            constraint: request.constraint.map(ConstraintState::Ready),
            num_breaks: 0,
            alone_until: 0,
            started: Arc::default(),
            places: None,
            route: None,
        }
    }

    /// Keeps the places of its request.
    pub fn with_places(mut self, places: Arc<Places>) -> Self {
        self.places = Some(places);
        self
    }

    /// Takes the turn of the sequence that came first with its request, where that was another.
    pub fn with_arrival(mut self, arrival: Option<SeqId>) -> Self {
        self.turn.arrival = arrival.unwrap_or(self.id);
        self
    }

    /// Says where its stream looks for it.
    pub(super) fn with_route(mut self, route: Arc<Route>) -> Self {
        self.route = Some(route);
        self
    }

    /// Where its stream looks for it.
    pub(super) fn route(&self) -> Option<Arc<Route>> {
        self.route.clone()
    }

    /// True once it has been in the batch, for whoever waits for it.
    pub fn started(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.started)
    }

    /// Its epoch has ended: what it held and what was in flight is gone. Where it was in the batch, gives how many epochs have
    /// ended so far while a step of it was in flight.
    pub fn interrupt(&mut self, committed: StepId) -> Option<u32> {
        let was_in_flight = self.is_in_flight(committed);
        self.num_in_flight = 0;
        self.constraint = self.constraint.take().map(ConstraintState::interrupted);
        self.stop()?;
        if was_in_flight {
            self.num_breaks += 1;
            if self.num_breaks >= BREAKS_UNTIL_ALONE {
                self.alone_until = self.tokens.len() + TOKENS_ALONE;
            }
        }
        Some(self.num_breaks)
    }

    /// True where a plan behind the committed step has a row of it.
    pub fn is_in_flight(&self, committed: StepId) -> bool {
        matches!(&self.phase, Phase::Running(residence) if residence.last_planned > committed)
    }

    /// True while it must have its steps for itself.
    pub fn runs_alone(&self) -> bool {
        self.tokens.len() < self.alone_until
    }

    /// Ends it within a context of so many tokens.
    pub fn shorten(&mut self, context: u32) {
        self.num_tokens_max = self.num_tokens_max.min(context);
    }

    /// Prompt and committed tokens.
    pub fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// Length of the prompt.
    pub fn num_prompt_tokens(&self) -> u32 {
        self.num_prompt_tokens
    }

    /// Tokens sampled by plans in flight.
    pub fn num_in_flight(&self) -> u32 {
        self.num_in_flight
    }

    /// True before its first admission.
    pub fn is_new(&self) -> bool {
        self.num_cached_tokens.is_none()
    }

    /// True before the first admission of its request: a search brings the same prompt with each of its sequences.
    pub fn brings_prompt(&self) -> bool {
        self.is_new() && self.turn.arrival == self.id
    }

    /// True while descriptions of the prompt are owed.
    pub fn wants_prompt_logprobs(&self) -> bool {
        self.prompt_logprobs.is_some()
    }

    /// True where every position of the prompt must be computed: no prefix may be taken from the cache then.
    pub fn wants_whole_prompt(&self) -> bool {
        self.wants_prompt_logprobs() || self.sampling.pooling == Some(Pooling::Mean)
    }

    /// True where it gives a vector and no token.
    pub fn pools(&self) -> bool {
        self.sampling.pooling.is_some()
    }

    /// What it has cost so far.
    pub fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.num_prompt_tokens,
            completion_tokens: self.tokens.len() as u32 - self.num_prompt_tokens,
            cached_tokens: self.num_cached_tokens.unwrap_or(0),
        }
    }

    /// Hashes of the full blocks among the first `num_tokens` known tokens; what is missing is computed.
    pub fn hashes(&mut self, block_size: u32, num_tokens: u32) -> &[BlockHash] {
        let size = block_size as usize;
        let num_full = (num_tokens as usize).min(self.tokens.len()) / size;
        while self.hashes.len() < num_full {
            let start = self.hashes.len() * size;
            let previous = self.hashes.last().copied().or(self.salt);
            self.hashes.push(BlockHash::chain(previous, &self.tokens[start..start + size]));
        }
        &self.hashes[..num_full]
    }

    /// True where it is about to compute the block at `index` whose hash is `hash`, for others to share.
    pub fn computes(&mut self, index: usize, hash: BlockHash, block_size: u32) -> bool {
        let Phase::Running(r) = &self.phase else { return false };
        let (num_registered, num_tokens) = (r.blocks.num_registered(), r.num_entry_tokens);
        num_registered <= index && self.hashes(block_size, num_tokens).get(index) == Some(&hash)
    }

    /// Enters the batch. The first positions of the table that come from the cache are computed already.
    pub fn start(&mut self, slot: SeqSlot, blocks: BlockTable, block_size: u32) {
        self.started.store(true, Ordering::Release);
        let num_cached = blocks.num_cached() as u32 * block_size;
        self.num_cached_tokens.get_or_insert(num_cached.min(self.num_prompt_tokens));
        self.phase = Phase::Running(Residence {
            slot,
            num_blocks_sent: blocks.num_cached(),
            blocks,
            num_entry_tokens: self.tokens.len() as u32,
            num_planned: num_cached,
            last_planned: StepId(0),
            last_sampled: None,
        });
    }

    /// Leaves the batch; what it held comes back.
    pub fn stop(&mut self) -> Option<Residence> {
        match std::mem::replace(&mut self.phase, Phase::Waiting) {
            Phase::Waiting => None,
            Phase::Running(residence) => Some(residence),
        }
    }

    /// Tokens of its entry that no plan covers yet; 0 for a decoding sequence.
    pub fn num_prefill_left(&self) -> u32 {
        match &self.phase {
            Phase::Waiting => 0,
            Phase::Running(r) => r.num_entry_tokens.saturating_sub(r.num_planned),
        }
    }

    /// True where one more token can be planned: not beyond `max_tokens`, which is known ahead.
    pub fn can_decode(&self) -> bool {
        let num_tokens = self.tokens.len() as u32 + self.num_in_flight;
        self.num_prefill_left() == 0 && num_tokens < self.num_tokens_max && self.may_sample() && !self.pools()
    }

    /// False while its constraint has no mask for the next token.
    pub fn may_sample(&self) -> bool {
        matches!(self.constraint, None | Some(ConstraintState::Ready(_)))
    }

    /// The tokens among which the row that was just planned is to draw; none where it may draw any.
    pub fn take_mask(&mut self) -> Option<TokenMask> {
        let constraint = match self.constraint.take() {
            Some(ConstraintState::Ready(constraint)) => constraint,
            other => {
                self.constraint = other;
                return None;
            }
        };
        let words = match constraint.next() {
            NextTokens::Only(words) => Some(words.clone()),
            NextTokens::Any | NextTokens::Done => None,
        };
        self.constraint = Some(ConstraintState::InFlight(constraint));
        let Phase::Running(residence) = &self.phase else { return None };
        Some(TokenMask { slot: residence.slot, words: words? })
    }

    /// What its constraint has to do after a commit, away from this thread.
    pub(super) fn take_constraint_work(&mut self) -> Option<ConstraintWork> {
        match self.constraint.take() {
            Some(ConstraintState::InFlight(constraint)) => {
                self.constraint = Some(ConstraintState::Away);
                let token = *self.tokens.last()?;
                Some(ConstraintWork { id: self.id, constraint, token })
            }
            other => {
                self.constraint = other;
                None
            }
        }
    }

    /// Its constraint is back with the next mask.
    pub(super) fn resume(&mut self, constraint: Constraint) {
        self.constraint = Some(ConstraintState::Ready(constraint));
    }

    /// True where the next row needs a block more than the table has.
    pub fn needs_block(&self, block_size: u32) -> bool {
        match &self.phase {
            Phase::Waiting => false,
            Phase::Running(r) => r.num_planned >= r.blocks.blocks().len() as u32 * block_size,
        }
    }

    /// The next `num_tokens` positions as a row of `step`. The table covers them.
    pub fn plan_row(&mut self, step: StepId, num_tokens: u32, block_size: u32) -> Option<PlanRow> {
        let num_known = self.tokens.len() as u32 + self.num_in_flight;
        let Phase::Running(r) = &mut self.phase else { return None };
        let start = r.num_planned;
        r.num_planned += num_tokens;
        r.last_planned = step;
        let num_blocks = r.num_planned.div_ceil(block_size) as usize;
        let new_blocks = r.blocks.blocks().get(r.num_blocks_sent..num_blocks).unwrap_or_default().to_vec();
        r.num_blocks_sent = r.num_blocks_sent.max(num_blocks);
        let consumes = if start >= r.num_entry_tokens { r.last_sampled } else { None };
        let is_last = r.num_planned == num_known;
        let pools = is_last && self.sampling.pooling.is_some();
        let samples = is_last && !pools;
        if samples {
            r.last_sampled = Some(step);
            self.num_in_flight += 1;
        }
        Some(PlanRow { slot: r.slot, start, num_tokens, new_blocks, samples, consumes, pools })
    }

    /// A token in flight has arrived. Events are in order; the last one ends the sequence where it carries a reason.
    pub fn commit(
        &mut self,
        token: TokenId,
        logprobs: Option<TokenLogprobs>,
        mut emit: impl FnMut(TokenEvent),
    ) -> Option<FinishReason> {
        self.num_in_flight -= 1;
        if let Some(prompt_logprobs) = self.prompt_logprobs.take() {
            self.sampling.prompt_logprobs = None;
            emit(TokenEvent::PromptLogprobs(prompt_logprobs));
        }
        let index = self.tokens.len() as u32 - self.num_prompt_tokens;
        self.tokens.push(token);
        emit(TokenEvent::Token { index, token, logprobs });
        if self.stop_token_ids.contains(&token) {
            Some(FinishReason::Stop(token))
        } else if self.tokens.len() as u32 >= self.num_tokens_max {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    /// Descriptions of a chunk of the prompt have arrived. After a preemption the first ones come twice: they count once.
    pub fn commit_prompt_logprobs(&mut self, chunk: PromptLogprobs) {
        let Some(known) = &mut self.prompt_logprobs else { return };
        for (position, logprobs) in (chunk.start as usize..).zip(chunk.tokens) {
            if position == known.len() + 1 && position < self.num_prompt_tokens as usize {
                known.push(logprobs);
            }
        }
    }
}
