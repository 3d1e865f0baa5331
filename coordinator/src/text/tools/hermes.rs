//! `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen 2.5 and 3, and models that are told so.

use super::{Body, ToolFormat};

pub(super) const FORMAT: ToolFormat = ToolFormat {
    name: "hermes",
    also: &["qwen", "qwen25", "qwen3", "generic"],
    marks: &["<tool_call>"],
    token: None,
    starts: &["<tool_call>"],
    ends: &["</tool_call>"],
    leading: None,
    body: Body::Json,
    bare_names: false,
    arguments_key: "arguments",
    open: "<tool_call>\n",
    close: "\n</tool_call>",
    between: "\n",
    each: true,
    keeps_special: false,
};
