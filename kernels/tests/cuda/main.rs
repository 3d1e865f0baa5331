//! Every op of the contract on an NVIDIA device against the reference: every activation type, odd row counts (so that padding
//! shows), outputs full of NaN beforehand. A test runs one program on both backends, through the contract only.
//!
//! Not part of `cargo test`: it needs a device, and fails where there is none. `cargo xtask gpu-test` runs it. Tests named
//! `large` take widths of real models; `--skip large` leaves what is quick enough for `compute-sanitizer`.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod attention;
mod bench;
mod edits;
mod products;
mod ranks;
mod rows;
mod sampling;
mod steps;

/// One test for each activation type.
macro_rules! in_every_type {
    ($($name:ident => $check:path),+ $(,)?) => {
        $(mod $name {
            use phalanx_kernels::cuda::Dtype;

            #[test]
            fn f32() {
                $check(Dtype::F32);
            }

            #[test]
            fn f16() {
                $check(Dtype::F16);
            }

            #[test]
            fn bf16() {
                $check(Dtype::Bf16);
            }
        })+
    };
}

in_every_type! {
    embed => crate::rows::check_embed,
    norms => crate::rows::check_norms,
    sums => crate::rows::check_sums,
    linear => crate::products::check_linear,
    linear_large => crate::products::check_large,
    gate_up => crate::products::check_gate_up,
    logits => crate::products::check_logits,
    heads => crate::attention::check_attention,
    heads_large => crate::attention::check_large,
    greedy => crate::sampling::check_greedy,
    draws => crate::sampling::check_draws,
    scores => crate::sampling::check_scores,
    last_tokens => crate::steps::check_last_tokens,
    recording => crate::steps::check_recording,
    edited => crate::edits::check_tokens,
    edited_values => crate::edits::check_values,
    edited_recording => crate::edits::check_recording,
    two_ranks => crate::ranks::check,
    two_ranks_nccl => crate::ranks::check_nccl,
    two_ranks_late => crate::ranks::check_late,
}
