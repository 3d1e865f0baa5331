//! Conversations in OpenAI's form.

use schemars::JsonSchema;
use serde_json::{Map, Value};

use super::sampling::Shared;

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
pub(super) struct FunctionName {
    name: String,
}

/// Whether and what to call.
#[derive(JsonSchema)]
#[schemars(untagged)]
enum ToolChoice {
    Word(#[schemars(extend("enum" = ["none", "auto", "required"]))] String),
    Named { function: FunctionName },
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
    arguments: MadeArguments,
}

#[derive(JsonSchema)]
#[schemars(untagged)]
pub enum MadeArguments {
    /// JSON as text.
    Text(String),
    /// What the text would say.
    Object(Map<String, Value>),
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
