//! GGUF's names for tensors, and the order of their rows.

use crate::architecture::GgufRows;
use crate::names::NameTable;
use crate::row_order::RowOrder;
use crate::{EMBEDDING, FINAL_NORM, Geometry, HEAD};

/// The names of GGUF files, whatever the family.
pub(crate) const NAMES: NameTable = NameTable {
    whole: &[("token_embd.weight", EMBEDDING), ("output_norm.weight", FINAL_NORM), ("output.weight", HEAD)],
    layers: "blk.",
    parts: &[
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ],
    fused_qkv: None,
};

/// How the rows of a tensor lie, by its Hugging Face name: families whose files rotate neighbours have the two rotary halves
/// of Q and K alternate, which Hugging Face rotates against each other.
pub(crate) fn row_order(geometry: &Geometry, name: &str) -> RowOrder {
    let is_rotated = name.contains(".self_attn.q_proj.") || name.contains(".self_attn.k_proj.");
    match geometry.architecture.family().gguf {
        Some(GgufRows::Interleaved) if is_rotated => RowOrder::Interleaved { head_dim: geometry.head_dim },
        _ => RowOrder::AsStored,
    }
}
