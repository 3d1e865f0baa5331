//! What head and rank agree on within an epoch: lives, step order, plans, tokens.
//!
//! **Invariant:** a plan is taken only if it belongs to this life, is the next step, and both its chains equal this rank's.

use std::collections::VecDeque;

use phalanx_proto::{Epoch, Incarnation, SeqSlot, StepId, StepOutput, StepPlan, Term, TokenId};

use crate::error::Divergence;

/// Token hashes that are kept beyond those of the steps in flight.
const SPARE_HASHES: usize = 8;

/// The record of an epoch on this rank.
#[derive(Debug)]
pub struct EpochRecord {
    term: Term,
    incarnation: Incarnation,
    epoch: Epoch,
    step: StepId,
    plan_hash: u64,
    /// Token chain after each of the last steps, oldest first; never empty.
    token_hashes: VecDeque<(StepId, u64)>,
    hashes_max: usize,
}

impl EpochRecord {
    /// The beginning of an epoch. `steps_in_flight_max` bounds how far the head may be ahead of its commits.
    pub fn new(term: Term, incarnation: Incarnation, epoch: Epoch, steps_in_flight_max: usize) -> Self {
        Self {
            term,
            incarnation,
            epoch,
            step: StepId(0),
            plan_hash: 0,
            token_hashes: VecDeque::from([(StepId(0), 0)]),
            hashes_max: steps_in_flight_max + SPARE_HASHES,
        }
    }

    /// Takes the next plan, or says why it is not the next plan.
    ///
    /// # Errors
    /// Head and rank have parted.
    pub fn admit(&mut self, plan: &StepPlan) -> Result<(), Divergence> {
        same("term", self.term.0, plan.term.0)?;
        same("incarnation", self.incarnation.0, plan.incarnation.0)?;
        same("epoch", self.epoch.0, plan.epoch.0)?;
        let expected = StepId(self.step.0 + 1);
        if plan.step != expected {
            return Err(Divergence::Step { expected, found: plan.step });
        }
        let expected = plan.chain(self.plan_hash);
        if plan.plan_hash != expected {
            return Err(Divergence::PlanHash { expected, found: plan.plan_hash });
        }
        let expected = self.token_hash_at(plan.committed_step)?;
        if plan.token_hash != expected {
            return Err(Divergence::TokenHash { step: plan.committed_step, expected, found: plan.token_hash });
        }
        (self.step, self.plan_hash) = (plan.step, plan.plan_hash);
        Ok(())
    }

    /// Takes in what an admitted step sampled; steps commit in order.
    pub fn commit(&mut self, step: StepId, tokens: &[(SeqSlot, TokenId)]) {
        let hash = StepOutput::chain(self.token_hash(), step, tokens.iter().copied());
        self.token_hashes.push_back((step, hash));
        if self.token_hashes.len() > self.hashes_max {
            self.token_hashes.pop_front();
        }
    }

    /// The plan chain through the last step.
    pub fn plan_hash(&self) -> u64 {
        self.plan_hash
    }

    /// The token chain through the last step that was committed.
    pub fn token_hash(&self) -> u64 {
        self.token_hashes.back().map_or(0, |(_, hash)| *hash)
    }

    fn token_hash_at(&self, step: StepId) -> Result<u64, Divergence> {
        let oldest = self.token_hashes.front().map_or(StepId(0), |(step, _)| *step);
        let newest = self.token_hashes.back().map_or(StepId(0), |(step, _)| *step);
        let kept = self.token_hashes.iter().find(|(kept, _)| *kept == step);
        kept.map(|(_, hash)| *hash).ok_or(Divergence::Committed { oldest, newest, found: step })
    }
}

fn same(counter: &'static str, expected: u64, found: u64) -> Result<(), Divergence> {
    if expected == found { Ok(()) } else { Err(Divergence::Life { counter, expected, found }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> EpochRecord {
        EpochRecord::new(Term(1), Incarnation(2), Epoch(3), 2)
    }

    /// The next plan of a head that agrees.
    fn next(record: &EpochRecord) -> StepPlan {
        let mut plan = StepPlan {
            term: Term(1),
            incarnation: Incarnation(2),
            epoch: Epoch(3),
            step: StepId(record.step.0 + 1),
            committed_step: record.step,
            token_hash: record.token_hash(),
            ..StepPlan::default()
        };
        plan.plan_hash = plan.chain(record.plan_hash);
        plan
    }

    #[test]
    fn plans_of_another_life_order_or_past_are_refused() {
        let changes: [fn(&mut StepPlan); 7] = [
            |p| p.term = Term(2),
            |p| p.incarnation = Incarnation(1),
            |p| p.epoch = Epoch(4),
            |p| p.step = StepId(3),
            |p| p.plan_hash ^= 1,
            |p| p.token_hash ^= 1,
            |p| p.committed_step = StepId(2),
        ];
        for change in changes {
            let mut record = record();
            record.admit(&next(&record)).expect("the next plan");
            record.commit(record.step, &[(SeqSlot(1), TokenId(5))]);
            let mut plan = next(&record);
            change(&mut plan);
            record.admit(&plan).expect_err("not the next plan");
            record.admit(&next(&record)).expect("a refused plan changes nothing");
        }
    }

    #[test]
    fn commits_may_lag_by_the_steps_in_flight_but_not_without_end() {
        let mut record = record();
        for step in 1..40u64 {
            let mut plan = next(&record);
            (plan.committed_step, plan.token_hash) =
                *record.token_hashes.iter().rev().nth(2.min(step as usize - 1)).expect("kept");
            record.admit(&plan).expect("two steps behind is fine");
            record.commit(record.step, &[]);
        }
        let mut plan = next(&record);
        plan.committed_step = StepId(1);
        assert!(matches!(record.admit(&plan), Err(Divergence::Committed { .. })));
    }
}
