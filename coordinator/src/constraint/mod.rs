//! Structured output: grammars, schemas, regular expressions and choices as constraints on tokens.
//!
//! Owns the limits under which a client's grammar is compiled, and the way from a compiled grammar to the engine's
//! [`TokenConstraint`](crate::engine::TokenConstraint). Knows no HTTP.
//!
//! **Invariant:** nothing of a client's grammar is compiled before its size and nesting are checked; compiling happens on a
//! thread of its own with a large stack and a deadline, a few at a time.
//! **Invariant:** a grammar that cannot be compiled hurts only the request that brought it.

mod budget;
mod calls;
mod compiler;
mod declared;
mod grammar;
mod limits;
mod matcher;
mod vocabulary;

pub use budget::ThoughtBudget;
pub use calls::{call_grammar, free_grammar};
pub use compiler::GrammarCompiler;
pub use grammar::Grammar;
pub use limits::GrammarError;
pub use matcher::Thoughts;
