//! A simulated group for tests: ranks that keep what each slot of each KV block holds, and a model whose next token is a
//! hash of all tokens before it, so that any mistake in blocks, order or positions changes the text.
//!
//! **Invariant:** every read of KV is checked against what this sequence must have written there.

use std::collections::{HashMap, HashSet, VecDeque};

use phalanx_proto::{
    BlockId, Fnv, NewSequence, PLAN_BYTES_MAX, PlanRow, PooledRow, Pooling, PromptLogprobs, SampledRow, SeqSlot,
    StepId, StepOutput, TokenId, TokenLogprobs, TokenMask,
};

use super::group::to_messages;
use super::scheduler::PlannedStep;

/// Vocabulary of the simulated model.
pub(super) const VOCAB_SIZE: u32 = 40;

/// What the model says after `tokens`.
pub(super) fn next_token(tokens: &[TokenId]) -> TokenId {
    sample(tokens.iter().fold(0, |before, token| content(before, *token)))
}

/// What the model makes of a prompt that is pooled.
pub(super) fn pooled(tokens: &[TokenId]) -> Vec<f32> {
    vec![(tokens.iter().fold(0, |before, token| content(before, *token)) >> 40) as f32]
}

/// The first token from `token` on, around the vocabulary, that a mask allows.
pub(super) fn masked(token: TokenId, words: Option<&[u32]>) -> TokenId {
    let Some(words) = words else { return token };
    let mut candidates = (0..VOCAB_SIZE).map(|step| (token.0 + step) % VOCAB_SIZE);
    TokenId(candidates.find(|candidate| TokenMask::allows(words, *candidate)).expect("a mask allows a token"))
}

fn sample(content: u64) -> TokenId {
    TokenId(((content >> 8) % u64::from(VOCAB_SIZE)) as u32)
}

/// What the KV of `token` is made of: itself and all `before` it.
fn content(before: u64, token: TokenId) -> u64 {
    Fnv::new(before).add(u64::from(token.0)).finish()
}

pub(super) fn describe(tokens: &[TokenId], position: usize) -> TokenLogprobs {
    TokenLogprobs { token: tokens[position], logprob: -(position as f32), rank: 1, top: vec![] }
}

/// A sequence as a rank holds it.
struct Resident {
    tokens: Vec<TokenId>,
    /// What the KV of each token is made of.
    contents: Vec<u64>,
    num_prompt_tokens: u32,
    blocks: Vec<BlockId>,
    num_computed: u32,
    /// The steps that sampled, for each token behind the entry.
    sampled: Vec<StepId>,
    num_entry: u32,
    wants_prompt_logprobs: bool,
    pooling: Option<Pooling>,
}

impl Resident {
    fn push(&mut self, token: TokenId) {
        self.contents.push(content(self.contents.last().copied().unwrap_or(0), token));
        self.tokens.push(token);
    }
}

/// One rank: plans run strictly in order.
pub(super) struct SimulatedRank {
    block_size: usize,
    kv: Vec<Vec<u64>>,
    slots: HashMap<SeqSlot, Resident>,
    plan_hash: u64,
    pub(super) token_hash: u64,
    last_step: StepId,
}

impl SimulatedRank {
    pub(super) fn new(num_blocks: u32, block_size: u32) -> Self {
        Self {
            block_size: block_size as usize,
            kv: vec![vec![0; block_size as usize]; num_blocks as usize],
            slots: HashMap::new(),
            plan_hash: 0,
            token_hash: 0,
            last_step: StepId(0),
        }
    }

    pub(super) fn run(&mut self, plan: &phalanx_proto::StepPlan) -> StepOutput {
        assert_eq!(plan.step.0, self.last_step.0 + 1, "steps come in order");
        self.last_step = plan.step;
        self.plan_hash = plan.chain(self.plan_hash);
        for slot in &plan.released_slots {
            assert!(self.slots.remove(slot).is_some(), "slot {slot} was not in use");
        }
        for new in &plan.new_sequences {
            self.enter(new);
        }
        let mut output = StepOutput { epoch: plan.epoch, step: plan.step, elapsed_us: 500, ..StepOutput::default() };
        let mut seen = HashSet::new();
        for row in &plan.rows {
            assert!(seen.insert(row.slot), "one row a sequence");
            let mask = plan.masks.iter().find(|mask| mask.slot == row.slot);
            assert!(mask.is_none() || row.samples, "a mask belongs to a row that samples");
            self.run_row(row, mask.map(|mask| &*mask.words), plan.step, &mut output);
        }
        let sampled = output.rows.iter().map(|row| (row.slot, row.token));
        self.token_hash = StepOutput::chain(self.token_hash, plan.step, sampled);
        output.plan_hash = self.plan_hash;
        output.token_hash = self.token_hash;
        output
    }

    fn enter(&mut self, new: &NewSequence) {
        assert!(new.sampling.pooling != Some(Pooling::Mean) || new.blocks.is_empty(), "a mean is over all positions");
        let mut resident = Resident {
            tokens: vec![],
            contents: vec![],
            num_prompt_tokens: new.num_prompt_tokens,
            blocks: new.blocks.clone(),
            num_computed: (new.blocks.len() * self.block_size) as u32,
            sampled: vec![],
            num_entry: new.tokens.len() as u32,
            wants_prompt_logprobs: new.sampling.prompt_logprobs.is_some(),
            pooling: new.sampling.pooling,
        };
        for token in &new.tokens {
            resident.push(*token);
        }
        assert!(self.slots.insert(new.slot, resident).is_none(), "slot {} is in use", new.slot);
    }

    fn run_row(&mut self, row: &PlanRow, mask: Option<&[u32]>, step: StepId, output: &mut StepOutput) {
        let resident = self.slots.get_mut(&row.slot).expect("the row's sequence is in the batch");
        resident.blocks.extend(&row.new_blocks);
        assert_eq!(row.start, resident.num_computed, "rows follow each other");
        let end = (row.start + row.num_tokens) as usize;
        assert!(end <= resident.tokens.len(), "only known tokens are computed");
        assert!(end <= resident.blocks.len() * self.block_size, "the table covers the row");
        let from_batch = (row.start as usize).checked_sub(resident.num_entry as usize);
        assert_eq!(row.consumes, from_batch.map(|index| resident.sampled[index]), "the step whose token is consumed");
        for position in row.start as usize..end {
            let block = resident.blocks[position / self.block_size].0 as usize;
            self.kv[block][position % self.block_size] = resident.contents[position];
        }
        for position in 0..end {
            let block = resident.blocks[position / self.block_size];
            let held = self.kv[block.0 as usize][position % self.block_size];
            assert_eq!(held, resident.contents[position], "block {block} at position {position}, {step}");
        }
        resident.num_computed = end as u32;
        let num_prompt = resident.num_prompt_tokens as usize;
        if resident.wants_prompt_logprobs {
            let first = row.start as usize + 1;
            let described = (first..(end + 1).min(num_prompt)).map(|at| describe(&resident.tokens, at)).collect();
            output.prompt_logprobs.push(PromptLogprobs { slot: row.slot, start: first as u32, tokens: described });
        }
        let pools = resident.pooling.is_some();
        assert_eq!(
            row.samples || row.pools,
            end == resident.tokens.len(),
            "a row gives something behind the last token"
        );
        assert!(if pools { !row.samples } else { !row.pools });
        if row.pools {
            output.pooled.push(PooledRow { slot: row.slot, values: pooled(&resident.tokens) });
        }
        if row.samples {
            let token = masked(sample(resident.contents[end - 1]), mask);
            resident.push(token);
            resident.sampled.push(step);
            output.rows.push(SampledRow { slot: row.slot, token, logprobs: None });
        }
    }
}

/// A group of one simulated rank that answers as late as the test likes.
pub(super) struct SimulatedGroup {
    rank: SimulatedRank,
    in_flight: VecDeque<(PlannedStep, StepOutput)>,
    /// The table of each slot as plans have told it.
    tables: HashMap<SeqSlot, Vec<BlockId>>,
    /// Blocks that the rows of each plan in flight name.
    named: VecDeque<HashSet<BlockId>>,
}

impl SimulatedGroup {
    pub(super) fn new(num_blocks: u32, block_size: u32) -> Self {
        Self {
            rank: SimulatedRank::new(num_blocks, block_size),
            in_flight: VecDeque::new(),
            tables: HashMap::new(),
            named: VecDeque::new(),
        }
    }

    pub(super) fn num_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    pub(super) fn launch(&mut self, step: PlannedStep) {
        self.check_quarantine(&step);
        for message in to_messages(&step.plan) {
            assert!(prost::Message::encoded_len(&message) <= PLAN_BYTES_MAX);
        }
        let output = self.rank.run(&step.plan);
        self.in_flight.push_back((step, output));
    }

    pub(super) fn finish(&mut self) -> Option<(PlannedStep, StepOutput)> {
        self.named.pop_front();
        self.in_flight.pop_front()
    }

    /// No block that is handed out is named by a plan in flight.
    fn check_quarantine(&mut self, step: &PlannedStep) {
        let plan = &step.plan;
        for row in &plan.rows {
            for block in &row.new_blocks {
                for named in &self.named {
                    assert!(!named.contains(block), "block {block} is handed out while a plan in flight names it");
                }
            }
        }
        for slot in &plan.released_slots {
            self.tables.remove(slot);
        }
        for new in &plan.new_sequences {
            self.tables.insert(new.slot, new.blocks.clone());
        }
        let mut named = HashSet::new();
        for row in &plan.rows {
            let table = self.tables.get_mut(&row.slot).expect("known slot");
            table.extend(&row.new_blocks);
            named.extend(table.iter().copied());
        }
        self.named.push_back(named);
    }
}
