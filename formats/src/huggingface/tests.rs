//! Folders: the reference models are read as their files say, broken folders are refused.

mod configs;
mod headers;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::test_support::goldens;
use crate::{Architecture, FileKind, Geometry, ModelError, ModelFiles, RopeScaling, StoredType, TokenizerSource};

fn golden(name: &str) -> ModelFiles {
    ModelFiles::open(&goldens().join(name)).unwrap()
}

/// A folder with one matrix of 2 rows and the given config.
fn folder(config: &Value) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

fn llama_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000, "tie_word_embeddings": true
    })
}

fn with(changes: Value) -> Value {
    let mut config = llama_config();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn geometry_of(config: &Value) -> Result<Geometry, ModelError> {
    ModelFiles::open_config(folder(config).path()).map(|model| model.geometry().clone())
}

#[test]
fn the_reference_models_have_their_geometry() {
    let model = golden("tiny-qwen2");
    let wanted = Geometry {
        architecture: Architecture::Qwen2,
        hidden_size: 64,
        intermediate_size: 176,
        num_layers: 3,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 16,
        vocab_size: 520,
        max_position: 1024,
        norm_eps: 1e-6,
        rope_theta: 1e6,
        rope_scaling: RopeScaling::None,
        tied_embeddings: false,
        qkv_bias: true,
        // There is a length, but it is not in use.
        sliding_window: None,
    };
    assert_eq!(*model.geometry(), wanted);
    assert_eq!((model.kind(), model.main_dtype()), (FileKind::HuggingFace, StoredType::BF16));
    assert_eq!((model.attention_block(), model.inner_block()), (1, 1));

    let model = golden("tiny-llama3-rope");
    let scaling =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 64 };
    assert_eq!(model.geometry().rope_scaling, scaling);
    assert!(model.geometry().tied_embeddings && !model.has_tensor("lm_head.weight"));
    assert_eq!(model.geometry().head_dim, 32);
    assert_eq!(golden("tiny-llama").main_dtype(), StoredType::F32);
    assert_eq!(golden("tiny-qwen2-tied-sharded").main_dtype(), StoredType::F16);
}

/// Rows are where the reference says: the files are read again here by their offsets alone.
#[test]
fn the_reference_models_have_their_rows() {
    let files = [
        ("tiny-qwen2", "model.safetensors"),
        ("tiny-llama", "model.safetensors"),
        ("tiny-llama3-rope", "model.safetensors"),
        ("tiny-qwen2-tied-sharded", "model-00001-of-00002.safetensors"),
        ("tiny-qwen2-tied-sharded", "model-00002-of-00002.safetensors"),
    ];
    for (name, file) in files {
        let bytes = std::fs::read(goldens().join(name).join(file)).unwrap();
        let len = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
        let model = golden(name);
        for (tensor, entry) in header.as_object().unwrap().iter().filter(|(tensor, _)| *tensor != "__metadata__") {
            let view = model.tensor(tensor).unwrap();
            let start = 8 + len + entry["data_offsets"][0].as_u64().unwrap() as usize;
            for row in [0, view.num_rows() / 2, view.num_rows() - 1] {
                let at = start + row * view.row_bytes();
                assert_eq!(view.row(row), &bytes[at..at + view.row_bytes()], "{name} {tensor} row {row}");
            }
        }
    }
}

#[test]
fn the_reference_models_say_what_ends_a_text() {
    assert_eq!(golden("tiny-llama").end_token_ids(), [511]);
    let model = golden("tiny-llama3-rope");
    assert_eq!(model.end_token_ids(), [509, 511]);
    let Some(TokenizerSource::Json { tokenizer_json, tokenizer_config, chat_template }) = model.tokenizer_source()
    else {
        panic!("no tokenizer")
    };
    assert!(tokenizer_json.is_file() && tokenizer_config.is_some());
    assert!(chat_template.unwrap().contains("<|im_start|>"));
}

/// Two groups of three query heads, K and V; heads of 16 rows.
#[test]
fn fused_projections_are_taken_apart() {
    let model = golden("tiny-internlm2");
    assert!(!model.has_tensor("model.layers.2.attention.wqkv.weight"));
    let wqkv = {
        let bytes = std::fs::read(goldens().join("tiny-internlm2/model.safetensors")).unwrap();
        let data = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..data]).unwrap();
        let [start, end] = [0, 1].map(|at| {
            header["model.layers.2.attention.wqkv.weight"]["data_offsets"][at].as_u64().unwrap() as usize + data
        });
        bytes[start..end].to_vec()
    };
    let stored = |row: usize| &wqkv[row * 192..(row + 1) * 192];
    let check = |part: &str, num_rows: usize, rows: &[(usize, usize)]| {
        let view = model.tensor(&format!("model.layers.2.self_attn.{part}_proj.weight")).unwrap();
        assert_eq!((view.num_rows(), view.cols(), view.shape.clone()), (num_rows, 96, vec![num_rows, 96]));
        rows.iter().for_each(|(row, place)| assert_eq!(view.row(*row), stored(*place), "{part} {row}"));
    };
    check("q", 96, &[(0, 0), (47, 47), (48, 80), (95, 127)]);
    check("k", 32, &[(0, 48), (15, 63), (16, 128), (31, 143)]);
    check("v", 32, &[(0, 64), (16, 144), (31, 159)]);
}

#[test]
fn what_is_wrong_is_said_in_the_names_of_the_files() {
    let copy = copy_of("tiny-internlm2");
    let path = copy.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut check = |field: &str, value: Value, words: &str| {
        let before = std::mem::replace(&mut config[field], value);
        std::fs::write(&path, config.to_string()).unwrap();
        let message = ModelFiles::open(copy.path()).unwrap_err().to_string();
        assert!(message.contains(words), "{message:?} does not say {words:?}");
        config[field] = before;
    };
    check(
        "num_key_value_heads",
        json!(3),
        "attention.wqkv.weight: has the shape [160, 96], but Q, K and V should have 192",
    );
    check("intermediate_size", json!(128), "model.layers.0.feed_forward.w1.weight: has the shape [256, 96]");
    check("num_hidden_layers", json!(4), "model.layers.3.attention_norm.weight: is not in the model's files");
    check("bias", json!(true), "model.layers.0.attention.wqkv.bias: is not in the model's files");
}

fn copy_of(name: &str) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(goldens().join(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    copy
}

#[test]
fn missing_shards_are_named() {
    let copy = copy_of("tiny-qwen2-tied-sharded");
    let shard = "model-00002-of-00002.safetensors";
    std::fs::remove_file(copy.path().join(shard)).unwrap();
    let error = ModelFiles::open(copy.path()).unwrap_err();
    let ModelError::MissingFiles { names, .. } = &error else { panic!("{error}") };
    assert_eq!(names, &[shard]);
    assert!(error.to_string().contains(shard));
    std::fs::copy(copy.path().join("model-00001-of-00002.safetensors"), copy.path().join(shard)).unwrap();
    let message = ModelFiles::open(copy.path()).unwrap_err().to_string();
    assert!(message.contains("which the index puts there"), "{message}");
}

#[test]
fn an_index_cannot_lead_out_of_the_folder() {
    let folder = folder(&llama_config());
    for shard in ["../model.safetensors", "/etc/passwd", "a/b", ""] {
        let index = json!({"weight_map": {"model.norm.weight": shard}}).to_string();
        std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        let message = ModelFiles::open(folder.path()).unwrap_err().to_string();
        assert!(message.contains("no file name"), "{message}");
    }
}

#[test]
fn folders_that_are_no_model_say_what_is_missing() {
    let check = |path: &Path, words: &str| {
        let message = ModelFiles::open(path).unwrap_err().to_string();
        assert!(message.contains(words), "{message:?} does not say {words:?}");
    };
    let empty = tempfile::tempdir().unwrap();
    check(empty.path(), "it has no config.json");
    check(&PathBuf::from("/no/such/model"), "cannot read /no/such/model");
    std::fs::write(empty.path().join("a.gguf"), "GGUF").unwrap();
    check(empty.path(), "a.gguf");
    let file = empty.path().join("notes.txt");
    std::fs::write(&file, "hello").unwrap();
    check(&file, "not GGUF");
    let weightless = folder(&llama_config());
    check(weightless.path(), "neither model.safetensors nor");
    std::fs::write(weightless.path().join("pytorch_model.bin"), "x").unwrap();
    check(weightless.path(), "convert them to safetensors");
    std::fs::write(weightless.path().join("config.json"), "{").unwrap();
    check(weightless.path(), "not JSON");
}
