//! A tokenizer from GGUF metadata: the same description that `tokenizer.json` holds, built from `tokenizer.ggml.*`.

use phalanx_formats::GgufVocab;
use serde_json::{Map, Value, json};

use super::TextError;

/// `tokenizer.ggml.token_type`: a control token, which is never text of a prompt.
const CONTROL: i32 = 3;
/// `tokenizer.ggml.token_type`: added by whoever made the file.
const USER_DEFINED: i32 = 4;

/// Splits text as Llama 3 does: contractions, words, up to three digits, punctuation, line ends, spaces.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As Qwen 2 does: the same with single digits.
const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The `tokenizer.json` that this vocabulary stands for.
///
/// # Errors
/// A model kind or a way of splitting that is not known: guessing would give wrong ids without a word.
pub(super) fn to_tokenizer_json(vocab: &GgufVocab) -> Result<Value, TextError> {
    let mut tokenizer = match vocab.model.as_str() {
        "gpt2" => byte_level(vocab)?,
        "llama" => sentencepiece(vocab),
        other => {
            return Err(TextError::Tokenizer {
                reason: format!("GGUF tokenizer model {other:?} is not known; known are gpt2 and llama"),
            });
        }
    };
    tokenizer["added_tokens"] = added_tokens(vocab);
    tokenizer["post_processor"] = post_processor(vocab);
    Ok(tokenizer)
}

fn ids(vocab: &GgufVocab) -> Map<String, Value> {
    vocab.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect()
}

fn added_tokens(vocab: &GgufVocab) -> Value {
    let special = |kind: i32| kind == CONTROL || kind == USER_DEFINED;
    vocab
        .tokens
        .iter()
        .zip(&vocab.token_types)
        .enumerate()
        .filter(|(_, (_, kind))| special(**kind))
        .map(|(id, (content, kind))| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": *kind == CONTROL,
            })
        })
        .collect()
}

fn post_processor(vocab: &GgufVocab) -> Value {
    // Llama's sentencepiece vocabularies begin with a begin token unless the file says otherwise.
    let adds = vocab.add_bos.unwrap_or(vocab.model == "llama");
    let bos = vocab.bos.filter(|_| adds).and_then(|id| Some((id, vocab.tokens.get(id as usize)?)));
    let Some((id, token)) = bos else { return Value::Null };
    let (begin, a, b) = (
        json!({"SpecialToken": {"id": token, "type_id": 0}}),
        json!({"Sequence": {"id": "A", "type_id": 0}}),
        json!({"Sequence": {"id": "B", "type_id": 0}}),
    );
    json!({
        "type": "TemplateProcessing",
        "single": [begin, a],
        "pair": [begin, a, begin, b],
        "special_tokens": {token.as_str(): {"id": token, "ids": [id], "tokens": [token]}},
    })
}

fn byte_level(vocab: &GgufVocab) -> Result<Value, TextError> {
    let split = |pattern: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]})
    };
    let gpt2 = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let pre_tokenizer = match vocab.pre.as_str() {
        "llama3" | "llama-v3" | "llama-bpe" => split(LLAMA3_SPLIT),
        "qwen2" | "deepseek-r1-qwen" => split(QWEN2_SPLIT),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => {
            json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, gpt2]})
        }
        "gpt-2" | "gpt2" | "default" | "mpt" | "olmo" | "" => gpt2,
        other => {
            return Err(TextError::Tokenizer { reason: format!("GGUF pre-tokenizer {other:?} is not known") });
        }
    };
    let normalizer = if vocab.pre == "qwen2" { json!({"type": "NFC"}) } else { Value::Null };
    // Llama 3 takes a word that is a token as it is, without merging.
    let ignore_merges = matches!(vocab.pre.as_str(), "llama3" | "llama-v3" | "llama-bpe");
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": ignore_merges, "vocab": ids(vocab), "merges": vocab.merges,
        },
    }))
}

/// Sentencepiece BPE has scores in place of merges: a pair may merge where the whole is a token, better scores first.
fn sentencepiece(vocab: &GgufVocab) -> Value {
    let prefix = vocab.add_space_prefix.unwrap_or(true);
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let normalizers = if prefix { json!([{"type": "Prepend", "prepend": "▁"}, replace]) } else { json!([replace]) };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unk = vocab.unk.and_then(|id| vocab.tokens.get(id as usize));
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unk, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": ids(vocab), "merges": merges_from_scores(vocab),
        },
    })
}

fn merges_from_scores(vocab: &GgufVocab) -> Vec<(String, String)> {
    let score = |id: usize| vocab.scores.get(id).copied().unwrap_or(f32::MIN);
    let by_text: std::collections::HashMap<&str, usize> =
        vocab.tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    let mut merges: Vec<(f32, usize, usize, &str, &str)> = Vec::new();
    for (id, token) in vocab.tokens.iter().enumerate() {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(l), Some(r)) = (by_text.get(left), by_text.get(right)) {
                merges.push((score(id), *l, *r, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    merges.into_iter().map(|(_, _, _, left, right)| (left.to_owned(), right.to_owned())).collect()
}
