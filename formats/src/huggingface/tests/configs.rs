//! What `config.json` and the files beside it say is read in all styles; what lies is refused.

use serde_json::{Value, json};

use super::{folder, geometry_of, with};
use crate::{
    Architecture, EmbeddingPooling, EmbeddingSettings, EmbeddingWidths, GenerationDefaults, Geometry, ModelError,
    ModelFiles, RopeScaling,
};

fn check_config_refused(changes: Value, words: &str) {
    let message = geometry_of(&with(changes)).unwrap_err().to_string();
    assert!(message.contains(words), "{message:?} does not say {words:?}");
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
