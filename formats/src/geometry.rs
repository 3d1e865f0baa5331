//! The numbers of a model: everything about its shape that head and ranks must agree on.

/// Model family, by what its code needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama 2 and 3, SmolLM2.
    Llama,
    /// Qwen1.5, Qwen2, Qwen2.5: bias on QKV.
    Qwen2,
}

/// How rotary frequencies are stretched beyond the trained length.
#[derive(Debug, Clone, Copy, PartialEq)]
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
}

/// Shape of a decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
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
