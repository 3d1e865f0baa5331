//! Safetensors files that lie, that are cut or changed: read or refused, never believed.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{folder, geometry_of, llama_config};
use crate::huggingface::read_header;
use crate::{ModelError, ModelFiles};

/// The tensors of `llama_config` as a safetensors header, with true sizes.
fn llama_header() -> (serde_json::Map<String, Value>, usize) {
    let geometry = geometry_of(&llama_config()).unwrap();
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for spec in geometry.tensors() {
        let bytes = spec.shape().iter().product::<usize>() * 2;
        header.insert(
            spec.name.clone(),
            json!({"dtype": "BF16", "shape": spec.shape(), "data_offsets": [at, at + bytes]}),
        );
        at += bytes;
    }
    (header, at)
}

fn safetensors(header: &str, data_len: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data_len, 0);
    bytes
}

fn open_with(bytes: &[u8]) -> Result<ModelFiles, ModelError> {
    let folder = folder(&llama_config());
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    ModelFiles::open(folder.path())
}

fn check_refused(bytes: &[u8], words: &str) {
    let message = open_with(bytes).unwrap_err().to_string();
    assert!(message.contains(words), "{message:?} does not say {words:?}");
}

#[test]
fn safetensors_headers_that_lie_are_refused() {
    let (header, data_len) = llama_header();
    let text = Value::Object(header.clone()).to_string();
    assert!(open_with(&safetensors(&text, data_len)).is_ok());
    check_refused(&[], "empty");
    check_refused(&[1, 2, 3], "only 3 bytes");
    check_refused(&u64::MAX.to_le_bytes(), "its header claims");
    check_refused(&1000u64.to_le_bytes(), "is cut");
    check_refused(&safetensors("[]", 0), "not what safetensors has");
    check_refused(&safetensors(&"[".repeat(5000), 0), "not what safetensors has");
    check_refused(&safetensors(&text, data_len - 1), "is cut");
    check_refused(&safetensors(&text, data_len + 1), "its tensors end");
    let twice = format!("{},{}", &text[..text.len() - 1], &text[1..]);
    check_refused(&safetensors(&twice, data_len), "twice");
    let lie = |field: &str, value: Value, words: &str| {
        let mut header = header.clone();
        header["model.embed_tokens.weight"][field] = value;
        check_refused(&safetensors(&Value::Object(header).to_string(), data_len), words);
    };
    lie("data_offsets", json!([0, u64::MAX]), "lies at");
    lie("data_offsets", json!([160, 0]), "lies at");
    lie("data_offsets", json!([2, 162]), "begins at byte");
    lie("data_offsets", json!([-1, 160]), "not what safetensors has");
    lie("shape", json!([10, 9]), "cannot have 160 bytes");
    lie("shape", json!([u64::MAX, u64::MAX]), "cannot have");
    lie("shape", json!([1, 1, 1, 1, 1, 1, 1, 10, 8]), "9 dimensions");
    lie("shape", json!([8, 10]), "has the shape [8, 10]");
    lie("dtype", json!("F8_E4M3"), "F8_E4M3");
    let mut lacking = header.clone();
    lacking.shift_remove("model.norm.weight");
    check_refused(&safetensors(&Value::Object(lacking).to_string(), data_len - 16), "model.norm.weight");
}

/// Llama's `attention_bias` also speaks of the output projection; conversions of biased models write zeros there.
#[test]
fn a_bias_that_no_layer_applies_must_be_zero() {
    let (mut header, data_len) = llama_header();
    let bias = json!({"dtype": "BF16", "shape": [8], "data_offsets": [data_len, data_len + 16]});
    header.insert("model.layers.0.self_attn.o_proj.bias".to_owned(), bias);
    let mut bytes = safetensors(&Value::Object(header).to_string(), data_len + 16);
    assert!(open_with(&bytes).is_ok());
    *bytes.last_mut().unwrap() = 0x3f;
    check_refused(&bytes, "o_proj.bias: is not zero");
}

/// Whatever byte of a header is changed, the file is read or refused; nothing panics.
#[test]
fn a_changed_byte_never_panics() {
    let (header, data_len) = llama_header();
    let bytes = safetensors(&Value::Object(header).to_string(), data_len);
    let path = PathBuf::from("changed.safetensors");
    for at in 0..bytes.len() - data_len {
        for value in [0, b'9', b'"', b'}', 0xff] {
            let mut changed = bytes.clone();
            changed[at] = value;
            let _ = read_header(&path, &changed);
        }
    }
}

#[test]
fn a_cut_safetensors_file_is_refused_wherever_it_is_cut() {
    let (header, data_len) = llama_header();
    let bytes = safetensors(&Value::Object(header).to_string(), data_len);
    for cut in (0..bytes.len()).step_by(5).chain([bytes.len() - 1]) {
        assert!(open_with(&bytes[..cut]).is_err(), "cut at {cut}");
    }
}
