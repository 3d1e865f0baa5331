//! Matrices: packed weights, activations on their way in, products.
//!
//! `out = x W^T` with `x` `[M, K]`, `W` `[N, K]` in any stored format, `out` `[M, N]`. Per weight format and activation mode there is one
//! arithmetic. With f32 activations: weights exactly as f32, products summed by fused multiply-add in the order of K, in
//! stretches of 256 whose sums are added in order. With int8 activations: per block of 32 an exact integer product, turned
//! into f32, times the activations' scale, times the weights' scale, added in the order of K, with the minimum's share after each block.
//!
//! **Invariant:** an output depends on its row of `x` and its row of `W` only, bit for bit, whatever M, N, the number of threads, the
//! tiling and the instructions are.

mod activation;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod driver;
mod format;
mod isa;
mod matrix;
mod memory;
mod packed;
mod scalar;
mod scratch;
#[cfg(test)]
mod tests;

pub use driver::{gate_up, linear};
pub use isa::Isa;
pub use matrix::{Activations, CpuMatrix};
pub use scratch::Scratch;
