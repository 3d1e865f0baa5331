//! Plans that this rank was given and has not finished, as they came.
//!
//! A head that dies while it sends a plan leaves some ranks with it and some without. Those that have it wait in its collectives for
//! those that lack it; the next head takes it from here and passes it on, so that all come to rest and keep their weights.
//!
//! **Invariant:** what this rank has and another one of its group lacks is here: no step ends before every rank has its plan.

use std::collections::VecDeque;

use phalanx_proto::{PlanMark, StepOutput, pb};

/// The messages of plans that are not finished; bounded, as the device thread's queue is.
#[derive(Debug, Clone, Default)]
pub(super) struct HeldPlans {
    /// What came for the next plan.
    parts: Vec<pb::HeadToRank>,
    plans: VecDeque<(PlanMark, Vec<pb::HeadToRank>)>,
    last: Option<PlanMark>,
}

impl HeldPlans {
    /// Keeps what belongs to a plan.
    pub fn keep(&mut self, message: &pb::HeadToRank) {
        use pb::head_to_rank::Message as M;
        match (&message.message, PlanMark::of(message)) {
            (_, Some(mark)) => {
                self.parts.push(message.clone());
                self.plans.push_back((mark, std::mem::take(&mut self.parts)));
                self.last = Some(mark);
            }
            (Some(M::Stage(_) | M::SampleInputs(_) | M::StageEdits(_)), None) => self.parts.push(message.clone()),
            _ => {}
        }
    }

    /// A step has ended here: every rank has its plan.
    pub fn finish(&mut self, output: &StepOutput) {
        let is_done = |mark: &PlanMark| (mark.epoch, mark.step) <= (output.epoch, output.step);
        while self.plans.front().is_some_and(|(mark, _)| is_done(mark)) {
            self.plans.pop_front();
        }
    }

    /// The device has come to rest: every step has ended.
    pub fn rest(&mut self) {
        self.plans.clear();
    }

    /// The stream has ended: what came of an unfinished plan comes again, or never.
    pub fn cut(&mut self) {
        self.parts.clear();
    }

    /// The last plan that came.
    pub fn last(&self) -> Option<PlanMark> {
        self.last
    }

    /// All that is held, in the order in which it came.
    pub fn messages(&self) -> impl ExactSizeIterator<Item = pb::HeadToRank> {
        let all: Vec<pb::HeadToRank> = self.plans.iter().flat_map(|(_, messages)| messages).cloned().collect();
        all.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::{Epoch, StepId, Term};

    use super::*;

    fn message(message: pb::head_to_rank::Message) -> pb::HeadToRank {
        pb::HeadToRank { message: Some(message) }
    }

    fn plan(epoch: u64, step: u64) -> pb::HeadToRank {
        message(pb::head_to_rank::Message::Plan(pb::Plan { term: 1, epoch, step, ..Default::default() }))
    }

    fn stage(seq_id: u64) -> pb::HeadToRank {
        message(pb::head_to_rank::Message::Stage(pb::StagePart { seq_id, tokens: vec![1] }))
    }

    fn mark(epoch: u64, step: u64) -> PlanMark {
        PlanMark { term: Term(1), epoch: Epoch(epoch), step: StepId(step) }
    }

    #[test]
    fn what_is_not_finished_is_held_with_its_parts() {
        let mut held = HeldPlans::default();
        for message in [plan(1, 1), stage(7), plan(1, 2), plan(1, 3), stage(8)] {
            held.keep(&message);
        }
        held.finish(&StepOutput { epoch: Epoch(1), step: StepId(1), ..StepOutput::default() });
        assert_eq!(held.messages().collect::<Vec<_>>(), [stage(7), plan(1, 2), plan(1, 3)]);
        held.cut();
        held.keep(&plan(1, 4));
        assert_eq!(held.messages().last(), Some(plan(1, 4)), "the part of a plan that never came is gone");
        assert_eq!(held.last(), Some(mark(1, 4)));
        held.rest();
        assert_eq!((held.messages().len(), held.last()), (0, Some(mark(1, 4))));
    }
}
