//! Model files, without candle and without a device.
//!
//! Owns `config.json`, GGUF and safetensors headers, tokenizer files, [`Geometry`], [`ShardPlan`] and memory arithmetic.
//! Head, loader and ranks call the same functions, so they cannot disagree. Does not know kernels, ranks' processes or text.
//!
//! **Invariant:** a header that was accepted describes ranges inside its file; whatever lies is refused before it is used.

mod architecture;
mod dtype;
mod embedding;
mod error;
mod geometry;
mod gguf;
mod huggingface;
mod json;
mod mapping;
mod memory;
mod model;
mod names;
mod row_order;
mod sentencepiece;
mod shard;
mod tensors;
#[cfg(any(test, feature = "test-support"))]
pub mod test_support;
mod texts;

pub use architecture::Architecture;
pub use dtype::StoredType;
pub use embedding::{EmbeddingPooling, EmbeddingSettings, EmbeddingWidths};
pub use error::ModelError;
pub use geometry::{Geometry, RopeScaling};
pub use memory::{kv_block_bytes, weight_bytes};
pub use model::{FileKind, ModelFiles, TensorView};
pub use sentencepiece::SentencePieceFiles;
pub use shard::{ShardPlan, Split};
pub use tensors::{EMBEDDING, FINAL_NORM, HEAD, LayerNames, Sharding, TensorSpec};
pub use texts::{GenerationDefaults, GgufVocab, TokenizerSource};
