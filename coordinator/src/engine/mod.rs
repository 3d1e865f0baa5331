//! One engine per tensor-parallel group: step loop, sequences, scheduler, KV blocks.
//!
//! Knows tokens only: no text, no HTTP, no cluster. Runs on a thread of its own.
//!
//! **Invariant:** every accepted request ends in exactly one event that carries a finish reason or an error.

mod request;

pub use request::{EngineError, EngineLimits, FinishReason, GenerateRequest, TokenEvent, Usage};
mod stub;
pub use stub::*;
