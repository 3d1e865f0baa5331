//! `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]name[ARGS]{...}` of later models: Mistral.

use super::{Body, ToolFormat};

pub(super) const FORMAT: ToolFormat = ToolFormat {
    name: "mistral",
    also: &[],
    marks: &["[TOOL_CALLS]"],
    token: None,
    starts: &["[TOOL_CALLS]"],
    ends: &["</s>"],
    leading: None,
    body: Body::Json,
    bare_names: true,
    arguments_key: "arguments",
    open: "[TOOL_CALLS][",
    close: "]",
    between: ", ",
    each: false,
    keeps_special: true,
};
