//! A compiled grammar as the engine's constraint.

use std::fmt;
use std::sync::Arc;

use llguidance::Matcher;
use phalanx_proto::TokenId;

use super::vocabulary::Vocabulary;
use crate::engine::{ConstraintError, NextTokens, TokenConstraint};

/// The state of one output within its grammar.
pub(super) struct GrammarConstraint {
    matcher: Matcher,
    vocabulary: Arc<Vocabulary>,
}

impl fmt::Debug for GrammarConstraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarConstraint").finish_non_exhaustive()
    }
}

impl GrammarConstraint {
    pub(super) fn new(matcher: Matcher, vocabulary: Arc<Vocabulary>) -> Self {
        Self { matcher, vocabulary }
    }
}

fn failed(error: impl fmt::Display) -> ConstraintError {
    let reason = error.to_string();
    ConstraintError { reason: reason.lines().next().unwrap_or_default().to_owned() }
}

impl TokenConstraint for GrammarConstraint {
    fn mask(&mut self) -> Result<NextTokens, ConstraintError> {
        if let Some(error) = self.matcher.get_error() {
            return Err(failed(error));
        }
        if self.matcher.is_stopped() {
            return Ok(NextTokens::Done);
        }
        let allowed = self.matcher.compute_mask().map_err(failed)?;
        let words = self.vocabulary.words(allowed.as_slice());
        if self.vocabulary.allows_only_ends(&words) {
            return Ok(NextTokens::Done);
        }
        Ok(NextTokens::Only(words.into()))
    }

    fn commit(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        self.matcher.consume_token(token.0).map_err(failed)
    }

    fn rollback(&mut self, num_tokens: usize) -> Result<(), ConstraintError> {
        self.matcher.rollback(num_tokens).map_err(failed)
    }

    fn fork(&self) -> Box<dyn TokenConstraint> {
        Box::new(Self { matcher: self.matcher.deep_clone(), vocabulary: Arc::clone(&self.vocabulary) })
    }
}

/// The tokens around the thoughts of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thoughts {
    /// Opens them; none where the prompt has done so.
    pub start: Option<TokenId>,
    /// Closes them.
    pub end: TokenId,
}

/// Free while the model thinks, held to a grammar from its answer on.
#[derive(Debug)]
pub(super) struct AfterThoughts {
    thoughts: Thoughts,
    inner: Box<dyn TokenConstraint>,
    /// Tokens so far.
    num_tokens: usize,
    /// How many of them are thoughts with their marks; none while thoughts go on.
    num_thoughts: Option<usize>,
}

impl AfterThoughts {
    pub(super) fn new(thoughts: Thoughts, inner: Box<dyn TokenConstraint>) -> Self {
        Self { thoughts, inner, num_tokens: 0, num_thoughts: None }
    }

    /// True where the first token says whether there are thoughts.
    fn is_undecided(&self) -> bool {
        self.num_tokens == 0 && self.thoughts.start.is_some()
    }
}

impl TokenConstraint for AfterThoughts {
    fn mask(&mut self) -> Result<NextTokens, ConstraintError> {
        if self.num_thoughts.is_some() {
            return self.inner.mask();
        }
        match self.thoughts.start {
            Some(start) if self.num_tokens == 0 => Ok(with_token(self.inner.mask()?, start)),
            _ => Ok(NextTokens::Any),
        }
    }

    fn commit(&mut self, token: TokenId) -> Result<(), ConstraintError> {
        if self.is_undecided() && Some(token) != self.thoughts.start {
            self.num_thoughts = Some(0);
        }
        self.num_tokens += 1;
        if self.num_thoughts.is_some() {
            return self.inner.commit(token);
        }
        if token == self.thoughts.end {
            self.num_thoughts = Some(self.num_tokens);
        }
        Ok(())
    }

    fn rollback(&mut self, num_tokens: usize) -> Result<(), ConstraintError> {
        let kept = self.num_tokens.checked_sub(num_tokens);
        let kept = kept.ok_or_else(|| ConstraintError { reason: "fewer tokens were taken in".into() })?;
        let num_in_grammar = self.num_tokens - self.num_thoughts.unwrap_or(self.num_tokens);
        self.inner.rollback(num_tokens.min(num_in_grammar))?;
        self.num_tokens = kept;
        self.num_thoughts = self.num_thoughts.filter(|num_thoughts| *num_thoughts <= kept && kept > 0);
        Ok(())
    }

    fn fork(&self) -> Box<dyn TokenConstraint> {
        let (thoughts, inner) = (self.thoughts, self.inner.fork());
        Box::new(Self { thoughts, inner, num_tokens: self.num_tokens, num_thoughts: self.num_thoughts })
    }
}

/// A mask that allows one token more.
fn with_token(next: NextTokens, token: TokenId) -> NextTokens {
    let NextTokens::Only(words) = next else { return next };
    let mut words = words.to_vec();
    if let Some(word) = words.get_mut((token.0 / u32::BITS) as usize) {
        *word |= 1 << (token.0 % u32::BITS);
    }
    NextTokens::Only(words.into())
}
