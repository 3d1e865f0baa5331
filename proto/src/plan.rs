//! Plans and their results: what the head asks of every rank in one step, and what comes back.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{
    BlockId, Epoch, Incarnation, LogitEdits, PooledRow, Pooling, SeqId, SeqSlot, StepId, Term, TokenId, TokenMask,
    WireError, pb,
};

/// Which sampler a step runs; the same on every rank, since it changes the sequence of collectives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SamplerVariant {
    /// Every row takes the highest logit.
    #[default]
    Greedy,
    /// Rows draw from the whole distribution (temperature only).
    NoCut,
    /// Some row has top-k, top-p or min-p.
    Cut,
}

/// How a rank samples a sequence. Ranges were checked where the request was parsed.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// In (0, 1]; 1 is off.
    pub top_p: f32,
    /// In [0, 1]; 0 is off.
    pub min_p: f32,
    /// Keys the counter-based random numbers.
    pub seed: u64,
    /// How many of the best tokens to report beside the sampled one (0: the sampled one only).
    pub logprobs: Option<u32>,
    /// The same for each prompt token.
    pub prompt_logprobs: Option<u32>,
    /// How logits are edited before a token is drawn. They travel ahead of the plan.
    pub edits: Option<Arc<LogitEdits>>,
    /// Where set, no token is drawn: the prompt's hidden states are pooled when all of it is computed.
    pub pooling: Option<Pooling>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            logprobs: None,
            prompt_logprobs: None,
            edits: None,
            pooling: None,
        }
    }
}

impl SamplingParams {
    /// The cheapest sampler that serves these parameters.
    pub fn variant(&self) -> SamplerVariant {
        if self.temperature == 0.0 {
            SamplerVariant::Greedy
        } else if self.top_k == 0 && self.top_p >= 1.0 && self.min_p <= 0.0 {
            SamplerVariant::NoCut
        } else {
            SamplerVariant::Cut
        }
    }
}

/// A sequence enters the batch: new, preempted or replayed, always by this one message.
#[derive(Debug, Clone, PartialEq)]
pub struct NewSequence {
    /// Where the ranks keep it.
    pub slot: SeqSlot,
    /// The engine's name for it.
    pub seq_id: SeqId,
    /// Prompt and, after a preemption or a replay, the tokens so far.
    pub tokens: Vec<TokenId>,
    /// How many of `tokens` are prompt: the index of an output token counts from here.
    pub num_prompt_tokens: u32,
    /// Blocks that the prefix cache already holds; the first row starts behind them.
    pub blocks: Vec<BlockId>,
    /// How it is sampled.
    pub sampling: SamplingParams,
}

/// The work of one sequence in one step: a prefill chunk or one decoded token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanRow {
    /// The sequence's slot.
    pub slot: SeqSlot,
    /// Position of the first token that is computed.
    pub start: u32,
    /// Tokens that are computed, at least 1.
    pub num_tokens: u32,
    /// Blocks appended to the sequence's table.
    pub new_blocks: Vec<BlockId>,
    /// True where the row ends at the last known token, so that one is sampled behind it; never of a sequence that is pooled.
    pub samples: bool,
    /// The step whose sampled token this row consumes; it may still be in flight.
    pub consumes: Option<StepId>,
    /// True where the row ends at the last token of a sequence that is pooled, so that its vector is given.
    pub pools: bool,
}

/// One step for every rank of a group: a delta against the batch that the ranks hold.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepPlan {
    /// Life of the head.
    pub term: Term,
    /// Life of the rank processes.
    pub incarnation: Incarnation,
    /// Life of sequences and blocks.
    pub epoch: Epoch,
    /// Number of the step within the epoch.
    pub step: StepId,
    /// Chain over all plans of the epoch up to and with this one; see [`StepPlan::chain`].
    pub plan_hash: u64,
    /// The last step whose tokens the head had committed when it sent this.
    pub committed_step: StepId,
    /// Chain over the tokens sampled up to `committed_step`; see [`StepOutput::chain`].
    pub token_hash: u64,
    /// Which sampler runs.
    pub sampler: SamplerVariant,
    /// Sequences that leave the batch before this step.
    pub released_slots: Vec<SeqSlot>,
    /// Sequences that enter it.
    pub new_sequences: Vec<NewSequence>,
    /// The work, in batch order.
    pub rows: Vec<PlanRow>,
    /// Rows that may draw certain tokens only, in the order of the rows. They travel ahead of the plan.
    pub masks: Vec<TokenMask>,
}

/// A token with its log-probability (of the raw logits) and the best alternatives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprobs {
    /// The token that stands in the text.
    pub token: TokenId,
    /// Its natural log-probability.
    pub logprob: f32,
    /// Its place among all tokens, 1 for the best.
    pub rank: u32,
    /// The best tokens, best first.
    pub top: Vec<(TokenId, f32)>,
}

/// The token sampled for one row.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledRow {
    /// The sequence's slot.
    pub slot: SeqSlot,
    /// The token.
    pub token: TokenId,
    /// Present where asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// Log-probabilities of a chunk of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptLogprobs {
    /// The sequence's slot.
    pub slot: SeqSlot,
    /// Position of the first described token (never 0: nothing comes before it).
    pub start: u32,
    /// One entry a token.
    pub tokens: Vec<TokenLogprobs>,
}

/// What a rank answers to a plan. Tokens and log-probabilities come from rank 0 only.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepOutput {
    /// The plan's epoch.
    pub epoch: Epoch,
    /// The plan's step.
    pub step: StepId,
    /// Device time of the step, microseconds.
    pub elapsed_us: u64,
    /// The plan chain as this rank computed it.
    pub plan_hash: u64,
    /// The token chain through this step: equal on all ranks.
    pub token_hash: u64,
    /// One entry for each row that samples, in plan order.
    pub rows: Vec<SampledRow>,
    /// Log-probabilities of prompt chunks computed in this step.
    pub prompt_logprobs: Vec<PromptLogprobs>,
    /// Prompts that are pooled and ended in this step, at most [`crate::POOLED_ROWS_MAX`].
    pub pooled: Vec<PooledRow>,
}

/// 64-bit FNV-1a, over integers: enough to see a divergence, not a defence.
#[derive(Debug, Clone, Copy)]
pub struct Fnv(u64);

impl Fnv {
    /// Continues a chain from `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0xcbf2_9ce4_8422_2325)
    }

    /// Takes one value in.
    pub fn add(&mut self, value: u64) -> &mut Self {
        for byte in value.to_le_bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        self
    }

    /// The hash so far.
    pub fn finish(self) -> u64 {
        self.0
    }
}

impl StepPlan {
    /// The plan chain after this plan, where `previous` is the chain before it (0 at the start of an epoch).
    pub fn chain(&self, previous: u64) -> u64 {
        let mut hash = Fnv::new(previous);
        hash.add(self.step.0).add(self.sampler as u64);
        hash.add(self.released_slots.len() as u64);
        for slot in &self.released_slots {
            hash.add(u64::from(slot.0));
        }
        hash.add(self.new_sequences.len() as u64);
        for new in &self.new_sequences {
            hash.add(u64::from(new.slot.0)).add(new.seq_id.0).add(u64::from(new.num_prompt_tokens));
            hash.add(new.sampling.edits.as_ref().map_or(0, |edits| edits.digest()));
            hash.add(u64::from(Pooling::to_wire(new.sampling.pooling)));
            hash.add(new.tokens.len() as u64);
            for token in &new.tokens {
                hash.add(u64::from(token.0));
            }
            for block in &new.blocks {
                hash.add(u64::from(block.0));
            }
        }
        hash.add(self.rows.len() as u64);
        for row in &self.rows {
            hash.add(u64::from(row.slot.0)).add(u64::from(row.start)).add(u64::from(row.num_tokens));
            hash.add(u64::from(row.samples) | u64::from(row.pools) << 1).add(row.consumes.map_or(0, |step| step.0));
            for block in &row.new_blocks {
                hash.add(u64::from(block.0));
            }
        }
        for mask in &self.masks {
            hash.add(u64::from(mask.slot.0)).add(mask.digest());
        }
        hash.finish()
    }

    /// Tokens that the step computes.
    pub fn num_tokens(&self) -> u32 {
        self.rows.iter().map(|row| row.num_tokens).sum()
    }
}

impl StepOutput {
    /// The token chain after a step whose rows sampled `tokens`, in plan order.
    pub fn chain(previous: u64, step: StepId, tokens: impl IntoIterator<Item = (SeqSlot, TokenId)>) -> u64 {
        let mut hash = Fnv::new(previous);
        hash.add(step.0);
        for (slot, token) in tokens {
            hash.add(u64::from(slot.0)).add(u64::from(token.0));
        }
        hash.finish()
    }
}

// ---- conversions ----

fn raw<T: Copy, U>(items: &[T], f: impl Fn(T) -> U) -> Vec<U> {
    items.iter().map(|item| f(*item)).collect()
}

impl From<&SamplingParams> for pb::Sampling {
    fn from(s: &SamplingParams) -> Self {
        Self {
            temperature: s.temperature,
            top_k: s.top_k,
            top_p: s.top_p,
            min_p: s.min_p,
            seed: s.seed,
            logprobs: s.logprobs,
            prompt_logprobs: s.prompt_logprobs,
            edits: s.edits.is_some(),
            pooling: Pooling::to_wire(s.pooling),
        }
    }
}

impl TryFrom<pb::Sampling> for SamplingParams {
    type Error = WireError;

    fn try_from(s: pb::Sampling) -> Result<Self, WireError> {
        let check = |field: &'static str, value: f32, fine: bool, expected: &'static str| {
            if fine { Ok(value) } else { Err(WireError::Invalid { field, value: value.to_string(), expected }) }
        };
        Ok(Self {
            temperature: check("temperature", s.temperature, s.temperature >= 0.0, "a number of 0 or more")?,
            top_k: s.top_k,
            top_p: check("top_p", s.top_p, s.top_p > 0.0 && s.top_p <= 1.0, "in (0, 1]")?,
            min_p: check("min_p", s.min_p, (0.0..=1.0).contains(&s.min_p), "in [0, 1]")?,
            seed: s.seed,
            logprobs: s.logprobs,
            prompt_logprobs: s.prompt_logprobs,
            edits: s.edits.then(Arc::default),
            pooling: Pooling::from_wire(s.pooling)?,
        })
    }
}

impl From<&NewSequence> for pb::NewSequence {
    /// Carries all tokens inline; the sender moves the first ones to `StagePart`s where they are too many.
    fn from(n: &NewSequence) -> Self {
        Self {
            slot: n.slot.0,
            seq_id: n.seq_id.0,
            tokens: raw(&n.tokens, |t| t.0),
            num_tokens: n.tokens.len() as u32,
            num_prompt_tokens: n.num_prompt_tokens,
            blocks: raw(&n.blocks, |b| b.0),
            sampling: Some((&n.sampling).into()),
        }
    }
}

impl TryFrom<pb::NewSequence> for NewSequence {
    type Error = WireError;

    /// Staged parts must have been put in front of `tokens` before.
    fn try_from(n: pb::NewSequence) -> Result<Self, WireError> {
        if n.tokens.len() as u64 != u64::from(n.num_tokens) || n.tokens.is_empty() {
            return Err(WireError::Invalid {
                field: "new_sequences.tokens",
                value: format!("{} tokens", n.tokens.len()),
                expected: "as many as num_tokens, and at least one",
            });
        }
        if n.num_prompt_tokens == 0 || n.num_prompt_tokens > n.num_tokens {
            return Err(WireError::Invalid {
                field: "new_sequences.num_prompt_tokens",
                value: n.num_prompt_tokens.to_string(),
                expected: "between 1 and num_tokens",
            });
        }
        let sampling = n.sampling.ok_or(WireError::Missing { message: "NewSequence", field: "sampling" })?;
        Ok(Self {
            slot: SeqSlot(n.slot),
            seq_id: SeqId(n.seq_id),
            tokens: raw(&n.tokens, TokenId),
            num_prompt_tokens: n.num_prompt_tokens,
            blocks: raw(&n.blocks, BlockId),
            sampling: sampling.try_into()?,
        })
    }
}

impl From<&PlanRow> for pb::PlanRow {
    fn from(r: &PlanRow) -> Self {
        Self {
            slot: r.slot.0,
            start: r.start,
            num_tokens: r.num_tokens,
            new_blocks: raw(&r.new_blocks, |b| b.0),
            samples: r.samples,
            consumes: r.consumes.map(|step| step.0),
            pools: r.pools,
        }
    }
}

impl TryFrom<pb::PlanRow> for PlanRow {
    type Error = WireError;

    fn try_from(r: pb::PlanRow) -> Result<Self, WireError> {
        if r.num_tokens == 0 {
            return Err(WireError::Invalid { field: "rows.num_tokens", value: "0".into(), expected: "at least 1" });
        }
        Ok(Self {
            slot: SeqSlot(r.slot),
            start: r.start,
            num_tokens: r.num_tokens,
            new_blocks: raw(&r.new_blocks, BlockId),
            samples: r.samples,
            consumes: r.consumes.map(StepId),
            pools: r.pools,
        })
    }
}

impl From<&StepPlan> for pb::Plan {
    fn from(p: &StepPlan) -> Self {
        Self {
            term: p.term.0,
            incarnation: p.incarnation.0,
            epoch: p.epoch.0,
            step: p.step.0,
            plan_hash: p.plan_hash,
            committed_step: p.committed_step.0,
            token_hash: p.token_hash,
            released_slots: raw(&p.released_slots, |s| s.0),
            new_sequences: p.new_sequences.iter().map(Into::into).collect(),
            rows: p.rows.iter().map(Into::into).collect(),
            sampler: p.sampler as u32,
            masked_slots: p.masks.iter().map(|mask| mask.slot.0).collect(),
        }
    }
}

impl TryFrom<pb::Plan> for StepPlan {
    type Error = WireError;

    /// Masks come without their words and edits without their content: [`crate::MaskStaging::complete`] and
    /// [`crate::EditStaging::complete`] add what was sent ahead.
    fn try_from(p: pb::Plan) -> Result<Self, WireError> {
        let sampler = match p.sampler {
            0 => SamplerVariant::Greedy,
            1 => SamplerVariant::NoCut,
            2 => SamplerVariant::Cut,
            other => {
                let expected = "0 (greedy), 1 (no cut) or 2 (cut)";
                return Err(WireError::Invalid { field: "sampler", value: other.to_string(), expected });
            }
        };
        Ok(Self {
            term: Term(p.term),
            incarnation: Incarnation(p.incarnation),
            epoch: Epoch(p.epoch),
            step: StepId(p.step),
            plan_hash: p.plan_hash,
            committed_step: StepId(p.committed_step),
            token_hash: p.token_hash,
            sampler,
            released_slots: raw(&p.released_slots, SeqSlot),
            new_sequences: p.new_sequences.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            rows: p.rows.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            masks: p.masked_slots.into_iter().map(|slot| TokenMask { slot: SeqSlot(slot), words: [].into() }).collect(),
        })
    }
}

impl From<&TokenLogprobs> for pb::TokenLogprobs {
    fn from(t: &TokenLogprobs) -> Self {
        Self {
            token: t.token.0,
            logprob: t.logprob,
            rank: t.rank,
            top_tokens: t.top.iter().map(|(token, _)| token.0).collect(),
            top_logprobs: t.top.iter().map(|(_, logprob)| *logprob).collect(),
        }
    }
}

impl From<pb::TokenLogprobs> for TokenLogprobs {
    fn from(t: pb::TokenLogprobs) -> Self {
        let top = t.top_tokens.into_iter().map(TokenId).zip(t.top_logprobs).collect();
        Self { token: TokenId(t.token), logprob: t.logprob, rank: t.rank, top }
    }
}

impl From<&StepOutput> for pb::StepOutput {
    fn from(o: &StepOutput) -> Self {
        Self {
            epoch: o.epoch.0,
            step: o.step.0,
            elapsed_us: o.elapsed_us,
            plan_hash: o.plan_hash,
            token_hash: o.token_hash,
            rows: o
                .rows
                .iter()
                .map(|row| pb::SampledRow {
                    slot: row.slot.0,
                    token: row.token.0,
                    logprobs: row.logprobs.as_ref().map(Into::into),
                })
                .collect(),
            prompt_logprobs: o
                .prompt_logprobs
                .iter()
                .map(|p| pb::PromptLogprobs {
                    slot: p.slot.0,
                    start: p.start,
                    tokens: p.tokens.iter().map(Into::into).collect(),
                })
                .collect(),
            pooled: o.pooled.iter().map(Into::into).collect(),
        }
    }
}

impl From<pb::StepOutput> for StepOutput {
    fn from(o: pb::StepOutput) -> Self {
        Self {
            epoch: Epoch(o.epoch),
            step: StepId(o.step),
            elapsed_us: o.elapsed_us,
            plan_hash: o.plan_hash,
            token_hash: o.token_hash,
            rows: o
                .rows
                .into_iter()
                .map(|row| SampledRow {
                    slot: SeqSlot(row.slot),
                    token: TokenId(row.token),
                    logprobs: row.logprobs.map(Into::into),
                })
                .collect(),
            prompt_logprobs: o
                .prompt_logprobs
                .into_iter()
                .map(|p| PromptLogprobs {
                    slot: SeqSlot(p.slot),
                    start: p.start,
                    tokens: p.tokens.into_iter().map(Into::into).collect(),
                })
                .collect(),
            pooled: o.pooled.into_iter().map(Into::into).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> StepPlan {
        StepPlan {
            step: StepId(7),
            new_sequences: vec![NewSequence {
                slot: SeqSlot(3),
                seq_id: SeqId(9),
                tokens: vec![TokenId(1), TokenId(2)],
                num_prompt_tokens: 2,
                blocks: vec![BlockId(5)],
                sampling: SamplingParams::default(),
            }],
            rows: vec![PlanRow {
                slot: SeqSlot(3),
                start: 0,
                num_tokens: 2,
                new_blocks: vec![BlockId(6)],
                samples: true,
                consumes: None,
                pools: false,
            }],
            ..StepPlan::default()
        }
    }

    #[test]
    fn a_plan_survives_the_wire() {
        assert_eq!(StepPlan::try_from(pb::Plan::from(&plan())), Ok(plan()));
    }

    #[test]
    fn lying_plans_are_refused() {
        let mut wire = pb::Plan::from(&plan());
        wire.rows[0].num_tokens = 0;
        assert!(StepPlan::try_from(wire).is_err());
        let mut wire = pb::Plan::from(&plan());
        wire.new_sequences[0].num_tokens = 3;
        assert!(StepPlan::try_from(wire).is_err());
        let mut wire = pb::Plan::from(&plan());
        wire.sampler = 9;
        assert!(StepPlan::try_from(wire).is_err());
    }

    #[test]
    fn the_chain_sees_every_field_that_ranks_act_on() {
        let base = plan().chain(0);
        let mut other = plan();
        other.rows[0].new_blocks[0] = BlockId(7);
        assert_ne!(base, other.chain(0));
        assert_ne!(base, plan().chain(1));
    }

    #[test]
    fn a_pure_decode_step_is_small() {
        use prost::Message;
        let mut small = plan();
        small.new_sequences.clear();
        small.rows = vec![PlanRow {
            slot: SeqSlot(3),
            start: 700,
            num_tokens: 1,
            new_blocks: vec![],
            samples: true,
            consumes: Some(StepId(6)),
            pools: false,
        }];
        assert!(pb::Plan::from(&small).encoded_len() < 80);
    }
}
