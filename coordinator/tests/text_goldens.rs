//! Chat templates, round trips and streaming pieces against transformers' own output.
//!
//! The tiny tokenizers are in the repository; the real ones are obtained by `cargo xtask fetch` into `.cache/tokenizers`.

#![expect(clippy::panic, clippy::unwrap_used, reason = "helpers of tests are test code too")]

use std::fs;
use std::path::{Path, PathBuf};

use phalanx_coordinator::text::tools::{ToolFormat, knows_tools};
use phalanx_coordinator::text::{ChatPrompt, ChatTemplate, Detokenizer, TokenBytes, Tokenizer};
use phalanx_formats::ModelFiles;
use phalanx_proto::TokenId;
use serde_json::Value;

const TOKENIZERS: [&str; 8] =
    ["tiny-bpe", "tiny-spm", "qwen1_5", "qwen2_5", "llama3", "llama3_1", "internlm2", "smollm2"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read_json(path: &Path) -> Value {
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// SmolLM2's tokenizer and template come out of its GGUF metadata.
fn smollm2() -> Option<(Tokenizer, Option<String>)> {
    let file = root().join(".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !file.exists() {
        let excused = root().join(".cache/models/unavailable").exists();
        assert!(excused, "SmolLM2 is not in .cache/models: run `cargo xtask fetch`");
        return None;
    }
    let source = ModelFiles::open(&file).unwrap().tokenizer_source().unwrap();
    Some(Tokenizer::from_source(&source).unwrap())
}

/// The folder that holds a tokenizer's files, where it could be had.
fn folder(name: &str) -> Option<PathBuf> {
    let folder = match name {
        "tiny-bpe" | "tiny-spm" => root().join("tests/goldens/tokenizers").join(name),
        "qwen2_5" => root().join(".cache/tokenizers/qwen1_5"),
        other => root().join(".cache/tokenizers").join(other),
    };
    let there = folder.join("tokenizer.json").exists();
    // The fetch step leaves this mark where no registry answered; without it a missing file is a mistake.
    let excused = root().join(".cache/tokenizers/unavailable").exists();
    assert!(there || excused, "{name} is not in .cache/tokenizers: run `cargo xtask fetch`");
    there.then_some(folder)
}

fn tokenizer(name: &str) -> Option<Tokenizer> {
    if name == "smollm2" {
        return smollm2().map(|(tokenizer, _)| tokenizer);
    }
    let folder = folder(name)?;
    let mut config = read_json(&folder.join("tokenizer_config.json"));
    if name == "qwen2_5" {
        // The same vocabulary and merges with further added tokens.
        for entry in read_json(&root().join("tests/goldens/text/added_tokens_qwen2_5.json")).as_array().unwrap() {
            config["added_tokens_decoder"][entry["id"].to_string()] = entry.clone();
        }
    }
    let bytes = fs::read(folder.join("tokenizer.json")).unwrap();
    Some(Tokenizer::from_json(&bytes, config.as_object()).unwrap())
}

fn ids(value: &Value) -> Vec<TokenId> {
    value.as_array().unwrap().iter().map(|id| TokenId(id.as_u64().unwrap() as u32)).collect()
}

fn pieces(tokenizer: &std::sync::Arc<Tokenizer>, tokens: &[TokenId]) -> (Vec<String>, String) {
    let mut detokenizer = Detokenizer::new(tokenizer.clone(), false);
    let stream = tokens.iter().map(|token| detokenizer.push(*token)).collect();
    (stream, detokenizer.finish())
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|s| s.as_str().unwrap().to_owned()).collect()
}

/// Every text of the reference to ids and back, whole and piece by piece.
fn check_round_trips(name: &str, tokenizer: Tokenizer, texts: &[String], golden: &Value) -> usize {
    let tokenizer = std::sync::Arc::new(tokenizer);
    let rows = golden["rows"].as_array().unwrap();
    for (text, row) in texts.iter().zip(rows) {
        let expected = ids(&row["ids"]);
        assert_eq!(tokenizer.encode(text, false).unwrap(), expected, "{name}: {text:?}");
        if let Some(with_special) = row.get("with_special").filter(|v| v.is_array()) {
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids(with_special), "{name}: {text:?}");
        }
        let decoded = row.get("decoded").and_then(Value::as_str).unwrap_or(text);
        assert_eq!(tokenizer.decode(&expected, false), decoded, "{name}: {text:?}");
        if let Some(skipped) = row.get("decoded_skip_special").and_then(Value::as_str) {
            assert_eq!(tokenizer.decode(&expected, true), skipped, "{name}: {text:?}");
        }
        let (stream, tail) = pieces(&tokenizer, &expected);
        assert_eq!(stream, strings(&row["stream"]), "{name}: {text:?}");
        assert_eq!(tail, row["stream_tail"].as_str().unwrap(), "{name}: {text:?}");
    }
    for cut in golden["cut"].as_array().unwrap() {
        let (stream, tail) = pieces(&tokenizer, &ids(&cut["ids"]));
        assert_eq!(stream, strings(&cut["stream"]), "{name}");
        assert_eq!(tail, cut["held_back_tail"].as_str().unwrap(), "{name}");
    }
    rows.len()
}

#[test]
fn texts_survive_the_tokenizers_and_stream_in_whole_characters() {
    let goldens = read_json(&root().join("tests/goldens/text/tokenizer_roundtrip.json"));
    let texts = strings(&goldens["texts"]);
    let mut checked = 0;
    for name in TOKENIZERS {
        let Some(tokenizer) = tokenizer(name) else { continue };
        checked += check_round_trips(name, tokenizer, &texts, &goldens["tokenizers"][name]);
    }
    println!("{checked} round trips checked");
    assert!(checked >= 46);
}

/// The vocabulary of `tiny-spm` as SentencePiece writes it: what merges first has the better score.
fn sentencepiece_model() -> Vec<u8> {
    let message = |number: u8, content: &[u8]| [&[number << 3 | 2, content.len() as u8], content].concat();
    let tokenizer = read_json(&root().join("tests/goldens/tokenizers/tiny-spm/tokenizer.json"));
    let merges: Vec<String> =
        tokenizer["model"]["merges"].as_array().unwrap().iter().map(|m| strings(m).concat()).collect();
    let mut vocab: Vec<(u64, &String)> = tokenizer["model"]["vocab"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(text, id)| (id.as_u64().unwrap(), text))
        .collect();
    vocab.sort_unstable();
    let mut model = Vec::new();
    for (_, text) in vocab {
        let rank = merges.iter().position(|merged| merged == text).unwrap_or(merges.len());
        let kind = match text.as_str() {
            "<unk>" => 2,
            "<s>" | "</s>" => 3,
            byte if byte.starts_with("<0x") => 6,
            _ => 1,
        };
        let score = [&[0x15], &(-(rank as f32)).to_le_bytes()[..]].concat();
        model.extend(message(1, &[message(1, text.as_bytes()), score, vec![0x18, kind]].concat()));
    }
    // BPE, and spaces stay.
    model.extend([message(2, &[0x18, 2]), message(3, &[0x20, 0])].concat());
    model
}

#[test]
fn a_folder_with_tokenizer_model_needs_no_tokenizer_json() {
    let folder = tempfile::tempdir().unwrap();
    let goldens = root().join("tests/goldens");
    for file in ["tiny-internlm2/config.json", "tokenizers/tiny-spm/tokenizer_config.json"] {
        let file = goldens.join(file);
        fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
    }
    fs::write(folder.path().join("tokenizer.model"), sentencepiece_model()).unwrap();
    let source = ModelFiles::open_config(folder.path()).unwrap().tokenizer_source().unwrap();
    let (tokenizer, template) = Tokenizer::from_source(&source).unwrap();
    assert!(template.unwrap().contains("<|im_start|>"));
    assert_eq!(tokenizer.token_id("<|im_end|>"), Some(TokenId(592)));
    let round_trips = read_json(&goldens.join("text/tokenizer_roundtrip.json"));
    let golden = &round_trips["tokenizers"]["tiny-spm"];
    assert_eq!(check_round_trips("tiny-spm", tokenizer, &strings(&round_trips["texts"]), golden), 23);
}

/// Grammars see a text as the bytes of its tokens.
#[test]
fn the_bytes_of_tokens_join_to_the_text() {
    let goldens = read_json(&root().join("tests/goldens/text/tokenizer_roundtrip.json"));
    for name in TOKENIZERS {
        let Some(tokenizer) = tokenizer(name) else { continue };
        let rows = goldens["tokenizers"][name]["rows"].as_array().unwrap();
        let rows: Vec<Vec<TokenId>> = rows.iter().map(|row| ids(&row["ids"])).collect();
        let num_tokens = rows.iter().flatten().map(|id| id.0 + 1).max().unwrap();
        let bytes = tokenizer.token_bytes(num_tokens);
        for row in rows {
            let mut joined = Vec::new();
            for id in &row {
                match &bytes[id.0 as usize] {
                    TokenBytes::Text(text) => joined.extend_from_slice(text),
                    TokenBytes::Special(text) => joined.extend_from_slice(text.as_bytes()),
                    TokenBytes::Absent => panic!("{name}: token {id} is absent"),
                }
            }
            let joined = String::from_utf8_lossy(&joined).into_owned();
            let decoded = tokenizer.decode(&row, false);
            // Vocabularies of pieces begin a text with a space that decoding takes away, also behind control tokens.
            let without_spaces = |text: &str| text.replace(' ', "");
            assert_eq!(without_spaces(&joined), without_spaces(&decoded), "{name}");
        }
    }
}

#[test]
fn real_templates_show_how_their_models_call_tools() {
    let goldens = read_json(&root().join("tests/goldens/text/chat_templates.json"));
    for (name, format, knows) in [
        ("qwen1_5", "hermes", false),
        ("qwen2_5", "hermes", true),
        ("llama3", "hermes", false),
        ("llama3_1", "llama3_json", true),
        ("internlm2", "internlm", false),
        ("smollm2", "hermes", false),
    ] {
        let golden = &goldens["templates"][name];
        let tokenizer = tokenizer(golden["tokenizer"].as_str().unwrap());
        let (Some(tokenizer), Some(template)) = (tokenizer, template(name, golden)) else { continue };
        let found = ToolFormat::of_model(Some(&template), |token| tokenizer.token_id(token).is_some());
        assert_eq!((found.name, knows_tools(&template)), (format, knows), "{name}");
    }
}

#[test]
fn chat_templates_render_as_in_transformers() {
    let goldens = read_json(&root().join("tests/goldens/text/chat_templates.json"));
    let mut checked = 0;
    for (name, golden) in goldens["templates"].as_object().unwrap() {
        let Some(tokenizer) = tokenizer(golden["tokenizer"].as_str().unwrap()) else { continue };
        let Some(template) = template(name, golden) else {
            println!("{name}: its template could not be had");
            continue;
        };
        let template = ChatTemplate::new(template, &tokenizer).unwrap();
        for case in golden["cases"].as_array().unwrap() {
            check_case(name, &goldens, golden, case, &template, &tokenizer);
            checked += 1;
        }
    }
    println!("{checked} renderings checked");
    assert!(checked >= 22);
}

fn template(name: &str, golden: &Value) -> Option<String> {
    if let Some(inline) = golden.get("template") {
        return Some(inline.as_str().unwrap().to_owned());
    }
    let from = golden["template_from"].as_str().unwrap();
    if name == "smollm2" {
        return smollm2()?.1;
    }
    if from == "tokenizer_config.json" {
        let config = read_json(&folder(name)?.join("tokenizer_config.json"));
        return Some(config["chat_template"].as_str().unwrap().to_owned());
    }
    fs::read_to_string(root().join(".cache/templates").join(from)).ok()
}

fn check_case(
    name: &str,
    goldens: &Value,
    golden: &Value,
    case: &Value,
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
) {
    let mut kwargs = golden["extra"].as_object().unwrap().clone();
    for key in ["bos_token", "eos_token"] {
        if golden[key].is_string() {
            kwargs.insert(key.into(), golden[key].clone());
        }
    }
    if let Some(extra) = case.get("extra").and_then(Value::as_object) {
        kwargs.extend(extra.clone());
    }
    let with_tools = case.get("tools").and_then(Value::as_bool).unwrap_or(false);
    let prompt = ChatPrompt {
        messages: goldens["messages"][case["messages"].as_str().unwrap()].as_array().unwrap().clone(),
        tools: with_tools.then(|| goldens["tools"].as_array().unwrap().clone()),
        add_generation_prompt: case.get("add_generation_prompt").and_then(Value::as_bool).unwrap_or(true),
        continue_final_message: false,
        kwargs,
    };
    let rendered = template.render(&prompt);
    let Some(expected) = case.get("rendered").and_then(Value::as_str) else {
        assert!(rendered.is_err(), "{name} {case}: rendered {rendered:?}");
        return;
    };
    assert_eq!(rendered.unwrap(), expected, "{name} {}", case["messages"]);
    assert_eq!(tokenizer.encode(expected, false).unwrap(), ids(&case["ids"]), "{name} {}", case["messages"]);
}
