//! InternLM2 and InternLM2.5. Source: arXiv:2403.17297, section 2.2.

use super::{Family, GgufRows, Switch, Window};
use crate::names::NameTable;

pub(super) const FAMILY: Family = Family {
    class_name: "InternLM2ForCausalLM",
    model_type: "internlm2",
    max_position: 2048,
    qkv_bias: Switch::Field { name: "bias", absent: true },
    window: Window::Never,
    names: &NameTable {
        whole: &[("model.tok_embeddings.weight", "model.embed_tokens.weight"), ("output.weight", "lm_head.weight")],
        layers: "model.layers.",
        parts: &[
            ("attention_norm", "input_layernorm"),
            ("attention.wo", "self_attn.o_proj"),
            ("ffn_norm", "post_attention_layernorm"),
            ("feed_forward.w1", "mlp.gate_proj"),
            ("feed_forward.w3", "mlp.up_proj"),
            ("feed_forward.w2", "mlp.down_proj"),
        ],
        fused_qkv: Some("attention.wqkv"),
    },
    gguf: Some(GgufRows::Interleaved),
};
