//! The CPU backend: [`CpuOps`], and what its ops are made of.
//!
//! Owns how a host computes an op: threads, matrices, vectors of lanes, the cache. Knows no model and no plan.
//!
//! **Invariant:** what an op leaves in a row of a buffer depends on that row's inputs only, bit for bit: never on the other
//! rows of the batch, on the number of threads or on the tiling.

pub(crate) mod attention;
mod backend;
pub(crate) mod disjoint;
pub(crate) mod inputs;
pub(crate) mod kv;
pub(crate) mod lanes;
mod linear;
pub(crate) mod math;
pub(crate) mod memory;
mod pool;
pub(crate) mod rows;

pub use backend::CpuOps;
pub use inputs::{CpuBuffer, CpuInputs};
pub use kv::CpuKvLayer;
pub use linear::{Activations, CpuMatrix, Isa, Scratch, gate_up, linear};
pub use pool::{Pool, Waiting};
