//! `<|action_start|><|plugin|>{"name": ..., "parameters": {...}}<|action_end|>`: InternLM 2 and 2.5.

use super::{Body, ToolFormat};

pub(super) const FORMAT: ToolFormat = ToolFormat {
    name: "internlm",
    also: &["internlm2"],
    marks: &["<|action_start|>"],
    token: Some("<|action_start|>"),
    starts: &["<|action_start|><|plugin|>", "<|action_start|> <|plugin|>"],
    ends: &["<|action_end|>"],
    leading: None,
    body: Body::Json,
    bare_names: false,
    arguments_key: "parameters",
    open: "<|action_start|><|plugin|>\n",
    close: "<|action_end|>",
    between: "\n",
    each: true,
    keeps_special: true,
};
