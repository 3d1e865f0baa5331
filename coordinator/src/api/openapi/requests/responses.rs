//! Conversations as items: `/v1/responses`.

use std::collections::BTreeMap;

use schemars::JsonSchema;

use super::chat::{Content, Function, FunctionName};
use super::sampling::{JsonSchemaText, Sampling, Structured};

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
