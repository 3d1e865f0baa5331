//! GGUF's names for tensors, and the order of their rows.

use crate::model::RowOrder;
use crate::{Architecture, EMBEDDING, FINAL_NORM, Geometry, HEAD};

/// Parts of a layer: GGUF's name, Hugging Face's name.
const LAYER_PARTS: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The Hugging Face name of a tensor; one that has none keeps its own.
pub(crate) fn hugging_face(name: &str) -> String {
    match name {
        "token_embd.weight" => EMBEDDING.to_owned(),
        "output_norm.weight" => FINAL_NORM.to_owned(),
        "output.weight" => HEAD.to_owned(),
        other => layer_part(other).unwrap_or_else(|| other.to_owned()),
    }
}

/// `blk.0.attn_q.weight` is `model.layers.0.self_attn.q_proj.weight`.
fn layer_part(name: &str) -> Option<String> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (part, suffix) = rest.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (_, part) = LAYER_PARTS.iter().find(|(gguf, _)| *gguf == part)?;
    Some(format!("model.layers.{layer}.{part}.{suffix}"))
}

/// GGUF files of the Llama family rotate neighbours, so their rows of Q and K alternate between the halves that Hugging Face
/// rotates against each other.
pub(crate) fn row_order(geometry: &Geometry, name: &str) -> RowOrder {
    let is_rotated = name.contains(".self_attn.q_proj.") || name.contains(".self_attn.k_proj.");
    match geometry.architecture {
        Architecture::Llama if is_rotated => RowOrder::Interleaved { head_dim: geometry.head_dim },
        Architecture::Llama | Architecture::Qwen2 => RowOrder::AsStored,
    }
}
