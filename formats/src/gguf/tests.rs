//! GGUF files written to order: true ones are read as they are, lying ones are refused.

use std::path::PathBuf;

use tempfile::TempDir;

use crate::test_support::{Entry, GgufBuilder, byte_at, gguf_model, small_geometry};
use crate::{
    Architecture, FileKind, GenerationDefaults, Geometry, ModelError, ModelFiles, RopeScaling, StoredType,
    TokenizerSource,
};

fn write(folder: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn open(bytes: &[u8]) -> Result<ModelFiles, ModelError> {
    let folder = tempfile::tempdir().unwrap();
    ModelFiles::open(&write(&folder, "model.gguf", bytes))
}

fn llama() -> GgufBuilder {
    gguf_model(&small_geometry(Architecture::Llama), StoredType::Q8_0)
}

/// A refused file, with words that its message has.
fn check_refused(builder: &GgufBuilder, words: &str) {
    let message = open(&builder.build()).unwrap_err().to_string();
    assert!(message.contains(words), "{message:?} does not say {words:?}");
}

fn check_rows(model: &ModelFiles) {
    for spec in model.geometry().tensors() {
        let view = model.tensor(&spec.name).unwrap();
        assert_eq!(view.shape, spec.shape(), "{}", spec.name);
        for row in 0..view.num_rows() {
            let wanted: Vec<u8> = (0..view.row_bytes()).map(|at| byte_at(&spec.name, row, at)).collect();
            assert_eq!(view.row(row), wanted, "row {row} of {}", spec.name);
        }
    }
}

/// Rows of Q and K come out in Hugging Face order, quantised or not; nothing else is moved.
#[test]
fn every_type_is_read_in_hugging_face_order() {
    for dtype in StoredType::ALL {
        for &architecture in Architecture::ALL.iter().filter(|architecture| architecture.is_in_gguf()) {
            let wide = dtype.block_len() == 256;
            let mut geometry = Geometry { num_layers: 1, ..small_geometry(architecture) };
            if wide {
                (geometry.hidden_size, geometry.intermediate_size) = (256, 512);
                (geometry.num_heads, geometry.num_kv_heads) = (8, 2);
            }
            let model = open(&gguf_model(&geometry, dtype).build()).unwrap();
            assert_eq!(*model.geometry(), geometry);
            assert_eq!((model.kind(), model.main_dtype()), (FileKind::Gguf, dtype));
            assert_eq!((model.attention_block(), model.inner_block()), (dtype.block_len(), dtype.block_len()));
            check_rows(&model);
        }
    }
}

#[test]
fn version_2_and_other_alignments_are_read() {
    check_rows(&open(&llama().version(2).build()).unwrap());
    check_rows(&open(&llama().alignment(256).build()).unwrap());
}

#[test]
fn biases_of_llama_are_read_in_hugging_face_order() {
    let geometry = Geometry { qkv_bias: true, ..small_geometry(Architecture::Llama) };
    let model = open(&gguf_model(&geometry, StoredType::F16).build()).unwrap();
    assert!(model.geometry().qkv_bias);
    check_rows(&model);
}

#[test]
fn other_keys_shape_the_geometry() {
    let check = |builder: GgufBuilder, wanted: &dyn Fn(&mut Geometry)| {
        let mut geometry = small_geometry(Architecture::Llama);
        wanted(&mut geometry);
        assert_eq!(*open(&builder.build()).unwrap().geometry(), geometry);
    };
    check(llama().without("output.weight"), &|geometry| geometry.tied_embeddings = true);
    check(llama().entry("llama.rope.freq_base", Entry::F32(5e5)), &|geometry| geometry.rope_theta = 5e5);
    check(llama().entry("llama.attention.sliding_window", Entry::U32(64)), &|geometry| {
        geometry.sliding_window = Some(64);
    });
    check(llama().entry("llama.attention.sliding_window", Entry::U32(0)), &|_| {});
    let linear = llama()
        .entry("llama.rope.scaling.type", Entry::Text("linear".to_owned()))
        .entry("llama.rope.scaling.factor", Entry::F32(4.0));
    check(linear, &|geometry| geometry.rope_scaling = RopeScaling::Linear { factor: 4.0 });
    let factors: Vec<f32> = (0..16).map(|index| 1.0 + index as f32).collect();
    let bytes = factors.iter().flat_map(|factor| factor.to_le_bytes()).collect();
    check(llama().tensor("rope_freqs.weight", &[16], StoredType::F32, bytes), &|geometry| {
        geometry.rope_scaling = RopeScaling::Factors { factors: factors.clone() };
    });
}

fn vocabulary() -> GgufBuilder {
    let tokens = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "a"].map(str::to_owned).to_vec();
    llama()
        .entry("tokenizer.ggml.model", Entry::Text("gpt2".to_owned()))
        .entry("tokenizer.ggml.pre", Entry::Text("smollm".to_owned()))
        .entry("tokenizer.ggml.tokens", Entry::Texts(tokens))
        .entry("tokenizer.ggml.token_type", Entry::Integers(vec![2, 3, 3, 3, 3, 1]))
        .entry("tokenizer.ggml.scores", Entry::Floats(vec![0.0; 6]))
        .entry("tokenizer.ggml.merges", Entry::Texts(vec!["a b".to_owned()]))
        .entry("tokenizer.ggml.bos_token_id", Entry::U32(1))
        .entry("tokenizer.ggml.eos_token_id", Entry::U32(2))
        .entry("tokenizer.ggml.padding_token_id", Entry::U32(u32::MAX))
        .entry("tokenizer.ggml.add_bos_token", Entry::Bool(false))
        .entry("tokenizer.chat_template", Entry::Text("{{ m }}<|im_end|>".to_owned()))
        .entry("general.sampling.temp", Entry::F32(0.5))
        .entry("general.sampling.top_k", Entry::U32(20))
}

#[test]
fn the_vocabulary_and_what_ends_a_text_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let model = ModelFiles::open(&write(&folder, "model.gguf", &vocabulary().build())).unwrap();
    // The config's end token, and the one with which the chat template ends a turn.
    assert_eq!(model.end_token_ids(), [2, 4]);
    let defaults = GenerationDefaults { temperature: Some(0.5), top_k: Some(20), ..GenerationDefaults::default() };
    assert_eq!(model.generation_defaults(), defaults);
    let Some(TokenizerSource::Gguf(vocab)) = model.tokenizer_source() else { panic!("no vocabulary") };
    assert_eq!((vocab.model.as_str(), vocab.pre.as_str(), vocab.tokens.len()), ("gpt2", "smollm", 6));
    assert_eq!((vocab.bos, vocab.eos, vocab.unk, vocab.pad), (Some(1), Some(2), None, None));
    assert_eq!((vocab.add_bos, vocab.add_space_prefix), (Some(false), None));
    assert_eq!(
        (vocab.token_types, vocab.scores.len(), vocab.merges),
        (vec![2, 3, 3, 3, 3, 1], 6, vec!["a b".to_owned()])
    );
    assert!(vocab.chat_template.is_some());
}

#[test]
fn a_file_without_tensors_describes_a_model() {
    let mut builder = vocabulary();
    for spec in small_geometry(Architecture::Llama).tensors() {
        builder = builder.without(&crate::test_support::gguf_name(&spec.name));
    }
    let folder = tempfile::tempdir().unwrap();
    let path = write(&folder, "vocab.gguf", &builder.build());
    assert_eq!(ModelFiles::open_config(&path).unwrap().geometry().vocab_size, 6);
    assert!(matches!(ModelFiles::open(&path), Err(ModelError::Tensor { .. })));
}

#[test]
fn parts_are_read_together_and_missing_ones_named() {
    let geometry = small_geometry(Architecture::Llama);
    let (mut first, mut second) = (llama(), GgufBuilder::default().entry("split.no", Entry::U32(1)));
    for spec in geometry.tensors().iter().filter(|spec| spec.name.starts_with("model.layers.2.")) {
        let name = crate::test_support::gguf_name(&spec.name);
        let full = open(&llama().build()).unwrap();
        let view = full.tensor(&spec.name).unwrap();
        let data = view.stored_bytes().to_vec();
        first = first.without(&name);
        second = second.tensor(&name, &view.shape, view.dtype, data);
    }
    first = first.entry("split.no", Entry::U32(0)).entry("split.count", Entry::U32(2));
    let folder = tempfile::tempdir().unwrap();
    let path = write(&folder, "m-00001-of-00002.gguf", &first.build());
    let message = ModelFiles::open(&path).unwrap_err().to_string();
    assert!(message.contains("m-00002-of-00002.gguf"), "{message}");
    let other = write(&folder, "m-00002-of-00002.gguf", &second.build());
    check_rows(&ModelFiles::open(&path).unwrap());
    assert!(ModelFiles::open(&other).is_err());
    let renamed = write(&folder, "renamed.gguf", &first.build());
    assert!(ModelFiles::open(&renamed).unwrap_err().to_string().contains("-00001-of-00002.gguf"));
}

#[test]
fn headers_that_lie_are_refused() {
    check_refused(&llama().version(1), "version 1");
    check_refused(&llama().version(4), "version 4");
    check_refused(&llama().version(3u32.swap_bytes()), "big-endian");
    check_refused(&llama().counts(u64::MAX, 9), "number of tensors");
    check_refused(&llama().counts(3, u64::MAX), "number of metadata");
    check_refused(&llama().counts(1 << 40, 1), "number of tensors");
    check_refused(&llama().entry("general.alignment", Entry::U32(0)), "alignment");
    check_refused(&llama().entry("general.alignment", Entry::U32(33)), "alignment");
    check_refused(&llama().entry("a", Entry::Bool(true)).entry("a", Entry::U32(1)), "a is there twice");
    check_refused(&llama().entry("a", Entry::Raw(77, vec![])), "type 77");
    check_refused(&llama().entry("a", Entry::Raw(8, u64::MAX.to_le_bytes().to_vec())), "a of");
    let array = |kind: u32, len: u64| Entry::Raw(9, [&kind.to_le_bytes()[..], &len.to_le_bytes()].concat());
    check_refused(&llama().entry("a", array(0, u64::MAX)), "a of");
    check_refused(&llama().entry("a", array(10, 1 << 61)), "a of");
    check_refused(&llama().entry("a", array(8, 1 << 40)), "a of");
    let nested: Vec<u8> = [[9u8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0].as_slice(); 40].concat();
    check_refused(&llama().entry("a", Entry::Raw(9, nested)), "arrays inside arrays");
}

#[test]
fn tensors_that_lie_are_refused() {
    let last = "rope_freqs.weight";
    check_refused(&llama().lying_tensor(last, &[16], 0, u64::MAX), "cut");
    check_refused(&llama().lying_tensor(last, &[16], 0, u64::MAX - 4096), "cut");
    check_refused(&llama().lying_tensor(last, &[16], 0, 1 << 40), "cut");
    check_refused(&llama().lying_tensor(last, &[16], 0, 0), "overlap");
    check_refused(&llama().lying_tensor(last, &[u64::MAX, u64::MAX], 0, 0), "cannot be stored");
    check_refused(&llama().lying_tensor(last, &[0], 0, 0), "a dimension of 0");
    check_refused(&llama().lying_tensor(last, &[], 0, 0), "0 dimensions");
    check_refused(&llama().lying_tensor(last, &[1; 5], 0, 0), "5 dimensions");
    check_refused(&llama().lying_tensor("x", &[2, 31], 2, 0), "cannot be stored");
    check_refused(&llama().lying_tensor("output.weight", &[2, 32], 2, 0), "described twice");
    check_refused(&llama().without("output.weight").lying_tensor("output.weight", &[70, 96], 11, 0), "Q3_K");
    check_refused(&llama().without("blk.1.ffn_up.weight"), "tensor blk.1.ffn_up.weight");
    let padded = llama().tensor("blk.01.ffn_up.weight", &[1, 32], StoredType::Q8_0, vec![0; 34]);
    check_refused(&padded, "there twice");
}

#[test]
fn metadata_that_lies_is_refused() {
    check_refused(&GgufBuilder::default(), "general.architecture is missing");
    check_refused(&llama().replace("general.architecture", Entry::Text("mamba".to_owned())), "known are llama, qwen2");
    check_refused(&llama().replace("llama.block_count", Entry::U64(1 << 40)), "num_hidden_layers");
    check_refused(&llama().replace("llama.block_count", Entry::F32(3.0)), "not a count");
    check_refused(&llama().replace("llama.attention.head_count", Entry::U32(0)), "num_attention_heads");
    check_refused(&llama().replace("llama.attention.head_count_kv", Entry::U32(2)), "does not divide");
    check_refused(&llama().replace("llama.attention.head_count_kv", Entry::Integers(vec![3, 3, 1])), "between layers");
    check_refused(&llama().replace("llama.embedding_length", Entry::U32(64)), "has the shape");
    check_refused(&llama().replace("llama.attention.key_length", Entry::U32(33)), "head_dim");
    check_refused(&llama().replace("llama.attention.layer_norm_rms_epsilon", Entry::F32(f32::NAN)), "above 0");
    check_refused(&llama().entry("llama.expert_count", Entry::U32(8)), "mixtures of experts");
    check_refused(&llama().entry("llama.rope.dimension_count", Entry::U32(16)), "not supported");
    check_refused(&llama().entry("llama.rope.scaling.type", Entry::Text("yarn".to_owned())), "yarn");
    check_refused(&llama().tensor("rope_freqs.weight", &[4], StoredType::F32, vec![0; 16]), "16 frequencies");
    check_refused(&vocabulary().replace("tokenizer.ggml.eos_token_id", Entry::U32(6)), "there are 6 tokens");
    check_refused(&vocabulary().replace("tokenizer.ggml.scores", Entry::Floats(vec![0.0])), "for 6 tokens");
    check_refused(&vocabulary().replace("tokenizer.ggml.tokens", Entry::U32(3)), "no array");
}

/// A file that was cut anywhere is refused; nothing panics.
#[test]
fn a_cut_file_is_refused_wherever_it_is_cut() {
    let bytes = vocabulary().build();
    let cuts = (0..4096).step_by(7).chain((4096..bytes.len()).step_by(9973));
    for cut in cuts.chain([bytes.len() - 1]) {
        assert!(open(&bytes[..cut]).is_err(), "cut at {cut}");
    }
}

/// Whatever byte is changed, the file is read or refused; nothing panics.
#[test]
fn a_changed_byte_never_panics() {
    let bytes = vocabulary().build();
    let path = PathBuf::from("changed.gguf");
    for at in 0..4096 {
        let mut changed = bytes.clone();
        changed[at] = if at % 5 == 0 { 0 } else { 0xff };
        if let Ok(header) = super::read_header(&path, &changed) {
            let metadata = super::Metadata { path: &path, bytes: &changed, header: &header };
            let _ = super::geometry::geometry(metadata);
            let _ = super::texts::texts(metadata).map(|_| super::texts::vocab(metadata));
        }
    }
}
