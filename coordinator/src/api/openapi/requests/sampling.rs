//! Fields of every request that generates.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde_json::{Map, Value};

/// A string or a list of strings.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum OneOrMany {
    One(#[schemars(length(min = 1))] String),
    Many(#[schemars(length(max = 4), inner(length(min = 1)))] Vec<String>),
}

/// How a stream is sent.
#[derive(JsonSchema)]
struct StreamOptions {
    /// One more chunk with the usage at the end.
    include_usage: Option<bool>,
    /// Usage on each chunk.
    continuous_usage_stats: Option<bool>,
}

/// A rule for the end of a beam search.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum EarlyStopping {
    Flag(bool),
    Never(NeverWord),
}

#[derive(JsonSchema)]
#[schemars(rename_all = "lowercase")]
enum NeverWord {
    Never,
}

/// Fields of every request that generates.
#[derive(JsonSchema)]
pub(super) struct Sampling {
    /// A served name, the model's path or its last part; the first model where it is absent.
    model: Option<String>,
    /// 0 is greedy.
    #[schemars(range(min = 0.0, max = 2.0))]
    temperature: Option<f64>,
    /// Above 0: the share of probability to choose from.
    #[schemars(range(min = 0.000_001, max = 1.0))]
    top_p: Option<f64>,
    /// Choose among so many; -1 or 0: all.
    #[schemars(range(min = -1, max = 2_147_483_647))]
    top_k: Option<i64>,
    /// Least share of the best token's probability.
    #[schemars(range(min = 0.0, max = 1.0))]
    min_p: Option<f64>,
    /// The same seed gives the same text; -1: a random one.
    #[schemars(range(min = -9_000_000_000_000_000_i64, max = 9_000_000_000_000_000_i64))]
    seed: Option<i64>,
    /// Subtracted from tokens of the output.
    #[schemars(range(min = -2.0, max = 2.0))]
    presence_penalty: Option<f64>,
    /// Subtracted for each time that a token stands in the output.
    #[schemars(range(min = -2.0, max = 2.0))]
    frequency_penalty: Option<f64>,
    /// Above 0: divides the logits of tokens seen before; 1 is off.
    #[schemars(extend("exclusiveMinimum" = 0))]
    repetition_penalty: Option<f64>,
    /// Tokens before which the output does not stop.
    #[schemars(range(min = 0, max = 4_294_967_295_u32))]
    min_tokens: Option<u32>,
    /// Added to the logits of token ids; clamped to 100 either way.
    #[schemars(extend("maxProperties" = 1024))]
    logit_bias: Option<BTreeMap<String, f64>>,
    /// The only tokens that may be drawn.
    #[schemars(length(min = 1), inner(range(min = 0)))]
    allowed_token_ids: Option<Vec<u32>>,
    /// Words that may not stand in the output.
    #[schemars(length(max = 128), inner(length(min = 1)))]
    bad_words: Option<Vec<String>>,
    /// End the output where its last tokens are one pattern, again and again.
    repetition_detection: Option<RepetitionDetection>,
    /// Tokens behind which thoughts are ended; -1: they end by themselves. For models that mark their thoughts.
    #[schemars(range(min = -1, max = 4_294_967_295_i64))]
    thinking_token_budget: Option<i64>,
    /// Tokens that end the output.
    #[schemars(inner(range(min = 0)))]
    stop_token_ids: Option<Vec<u32>>,
    /// Keep what ended the output in its text.
    include_stop_str_in_output: Option<bool>,
    /// Go on behind the model's end token.
    ignore_eos: Option<bool>,
    /// Leave special tokens out of the text.
    skip_special_tokens: Option<bool>,
    /// No effect with tokenizers of this kind.
    spaces_between_special_tokens: Option<bool>,
    /// Add the tokenizer's own special tokens to the prompt.
    add_special_tokens: Option<bool>,
    /// Lower runs first; 0 where the model is served first come, first served.
    #[schemars(range(min = -2_147_483_648_i64, max = 2_147_483_647))]
    priority: Option<i32>,
    /// Cut longer prompts to so many tokens; -1: to what the model's context leaves.
    #[schemars(range(min = -1, max = 4_294_967_295_i64))]
    truncate_prompt_tokens: Option<i64>,
    /// The end that is cut off; `left` where it is absent.
    truncation_side: Option<TruncationSide>,
    /// Share the prefix cache with requests of the same salt only; without `@`, `/` and `\\`.
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[^@/\\\x00]+$"))]
    cache_salt: Option<String>,
    /// Send the answer in pieces.
    stream: Option<bool>,
    /// Tokens of a piece; the first and the last come at once.
    #[schemars(range(min = 1, max = 4_294_967_295_i64))]
    stream_interval: Option<u32>,
}

/// What counts as a loop.
#[derive(JsonSchema)]
struct RepetitionDetection {
    /// Shortest pattern, in tokens.
    #[schemars(range(min = 0, max = 4096))]
    min_pattern_size: Option<u32>,
    /// Longest pattern; 0: nothing is looked for.
    #[schemars(range(min = 0, max = 4096))]
    max_pattern_size: Option<u32>,
    /// How often it stands there, at least twice.
    #[schemars(range(min = 0, max = 4_294_967_295_i64))]
    min_count: Option<u32>,
}

/// A JSON schema, or its text.
#[derive(JsonSchema)]
#[schemars(untagged)]
pub(super) enum JsonSchemaText {
    Object(Map<String, Value>),
    Any(bool),
    Text(String),
}

/// What an output is held to: one of these.
#[derive(JsonSchema)]
struct StructuredOutputs {
    json: Option<JsonSchemaText>,
    json_object: Option<bool>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    /// In Lark's notation.
    grammar: Option<String>,
}

/// Fields that hold an output to a grammar; one of them at the most.
#[derive(JsonSchema)]
pub(super) struct Structured {
    structured_outputs: Option<StructuredOutputs>,
    /// An older name of `structured_outputs.json`.
    guided_json: Option<JsonSchemaText>,
    /// An older name of `structured_outputs.regex`.
    guided_regex: Option<String>,
    /// An older name of `structured_outputs.choice`.
    guided_choice: Option<Vec<String>>,
    /// An older name of `structured_outputs.grammar`.
    guided_grammar: Option<String>,
}

/// A schema under the name of chat.
#[derive(JsonSchema)]
struct NamedSchema {
    schema: JsonSchemaText,
}

/// What an answer is held to.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum ResponseFormat {
    Plain {
        #[schemars(rename = "type", extend("enum" = ["text", "json_object"]))]
        kind: String,
    },
    Schema {
        #[schemars(rename = "type", extend("enum" = ["json_schema"]))]
        kind: String,
        json_schema: NamedSchema,
    },
}

/// Which end of a prompt is cut off.
#[derive(JsonSchema)]
#[schemars(rename_all = "lowercase")]
pub(super) enum TruncationSide {
    Left,
    Right,
}

/// Tokens for each place, or lists of them for one place each; -1 names none.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum PromptCandidates {
    Same(#[schemars(length(max = 20), inner(range(min = -1)))] Vec<i64>),
    Each(#[schemars(inner(length(max = 20)))] Vec<Vec<i64>>),
}

/// Fields that chat and completions share.
#[derive(JsonSchema)]
pub(super) struct Shared {
    #[schemars(flatten)]
    sampling: Sampling,
    /// Outputs of each prompt.
    #[schemars(range(min = 1, max = 16_384))]
    n: Option<u32>,
    /// Outputs that are made to choose the best of; at least n.
    #[schemars(range(min = 1, max = 16_384))]
    best_of: Option<u32>,
    /// Search for the likeliest outputs: `best_of` (or `n`) beams, of which the best `n` are given.
    use_beam_search: Option<bool>,
    /// Scores of a search are divided by length to this power.
    length_penalty: Option<f64>,
    /// When a search ends: `true`, `false` or `"never"`, as in transformers; absent: all steps are made.
    early_stopping: Option<EarlyStopping>,
    /// Strings that end an output, four at the most.
    stop: Option<OneOrMany>,
    /// Log-probabilities of the prompt, with so many alternatives.
    #[schemars(range(min = 0, max = 20))]
    prompt_logprobs: Option<u32>,
    /// Tokens whose log-probabilities are told beside each token of the output, in place of the best ones.
    #[schemars(length(max = 128), inner(range(min = 0)))]
    logprob_token_ids: Option<Vec<u32>>,
    /// Tokens whose log-probabilities are told at places of the prompt: at each, or a list for each. Not with `stream`.
    prompt_logprob_token_ids: Option<PromptCandidates>,
    /// The first such place is behind the prompt's token of this index.
    #[schemars(range(min = 0, max = 4_294_967_295_i64))]
    prompt_logprob_start: Option<u32>,
    /// `false`: answer with token ids alone.
    detokenize: Option<bool>,
    /// Answer with token ids too.
    return_token_ids: Option<bool>,
    /// Name tokens by `token_id:N`.
    return_tokens_as_token_ids: Option<bool>,
    /// With `stream` alone.
    stream_options: Option<StreamOptions>,
    /// The client's own name for the request.
    #[schemars(length(max = 128))]
    request_id: Option<String>,
    #[schemars(flatten)]
    structured: Structured,
    /// What an answer is held to.
    response_format: Option<ResponseFormat>,
}
