//! Checked conversions of plans and their results to their generated types and back.

use std::sync::Arc;

use super::{
    NewSequence, PlanRow, PromptLogprobs, SampledRow, SamplerVariant, SamplingParams, StepOutput, StepPlan,
    TokenLogprobs,
};
use crate::{BlockId, Epoch, Incarnation, Pooling, SeqId, SeqSlot, StepId, Term, TokenId, TokenMask, WireError, pb};

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
