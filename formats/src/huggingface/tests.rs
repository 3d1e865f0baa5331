//! Folders: the reference models are read as their files say, broken folders are refused.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::test_support::goldens;
use crate::{
    Architecture, EmbeddingPooling, EmbeddingSettings, EmbeddingWidths, FileKind, GenerationDefaults, Geometry,
    ModelError, ModelFiles, RopeScaling, StoredType, TokenizerSource,
};

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

fn check_config_refused(changes: Value, words: &str) {
    let message = geometry_of(&with(changes)).unwrap_err().to_string();
    assert!(message.contains(words), "{message:?} does not say {words:?}");
}

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

#[test]
fn a_config_of_another_architecture_lists_the_known_ones() {
    let config = with(json!({"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}));
    let error = ModelFiles::open(folder(&config).path()).unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, ModelError::UnknownArchitecture { .. }));
    for word in
        ["GemmaForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM", "InternLM2ForCausalLM", "MistralForCausalLM"]
    {
        assert!(message.contains(word), "{message}");
    }
}

#[test]
fn configs_of_all_styles_are_read() {
    let check = |changes: Value, wanted: &dyn Fn(&Geometry) -> bool| {
        let geometry = geometry_of(&with(changes.clone())).unwrap();
        assert!(wanted(&geometry), "{changes}: {geometry:?}");
    };
    check(json!({}), &|geometry| geometry.head_dim == 4 && !geometry.qkv_bias && geometry.rope_theta == 1e4);
    check(json!({"head_dim": 16}), &|geometry| geometry.head_dim == 16);
    check(json!({"num_key_value_heads": null}), &|geometry| geometry.num_kv_heads == 2);
    check(json!({"attention_bias": true}), &|geometry| geometry.qkv_bias);
    check(json!({"hidden_size": 8.0}), &|geometry| geometry.hidden_size == 8);
    check(json!({"architectures": null}), &|geometry| geometry.architecture == Architecture::Llama);
    check(json!({"sliding_window": 16}), &|geometry| geometry.sliding_window == Some(16));
    check(json!({"sliding_window": null}), &|geometry| geometry.sliding_window.is_none());
    check(json!({"rope_scaling": {"type": "dynamic", "factor": 2}}), &|geometry| {
        geometry.rope_scaling == RopeScaling::None && geometry.max_position == 64
    });
    check(json!({"rope_scaling": {"type": "linear", "factor": 2}}), &|geometry| {
        geometry.rope_scaling == RopeScaling::Linear { factor: 2.0 }
    });
    let llama3 = json!({
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32, "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": 8192
    });
    let scaling =
        RopeScaling::Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 8192 };
    check(json!({"rope_theta": null, "rope_parameters": llama3}), &|geometry| {
        geometry.rope_theta == 5e5 && geometry.rope_scaling == scaling
    });
    check(json!({"rope_parameters": {"rope_theta": 7, "rope_type": "default"}}), &|geometry| {
        geometry.rope_theta == 7.0 && geometry.rope_scaling == RopeScaling::None
    });
    let qwen = |changes: Value| {
        let mut all = json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32, "max_window_layers": 0});
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        all
    };
    check(qwen(json!({})), &|geometry| geometry.qkv_bias && geometry.sliding_window.is_none());
    check(qwen(json!({"use_sliding_window": true})), &|geometry| geometry.sliding_window == Some(32));
    check(qwen(json!({"use_sliding_window": true, "max_window_layers": 1})), &|geometry| {
        geometry.sliding_window.is_none()
    });
}

#[test]
fn mistral_has_a_window_unless_it_says_null() {
    let window = |changes: Value| {
        let mut config = with(json!({"architectures": ["MistralForCausalLM"]}));
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        geometry_of(&config).unwrap().sliding_window
    };
    assert_eq!(window(json!({})), Some(4096));
    assert_eq!(window(json!({"sliding_window": 32})), Some(32));
    assert_eq!(window(json!({"sliding_window": null})), None);
}

#[test]
fn internlm2_has_no_window_and_says_whether_it_has_biases() {
    let geometry = |bias: Value| {
        let architectures = json!(["InternLM2ForCausalLM"]);
        geometry_of(&with(json!({"architectures": architectures, "bias": bias, "sliding_window": 8}))).unwrap()
    };
    assert!(!geometry(json!(false)).qkv_bias && geometry(json!(null)).qkv_bias);
    assert_eq!(geometry(json!(false)).sliding_window, None);
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

#[test]
fn configs_that_lie_are_refused() {
    check_config_refused(json!({"architectures": ["MambaForCausalLM"]}), "known are LlamaForCausalLM");
    check_config_refused(json!({"architectures": null, "model_type": null}), "architectures is missing");
    check_config_refused(json!({"architectures": "LlamaForCausalLM"}), "not a list");
    check_config_refused(json!({"hidden_size": null}), "hidden_size is missing");
    check_config_refused(json!({"hidden_size": "8"}), "hidden_size is \"8\", not a count");
    check_config_refused(json!({"hidden_size": -8}), "not a count");
    check_config_refused(json!({"hidden_size": 1u64 << 60}), "not within");
    check_config_refused(json!({"num_hidden_layers": 0}), "num_hidden_layers is 0");
    check_config_refused(json!({"num_hidden_layers": 1_000_000}), "not within");
    check_config_refused(json!({"num_attention_heads": 0}), "num_attention_heads");
    check_config_refused(json!({"num_attention_heads": 3, "head_dim": 4, "num_key_value_heads": 2}), "does not divide");
    check_config_refused(json!({"num_attention_heads": 3}), "does not divide");
    check_config_refused(json!({"head_dim": 5}), "must be even");
    check_config_refused(json!({"rms_norm_eps": 0}), "above 0");
    check_config_refused(json!({"rope_theta": "x"}), "not a number");
    check_config_refused(json!({"rope_scaling": {"rope_type": "yarn"}}), "known are default, dynamic, linear, llama3");
    check_config_refused(json!({"rope_scaling": {"rope_type": "linear"}}), "rope_scaling.factor is missing");
    check_config_refused(json!({"rope_scaling": 3}), "not an object");
    check_config_refused(json!({"hidden_act": "gelu"}), "only silu");
    check_config_refused(json!({"mlp_bias": true}), "mlp_bias");
    check_config_refused(json!({"quantization_config": {"quant_method": "awq"}}), "awq");
    check_config_refused(json!({"sliding_window": 0}), "sliding_window");
    check_config_refused(json!({"eos_token_id": "x"}), "eos_token_id");
}

#[test]
fn end_tokens_are_found_where_they_hide() {
    let folder = folder(&with(json!({"eos_token_id": 3})));
    let write = |name: &str, value: Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    let ends = || ModelFiles::open_config(folder.path()).unwrap().end_token_ids();
    write("generation_config.json", json!({"eos_token_id": [4, 3], "temperature": 0.7, "top_k": 20, "top_p": null}));
    assert_eq!(ends(), [3, 4]);
    let decoder = json!({"5": {"content": "</s>"}, "6": {"content": "<|im_end|>"}, "7": {"content": "<|eot_id|>"}});
    write("tokenizer_config.json", json!({"eos_token": {"content": "</s>"}, "added_tokens_decoder": decoder}));
    assert_eq!(ends(), [3, 4, 5]);
    let template = json!([{"name": "tools", "template": "<|eot_id|>"}, {"name": "default", "template": "<|im_end|>"}]);
    write(
        "tokenizer_config.json",
        json!({"eos_token": "</s>", "added_tokens_decoder": decoder, "chat_template": template}),
    );
    assert_eq!(ends(), [3, 4, 5, 6]);
    // The decoder goes before placeholders in tokenizer.json; what it lacks is found there.
    let added = json!([{"id": 8, "content": "<|im_end|>"}, {"id": 9, "content": "<|eot_id|>"}]);
    write("tokenizer.json", json!({"model": {"vocab": {"a": 0}}, "added_tokens": added}));
    std::fs::write(folder.path().join("chat_template.jinja"), "<|im_end|><|eot_id|>").unwrap();
    assert_eq!(ends(), [3, 4, 5, 6, 7]);
    write("tokenizer_config.json", json!({"eos_token": "</s>"}));
    assert_eq!(ends(), [3, 4, 8, 9]);
    let wanted = GenerationDefaults { temperature: Some(0.7), top_k: Some(20), ..GenerationDefaults::default() };
    assert_eq!(ModelFiles::open_config(folder.path()).unwrap().generation_defaults(), wanted);
}

/// Reads a folder with `config` fields, `modules.json` and the file of its pooling module.
fn embedding_of(config: Value, modules: Value, pooling: Value) -> Result<EmbeddingSettings, String> {
    let folder = folder(&with(config));
    std::fs::create_dir(folder.path().join("1_Pooling")).unwrap();
    let write = |name: &str, value: Value| std::fs::write(folder.path().join(name), value.to_string()).unwrap();
    if !modules.is_null() {
        write("modules.json", modules);
    }
    write("1_Pooling/config.json", pooling);
    match ModelFiles::open_config(folder.path()) {
        Ok(files) => Ok(files.embedding_settings()),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn embeddings_are_made_as_a_folder_says() {
    let module = |kind: &str, path: &str| json!({"type": format!("sentence_transformers.models.{kind}"), "path": path});
    let (whole, pooling) = (module("Transformer", ""), module("Pooling", "1_Pooling"));
    let check = |config: Value, modules: Value, file: Value, expected: EmbeddingSettings| {
        assert_eq!(embedding_of(config, modules, file), Ok(expected));
    };
    let settings = |pooling, normalizes, widths| EmbeddingSettings { pooling, normalizes, widths };
    let (none, any) = (EmbeddingWidths::Whole, EmbeddingWidths::Any);
    check(json!({}), Value::Null, json!({}), EmbeddingSettings::default());
    check(json!({"is_matryoshka": true}), Value::Null, json!({}), settings(EmbeddingPooling::Last, true, any));
    let (mean, last) = (
        json!({"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": false}),
        json!({"pooling_mode": "lasttoken"}),
    );
    let modules = json!([whole, pooling, module("Normalize", "2_Normalize")]);
    let only = EmbeddingWidths::Only(vec![32, 64]);
    check(
        json!({"matryoshka_dimensions": [32, 64]}),
        modules.clone(),
        mean.clone(),
        settings(EmbeddingPooling::Mean, true, only),
    );
    check(json!({}), json!([whole, pooling]), last, settings(EmbeddingPooling::Last, false, none.clone()));
    let other = |words: &str| EmbeddingPooling::Other(words.into());
    let cls = json!({"pooling_mode_cls_token": true});
    check(json!({}), json!([whole, pooling]), cls, settings(other("pooling mode cls"), false, none.clone()));
    let dense = json!([whole, pooling, module("Dense", "3_Dense")]);
    check(json!({}), dense, mean.clone(), settings(other("a module of type Dense"), false, none));
    let refused = |config: Value, modules: Value, words: &str| {
        let told = embedding_of(config, modules, mean.clone()).expect_err("it is refused");
        assert!(told.contains(words), "{told}");
    };
    refused(json!({}), json!({}), "not a JSON list");
    refused(json!({}), json!([module("Pooling", "../x")]), "out of the model's folder");
    refused(json!({}), json!([module("Pooling", "2_Pooling")]), "not there");
    refused(json!({"matryoshka_dimensions": [0]}), modules, "matryoshka_dimensions");
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
            let _ = super::read_header(&path, &changed);
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
