//! `{"name": ..., "parameters": {...}}` as the whole answer, several with `; ` between: Llama 3.1 to 3.3.

use super::{Body, ToolFormat};

pub(super) const FORMAT: ToolFormat = ToolFormat {
    name: "llama3_json",
    also: &["llama3", "llama", "llama4_json"],
    marks: &["<|python_tag|>", "Environment: ipython", "\"parameters\": dictionary of"],
    token: None,
    starts: &["<|python_tag|>"],
    ends: &["<|eom_id|>", "<|eot_id|>"],
    leading: Some('{'),
    body: Body::Json,
    bare_names: false,
    arguments_key: "parameters",
    open: "",
    close: "",
    between: "; ",
    each: false,
    keeps_special: true,
};
