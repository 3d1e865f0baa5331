//! A group of ranks in this process, driven as a head drives it: through device threads, with plans ahead of their results.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use phalanx_proto::{
    BlockId, Epoch, HeadMessage, Incarnation, LoadModel, NewSequence, NodeId, PlanRow, Rank, RankEvent, RankFailure,
    SamplerVariant, SamplingParams, SeqId, SeqSlot, StepId, StepOutput, StepPlan, Term, TokenId, TokenLogprobs,
};
use phalanx_worker::backend::DeviceKind;
use phalanx_worker::device_thread::{DeviceHandle, RankSetup, spawn};

/// Longest wait for a rank.
const DEADLINE: Duration = Duration::from_secs(120);
/// Steps that are sent ahead of their results.
const STEPS_IN_FLIGHT: usize = 2;

/// The folder with the reference data.
pub fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens")
}

/// What to load, in float32.
pub fn load(model: &Path, world_size: u32) -> LoadModel {
    let process = u64::from(std::process::id());
    let unique = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_nanos();
    LoadModel {
        term: Term(1),
        epoch: Epoch(1),
        model_path: model.to_string_lossy().into_owned(),
        load_format: "auto".into(),
        dtype: "float32".into(),
        kv_cache_dtype: "auto".into(),
        world_size,
        block_size: 16,
        max_model_len: 512,
        max_num_seqs: 16,
        max_num_batched_tokens: 128,
        memory_utilization: 0.5,
        num_blocks_override: Some(256),
        seed: 0,
        group_key: format!("{process:016x}{unique:032x}").into_bytes(),
        rank_nodes: vec![NodeId("here".into()); world_size as usize],
        steps_in_flight_max: STEPS_IN_FLIGHT as u32,
        enforce_eager: false,
        disable_custom_all_reduce: false,
        collective_interface: String::new(),
        collective_ports: (0, 0),
    }
}

/// Ranks that are ready.
pub struct Group {
    ranks: Vec<DeviceHandle>,
    load: LoadModel,
    step: StepId,
    plan_hash: u64,
    committed: (StepId, u64),
    in_flight: VecDeque<StepId>,
}

impl Group {
    /// Starts all ranks as a head does.
    pub fn start(load: LoadModel, device: DeviceKind, num_threads: usize) -> Self {
        let setup = |rank| RankSetup {
            rank: Rank(rank),
            incarnation: Incarnation(1),
            node_id: NodeId("here".into()),
            device,
            num_threads,
            head_grace: std::time::Duration::ZERO,
        };
        let mut ranks: Vec<DeviceHandle> =
            (0..load.world_size).map(|rank| spawn(setup(rank)).expect("a thread")).collect();
        tell(&ranks, &HeadMessage::Load(load.clone()));
        let addresses: Vec<String> = (ranks.iter_mut())
            .map(|rank| match next_milestone(rank) {
                Ok(RankEvent::Listening(address)) => address,
                other => panic!("{other:?}"),
            })
            .collect();
        tell(&ranks, &HeadMessage::Connect(addresses));
        let capacity = |rank| match next_milestone(rank) {
            Ok(RankEvent::Capacity(capacity)) => capacity.num_blocks as u32,
            other => panic!("{other:?}"),
        };
        let num_blocks = ranks.iter_mut().map(capacity).min().expect("at least one rank");
        tell(&ranks, &HeadMessage::InitKvCache { num_blocks });
        for rank in &mut ranks {
            assert_eq!(next_milestone(rank), Ok(RankEvent::Ready { num_blocks }));
        }
        let load = LoadModel { num_blocks_override: Some(num_blocks), ..load };
        Self { ranks, load, step: StepId(0), plan_hash: 0, committed: (StepId(0), 0), in_flight: VecDeque::new() }
    }

    /// Sends a plan to all ranks; its lives, number and hashes are filled in here.
    pub fn send(&mut self, mut plan: StepPlan) {
        self.step = StepId(self.step.0 + 1);
        (plan.term, plan.incarnation, plan.epoch, plan.step) =
            (self.load.term, Incarnation(1), self.load.epoch, self.step);
        (plan.committed_step, plan.token_hash) = self.committed;
        self.plan_hash = plan.chain(self.plan_hash);
        plan.plan_hash = self.plan_hash;
        self.in_flight.push_back(self.step);
        tell(&self.ranks, &HeadMessage::Plan(plan));
    }

    /// Waits for the oldest step: all ranks agree, only rank 0 has tokens.
    pub fn finish(&mut self) -> Result<StepOutput, RankFailure> {
        let step = self.in_flight.pop_front().expect("a step in flight");
        let mut outputs = Vec::new();
        for rank in &mut self.ranks {
            match next_milestone(rank)? {
                RankEvent::Output(output) => outputs.push(output),
                other => panic!("{other:?}"),
            }
        }
        let first = outputs.swap_remove(0);
        let tokens = first.rows.iter().map(|row| (row.slot, row.token));
        assert_eq!(first.token_hash, StepOutput::chain(self.committed.1, step, tokens), "tokens are chained");
        for output in &outputs {
            assert_eq!((output.step, output.plan_hash), (step, first.plan_hash));
            assert_eq!(output.token_hash, first.token_hash, "all ranks sample the same tokens");
            assert!(output.rows.is_empty() && output.prompt_logprobs.is_empty());
        }
        self.committed = (step, first.token_hash);
        Ok(first)
    }

    /// Runs sequences to their end: all together, prompts in chunks of random sizes, decodes planned ahead.
    pub fn generate(&mut self, requests: &[Request], seed: u64) -> Vec<Generated> {
        let mut batch = TestBatch::new(requests, &self.load, seed);
        let mut results = vec![Generated::default(); requests.len()];
        let mut open = 0;
        loop {
            let plan = if open < STEPS_IN_FLIGHT { batch.plan(StepId(self.step.0 + 1)) } else { None };
            if let Some(plan) = plan {
                self.send(plan);
                open += 1;
            } else if open > 0 {
                let output = self.finish().unwrap_or_else(|failure| panic!("{failure:?}"));
                open -= 1;
                batch.collect(output, &mut results);
            } else {
                self.send(batch.release());
                self.finish().unwrap_or_else(|failure| panic!("{failure:?}"));
                return results;
            }
        }
    }
}

/// Tells all ranks the same.
fn tell(ranks: &[DeviceHandle], message: &HeadMessage) {
    for rank in ranks {
        rank.commands.try_send(message.clone()).expect("room for a command");
    }
}

/// The next event that is no progress.
pub fn next_milestone(rank: &mut DeviceHandle) -> Result<RankEvent, RankFailure> {
    let started = Instant::now();
    loop {
        match rank.events.try_recv() {
            Ok(RankEvent::Progress { .. }) => {}
            Ok(RankEvent::Failure(failure)) => return Err(failure),
            Ok(event) => return Ok(event),
            Err(error) => {
                assert!(started.elapsed() < DEADLINE, "no event from a rank: {error}");
                std::thread::sleep(Duration::from_micros(20));
            }
        }
    }
}

/// A sequence to run.
#[derive(Clone)]
pub struct Request {
    pub prompt: Vec<TokenId>,
    pub num_new: usize,
    pub sampling: SamplingParams,
    /// The first so many prompt tokens come from the blocks of another request, which runs first.
    pub shares: Option<(usize, usize)>,
    /// So many tokens at the end of `prompt` are output that is known already, as after a preemption.
    pub num_output: usize,
}

/// What came of it.
#[derive(Clone, Default)]
pub struct Generated {
    pub tokens: Vec<TokenId>,
    pub logprobs: Vec<TokenLogprobs>,
    /// By position; `None` where the plan did not compute it.
    pub prompt_logprobs: Vec<Option<TokenLogprobs>>,
}

/// The planning half of a head, without policy: no token is ever looked at.
struct TestBatch<'a> {
    requests: &'a [Request],
    states: Vec<State>,
    free_blocks: Vec<u32>,
    block_size: usize,
    tokens_max: usize,
    random: Random,
}

#[derive(Default)]
struct State {
    entered: bool,
    released: bool,
    num_computed: usize,
    num_sampled: usize,
    sampled_in: Option<StepId>,
    blocks: Vec<u32>,
}

impl<'a> TestBatch<'a> {
    fn new(requests: &'a [Request], load: &LoadModel, seed: u64) -> Self {
        let mut random = Random(seed);
        let mut free_blocks: Vec<u32> = (0..load.num_blocks_override.expect("a number of blocks")).collect();
        for index in (1..free_blocks.len()).rev() {
            free_blocks.swap(index, random.below(index + 1));
        }
        Self {
            requests,
            states: requests.iter().map(|_| State::default()).collect(),
            free_blocks,
            block_size: load.block_size as usize,
            tokens_max: load.max_num_batched_tokens as usize,
            random,
        }
    }

    /// The next step, or `None` where all tokens are sampled or on their way.
    fn plan(&mut self, step: StepId) -> Option<StepPlan> {
        if self.states.iter().zip(self.requests).all(|(state, request)| state.num_sampled == request.num_new) {
            return None;
        }
        let mut plan = StepPlan::default();
        let mut budget = self.tokens_max;
        for index in 0..self.requests.len() {
            let request = &self.requests[index];
            let (state, ready) = (&self.states[index], self.shared_is_ready(index));
            if state.num_sampled == request.num_new && state.entered && !state.released {
                plan.released_slots.push(slot(index));
                self.states[index].released = true;
            }
            if self.states[index].num_sampled < request.num_new && ready && budget > 0 {
                if !self.states[index].entered {
                    plan.new_sequences.push(self.enter(index));
                }
                let row = self.row(index, budget, step);
                budget -= row.num_tokens as usize;
                let variant = request.sampling.variant();
                if row.samples && variant as u32 > plan.sampler as u32 {
                    plan.sampler = variant;
                }
                plan.rows.push(row);
            }
        }
        Some(plan)
    }

    /// Releases what is left.
    fn release(&mut self) -> StepPlan {
        let left = (0..self.states.len()).filter(|&index| !self.states[index].released).map(slot);
        StepPlan { released_slots: left.collect(), ..StepPlan::default() }
    }

    fn shared_is_ready(&self, index: usize) -> bool {
        let shared = self.requests[index].shares;
        shared.is_none_or(|(other, num_tokens)| self.states[other].num_computed >= num_tokens)
    }

    fn enter(&mut self, index: usize) -> NewSequence {
        let request = &self.requests[index];
        if let Some((other, num_tokens)) = request.shares {
            self.states[index].blocks = self.states[other].blocks[..num_tokens / self.block_size].to_vec();
            self.states[index].num_computed = num_tokens;
        }
        self.states[index].entered = true;
        NewSequence {
            slot: slot(index),
            seq_id: SeqId(index as u64),
            tokens: request.prompt.clone(),
            num_prompt_tokens: (request.prompt.len() - request.num_output) as u32,
            blocks: self.states[index].blocks.iter().copied().map(BlockId).collect(),
            sampling: request.sampling.clone(),
        }
    }

    fn row(&mut self, index: usize, budget: usize, step: StepId) -> PlanRow {
        let (prompt_len, state) = (self.requests[index].prompt.len(), &mut self.states[index]);
        let start = state.num_computed;
        let known = prompt_len + state.num_sampled;
        let most = (known - start).min(budget);
        let num_tokens = if start < prompt_len { 1 + self.random.below(most) } else { 1 };
        let consumes = if start >= prompt_len { state.sampled_in } else { None };
        state.num_computed += num_tokens;
        let samples = state.num_computed == known;
        let mut new_blocks = Vec::new();
        while state.blocks.len() * self.block_size < state.num_computed {
            let block = self.free_blocks.pop().expect("a free block");
            state.blocks.push(block);
            new_blocks.push(BlockId(block));
        }
        if samples {
            state.num_sampled += 1;
            state.sampled_in = Some(step);
        }
        let (start, num_tokens) = (start as u32, num_tokens as u32);
        PlanRow { slot: slot(index), start, num_tokens, new_blocks, samples, consumes, pools: false }
    }

    fn collect(&self, output: StepOutput, results: &mut [Generated]) {
        for row in output.rows {
            let result = &mut results[row.slot.0 as usize - FIRST_SLOT as usize];
            result.tokens.push(row.token);
            result.logprobs.extend(row.logprobs);
        }
        for chunk in output.prompt_logprobs {
            let index = chunk.slot.0 as usize - FIRST_SLOT as usize;
            let result = &mut results[index].prompt_logprobs;
            result.resize(self.requests[index].prompt.len(), None);
            for (position, token) in (chunk.start as usize..).zip(chunk.tokens) {
                assert!(result[position].replace(token).is_none(), "position {position} comes once");
            }
        }
    }
}

const FIRST_SLOT: u32 = 5;

fn slot(index: usize) -> SeqSlot {
    SeqSlot(FIRST_SLOT + index as u32)
}

/// SplitMix64: enough for chunk sizes.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// Whether a sampler variant is what a request needs.
pub fn greedy() -> SamplingParams {
    let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    assert_eq!(params.variant(), SamplerVariant::Greedy);
    params
}
