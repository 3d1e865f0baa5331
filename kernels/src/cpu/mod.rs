//! The CPU backend's own kernels: threads, matrices, and what lies between them.
//!
//! Owns how a host computes an op. Knows no model and no plan.
//!
//! **Invariant:** what an op leaves in a row of a buffer depends on that row's inputs only, bit for bit: never on the other
//! rows of the batch, on the number of threads or on the tiling.

mod linear;
mod pool;

pub use linear::{Activations, CpuMatrix, Isa, Scratch, gate_up, linear};
pub use pool::{Pool, Waiting};
