//! Mistral 7B, Mistral Nemo. Source: arXiv:2310.06825. GGUF files have them as Llama.

use super::{Family, Switch, Window};
use crate::names::LLAMA;

pub(super) const FAMILY: Family = Family {
    class_name: "MistralForCausalLM",
    model_type: "mistral",
    max_position: 131_072,
    qkv_bias: Switch::Field { name: "attention_bias", absent: false },
    window: Window::Length { absent: 4096 },
    names: &LLAMA,
    gguf: None,
};
