//! `{"name": ..., "parameters": {...}}` as the whole answer, several with `; ` between: Llama 3.1 to 3.3.

use super::{Body, ToolFormat};

pub(super) const FORMAT: ToolFormat = ToolFormat {
    name: "llama3_json",
    starts: &["<|python_tag|>"],
    ends: &["<|eom_id|>", "<|eot_id|>"],
    leading: Some('{'),
    body: Body::Json,
    arguments_key: "parameters",
    open: "",
    close: "",
    between: "; ",
    each: false,
    keeps_special: true,
};
