//! Conversations in the form of Anthropic's API.

use schemars::JsonSchema;
use serde_json::{Map, Value};

use super::sampling::{JsonSchemaText, Sampling, Structured};

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
