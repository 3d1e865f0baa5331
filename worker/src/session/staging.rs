//! What comes ahead of its plan: parts of long prompts, token masks, edits of logits.
//!
//! **Invariant:** what is staged is bounded, and belongs to a plan of the present stream and epoch.

use std::collections::HashMap;

use phalanx_proto::{EditStaging, Epoch, HeadMessage, LoadModel, MaskStaging, SeqId, Term, WireError, pb};

use super::SessionError;

/// Prompt parts, masks and edits that wait for their plan.
#[derive(Debug, Default)]
pub(super) struct Staging {
    parts: HashMap<SeqId, Vec<u32>>,
    masks: MaskStaging,
    edits: EditStaging,
    num_tokens: usize,
    pub(super) num_tokens_max: usize,
}

impl Staging {
    /// What all sequences of a full batch may have staged.
    pub(super) fn limit(&mut self, load: &LoadModel) {
        self.num_tokens_max = load.max_model_len as usize * load.max_num_seqs.max(1) as usize;
    }

    /// Keeps parts, completes plans, and converts what is whole.
    pub(super) fn admit(&mut self, message: pb::HeadToRank) -> Result<Option<HeadMessage>, SessionError> {
        use pb::head_to_rank::Message as M;
        let missing = WireError::Missing { message: "HeadToRank", field: "message" };
        Ok(Some(match message.message.ok_or(missing)? {
            M::Stage(part) => {
                self.keep(part)?;
                return Ok(None);
            }
            M::Plan(mut plan) => {
                for new in &mut plan.new_sequences {
                    self.complete(new);
                }
                let mut plan = plan.try_into()?;
                self.masks.complete(&mut plan)?;
                self.edits.complete(&mut plan)?;
                HeadMessage::Plan(plan)
            }
            M::SampleInputs(inputs) => {
                self.masks.keep(inputs)?;
                return Ok(None);
            }
            M::StageEdits(part) => {
                self.edits.keep(part)?;
                return Ok(None);
            }
            M::Load(load) => HeadMessage::Load(load.try_into()?),
            M::Connect(connect) => HeadMessage::Connect(connect.addresses),
            M::InitKvCache(init) => HeadMessage::InitKvCache { num_blocks: init.num_blocks },
            M::BeginEpoch(begin) => {
                // What came for plans of the epoch before belongs to nobody any more.
                *self = Self { num_tokens_max: self.num_tokens_max, ..Self::default() };
                HeadMessage::BeginEpoch { term: Term(begin.term), epoch: Epoch(begin.epoch) }
            }
            M::RecallPlans(_) => HeadMessage::RecallPlans,
            M::Shutdown(shutdown) => HeadMessage::Shutdown(shutdown.reason),
        }))
    }

    fn keep(&mut self, part: pb::StagePart) -> Result<(), SessionError> {
        let num_tokens = self.num_tokens + part.tokens.len();
        if num_tokens > self.num_tokens_max {
            return Err(SessionError::Staging { num_tokens, num_tokens_max: self.num_tokens_max });
        }
        self.num_tokens = num_tokens;
        self.parts.entry(SeqId(part.seq_id)).or_default().extend(part.tokens);
        Ok(())
    }

    fn complete(&mut self, new: &mut pb::NewSequence) {
        if let Some(mut tokens) = self.parts.remove(&SeqId(new.seq_id)) {
            self.num_tokens -= tokens.len();
            tokens.append(&mut new.tokens);
            new.tokens = tokens;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(seq_id: u64, tokens: Vec<u32>) -> pb::HeadToRank {
        let part = pb::StagePart { seq_id, tokens };
        pb::HeadToRank { message: Some(pb::head_to_rank::Message::Stage(part)) }
    }

    fn plan(seq_id: u64, tokens: Vec<u32>, num_tokens: u32) -> pb::HeadToRank {
        let new = pb::NewSequence {
            seq_id,
            tokens,
            num_tokens,
            num_prompt_tokens: num_tokens,
            sampling: Some(pb::Sampling { top_p: 1.0, ..Default::default() }),
            ..Default::default()
        };
        let plan = pb::Plan { new_sequences: vec![new], ..Default::default() };
        pb::HeadToRank { message: Some(pb::head_to_rank::Message::Plan(plan)) }
    }

    #[test]
    fn staged_parts_come_before_the_tokens_of_their_plan() {
        let mut staging = Staging { num_tokens_max: 100, ..Staging::default() };
        for part in [stage(1, vec![1, 2]), stage(2, vec![9]), stage(1, vec![3])] {
            assert!(staging.admit(part).unwrap().is_none());
        }
        let Some(HeadMessage::Plan(plan)) = staging.admit(plan(1, vec![4, 5], 5)).unwrap() else { panic!() };
        let tokens: Vec<u32> = plan.new_sequences[0].tokens.iter().map(|token| token.0).collect();
        assert_eq!(tokens, [1, 2, 3, 4, 5]);
        assert_eq!((staging.parts.len(), staging.num_tokens), (1, 1));
    }

    #[test]
    fn an_epoch_begins_with_nothing_staged() {
        let mut staging = Staging { num_tokens_max: 4, ..Staging::default() };
        staging.admit(stage(1, vec![1, 2, 3])).unwrap();
        let begin = pb::BeginEpoch { term: 1, epoch: 2 };
        staging.admit(pb::HeadToRank { message: Some(pb::head_to_rank::Message::BeginEpoch(begin)) }).unwrap();
        assert_eq!((staging.parts.len(), staging.num_tokens, staging.num_tokens_max), (0, 0, 4));
        assert!(staging.admit(plan(1, vec![4], 1)).is_ok());
    }

    #[test]
    fn lying_heads_are_refused() {
        let mut staging = Staging { num_tokens_max: 4, ..Staging::default() };
        assert!(staging.admit(stage(1, vec![1, 2, 3])).unwrap().is_none());
        assert!(matches!(staging.admit(stage(2, vec![1, 2])), Err(SessionError::Staging { num_tokens: 5, .. })));
        assert!(matches!(staging.admit(plan(1, vec![4], 5)), Err(SessionError::Wire(_))));
        assert!(matches!(staging.admit(pb::HeadToRank { message: None }), Err(SessionError::Wire(_))));
    }
}
