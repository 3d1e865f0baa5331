//! How a model's hidden states become an embedding, as its files say.

/// Settings of embeddings; where a model says nothing, the last token's hidden state, normalised, at its full width.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddingSettings {
    /// What is made of the hidden states.
    pub pooling: EmbeddingPooling,
    /// Whether the vector is brought to length 1.
    pub normalizes: bool,
    /// Whether it may be cut.
    pub widths: EmbeddingWidths,
}

impl Default for EmbeddingSettings {
    fn default() -> Self {
        Self { pooling: EmbeddingPooling::Last, normalizes: true, widths: EmbeddingWidths::Whole }
    }
}

/// What is made of the hidden states of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EmbeddingPooling {
    /// That of the last token.
    Last,
    /// The mean over all tokens.
    Mean,
    /// Something that is not built: in words.
    Other(String),
}

/// To which widths an embedding may be cut. Source: arXiv:2205.13147.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EmbeddingWidths {
    /// None but its own: the model was not trained for it.
    Whole,
    /// Any.
    Any,
    /// These.
    Only(Vec<u32>),
}
