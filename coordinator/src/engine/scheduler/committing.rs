//! What the ranks answered, taken in: tokens, descriptions of prompts, vectors, and what constraints make of them.
//!
//! **Invariant:** steps are taken in in the order in which they were planned.

use phalanx_proto::{PromptLogprobs, SampledRow, SeqId, StepOutput, StepPlan};

use super::super::block_manager::BlockManager;
use super::super::constraint::{ConstraintAnswer, ConstraintWork, NextTokens};
use super::super::request::{EngineError, FinishReason, TokenEvent};
use super::{PlannedStep, Scheduler, SeqEvent, register};

impl Scheduler {
    /// Takes the tokens of a step in: the oldest one in flight. Gives the events in order.
    pub fn commit(&mut self, step: PlannedStep, output: StepOutput, blocks: &mut BlockManager) -> Vec<SeqEvent> {
        let PlannedStep { plan, sequences, num_decode } = step;
        self.step_time.observe(num_decode, plan.num_tokens() - num_decode, output.elapsed_us);
        for chunk in output.prompt_logprobs {
            self.commit_prompt_logprobs(chunk, &plan, &sequences);
        }
        let sampling = plan.rows.iter().zip(&sequences).filter(|(row, _)| row.samples);
        for ((_, id), sampled) in sampling.zip(output.rows) {
            self.commit_token(*id, sampled, blocks);
        }
        let pooling = plan.rows.iter().zip(&sequences).filter(|(row, _)| row.pools);
        for ((_, id), pooled) in pooling.zip(output.pooled) {
            self.commit_pooled(*id, pooled.values, blocks);
        }
        blocks.commit(plan.step);
        self.committed_step = plan.step;
        self.counters.steps += 1;
        self.take_events()
    }

    fn commit_token(&mut self, id: SeqId, sampled: SampledRow, blocks: &mut BlockManager) {
        // Gone: it ended or was cancelled while this token was in flight, which is dropped.
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        self.counters.generated_tokens += 1;
        let events = &mut self.events;
        let reason = sequence.commit(sampled.token, sampled.logprobs, |event| events.push((id, event)));
        match reason {
            Some(reason) => self.finish(id, reason, blocks),
            None => {
                register(sequence, blocks);
                self.constraint_work.extend(sequence.take_constraint_work());
            }
        }
    }

    /// What constraints have to do now: each is answered by [`Scheduler::resume`].
    pub(in crate::engine) fn take_constraint_work(&mut self) -> Vec<ConstraintWork> {
        std::mem::take(&mut self.constraint_work)
    }

    /// A constraint is back. Its sequence goes on, or ends where its text is complete or cannot be continued.
    pub(in crate::engine) fn resume(&mut self, answer: ConstraintAnswer, blocks: &mut BlockManager) {
        let ConstraintAnswer { id, result } = answer;
        // Gone: it was cancelled meanwhile.
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        match result {
            Ok(constraint) if *constraint.next() == NextTokens::Done => self.finish(id, FinishReason::Complete, blocks),
            Ok(constraint) => sequence.resume(constraint),
            Err(error) => {
                self.remove(id, blocks);
                let error = EngineError::Constraint { reason: error.reason };
                self.events.push((id, TokenEvent::Failed(error)));
            }
        }
    }

    fn commit_prompt_logprobs(&mut self, chunk: PromptLogprobs, plan: &StepPlan, sequences: &[SeqId]) {
        let Some(index) = plan.rows.iter().position(|row| row.slot == chunk.slot) else { return };
        if let Some(sequence) = sequences.get(index).and_then(|id| self.sequences.get_mut(id)) {
            sequence.commit_prompt_logprobs(chunk);
        }
    }

    /// A prompt's vector is there, which is all that was asked for.
    fn commit_pooled(&mut self, id: SeqId, values: Vec<f32>, blocks: &mut BlockManager) {
        if self.sequences.contains_key(&id) {
            self.events.push((id, TokenEvent::Pooled(values)));
            self.finish(id, FinishReason::Complete, blocks);
        }
    }
}
