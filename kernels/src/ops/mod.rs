//! One file per op: its shapes, its CPU form, a plain reference, a parity test.
//!
//! **Invariant:** what an op writes for a row depends only on that row's inputs, never on batch, threads or chunking.

pub(crate) mod add;
pub(crate) mod attend;
pub mod edit;
pub(crate) mod embed;
pub(crate) mod gate_up_act;
pub(crate) mod host_sampler;
pub(crate) mod linear;
pub(crate) mod logits;
pub(crate) mod reduce;
pub(crate) mod rms_norm;
pub(crate) mod rope_store;
pub mod sample;
#[cfg(test)]
pub(crate) mod test_random;

use crate::KernelError;

/// An error where `fits` does not hold.
pub(crate) fn fit(op: &'static str, fits: bool, reason: impl FnOnce() -> String) -> Result<(), KernelError> {
    if fits { Ok(()) } else { Err(KernelError::Shape { op, reason: reason() }) }
}
