//! `<|action_start|><|plugin|>{"name": ..., "parameters": {...}}<|action_end|>`: InternLM 2 and 2.5.

use super::{Body, ToolFormat};

pub(super) const FORMAT: ToolFormat = ToolFormat {
    name: "internlm",
    starts: &["<|action_start|><|plugin|>", "<|action_start|> <|plugin|>"],
    ends: &["<|action_end|>"],
    leading: None,
    body: Body::Json,
    arguments_key: "parameters",
    open: "<|action_start|><|plugin|>\n",
    close: "<|action_end|>",
    between: "\n",
    each: true,
    keeps_special: true,
};
