//! A budget for thoughts: behind so many of their tokens the one that closes them is the only one that may come.
//!
//! **Invariant:** while thoughts are within the budget, and behind them, what else holds the output decides alone.

use std::sync::Arc;

use phalanx_proto::TokenId;

use crate::engine::{Constraint, ConstraintError, NextTokens, TokenConstraint};

/// The tokens around the thoughts of a model, and how far an output is within them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThoughtBudget {
    start: Option<TokenId>,
    end: TokenId,
    /// Thought tokens that are left.
    left: u32,
    is_inside: bool,
}

impl ThoughtBudget {
    /// A budget of `left` tokens between `start` and `end`, behind a prompt that may have opened thoughts itself.
    pub fn new(start: Option<TokenId>, end: TokenId, left: u32, prompt: &[TokenId]) -> Self {
        let place = |mark: TokenId| prompt.iter().rposition(|token| *token == mark);
        let is_inside = start.and_then(place).is_some_and(|opened| place(end).is_none_or(|closed| closed < opened));
        Self { start, end, left, is_inside }
    }

    /// Adds the budget to what holds the output already.
    ///
    /// # Errors
    /// Nothing may come at all.
    pub fn hold(self, inner: Option<Constraint>, vocab_size: u32) -> Result<Constraint, ConstraintError> {
        let mut end_only = vec![0; vocab_size.div_ceil(u32::BITS) as usize];
        match end_only.get_mut((self.end.0 / u32::BITS) as usize) {
            Some(word) => *word |= 1 << (self.end.0 % u32::BITS),
            None => return Err(ConstraintError { reason: "no token closes the thoughts".into() }),
        }
        Constraint::new(Box::new(WithinBudget {
            budget: self,
            inner: inner.map(Constraint::into_rules),
            end_only: end_only.into(),
            before: Vec::new(),
        }))
    }

    fn take(&mut self, token: TokenId) {
        if token == self.end {
            self.is_inside = false;
        } else if self.is_inside {
            self.left = self.left.saturating_sub(1);
        } else {
            self.is_inside = Some(token) == self.start;
        }
    }
}

/// What else holds an output, while its thoughts are within their budget.
#[derive(Debug)]
struct WithinBudget {
    budget: ThoughtBudget,
    inner: Option<Box<dyn TokenConstraint>>,
    /// The mask of the closing token.
    end_only: Arc<[u32]>,
    /// Where the output stood before each token that was taken in, for the way back.
    before: Vec<(u32, bool)>,
}

impl TokenConstraint for WithinBudget {
    fn mask(&mut self) -> Result<NextTokens, ConstraintError> {
        if self.budget.is_inside && self.budget.left == 0 {
            return Ok(NextTokens::Only(Arc::clone(&self.end_only)));
        }
        self.inner.as_mut().map_or(Ok(NextTokens::Any), |inner| inner.mask())
    }

    fn commit(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        self.before.push((self.budget.left, self.budget.is_inside));
        self.budget.take(token);
        self.inner.as_mut().map_or(Ok(()), |inner| inner.commit(token))
    }

    fn rollback(&mut self, num_tokens: usize) -> Result<(), ConstraintError> {
        let kept = self.before.len().checked_sub(num_tokens);
        let kept = kept.ok_or_else(|| ConstraintError { reason: "fewer tokens were taken in".into() })?;
        if let Some(&(left, is_inside)) = self.before.get(kept) {
            (self.budget.left, self.budget.is_inside) = (left, is_inside);
            self.before.truncate(kept);
        }
        self.inner.as_mut().map_or(Ok(()), |inner| inner.rollback(num_tokens))
    }

    fn fork(&self) -> Box<dyn TokenConstraint> {
        Box::new(Self {
            budget: self.budget.clone(),
            inner: self.inner.as_ref().map(|inner| inner.fork()),
            end_only: Arc::clone(&self.end_only),
            before: self.before.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: TokenId = TokenId(40);
    const END: TokenId = TokenId(41);

    fn held(left: u32, prompt: &[u32]) -> Constraint {
        let prompt: Vec<TokenId> = prompt.iter().copied().map(TokenId).collect();
        ThoughtBudget::new(Some(START), END, left, &prompt).hold(None, 64).unwrap()
    }

    /// For each token whether the next one was forced to close the thoughts, from the first token on.
    #[track_caller]
    fn check(left: u32, prompt: &[u32], tokens: &[u32], expected: &[bool]) {
        let mut constraint = held(left, prompt);
        let forced = |constraint: &Constraint| match constraint.next() {
            NextTokens::Only(words) => {
                assert_eq!(**words, [0, 1 << (END.0 - 32)]);
                true
            }
            other => {
                assert_eq!(*other, NextTokens::Any);
                false
            }
        };
        let mut told = vec![forced(&constraint)];
        for token in tokens {
            constraint = constraint.commit(TokenId(*token)).unwrap();
            told.push(forced(&constraint));
        }
        assert_eq!(told, expected, "{left} {prompt:?} {tokens:?}");
    }

    #[test]
    fn thoughts_end_when_their_budget_is_spent() {
        check(2, &[1], &[40, 5, 6, 41, 7], &[false, false, false, true, false, false]);
        check(2, &[1], &[5, 6, 7, 8], &[false; 5]);
        check(1, &[1, 40], &[5, 41, 6], &[false, true, false, false]);
        check(0, &[1, 40, 41, 40], &[41, 6], &[true, false, false]);
        check(0, &[1, 40, 41], &[6, 40, 41], &[false, false, true, false]);
        check(3, &[40], &[5, 41, 40, 6, 7, 41], &[false, false, false, false, false, true, false]);
    }

    #[test]
    fn tokens_can_be_taken_back() {
        let mut rules = held(1, &[40]).into_rules();
        rules.commit(TokenId(5)).unwrap();
        assert_ne!(rules.mask(), Ok(NextTokens::Any));
        rules.rollback(1).unwrap();
        assert_eq!(rules.mask(), Ok(NextTokens::Any));
        assert!(rules.rollback(1).is_err());
    }
}
