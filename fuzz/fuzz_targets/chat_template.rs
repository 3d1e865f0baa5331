//! Chat templates: a template, a NUL, and the conversation as JSON. Rendering ends, within bounds of time and size.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use phalanx_coordinator::text::{ChatPrompt, ChatTemplate, Tokenizer};
use serde_json::{Value, json};

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/tiny-llama/tokenizer.json");
    Tokenizer::from_json(&std::fs::read(file).expect("the tiny tokenizer"), None).expect("a tokenizer")
});

fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let template = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let prompt = parts.next().and_then(|text| serde_json::from_slice::<Value>(text).ok()).unwrap_or_default();
    let messages = prompt["messages"].as_array().cloned();
    let prompt = ChatPrompt {
        messages: messages.unwrap_or_else(|| vec![json!({"role": "user", "content": "Hi"})]),
        tools: prompt["tools"].as_array().cloned(),
        add_generation_prompt: true,
        continue_final_message: prompt["continue"] == true,
        kwargs: prompt["kwargs"].as_object().cloned().unwrap_or_default(),
    };
    let started = Instant::now();
    if let Ok(template) = ChatTemplate::new(template, &TOKENIZER)
        && let Ok(text) = template.render(&prompt)
    {
        assert!(text.len() <= 64 << 20, "{} bytes", text.len());
    }
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
});
