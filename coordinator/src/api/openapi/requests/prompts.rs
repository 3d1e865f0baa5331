//! Texts and token ids: completions, embeddings, and the way between the two.

use schemars::JsonSchema;

use super::chat::{ChatMessage, Tool};
use super::sampling::{Shared, TruncationSide};

/// Text, texts, token ids or lists of them.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum Prompt {
    Text(String),
    Texts(#[schemars(length(min = 1, max = 1024))] Vec<String>),
    Ids(#[schemars(length(min = 1))] Vec<u32>),
    Lists(#[schemars(length(min = 1, max = 1024), inner(length(min = 1)))] Vec<Vec<u32>>),
}

/// How numbers are sent.
#[derive(JsonSchema)]
#[schemars(rename_all = "lowercase")]
enum EncodingFormat {
    Float,
    Base64,
}

/// Body of `/v1/embeddings`.
#[derive(JsonSchema)]
pub struct EmbeddingRequest {
    /// A served name, the model's path or its last part; the first model where it is absent.
    model: Option<String>,
    input: Prompt,
    /// Lists of numbers, or little-endian 32-bit floats in base64.
    encoding_format: Option<EncodingFormat>,
    /// Cut each vector to its first numbers, where the model was trained for it.
    #[schemars(range(min = 1, max = 4_294_967_295_u64))]
    dimensions: Option<u32>,
    /// Bring each vector to length 1; as the model's files say where it is absent.
    normalize: Option<bool>,
    /// Add the tokens that the model wants around a text.
    add_special_tokens: Option<bool>,
    /// Cut longer inputs to so many tokens; -1: to the model's context.
    #[schemars(range(min = -1, max = 4_294_967_295_i64))]
    truncate_prompt_tokens: Option<i64>,
    /// The end that is cut off; `left` where it is absent.
    truncation_side: Option<TruncationSide>,
    /// Lower runs first, where the server is set to look at it.
    #[schemars(range(min = -2_147_483_648_i64, max = 2_147_483_647))]
    priority: Option<i32>,
    /// The client's own name for the request.
    #[schemars(length(max = 128))]
    request_id: Option<String>,
}

/// Body of `/v1/completions`.
#[derive(JsonSchema)]
pub struct CompletionRequest {
    prompt: Prompt,
    /// Most tokens of an output; 16 where it is absent. 0 with `echo` alone.
    #[schemars(range(min = 1, max = 9_000_000_000_000_000_i64))]
    max_tokens: Option<u64>,
    /// Repeat the prompt.
    echo: Option<bool>,
    /// Log-probabilities, with so many alternatives.
    #[schemars(range(min = 0, max = 20))]
    logprobs: Option<u32>,
    #[schemars(flatten)]
    shared: Shared,
}

/// Body of `/tokenize`: a prompt, or messages.
#[derive(JsonSchema)]
#[schemars(untagged)]
pub enum TokenizeRequest {
    /// A text.
    Text {
        /// The text.
        prompt: String,
        /// A served name.
        model: Option<String>,
        /// Add the tokenizer's own special tokens.
        add_special_tokens: Option<bool>,
        /// Answer with the tokens' texts too.
        return_token_strs: Option<bool>,
    },
    /// A conversation.
    Chat {
        /// Its messages.
        #[schemars(length(min = 1, max = 10_000))]
        messages: Vec<ChatMessage>,
        /// A served name.
        model: Option<String>,
        /// Functions that the template is told about.
        #[schemars(length(max = 128))]
        tools: Option<Vec<Tool>>,
    },
}

/// Body of `/detokenize`.
#[derive(JsonSchema)]
pub struct DetokenizeRequest {
    tokens: Vec<u32>,
    /// A served name.
    model: Option<String>,
}
