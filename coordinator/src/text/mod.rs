//! The only room that knows text: chat template, tokenizer, incremental detokenizer, stop strings, thoughts, tool calls.
//!
//! Built from a model's own files by [`TextModel::load`]. Knows no HTTP and no engine.
//!
//! **Invariant:** text that was released is never taken back; joined, the released pieces are the decoded text.

mod chat_template;
mod detokenizer;
mod error;
mod gguf_vocab;
mod python_json;
mod reasoning;
mod stop;
mod template_thread;
mod token_bytes;
mod tokenizer;
pub mod tools;

use std::sync::Arc;

use phalanx_formats::ModelFiles;
use phalanx_proto::TokenId;
use tools::ToolFormat;

pub use chat_template::{ChatPrompt, ChatTemplate};
pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use reasoning::{Split, ThoughtParser};
pub use stop::{StopMatcher, StopStep};
pub use token_bytes::TokenBytes;
pub use tokenizer::Tokenizer;

/// Everything of a model that concerns text.
#[derive(Debug)]
pub struct TextModel {
    tokenizer: Arc<Tokenizer>,
    chat_template: Option<ChatTemplate>,
    end_token_ids: Vec<TokenId>,
    habits: Habits,
}

/// What the chat template shows of the way a model writes.
#[derive(Debug, Clone)]
struct Habits {
    tool_format: &'static ToolFormat,
    knows_tools: bool,
    thinks: bool,
    takes_effort: bool,
    takes_thinking_switch: bool,
}

impl Habits {
    fn new(template: Option<&str>, tokenizer: &Tokenizer) -> Self {
        let writes = |mark: &str| template.is_some_and(|template| template.contains(mark));
        Self {
            tool_format: ToolFormat::of_model(template, |token| tokenizer.token_id(token).is_some()),
            knows_tools: template.is_some_and(tools::knows_tools),
            thinks: template.is_some_and(ThoughtParser::is_used_by),
            takes_effort: writes("reasoning_effort"),
            takes_thinking_switch: writes("enable_thinking"),
        }
    }
}

impl TextModel {
    /// Builds tokenizer and chat template from a model's files.
    ///
    /// # Errors
    /// No tokenizer, or one that cannot be read; a chat template that does not parse.
    pub fn load(files: &ModelFiles) -> Result<Self, TextError> {
        let source = files.tokenizer_source().ok_or(TextError::NoTokenizer)?;
        let (tokenizer, template) = Tokenizer::from_source(&source)?;
        let habits = Habits::new(template.as_deref(), &tokenizer);
        let chat_template = match template {
            Some(text) => Some(ChatTemplate::new(text, &tokenizer)?),
            None => None,
        };
        let end_token_ids = files.end_token_ids().into_iter().map(TokenId).collect();
        Ok(Self { tokenizer: Arc::new(tokenizer), chat_template, end_token_ids, habits })
    }

    /// Token ids of a text; `add_special` adds what the model wants around a plain prompt, such as a begin token.
    ///
    /// # Errors
    /// The tokenizer refuses the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, TextError> {
        self.tokenizer.encode(text, add_special)
    }

    /// Text of token ids; unknown ids are left out.
    pub fn decode(&self, tokens: &[TokenId], skip_special: bool) -> String {
        self.tokenizer.decode(tokens, skip_special)
    }

    /// The prompt of a conversation.
    ///
    /// # Errors
    /// The model has no template, or the template refuses these messages.
    pub fn render_chat(&self, prompt: &ChatPrompt) -> Result<String, TextError> {
        self.chat_template.as_ref().ok_or(TextError::NoChatTemplate)?.render(prompt)
    }

    /// True where `render_chat` can work.
    pub fn has_chat_template(&self) -> bool {
        self.chat_template.is_some()
    }

    /// Replaces the model's own chat template (`--chat-template`).
    ///
    /// # Errors
    /// The template does not parse.
    pub fn set_chat_template(&mut self, template: String) -> Result<(), TextError> {
        let habits = Habits::new(Some(&template), &self.tokenizer);
        self.chat_template = Some(ChatTemplate::new(template, &self.tokenizer)?);
        self.habits = habits;
        Ok(())
    }

    /// Turns one sequence's tokens into text as they come.
    pub fn detokenizer(&self, skip_special: bool) -> Detokenizer {
        Detokenizer::new(Arc::clone(&self.tokenizer), skip_special)
    }

    /// Text of one token, special tokens included; for log-probabilities.
    pub fn token_text(&self, token: TokenId) -> String {
        self.tokenizer.decode(&[token], false)
    }

    /// The bytes of each token, by id, for ids below `num_tokens`; takes a while for a large vocabulary.
    pub fn token_bytes(&self, num_tokens: u32) -> Vec<TokenBytes> {
        self.tokenizer.token_bytes(num_tokens)
    }

    /// How the model writes calls of tools.
    pub fn tool_format(&self) -> &'static ToolFormat {
        self.habits.tool_format
    }

    /// Sets how the model writes calls (`--tool-call-parser`), whatever its template looks like.
    pub fn set_tool_format(&mut self, format: &'static ToolFormat) {
        self.habits.tool_format = format;
    }

    /// True where the chat template tells tools to the model itself.
    pub fn knows_tools(&self) -> bool {
        self.habits.knows_tools
    }

    /// True where the model writes thoughts before its answer.
    pub fn thinks(&self) -> bool {
        self.habits.thinks
    }

    /// The template's own variables for an effort of reasoning; none where it takes no such thing.
    pub fn effort_variables(&self, effort: &str) -> Vec<(&'static str, serde_json::Value)> {
        let mut variables = Vec::new();
        if self.habits.takes_effort {
            variables.push(("reasoning_effort", effort.into()));
        }
        if self.habits.takes_thinking_switch {
            variables.push(("enable_thinking", (effort != "none").into()));
        }
        variables
    }

    /// The id of a control token by its text.
    pub fn control_token(&self, text: &str) -> Option<TokenId> {
        self.tokenizer.control_token(text)
    }

    /// The id of a token by its whole text.
    pub fn token_id(&self, text: &str) -> Option<TokenId> {
        self.tokenizer.token_id(text)
    }

    /// Tokens that end an answer.
    pub fn end_token_ids(&self) -> &[TokenId] {
        &self.end_token_ids
    }
}
