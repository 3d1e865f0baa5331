//! `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]name[ARGS]{...}` of later models: Mistral.

use super::{Body, ToolFormat};

pub(super) const FORMAT: ToolFormat = ToolFormat {
    name: "mistral",
    starts: &["[TOOL_CALLS]"],
    ends: &["</s>"],
    leading: None,
    body: Body::Json,
    arguments_key: "arguments",
    open: "[TOOL_CALLS][",
    close: "]",
    between: ", ",
    each: false,
    keeps_special: true,
};
