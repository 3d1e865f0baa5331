//! Sizes that are known before the first step, and how much a step may have.

use phalanx_formats::StoredType;

/// Sizes of one layer's K and V storage: `[K/V][kv head][slot][head dim]`, `slot = block * block_size + offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Blocks.
    pub num_blocks: usize,
    /// Slots in a block, a multiple of 16.
    pub block_size: usize,
    /// KV heads on this rank.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// F32, F16 or BF16, as the backend has it.
    pub dtype: StoredType,
}

/// Heads on this rank, and where their output goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// KV heads on this rank, padding included.
    pub num_kv_heads: usize,
    /// Query heads of one KV head, padding included.
    pub group: usize,
    /// Query heads that are real: the first ones. Nothing is written for the others.
    pub num_heads_owned: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Column of the output buffer where the first owned head goes; columns outside the owned heads stay zero.
    pub out_column: usize,
    /// Factor on q . k.
    pub scale: f32,
    /// A query sees this many positions back, itself included.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)` before the softmax. Source: arXiv:2408.00118, section 2.
    pub soft_cap: Option<f32>,
}

/// What a gated layer does to its gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateActivation {
    /// `x / (1 + exp(-x))`. Source: arXiv:2002.05202.
    Silu,
    /// `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`. Source: arXiv:1606.08415, section 2.
    GeluTanh,
}

/// Rotary cosines and sines, host side: `[max_position, head_dim / 2]` each. Halves are rotated (not interleaved pairs).
#[derive(Debug, Clone)]
pub struct RopeTable {
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
    /// Width of a head.
    pub head_dim: usize,
}

/// Largest step that a backend must hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InputLimits {
    /// Rows.
    pub tokens_max: usize,
    /// Sequences.
    pub seqs_max: usize,
    /// Entries of all block tables.
    pub table_entries_max: usize,
    /// Rows with logits.
    pub logit_rows_max: usize,
    /// Slots that keep a last token.
    pub slots_max: usize,
    /// Positions of the longest sequence.
    pub positions_max: usize,
    /// Steps that may be submitted and not yet taken.
    pub steps_max: usize,
    /// Tokens of the whole vocabulary; 0 where no row has a mask or edits.
    pub vocab_size: usize,
    /// What attention is planned for.
    pub attention: AttentionLimits,
}

/// What all attention layers of a model have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AttentionLimits {
    /// KV heads on this rank, padding included.
    pub num_kv_heads: usize,
    /// Query heads of one KV head, padding included.
    pub group: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Slots in a block.
    pub block_size: usize,
    /// A query sees this many positions back, itself included.
    pub window: Option<usize>,
}

/// Memory of the device, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemoryInfo {
    /// All of it.
    pub total: u64,
    /// What nobody holds.
    pub free: u64,
}
