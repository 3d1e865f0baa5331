//! The numbers of a model: everything about its shape that head and ranks must agree on.
//!
//! **Invariant:** a geometry that left this crate passed [`Geometry::check`]: nothing is zero or absurd, heads divide.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Architecture, ModelError};

/// Largest width, vocabulary or position that is believed.
const SIZE_MAX: usize = 1 << 28;
/// Most layers that are believed.
const LAYERS_MAX: usize = 1 << 12;
/// Most heads that are believed.
const HEADS_MAX: usize = 1 << 14;
/// Widest head that is believed.
const HEAD_DIM_MAX: usize = 1 << 12;

/// How rotary frequencies are stretched beyond the trained length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Positions divided by a factor.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a smooth ramp between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f32,
        /// Wavelengths above `original / low` are low.
        low_freq_factor: f32,
        /// Wavelengths below `original / high` are high.
        high_freq_factor: f32,
        /// Trained length.
        original_max_position: u32,
    },
    /// Each frequency divided by a factor of its own: what GGUF files store in place of the rule that made the factors.
    Factors {
        /// `[head_dim / 2]` divisors.
        factors: Vec<f32>,
    },
}

/// Shape of a decoder-only transformer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Geometry {
    /// Family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest trained sequence.
    pub max_position: usize,
    /// Epsilon of RMSNorm.
    pub norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Their scaling.
    pub rope_scaling: RopeScaling,
    /// The output head is the embedding.
    pub tied_embeddings: bool,
    /// Bias on Q, K and V.
    pub qkv_bias: bool,
    /// A query sees this many positions back, itself included; `None` sees all.
    pub sliding_window: Option<usize>,
}

impl Geometry {
    /// Width of the output of all query heads.
    pub const fn query_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Width of K, or of V, of all heads.
    pub const fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Refuses what no code could run.
    pub(crate) fn check(&self, path: &Path) -> Result<(), ModelError> {
        let sizes = [
            ("hidden_size", self.hidden_size, SIZE_MAX),
            ("intermediate_size", self.intermediate_size, SIZE_MAX),
            ("num_hidden_layers", self.num_layers, LAYERS_MAX),
            ("num_attention_heads", self.num_heads, HEADS_MAX),
            ("num_key_value_heads", self.num_kv_heads, HEADS_MAX),
            ("head_dim", self.head_dim, HEAD_DIM_MAX),
            ("vocab_size", self.vocab_size, SIZE_MAX),
            ("max_position_embeddings", self.max_position, SIZE_MAX),
        ];
        for (field, value, max) in sizes {
            if value == 0 || value > max {
                return Err(ModelError::config(path, field, format!("is {value}, which is not within 1 to {max}")));
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let reason = format!("is {}, which does not divide {} query heads", self.num_kv_heads, self.num_heads);
            return Err(ModelError::config(path, "num_key_value_heads", reason));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ModelError::config(path, "head_dim", format!("is {}, but must be even", self.head_dim)));
        }
        if self.sliding_window == Some(0) {
            return Err(ModelError::config(path, "sliding_window", "is 0, so that no token sees any"));
        }
        self.check_floats(path)
    }

    fn check_floats(&self, path: &Path) -> Result<(), ModelError> {
        let mut values = vec![("rms_norm_eps", self.norm_eps), ("rope_theta", self.rope_theta)];
        match &self.rope_scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => values.push(("rope_scaling.factor", *factor)),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                values.push(("rope_scaling.factor", *factor));
                values.push(("rope_scaling.low_freq_factor", *low_freq_factor));
                values.push(("rope_scaling.high_freq_factor - low_freq_factor", high_freq_factor - low_freq_factor));
                values.push(("rope_scaling.original_max_position_embeddings", *original_max_position as f32));
            }
            RopeScaling::Factors { factors } => {
                if factors.len() != self.head_dim / 2 {
                    let reason = format!("has {} factors for {} frequencies", factors.len(), self.head_dim / 2);
                    return Err(ModelError::config(path, "rope_freqs.weight", reason));
                }
                values.extend(factors.iter().map(|factor| ("rope_freqs.weight", *factor)));
            }
        }
        for (field, value) in values {
            if !value.is_finite() || value <= 0.0 {
                return Err(ModelError::config(path, field, format!("is {value}, but must be above 0")));
            }
        }
        Ok(())
    }
}
