//! `[name(key=value, ...), ...]` as the whole answer: Llama 4, and smaller models that are trained on Python.

use super::{Body, ToolFormat};

pub(super) const FORMAT: ToolFormat = ToolFormat {
    name: "pythonic",
    also: &["llama4_pythonic"],
    marks: &["<|python_start|>", "[func_name1("],
    token: None,
    starts: &["<|python_start|>"],
    ends: &["<|python_end|>", "<|eom|>", "<|eot|>"],
    leading: Some('['),
    body: Body::Python,
    bare_names: false,
    arguments_key: "",
    open: "[",
    close: "]",
    between: ", ",
    each: false,
    keeps_special: true,
};
