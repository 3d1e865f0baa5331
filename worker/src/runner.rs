//! One step on this rank.
//!
//! Owns the backend, the model, the KV cache and the batch. Knows no stream and no start-up: it is given a loaded model and
//! answers plans. Generic over the backend, so that nothing here asks which device it is.
//!
//! **Invariant:** all ranks execute the same plans with the same collectives in the same order, and sample the same tokens.

use std::time::{Duration, Instant};

use phalanx_kernels::{InputLimits, Ops};
use phalanx_proto::{PromptLogprobs, Rank, SampledRow, SeqSlot, StepOutput, StepPlan, TokenId, TokenLogprobs};

use crate::epoch::EpochRecord;
use crate::error::WorkerError;
use crate::inputs::{Batch, PromptChunk, StepWork};
use crate::kv_cache::KvCache;
use crate::layers::{SampleRow, Sampler, ScoreRow};
use crate::models::Model;

/// Executes plans.
pub struct Runner<B: Ops> {
    rank: Rank,
    ops: B,
    model: Box<dyn Model<B>>,
    kv: KvCache<B>,
    inputs: B::Inputs,
    logit_rows_max: usize,
    batch: Batch,
    work: StepWork,
    sampler: Sampler,
    record: EpochRecord,
}

/// What a runner is made of.
pub struct RunnerParts<B: Ops> {
    /// Place in the group.
    pub rank: Rank,
    /// The backend.
    pub ops: B,
    /// The model's shard.
    pub model: Box<dyn Model<B>>,
    /// Its cache.
    pub kv: KvCache<B>,
    /// Largest step.
    pub limits: InputLimits,
    /// An empty batch.
    pub batch: Batch,
    /// The sampler of this rank's vocabulary.
    pub sampler: Sampler,
    /// The beginning of an epoch.
    pub record: EpochRecord,
}

impl<B: Ops> Runner<B> {
    /// Plans the inputs; everything else is there.
    ///
    /// # Errors
    /// No memory.
    pub fn new(parts: RunnerParts<B>) -> Result<Self, WorkerError> {
        let RunnerParts { rank, mut ops, model, kv, limits, batch, sampler, record } = parts;
        let (inputs, logit_rows_max) = (ops.inputs(limits)?, limits.logit_rows_max);
        Ok(Self { rank, ops, model, kv, inputs, logit_rows_max, batch, work: StepWork::default(), sampler, record })
    }

    /// Forgets all sequences and begins an epoch.
    pub fn begin(&mut self, record: EpochRecord) {
        self.batch.clear();
        self.record = record;
    }

    /// Executes one plan: checks it, runs the model over its rows, samples, scores. Collective.
    ///
    /// # Errors
    /// Head and rank have parted, the device failed or the group is broken; in each case the rank is done.
    pub fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, WorkerError> {
        let started = Instant::now();
        let parted = |reason| WorkerError::Divergence { step: plan.step, reason };
        self.record.admit(plan).map_err(parted)?;
        self.batch.apply(plan, &mut self.work).map_err(parted)?;
        self.forward()?;
        let tokens = self.sample(plan)?;
        let logprobs = self.score_samples(&tokens)?;
        let prompt_logprobs = self.score_prompts()?;
        self.batch.commit(plan.step, &tokens);
        self.record.commit(&tokens);
        Ok(self.output(plan, started.elapsed(), &tokens, logprobs, prompt_logprobs))
    }

    fn forward(&mut self) -> Result<(), WorkerError> {
        if self.work.inputs.seqs.is_empty() {
            return Ok(());
        }
        self.ops.load_inputs(&self.work.inputs, &mut self.inputs)?;
        Ok(self.model.forward(&mut self.ops, &self.inputs, self.kv.layers_mut())?)
    }

    fn sample(&mut self, plan: &StepPlan) -> Result<Vec<(SeqSlot, TokenId)>, WorkerError> {
        let rows = &self.work.samples;
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        self.model.project(&mut self.ops, &self.inputs)?;
        let tokens = self.sampler.sample(&mut self.ops, self.model.logits(), plan.sampler, rows)?;
        let found = |(row, token): (&SampleRow, Option<TokenId>)| match token {
            Some(token) => Ok((row.slot, token)),
            None => Err(WorkerError::NoToken { step: plan.step, slot: row.slot }),
        };
        rows.iter().zip(tokens).map(found).collect()
    }

    /// Log-probabilities of the sampled tokens whose sequences want them, in plan order; the logits are those of `sample`.
    fn score_samples(&mut self, tokens: &[(SeqSlot, TokenId)]) -> Result<Vec<TokenLogprobs>, WorkerError> {
        let mut rows = Vec::new();
        for (row, (sample, (_, token))) in self.work.samples.iter().zip(tokens).enumerate() {
            if let Some(num_top) = sample.sampling.logprobs {
                rows.push(ScoreRow { row, token: *token, num_top });
            }
        }
        Ok(self.sampler.score(&mut self.ops, self.model.logits(), &rows)?)
    }

    /// Log-probabilities of the prompt tokens that the step's chunks predict, in passes of as many rows as logits have room.
    fn score_prompts(&mut self) -> Result<Vec<TokenLogprobs>, WorkerError> {
        let wanted: Vec<(u32, TokenId, u32)> = self.work.prompts.iter().flat_map(PromptChunk::rows).collect();
        let mut scored = Vec::with_capacity(wanted.len());
        for pass in wanted.chunks(self.logit_rows_max.max(1)) {
            self.work.inputs.logit_rows.clear();
            self.work.inputs.logit_rows.extend(pass.iter().map(|(row, ..)| *row));
            self.ops.load_inputs(&self.work.inputs, &mut self.inputs)?;
            self.model.project(&mut self.ops, &self.inputs)?;
            let row = |(row, (_, token, num_top)): (usize, &(u32, TokenId, u32))| ScoreRow {
                row,
                token: *token,
                num_top: *num_top,
            };
            let rows: Vec<ScoreRow> = pass.iter().enumerate().map(row).collect();
            scored.extend(self.sampler.score(&mut self.ops, self.model.logits(), &rows)?);
        }
        Ok(scored)
    }

    /// The answer to the plan; tokens and log-probabilities from rank 0 only.
    fn output(
        &self,
        plan: &StepPlan,
        elapsed: Duration,
        tokens: &[(SeqSlot, TokenId)],
        logprobs: Vec<TokenLogprobs>,
        prompts: Vec<TokenLogprobs>,
    ) -> StepOutput {
        let mut output = StepOutput {
            epoch: plan.epoch,
            step: plan.step,
            elapsed_us: elapsed.as_micros() as u64,
            plan_hash: self.record.plan_hash(),
            token_hash: self.record.token_hash(),
            ..StepOutput::default()
        };
        if self.rank != Rank(0) {
            return output;
        }
        let (mut logprobs, mut prompts) = (logprobs.into_iter(), prompts.into_iter());
        for (sample, (slot, token)) in self.work.samples.iter().zip(tokens) {
            let logprobs = if sample.sampling.logprobs.is_some() { logprobs.next() } else { None };
            output.rows.push(SampledRow { slot: *slot, token: *token, logprobs });
        }
        for chunk in &self.work.prompts {
            let tokens = prompts.by_ref().take(chunk.tokens.len()).collect();
            output.prompt_logprobs.push(PromptLogprobs { slot: chunk.slot, start: chunk.start, tokens });
        }
        output
    }
}
