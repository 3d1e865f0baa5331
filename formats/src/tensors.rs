//! Which tensors an architecture has: their names, shapes, and which dimension of them a rank holds.
//!
//! Names are those of Hugging Face's Llama, whatever family a model is of and whatever file it comes from.
//!
//! **Invariant:** the check at open, the loader, dummy weights and memory arithmetic all use this list.

use crate::Geometry;

/// Name of the embedding.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the last norm.
pub const FINAL_NORM: &str = "model.norm.weight";
/// Name of the output head; models with tied embeddings have none.
pub const HEAD: &str = "lm_head.weight";

/// Names of the tensors of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerNames {
    /// Norm before attention.
    pub input_norm: String,
    /// Query, key and value projections, without `.weight` and `.bias`.
    pub qkv: [String; 3],
    /// Output projection of attention.
    pub attention_output: String,
    /// Norm before the MLP.
    pub mlp_norm: String,
    /// Gate.
    pub gate: String,
    /// Up.
    pub up: String,
    /// Down.
    pub down: String,
}

impl LayerNames {
    /// Those of a layer, counted from 0.
    pub fn new(layer: usize) -> Self {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        Self {
            input_norm: name("input_layernorm.weight"),
            qkv: [name("self_attn.q_proj"), name("self_attn.k_proj"), name("self_attn.v_proj")],
            attention_output: name("self_attn.o_proj.weight"),
            mlp_norm: name("post_attention_layernorm.weight"),
            gate: name("mlp.gate_proj.weight"),
            up: name("mlp.up_proj.weight"),
            down: name("mlp.down_proj.weight"),
        }
    }
}

/// Which part of a tensor a rank holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharding {
    /// All of it: norms.
    Whole,
    /// Rows of its query heads.
    QueryRows,
    /// Rows of its KV heads.
    KvRows,
    /// Rows of its part of the MLP.
    InnerRows,
    /// Rows of its part of the vocabulary.
    VocabRows,
    /// Columns of its query heads.
    AttentionCols,
    /// Columns of its part of the MLP.
    InnerCols,
}

/// A tensor that an architecture needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its Hugging Face name.
    pub name: String,
    /// Rows; of a vector, its elements.
    pub rows: usize,
    /// Columns; `None` for a vector.
    pub cols: Option<usize>,
    /// What a rank holds of it.
    pub sharding: Sharding,
}

impl TensorSpec {
    /// Dimensions, outermost first.
    pub fn shape(&self) -> Vec<usize> {
        [self.rows].into_iter().chain(self.cols).collect()
    }
}

impl Geometry {
    /// All tensors of the model, in the order in which a forward meets them.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let matrix = |name: String, rows, cols, sharding| TensorSpec { name, rows, cols: Some(cols), sharding };
        let vector = |name: String, rows, sharding| TensorSpec { name, rows, cols: None, sharding };
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let mut specs = vec![matrix(EMBEDDING.to_owned(), self.vocab_size, hidden, Sharding::VocabRows)];
        for layer in 0..self.num_layers {
            let names = LayerNames::new(layer);
            specs.push(vector(names.input_norm, hidden, Sharding::Whole));
            let widths = [
                (self.query_width(), Sharding::QueryRows),
                (self.kv_width(), Sharding::KvRows),
                (self.kv_width(), Sharding::KvRows),
            ];
            for (name, (rows, sharding)) in names.qkv.into_iter().zip(widths) {
                specs.push(matrix(format!("{name}.weight"), rows, hidden, sharding));
                if self.qkv_bias {
                    specs.push(vector(format!("{name}.bias"), rows, sharding));
                }
            }
            specs.push(matrix(names.attention_output, hidden, self.query_width(), Sharding::AttentionCols));
            specs.push(vector(names.mlp_norm, hidden, Sharding::Whole));
            specs.push(matrix(names.gate, inner, hidden, Sharding::InnerRows));
            specs.push(matrix(names.up, inner, hidden, Sharding::InnerRows));
            specs.push(matrix(names.down, hidden, inner, Sharding::InnerCols));
        }
        specs.push(vector(FINAL_NORM.to_owned(), hidden, Sharding::Whole));
        if !self.tied_embeddings {
            specs.push(matrix(HEAD.to_owned(), self.vocab_size, hidden, Sharding::VocabRows));
        }
        specs
    }
}
