//! What model files say about text: end tokens, generation defaults, the tokenizer.
//!
//! Does not tokenize.

use std::path::PathBuf;

use serde_json::Value;

use crate::SentencePieceFiles;
use crate::embedding::EmbeddingSettings;

/// Tokens that end a turn of a chat. One that a chat template writes is an end token of its model, whatever the config says.
pub(crate) const CHAT_END_TOKENS: [&str; 6] =
    ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>"];

/// What a model's files say about text.
#[derive(Debug, Clone)]
pub(crate) struct ModelTexts {
    /// Ids that end a sequence.
    pub end_token_ids: Vec<u32>,
    /// Recommended sampling parameters.
    pub defaults: GenerationDefaults,
    /// Where the tokenizer is; a GGUF file's own vocabulary is read only when it is asked for.
    pub tokenizer: Option<TokenizerSource>,
    /// How hidden states become embeddings.
    pub embedding: EmbeddingSettings,
}

/// Ids that end a sequence, each once, in the order in which they were found.
#[derive(Debug, Default)]
pub(crate) struct EndTokens(Vec<u32>);

impl EndTokens {
    /// Adds one.
    pub(crate) fn add(&mut self, id: u32) {
        if !self.0.contains(&id) {
            self.0.push(id);
        }
    }

    /// All of them.
    pub(crate) fn into_ids(self) -> Vec<u32> {
        self.0
    }
}

/// Sampling parameters that a model's authors recommend, for requests that do not say.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Divisor of logits.
    pub temperature: Option<f32>,
    /// How many tokens stay in the draw.
    pub top_k: Option<u32>,
    /// How much probability stays in the draw.
    pub top_p: Option<f32>,
    /// Least probability, as a part of the largest.
    pub min_p: Option<f32>,
    /// Divisor of the logits of tokens seen before.
    pub repetition_penalty: Option<f32>,
}

/// Where a model's tokenizer is.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenizerSource {
    /// The files of a Hugging Face folder.
    Json {
        /// Path of `tokenizer.json`.
        tokenizer_json: PathBuf,
        /// Contents of `tokenizer_config.json`.
        tokenizer_config: Option<Value>,
        /// The default chat template, from whichever file has it.
        chat_template: Option<String>,
    },
    /// The metadata of a GGUF file.
    Gguf(GgufVocab),
    /// A Hugging Face folder that has `tokenizer.model` and no `tokenizer.json`.
    SentencePiece(SentencePieceFiles),
}

/// A vocabulary as GGUF metadata has it (`tokenizer.ggml.*`).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufVocab {
    /// Kind of tokenizer: `gpt2` (byte-level BPE), `llama` (sentencepiece).
    pub model: String,
    /// How text is cut before BPE: `default`, `llama-bpe`, `qwen2`, `smollm`.
    pub pre: String,
    /// Texts by id.
    pub tokens: Vec<String>,
    /// Scores by id; empty where the file has none.
    pub scores: Vec<f32>,
    /// Kinds by id (1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte); empty where the file has none.
    pub token_types: Vec<i32>,
    /// BPE merges, best first.
    pub merges: Vec<String>,
    /// Begins a text.
    pub bos: Option<u32>,
    /// Ends a text.
    pub eos: Option<u32>,
    /// Stands for what is not known.
    pub unk: Option<u32>,
    /// Fills.
    pub pad: Option<u32>,
    /// Whether `bos` is put before a text.
    pub add_bos: Option<bool>,
    /// Whether a space is put before a text.
    pub add_space_prefix: Option<bool>,
    /// The chat template.
    pub chat_template: Option<String>,
}
