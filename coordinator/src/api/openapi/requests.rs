//! What clients send, as types: the source of the request schemas.
//!
//! Bodies are read field by field elsewhere, so that every error names its field; a test sends each field that stands here
//! and sees it read.
//!
//! **Invariant:** no field stands here that its endpoint would ignore.
#![expect(dead_code, reason = "the generator of schemas reads these types, nobody else does")]

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
struct Sampling {
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
    /// Send the answer in pieces.
    stream: Option<bool>,
}

/// A JSON schema, or its text.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum JsonSchemaText {
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
struct Structured {
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

/// A function that the model may call.
#[derive(JsonSchema)]
pub struct Function {
    #[schemars(length(min = 1, max = 64))]
    name: String,
    description: Option<String>,
    /// A JSON schema.
    parameters: Option<Map<String, Value>>,
    /// Hold calls to the schema.
    strict: Option<bool>,
}

/// A tool of chat.
#[derive(JsonSchema)]
pub struct Tool {
    function: Function,
}

#[derive(JsonSchema)]
struct FunctionName {
    name: String,
}

/// Whether and what to call.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum ToolChoice {
    Word(#[schemars(extend("enum" = ["none", "auto", "required"]))] String),
    Named { function: FunctionName },
}

/// Fields that chat and completions share.
#[derive(JsonSchema)]
struct Shared {
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
    /// Answer with token ids too.
    return_token_ids: Option<bool>,
    /// Name tokens by `token_id:N`.
    return_tokens_as_token_ids: Option<bool>,
    /// With `stream` alone.
    stream_options: Option<StreamOptions>,
    /// The client's own name for the request.
    #[schemars(length(max = 32))]
    request_id: Option<String>,
    #[schemars(flatten)]
    structured: Structured,
    /// What an answer is held to.
    response_format: Option<ResponseFormat>,
}

/// One part of a message.
#[derive(JsonSchema)]
pub struct TextPart {
    #[schemars(rename = "type", extend("enum" = ["text", "input_text", "output_text"]))]
    kind: String,
    text: String,
}

/// A text, or parts of text.
#[derive(JsonSchema)]
#[schemars(untagged)]
pub enum Content {
    Text(String),
    Parts(Vec<TextPart>),
}

/// A call that an assistant has made.
#[derive(JsonSchema)]
pub struct MadeCall {
    function: MadeFunction,
}

#[derive(JsonSchema)]
pub struct MadeFunction {
    name: String,
    /// JSON as text.
    arguments: String,
}

/// One message of a conversation: what somebody said, or calls.
#[derive(JsonSchema)]
#[schemars(untagged)]
pub enum ChatMessage {
    Said {
        /// system, developer, user, assistant, tool, or a role that the model's template knows.
        role: String,
        content: Content,
    },
    Called {
        /// assistant.
        role: String,
        tool_calls: Vec<MadeCall>,
    },
}

/// Body of `/v1/chat/completions`.
#[derive(JsonSchema)]
pub struct ChatCompletionRequest {
    #[schemars(length(min = 1, max = 10_000))]
    messages: Vec<ChatMessage>,
    /// Most tokens of an answer.
    #[schemars(range(min = 1, max = 9_000_000_000_000_000_i64))]
    max_completion_tokens: Option<u64>,
    /// The older name of the same.
    #[schemars(range(min = 1, max = 9_000_000_000_000_000_i64))]
    max_tokens: Option<u64>,
    /// Log-probabilities of the answer's tokens.
    logprobs: Option<bool>,
    /// So many alternatives beside each; needs `logprobs`.
    #[schemars(range(min = 0, max = 20))]
    top_logprobs: Option<u32>,
    /// Open the assistant's turn.
    add_generation_prompt: Option<bool>,
    /// Go on with the last message.
    continue_final_message: Option<bool>,
    /// Variables for the template.
    chat_template_kwargs: Option<Map<String, Value>>,
    /// Functions that the model may call.
    #[schemars(length(max = 128))]
    tools: Option<Vec<Tool>>,
    /// Whether and what to call; `auto` where it is absent.
    tool_choice: Option<ToolChoice>,
    /// Several calls in one answer.
    parallel_tool_calls: Option<bool>,
    /// How much to think, where the model's template takes it.
    #[schemars(extend("enum" = ["none", "minimal", "low", "medium", "high", "xhigh", "max"]))]
    reasoning_effort: Option<String>,
    /// Answer with the thoughts too.
    include_reasoning: Option<bool>,
    #[schemars(flatten)]
    shared: Shared,
}

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

/// Which end of a prompt is cut off.
#[derive(JsonSchema)]
#[schemars(rename_all = "lowercase")]
enum TruncationSide {
    Left,
    Right,
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
    #[schemars(length(max = 32))]
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

/// One item of a response's input.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum InputItem {
    Message {
        #[schemars(rename = "type", extend("enum" = ["message"]))]
        kind: Option<String>,
        #[schemars(extend("enum" = ["system", "developer", "user", "assistant"]))]
        role: String,
        content: Content,
    },
    Call {
        #[schemars(rename = "type", extend("enum" = ["function_call"]))]
        kind: String,
        call_id: String,
        name: String,
        arguments: String,
    },
    Output {
        #[schemars(rename = "type", extend("enum" = ["function_call_output"]))]
        kind: String,
        call_id: String,
        output: Content,
    },
}

/// A text, or items.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum Input {
    Text(String),
    Items(#[schemars(length(min = 1))] Vec<InputItem>),
}

/// A tool of a response.
#[derive(JsonSchema)]
struct FlatTool {
    #[schemars(rename = "type", extend("enum" = ["function"]))]
    kind: String,
    #[schemars(flatten)]
    function: Function,
}

/// Whether and what to call.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum FlatChoice {
    Word(#[schemars(extend("enum" = ["none", "auto", "required"]))] String),
    Named(FunctionName),
}

/// What an answer is held to.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum FlatFormat {
    Plain {
        #[schemars(rename = "type", extend("enum" = ["text", "json_object"]))]
        kind: String,
    },
    Schema {
        #[schemars(rename = "type", extend("enum" = ["json_schema"]))]
        kind: String,
        schema: JsonSchemaText,
    },
}

/// How the text of a response is made.
#[derive(JsonSchema)]
struct TextConfig {
    format: Option<FlatFormat>,
}

/// How a response is thought about.
#[derive(JsonSchema)]
struct Reasoning {
    #[schemars(extend("enum" = ["none", "minimal", "low", "medium", "high", "xhigh", "max"]))]
    effort: Option<String>,
}

/// Body of `/v1/responses`.
#[derive(JsonSchema)]
pub struct ResponseRequest {
    input: Input,
    /// A system message before the input.
    instructions: Option<String>,
    /// Most tokens of the answer.
    #[schemars(range(min = 1, max = 9_000_000_000_000_000_i64))]
    max_output_tokens: Option<u64>,
    /// What else to send: `message.output_text.logprobs`.
    include: Option<Vec<String>>,
    /// Alternatives beside each token.
    #[schemars(range(min = 0, max = 20))]
    top_logprobs: Option<u32>,
    /// Repeated in the response.
    metadata: Option<BTreeMap<String, String>>,
    /// Functions that the model may call.
    #[schemars(length(max = 128))]
    tools: Option<Vec<FlatTool>>,
    /// Whether and what to call.
    tool_choice: Option<FlatChoice>,
    /// Several calls in one answer.
    parallel_tool_calls: Option<bool>,
    text: Option<TextConfig>,
    reasoning: Option<Reasoning>,
    #[schemars(flatten)]
    structured: Structured,
    #[schemars(flatten)]
    sampling: Sampling,
}

/// One block of a message.
#[derive(JsonSchema)]
struct TextBlock {
    #[schemars(rename = "type", extend("enum" = ["text"]))]
    kind: String,
    text: String,
}

/// A text, or blocks of text.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum BlockContent {
    Text(String),
    Blocks(Vec<TextBlock>),
}

/// One message of a conversation with `/v1/messages`.
#[derive(JsonSchema)]
struct AnthropicMessage {
    #[schemars(extend("enum" = ["user", "assistant"]))]
    role: String,
    content: BlockContent,
}

/// A tool of `/v1/messages`.
#[derive(JsonSchema)]
struct AnthropicTool {
    #[schemars(length(min = 1, max = 64))]
    name: String,
    description: Option<String>,
    /// A JSON schema.
    input_schema: Option<Map<String, Value>>,
    /// Hold calls to the schema.
    strict: Option<bool>,
}

/// Whether and what to call.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum AnthropicChoice {
    Mode {
        #[schemars(rename = "type", extend("enum" = ["auto", "any", "none"]))]
        kind: String,
        /// One call in an answer at the most.
        disable_parallel_tool_use: Option<bool>,
    },
    Tool {
        #[schemars(rename = "type", extend("enum" = ["tool"]))]
        kind: String,
        name: String,
        disable_parallel_tool_use: Option<bool>,
    },
}

/// Whether to think, where the model can.
#[derive(JsonSchema)]
struct Thinking {
    #[schemars(rename = "type", extend("enum" = ["enabled", "adaptive", "disabled"]))]
    kind: String,
}

/// A format of an answer.
#[derive(JsonSchema)]
struct AnthropicFormat {
    #[schemars(rename = "type", extend("enum" = ["json_schema"]))]
    kind: String,
    schema: JsonSchemaText,
}

/// How an answer is made.
#[derive(JsonSchema)]
struct OutputConfig {
    format: Option<AnthropicFormat>,
}

/// Body of `/v1/messages`.
#[derive(JsonSchema)]
pub struct MessageRequest {
    #[schemars(length(min = 1, max = 10_000))]
    messages: Vec<AnthropicMessage>,
    /// Most tokens of the answer.
    #[schemars(range(min = 1, max = 9_000_000_000_000_000_i64))]
    max_tokens: u64,
    system: Option<BlockContent>,
    #[schemars(length(max = 4), inner(length(min = 1)))]
    stop_sequences: Option<Vec<String>>,
    /// Tools that the model may call.
    #[schemars(length(max = 128))]
    tools: Option<Vec<AnthropicTool>>,
    /// Whether and what to call.
    tool_choice: Option<AnthropicChoice>,
    thinking: Option<Thinking>,
    output_config: Option<OutputConfig>,
    #[schemars(flatten)]
    structured: Structured,
    #[schemars(flatten)]
    sampling: Sampling,
}

/// Body of `/v1/messages/count_tokens`.
#[derive(JsonSchema)]
pub struct CountTokensRequest {
    #[schemars(length(min = 1, max = 10_000))]
    messages: Vec<AnthropicMessage>,
    model: Option<String>,
    system: Option<BlockContent>,
    /// Tools that the model may call.
    #[schemars(length(max = 128))]
    tools: Option<Vec<AnthropicTool>>,
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
