//! What crosses the streams of a group's ranks.
//!
//! **Invariant:** no message is longer than `PLAN_BYTES_MAX`: what is long of a plan goes ahead of it, in parts.

#[cfg(test)]
use phalanx_proto::{Epoch, Term};
use phalanx_proto::{
    HeadMessage, PLAN_BYTES_MAX, RankEvent, STAGE_TOKENS_MAX, StepPlan, edit_messages, mask_messages, pb,
};

/// Prompt tokens that a plan carries itself; the rest is staged ahead.
const INLINE_TOKENS_MAX: usize = 1024;

/// A message as the streams take it.
pub(in crate::engine) type Wire = pb::HeadToRank;

/// The messages that carry a plan, in order: masks, edits, parts of long prompts, then the plan itself, none above
/// `PLAN_BYTES_MAX`.
///
/// Public for the benchmark of a step.
pub fn to_messages(plan: &StepPlan) -> Vec<pb::HeadToRank> {
    use pb::head_to_rank::Message;
    let mut messages = mask_messages(plan);
    messages.append(&mut edit_messages(plan));
    let mut wire = pb::Plan::from(plan);
    let mut inline_left = INLINE_TOKENS_MAX;
    for new in &mut wire.new_sequences {
        if new.tokens.len() <= inline_left {
            inline_left -= new.tokens.len();
            continue;
        }
        for part in std::mem::take(&mut new.tokens).chunks(STAGE_TOKENS_MAX) {
            let part = pb::StagePart { seq_id: new.seq_id, tokens: part.to_vec() };
            messages.push(pb::HeadToRank { message: Some(Message::Stage(part)) });
        }
    }
    messages.push(pb::HeadToRank { message: Some(Message::Plan(wire)) });
    debug_assert!(messages.iter().all(|message| prost::Message::encoded_len(message) <= PLAN_BYTES_MAX));
    messages
}

/// The wire form of a message.
pub(in crate::engine) fn to_wire(message: &HeadMessage) -> Wire {
    message.into()
}

pub(in crate::engine) fn event_name(event: &RankEvent) -> &'static str {
    match event {
        RankEvent::Hello(_) => "a hello",
        RankEvent::Progress { .. } => "progress",
        RankEvent::Listening(_) => "the address of its collective",
        RankEvent::Capacity(_) => "its capacity",
        RankEvent::Ready { .. } => "that it is ready",
        RankEvent::Output(_) => "the output of a step",
        RankEvent::Recalled(_) => "a plan of an earlier head",
        RankEvent::Failure(_) => "a failure",
    }
}

/// What a rank makes of the head's messages: staged parts stand in front of their sequence's tokens.
#[cfg(test)]
#[derive(Default)]
pub(in crate::engine) struct Decoder {
    staged: std::collections::HashMap<u64, Vec<u32>>,
    masks: phalanx_proto::MaskStaging,
    edits: phalanx_proto::EditStaging,
}

#[cfg(test)]
impl Decoder {
    /// The message, if it is complete.
    pub(in crate::engine) fn decode(&mut self, message: pb::HeadToRank) -> Option<HeadMessage> {
        use pb::head_to_rank::Message;
        Some(match message.message.expect("a message has content") {
            Message::Load(load) => HeadMessage::Load(load.try_into().expect("valid")),
            Message::Connect(group) => HeadMessage::Connect(group.addresses),
            Message::InitKvCache(init) => HeadMessage::InitKvCache { num_blocks: init.num_blocks },
            Message::Stage(part) => {
                self.staged.entry(part.seq_id).or_default().extend(part.tokens);
                return None;
            }
            Message::Plan(mut plan) => {
                for new in &mut plan.new_sequences {
                    let mut tokens = self.staged.remove(&new.seq_id).unwrap_or_default();
                    tokens.append(&mut new.tokens);
                    new.tokens = tokens;
                }
                let mut plan = plan.try_into().expect("valid");
                self.masks.complete(&mut plan).expect("every mask came before its plan");
                self.edits.complete(&mut plan).expect("all edits came before their plan");
                HeadMessage::Plan(plan)
            }
            Message::StageEdits(part) => {
                self.edits.keep(part).expect("valid");
                return None;
            }
            Message::SampleInputs(inputs) => {
                self.masks.keep(inputs).expect("valid");
                return None;
            }
            Message::BeginEpoch(begin) => {
                self.masks = phalanx_proto::MaskStaging::default();
                HeadMessage::BeginEpoch { term: Term(begin.term), epoch: Epoch(begin.epoch) }
            }
            Message::RecallPlans(_) => HeadMessage::RecallPlans,
            Message::Shutdown(shutdown) => HeadMessage::Shutdown(shutdown.reason),
        })
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::{NewSequence, PlanRow, SamplingParams, SeqId, SeqSlot, TokenId};
    use prost::Message;

    use super::*;

    fn plan(prompts: &[u32]) -> StepPlan {
        let new = |(index, num_tokens): (usize, &u32)| NewSequence {
            slot: SeqSlot(index as u32),
            seq_id: SeqId(index as u64),
            tokens: (0..*num_tokens).map(|at| TokenId(u32::MAX - at)).collect(),
            num_prompt_tokens: *num_tokens,
            blocks: vec![],
            sampling: SamplingParams::default(),
        };
        let row = PlanRow {
            slot: SeqSlot(0),
            start: 0,
            num_tokens: 1,
            new_blocks: vec![phalanx_proto::BlockId(1)],
            samples: false,
            consumes: None,
            pools: false,
        };
        StepPlan {
            new_sequences: prompts.iter().enumerate().map(new).collect(),
            rows: vec![row],
            ..StepPlan::default()
        }
    }

    fn check(prompts: &[u32], num_parts: usize) {
        let plan = plan(prompts);
        let messages = to_messages(&plan);
        assert_eq!(messages.len(), num_parts + 1);
        assert!(messages.iter().all(|message| message.encoded_len() <= PLAN_BYTES_MAX));
        let mut decoder = Decoder::default();
        let mut decoded: Vec<_> = messages.into_iter().filter_map(|message| decoder.decode(message)).collect();
        assert_eq!(decoded.pop(), Some(HeadMessage::Plan(plan)));
        assert!(decoded.is_empty());
    }

    #[test]
    fn long_prompts_go_ahead_in_parts() {
        check(&[10], 0);
        check(&[1_000, 24], 0);
        check(&[1_000, 25], 1);
        check(&[30_000, 10, 8_193], 4 + 2);
    }
}
