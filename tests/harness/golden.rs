//! Reference values of transformers, float32 on a CPU; see `tests/goldens`.

use std::fs;
use std::path::{Path, PathBuf};

use phalanx_formats::ModelFiles;
use serde_json::Value;

use crate::places;

/// A tiny model with what it should compute.
pub struct Golden {
    /// Its name.
    pub name: String,
    /// Its folder.
    pub folder: PathBuf,
    /// What it should compute.
    pub prompts: Vec<GoldenPrompt>,
}

/// One prompt with what follows from it.
pub struct GoldenPrompt {
    /// Its name.
    pub name: String,
    /// Token ids.
    pub ids: Vec<u32>,
    /// ln p of each id given those before; none for the first.
    pub prompt_logprobs: Vec<Option<f64>>,
    /// The best tokens behind the prompt with their ln p.
    pub last_top: Vec<(u32, f64)>,
    /// The greedy continuation.
    pub greedy: Vec<u32>,
    /// Its ln p.
    pub greedy_logprobs: Vec<f64>,
    /// Best minus second logit at each of its steps.
    pub margins: Vec<f64>,
}

impl Golden {
    /// Whether so many ranks each get a head: more are refused.
    pub fn splits_into(&self, size: &str) -> bool {
        let files = ModelFiles::open_config(&self.folder).expect("a model");
        files.geometry().num_heads >= size.parse().expect("a size")
    }
}

fn read(path: &Path) -> Value {
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Reference values of more than one prompt's, by their path.
pub fn reference(path: &str) -> Value {
    read(&places::goldens().join(path))
}

/// The tiny models of the architectures that are served.
pub fn goldens() -> Vec<Golden> {
    ["tiny-llama", "tiny-llama3-rope", "tiny-qwen2", "tiny-qwen2-tied-sharded", "tiny-internlm2", "tiny-mistral"]
        .map(golden)
        .into()
}

/// One tiny model.
pub fn golden(name: &str) -> Golden {
    let folder = places::goldens().join(name);
    let prompts = prompts(&read(&folder.join("goldens.json"))["prompts"]);
    Golden { name: name.to_owned(), folder, prompts }
}

/// SmolLM2-135M-Instruct as GGUF with its prompts, or `None` where no registry had it.
pub fn smollm2() -> Option<Golden> {
    let file = places::models().join("SmolLM2-135M-Instruct.Q4_1.gguf");
    if !file.exists() {
        // Left where no registry answered, and where tests are carried without it.
        let excused = places::models().join("unavailable").exists();
        assert!(excused, "there is no {}: run `cargo xtask fetch`", file.display());
        eprintln!("NOT RUN: there is no {}; `cargo xtask fetch` obtains it", file.display());
        return None;
    }
    Some(Golden { name: "smollm2".into(), folder: file, prompts: smollm2_prompts("gguf") })
}

/// The same weights as a Hugging Face folder in bfloat16, with the values that follow from the rounding.
pub fn smollm2_bf16() -> Option<Golden> {
    let folder = crate::convert::hugging_face_folder(&smollm2()?.folder);
    Some(Golden { name: "smollm2-bf16".into(), folder, prompts: smollm2_prompts("hf_bf16") })
}

fn smollm2_prompts(reference: &str) -> Vec<GoldenPrompt> {
    let goldens = read(&places::goldens().join("smollm2/goldens-A.json"));
    let mut list = prompts(&goldens["references"][reference]);
    // The token ids stand once, with the first reference.
    for (prompt, first) in list.iter_mut().zip(prompts(&goldens["references"]["gguf"])) {
        prompt.ids = first.ids;
    }
    list
}

fn prompts(list: &Value) -> Vec<GoldenPrompt> {
    let numbers =
        |value: &Value| -> Vec<f64> { value.as_array().into_iter().flatten().filter_map(Value::as_f64).collect() };
    let ids = |value: &Value| -> Vec<u32> {
        value.as_array().into_iter().flatten().filter_map(Value::as_u64).map(|id| id as u32).collect()
    };
    let prompts = list.as_array().expect("prompts");
    let read = |prompt: &Value| GoldenPrompt {
        name: prompt["name"].as_str().unwrap_or_default().to_owned(),
        ids: ids(&prompt["ids"]),
        prompt_logprobs: prompt["prompt_logprobs"].as_array().expect("logprobs").iter().map(Value::as_f64).collect(),
        last_top: ids(&prompt["last"]["top20_ids"])
            .into_iter()
            .zip(numbers(&prompt["last"]["top20_logprobs"]))
            .collect(),
        greedy: ids(&prompt["greedy"]["ids"]),
        greedy_logprobs: numbers(&prompt["greedy"]["logprobs"]),
        margins: numbers(&prompt["greedy"]["margins"]),
    };
    prompts.iter().map(read).collect()
}
