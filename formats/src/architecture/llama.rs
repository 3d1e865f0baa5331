//! Llama 2 and 3, SmolLM2. Source: arXiv:2307.09288, arXiv:2407.21783.

use super::{Family, GgufRows, Switch, Window};
use crate::names::LLAMA;

pub(super) const FAMILY: Family = Family {
    class_name: "LlamaForCausalLM",
    model_type: "llama",
    max_position: 2048,
    qkv_bias: Switch::Field { name: "attention_bias", absent: false },
    window: Window::Switched { absent: true },
    names: &LLAMA,
    gguf: Some(GgufRows::Interleaved),
};
