//! From a grammar to a constraint, for one model.
//!
//! **Invariant:** what compiles holds its permit until it ends, also where the request has given up: a slow grammar cannot
//! occupy more than its place.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use llguidance::api::ParserLimits;
use llguidance::toktrie::InferenceCapabilities;
use llguidance::{Matcher, ParserFactory};
use phalanx_proto::TokenId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, timeout_at};

use super::grammar::Grammar;
use super::limits::{CACHED_MAX, COMPILE_DEADLINE, COMPILE_STACK_BYTES, COMPILES_MAX, GrammarError};
use super::matcher::{AfterThoughts, GrammarConstraint, Thoughts};
use super::vocabulary::Vocabulary;
use crate::engine::{Constraint, TokenConstraint};
use crate::heavy;
use crate::text::TextModel;

/// What the library may spend. A mask costs 15 ms at the most, and a sequence some tens of MiB.
const LIBRARY_LIMITS: ParserLimits = ParserLimits {
    max_items_in_row: 2_000,
    initial_lexer_fuel: 1_000_000,
    step_lexer_fuel: 200_000,
    step_max_items: 50_000,
    max_lexer_states: 20_000,
    max_grammar_size: 200_000,
    precompute_large_lexemes: false,
    verbose_errors: false,
};

/// Compiles the grammars of one model. Clones share what was compiled.
#[derive(Clone)]
pub struct GrammarCompiler {
    shared: Arc<Shared>,
}

struct Shared {
    text: Arc<TextModel>,
    vocab_size: u32,
    end_token_ids: Vec<TokenId>,
    /// Made by the first grammar.
    library: OnceLock<Result<Library, GrammarError>>,
    permits: Arc<Semaphore>,
    /// The last grammars, the newest first.
    compiled: Mutex<VecDeque<(String, Constraint)>>,
}

struct Library {
    factory: ParserFactory,
    vocabulary: Arc<Vocabulary>,
}

impl fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarCompiler").field("vocab_size", &self.shared.vocab_size).finish_non_exhaustive()
    }
}

impl GrammarCompiler {
    /// A compiler for a model with `vocab_size` rows of logits. Cheap: the vocabulary is read by the first grammar.
    pub fn new(text: Arc<TextModel>, vocab_size: u32, end_token_ids: Vec<TokenId>) -> Self {
        let (library, permits) = (OnceLock::new(), Arc::new(Semaphore::new(COMPILES_MAX)));
        let shared = Shared { text, vocab_size, end_token_ids, library, permits, compiled: Mutex::default() };
        Self { shared: Arc::new(shared) }
    }

    /// Compiles a grammar, away from the runtime's threads. Where the model thinks first, the grammar begins behind `thoughts`.
    ///
    /// # Errors
    /// The grammar is too large, does not compile, allows nothing or takes too long; or too many are being compiled.
    pub async fn compile(&self, grammar: Grammar, thoughts: Option<Thoughts>) -> Result<Constraint, GrammarError> {
        let what = grammar.what();
        grammar.check()?;
        let key = format!("{thoughts:?} {}", grammar.key());
        if let Some(constraint) = self.shared.cached(&key) {
            return Ok(constraint);
        }
        let deadline = Instant::now() + COMPILE_DEADLINE;
        let permit = timeout_at(deadline, Arc::clone(&self.shared.permits).acquire_owned()).await;
        let Ok(Ok(permit)) = permit else { return Err(GrammarError::Busy) };
        let answer = self.start(grammar, thoughts, permit)?;
        let compiled = timeout_at(deadline, answer).await.map_err(|_| GrammarError::TooSlow { what })?;
        let constraint = compiled.map_err(|_| GrammarError::invalid(what, "its compiler broke"))??;
        self.shared.keep(key, &constraint);
        Ok(constraint)
    }

    fn start(
        &self,
        grammar: Grammar,
        thoughts: Option<Thoughts>,
        permit: OwnedSemaphorePermit,
    ) -> Result<oneshot::Receiver<Result<Constraint, GrammarError>>, GrammarError> {
        let (reply, answer) = oneshot::channel();
        let (shared, what) = (Arc::clone(&self.shared), grammar.what());
        let body = move || {
            let _permit = permit;
            heavy::give_way();
            let compiled = catch_unwind(AssertUnwindSafe(|| shared.constraint(&grammar, thoughts)));
            let broke = |_| Err(GrammarError::invalid(what, "its compiler broke"));
            let _gone = reply.send(compiled.unwrap_or_else(broke));
        };
        let thread = std::thread::Builder::new().name("grammar".into()).stack_size(COMPILE_STACK_BYTES).spawn(body);
        thread.map_err(|error| GrammarError::invalid(what, error))?;
        Ok(answer)
    }
}

impl Shared {
    fn constraint(&self, grammar: &Grammar, thoughts: Option<Thoughts>) -> Result<Constraint, GrammarError> {
        let what = grammar.what();
        let library = self.library.get_or_init(|| self.library()).as_ref().map_err(Clone::clone)?;
        let parser = library.factory.create_parser(grammar.to_library());
        let matcher = Matcher::new(parser);
        if let Some(error) = matcher.get_error() {
            return Err(GrammarError::invalid(what, error));
        }
        let rules: Box<dyn TokenConstraint> =
            Box::new(GrammarConstraint::new(matcher, Arc::clone(&library.vocabulary)));
        // What allows nothing is refused now, also where thoughts come first.
        let constraint = Constraint::new(rules.fork()).map_err(|error| GrammarError::invalid(what, error))?;
        match thoughts {
            None => Ok(constraint),
            Some(thoughts) => Constraint::new(Box::new(AfterThoughts::new(thoughts, rules)))
                .map_err(|error| GrammarError::invalid(what, error)),
        }
    }

    fn library(&self) -> Result<Library, GrammarError> {
        let vocabulary = Arc::new(Vocabulary::new(&self.text, self.vocab_size, &self.end_token_ids));
        let env = Arc::clone(&vocabulary).into_env();
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
            .map_err(|error| GrammarError::invalid("vocabulary", error))?;
        factory.quiet();
        *factory.limits_mut() = LIBRARY_LIMITS;
        Ok(Library { factory, vocabulary })
    }

    fn cached(&self, key: &str) -> Option<Constraint> {
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        let at = compiled.iter().position(|(other, _)| other == key)?;
        let entry = compiled.remove(at)?;
        let constraint = entry.1.clone();
        compiled.push_front(entry);
        Some(constraint)
    }

    fn keep(&self, key: String, constraint: &Constraint) {
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        compiled.truncate(CACHED_MAX - 1);
        compiled.push_front((key, constraint.clone()));
    }
}

#[cfg(test)]
pub(super) mod tests;
