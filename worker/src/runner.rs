//! One step on this rank.
//!
//! Owns the backend, the model, the KV cache and the batch. Knows no stream and no start-up: it is given a loaded model and
//! answers plans. Generic over the backend, so that nothing here asks which device it is.
//!
//! A step is launched, and finished when the device has done it; the next one may be launched in between, since what it
//! consumes of the one before stays on the device.
//!
//! **Invariant:** all ranks execute the same plans with the same collectives in the same order, and sample the same tokens.

use std::collections::VecDeque;
use std::time::Instant;

use phalanx_kernels::{
    InputLimits, KernelError, Ops, SamplerKind, Scored, StepInputs, StepPart, StepResult, VocabSlice, WarmUpStep,
};
use phalanx_proto::{
    Epoch, Phase, PooledRow, PromptLogprobs, Rank, SampledRow, SamplerVariant, SeqSlot, StepId, StepOutput, StepPlan,
    TokenId,
};

use crate::decoder::Decoder;
use crate::epoch::EpochRecord;
use crate::error::WorkerError;
use crate::inputs::{Batch, StepWork};
use crate::kv_cache::KvCache;
use crate::pooling::Pools;
use crate::scoring::{NamedTokens, PromptChunk, Wanted, token_logprobs, write_pass};
use crate::warm_up;

/// Executes plans.
pub struct Runner<B: Ops> {
    rank: Rank,
    ops: B,
    model: Decoder<B>,
    kv: KvCache<B>,
    inputs: B::Inputs,
    limits: InputLimits,
    vocab: VocabSlice,
    batch: Batch,
    work: StepWork,
    record: EpochRecord,
    in_flight: VecDeque<Launched>,
    /// Results of the oldest of them that had to be taken early.
    taken: VecDeque<StepResult>,
    pools: Pools,
    last_finish: Instant,
}

/// Scores of tokens that requests name, each with the sampled row that they stand beside.
type NamedScores = Vec<(u32, Vec<(TokenId, f32)>)>;

/// A step that the device works on.
struct Launched {
    epoch: Epoch,
    step: StepId,
    plan_hash: u64,
    started: Instant,
    /// The rows that sample.
    slots: Vec<SeqSlot>,
    /// Which of them are scored.
    scored: Vec<u32>,
    prompt_logprobs: Vec<PromptLogprobs>,
    /// Of this step.
    named: NamedScores,
    pooled: Vec<PooledRow>,
}

/// What a runner is made of.
pub struct RunnerParts<B: Ops> {
    /// Place in the group.
    pub rank: Rank,
    /// The backend.
    pub ops: B,
    /// The model's shard.
    pub model: Decoder<B>,
    /// Its cache.
    pub kv: KvCache<B>,
    /// The step's inputs.
    pub inputs: B::Inputs,
    /// Largest step.
    pub limits: InputLimits,
    /// An empty batch.
    pub batch: Batch,
    /// This rank's part of the vocabulary.
    pub vocab: VocabSlice,
    /// The beginning of an epoch.
    pub record: EpochRecord,
}

impl<B: Ops> Runner<B> {
    /// Joins the parts.
    pub fn new(parts: RunnerParts<B>) -> Self {
        let RunnerParts { rank, ops, model, kv, inputs, limits, batch, vocab, record } = parts;
        Self {
            rank,
            ops,
            model,
            kv,
            inputs,
            limits,
            vocab,
            batch,
            work: StepWork::default(),
            record,
            in_flight: VecDeque::new(),
            taken: VecDeque::new(),
            pools: Pools::default(),
            last_finish: Instant::now(),
        }
    }

    /// Waits for what is in flight, forgets all sequences and begins an epoch.
    ///
    /// # Errors
    /// The device does not come to rest.
    pub fn begin(&mut self, record: EpochRecord) -> Result<(), WorkerError> {
        while self.in_flight.pop_front().is_some() {
            self.take()?;
        }
        self.batch.clear();
        self.pools = Pools::default();
        self.record = record;
        Ok(())
    }

    /// The phase of [`Self::warm_up`]: where steps are recorded, most of its time goes into that.
    pub fn warm_up_phase(&self) -> Phase {
        if self.ops.records_steps() { Phase::Graphs } else { Phase::WarmUp }
    }

    /// Runs what the backend wants to have run before the first plan. Collective. `progress` hears fractions from 0 to 1.
    ///
    /// # Errors
    /// A device fault or a broken group.
    pub fn warm_up(&mut self, mut progress: impl FnMut(f32)) -> Result<(), WorkerError> {
        let steps: Vec<WarmUpStep> = self.ops.warm_up_steps(&self.limits);
        for (index, step) in steps.iter().enumerate() {
            warm_up::write(step, &self.limits, &mut self.work.inputs);
            self.forward()?;
            self.sample(step.sampler)?;
            self.ops.submit(&self.inputs)?;
            self.ops.take()?;
            progress((index + 1) as f32 / steps.len() as f32);
        }
        Ok(())
    }

    /// Whether a plan follows commits that this rank has not finished yet: finish first.
    pub fn lags(&self, plan: &StepPlan) -> bool {
        self.in_flight.front().is_some_and(|oldest| oldest.step <= plan.committed_step)
    }

    /// Steps that were launched and not finished.
    pub fn num_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Starts one plan: checks it, sets the model to work on its rows, samples, scores. Collective.
    ///
    /// # Errors
    /// Head and rank have parted, the device failed or the group is broken; in each case the rank is done.
    pub fn launch(&mut self, plan: &StepPlan) -> Result<(), WorkerError> {
        let started = Instant::now();
        let parted = |reason| WorkerError::Divergence { step: plan.step, reason };
        self.record.admit(plan).map_err(parted)?;
        self.batch.apply(plan, &mut self.work).map_err(parted)?;
        let mut launched = Launched::new(plan, started, self.record.plan_hash(), &self.work.inputs);
        self.forward()?;
        self.sample(kind(plan.sampler))?;
        self.ops.submit(&self.inputs)?;
        if self.rank == Rank(0) {
            launched.pooled = self.pool()?;
        }
        if !self.work.prompts.is_empty() || !self.work.named.is_empty() {
            (launched.prompt_logprobs, launched.named) = self.score_known()?;
        }
        self.in_flight.push_back(launched);
        Ok(())
    }

    /// Whether [`Self::finish`] would not wait.
    ///
    /// # Errors
    /// A device fault.
    pub fn is_done(&mut self) -> Result<bool, WorkerError> {
        Ok(!self.taken.is_empty() || self.ops.is_done()?)
    }

    /// Waits for the oldest step and answers its plan.
    ///
    /// # Errors
    /// A device fault, a broken group, or a row without any finite logit.
    pub fn finish(&mut self) -> Result<StepOutput, WorkerError> {
        let Some(launched) = self.in_flight.pop_front() else { return Ok(StepOutput::default()) };
        let result = self.take()?;
        let tokens = launched.tokens(&result)?;
        self.batch.commit(launched.step, &tokens);
        self.record.commit(launched.step, &tokens);
        let started = launched.started.max(self.last_finish);
        self.last_finish = Instant::now();
        let elapsed_us = self.last_finish.duration_since(started).as_micros() as u64;
        let token_hash = self.record.token_hash();
        Ok(launched.output(self.rank, elapsed_us, token_hash, &tokens, result.scores))
    }

    fn take(&mut self) -> Result<StepResult, KernelError> {
        self.taken.pop_front().map_or_else(|| self.ops.take(), Ok)
    }

    fn forward(&mut self) -> Result<(), WorkerError> {
        let Self { ops, model, kv, inputs, work, .. } = self;
        ops.load_inputs(&work.inputs, inputs)?;
        if work.inputs.seqs.is_empty() {
            return Ok(());
        }
        Ok(ops.run(inputs, StepPart::Forward, &mut |ops| model.forward(ops, inputs, kv.layers_mut()))?)
    }

    fn sample(&mut self, kind: SamplerKind) -> Result<(), WorkerError> {
        let Self { ops, model, inputs, work, vocab, .. } = self;
        if work.inputs.samples.is_empty() {
            return Ok(());
        }
        ops.run(inputs, StepPart::Sample(kind), &mut |ops| {
            model.project(ops, inputs)?;
            ops.sample(inputs, model.logits(), vocab, kind)
        })?;
        if work.inputs.scores.is_empty() {
            return Ok(());
        }
        let is_edited = !work.inputs.masks.is_empty() || !work.inputs.edits.is_empty();
        if is_edited && !ops.sampler_features().keeps_logits {
            ops.run(inputs, StepPart::Score, &mut |ops| model.project(ops, inputs))?;
        }
        Ok(ops.score(inputs, model.logits(), vocab)?)
    }

    /// Takes in the hidden states of the step's rows that are pooled, and gives the vectors that are whole now.
    ///
    /// Waits for the device where there are such rows, as the next step writes over them. All ranks hold the same ones: one reads.
    fn pool(&mut self) -> Result<Vec<PooledRow>, WorkerError> {
        let Self { ops, model, work, pools, .. } = self;
        let mut pooled = Vec::new();
        for chunk in &work.pools {
            pooled.extend(pools.add(chunk, ops.read_rows(model.hidden(), chunk.rows.clone())?));
        }
        Ok(pooled)
    }

    /// Log-probabilities of the prompt tokens that the step's chunks predict and of the tokens that requests name, in passes of as
    /// many rows as logits have room.
    ///
    /// Waits for the device, as the hidden states are those of this step: requests that want this are rare.
    fn score_known(&mut self) -> Result<(Vec<PromptLogprobs>, NamedScores), WorkerError> {
        let prompts = self.work.prompts.iter().flat_map(PromptChunk::wanted);
        let wanted: Vec<Wanted> = prompts.chain(self.work.named.iter().flat_map(NamedTokens::wanted)).collect();
        let mut scored: Vec<Scored> = Vec::with_capacity(wanted.len());
        let Self { ops, model, inputs, work, vocab, limits, in_flight, taken, .. } = self;
        while taken.len() <= in_flight.len() {
            taken.push_back(ops.take()?);
        }
        for pass in wanted.chunks(limits.logit_rows_max.max(1)) {
            write_pass(pass, &mut work.inputs);
            ops.load_inputs(&work.inputs, inputs)?;
            ops.run(inputs, StepPart::Score, &mut |ops| model.project(ops, inputs))?;
            ops.score(inputs, model.logits(), vocab)?;
            ops.submit(inputs)?;
            scored.extend(ops.take()?.scores);
        }
        let mut scored = scored.into_iter();
        let prompts = self.work.prompts.iter().map(|chunk| chunk.take(&mut scored)).collect();
        Ok((prompts, self.work.named.iter().map(|named| named.take(&mut scored)).collect()))
    }
}

impl Launched {
    fn new(plan: &StepPlan, started: Instant, plan_hash: u64, inputs: &StepInputs) -> Self {
        Self {
            epoch: plan.epoch,
            step: plan.step,
            plan_hash,
            started,
            slots: inputs.samples.iter().map(|sample| SeqSlot(sample.slot)).collect(),
            scored: inputs.scores.iter().map(|score| score.row).collect(),
            prompt_logprobs: Vec::new(),
            named: Vec::new(),
            pooled: Vec::new(),
        }
    }

    /// What was sampled, in plan order.
    fn tokens(&self, result: &StepResult) -> Result<Vec<(SeqSlot, TokenId)>, WorkerError> {
        let found = |(slot, token): (&SeqSlot, &Option<u32>)| match token {
            Some(token) => Ok((*slot, TokenId(*token))),
            None => Err(WorkerError::NoToken { step: self.step, slot: *slot }),
        };
        self.slots.iter().zip(&result.tokens).map(found).collect()
    }

    /// The answer to the plan; tokens and log-probabilities from rank 0 only.
    fn output(
        self,
        rank: Rank,
        elapsed_us: u64,
        token_hash: u64,
        tokens: &[(SeqSlot, TokenId)],
        scores: Vec<Scored>,
    ) -> StepOutput {
        let Self { epoch, step, plan_hash, scored, prompt_logprobs, named, pooled, .. } = self;
        let mut output = StepOutput { epoch, step, elapsed_us, plan_hash, token_hash, ..StepOutput::default() };
        if rank != Rank(0) {
            return output;
        }
        output.rows.extend(tokens.iter().map(|(slot, token)| SampledRow {
            slot: *slot,
            token: *token,
            logprobs: None,
        }));
        for (row, score) in scored.into_iter().zip(scores) {
            if let Some(sampled) = output.rows.get_mut(row as usize) {
                sampled.logprobs = Some(token_logprobs(score));
            }
        }
        for (row, scores) in named {
            if let Some(logprobs) = output.rows.get_mut(row as usize).and_then(|sampled| sampled.logprobs.as_mut()) {
                logprobs.top.extend(scores);
            }
        }
        output.prompt_logprobs = prompt_logprobs;
        output.pooled = pooled;
        output
    }
}

fn kind(variant: SamplerVariant) -> SamplerKind {
    match variant {
        SamplerVariant::Greedy => SamplerKind::Greedy,
        SamplerVariant::NoCut => SamplerKind::NoCut,
        SamplerVariant::Cut => SamplerKind::Cut,
    }
}
