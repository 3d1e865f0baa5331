//! Model files, without candle and without a device.
//!
//! Owns `config.json`, GGUF and safetensors headers, tokenizer files, [`Geometry`], [`ShardPlan`] and memory arithmetic.
//! Head, loader and ranks call the same functions, so they cannot disagree. Does not know kernels, ranks' processes or text.
//!
//! **Invariant:** a header that was accepted describes ranges inside its file; whatever lies is refused before it is used.

mod dtype;
mod error;
mod geometry;
mod shard;

pub use dtype::StoredType;
pub use error::ModelError;
pub use geometry::{Architecture, Geometry, RopeScaling};
pub use shard::{ShardPlan, Split};
