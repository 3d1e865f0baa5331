//! Qwen1.5, Qwen2 and Qwen2.5. Source: arXiv:2309.16609, arXiv:2407.10671.

use super::{Family, GgufRows, Switch, Window};
use crate::names::LLAMA;

pub(super) const FAMILY: Family = Family {
    class_name: "Qwen2ForCausalLM",
    model_type: "qwen2",
    max_position: 32_768,
    qkv_bias: Switch::On,
    window: Window::Switched { absent: false },
    names: &LLAMA,
    gguf: Some(GgufRows::HuggingFace),
};
