//! One file per op: shapes, kernel, plain reference, parity test.
//!
//! **Invariant:** what an op writes for a row depends only on that row's inputs, never on batch, threads or chunking.

pub mod sample;
