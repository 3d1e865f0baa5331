//! The only room that knows text: chat template, tokenizer, incremental detokenizer, stop strings.
//!
//! Built from a model's own files by [`TextModel::load`]. Knows no HTTP and no engine.
//!
//! **Invariant:** text that was released is never taken back; joined, the released pieces are the decoded text.

mod chat_template;
mod detokenizer;
mod error;
mod gguf_vocab;
mod python_json;
mod stop;
mod token_bytes;
mod tokenizer;
pub mod tools;

use std::sync::Arc;

use phalanx_formats::ModelFiles;
use phalanx_proto::TokenId;

pub use chat_template::{ChatPrompt, ChatTemplate};
pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use stop::{StopMatcher, StopStep};
pub use token_bytes::TokenBytes;
pub use tokenizer::Tokenizer;

/// Everything of a model that concerns text.
#[derive(Debug)]
pub struct TextModel {
    tokenizer: Arc<Tokenizer>,
    chat_template: Option<ChatTemplate>,
    end_token_ids: Vec<TokenId>,
}

impl TextModel {
    /// Builds tokenizer and chat template from a model's files.
    ///
    /// # Errors
    /// No tokenizer, or one that cannot be read; a chat template that does not parse.
    pub fn load(files: &ModelFiles) -> Result<Self, TextError> {
        let source = files.tokenizer_source().ok_or(TextError::NoTokenizer)?;
        let (tokenizer, template) = Tokenizer::from_source(&source)?;
        let chat_template = match template {
            Some(text) => Some(ChatTemplate::new(text, &tokenizer)?),
            None => None,
        };
        let end_token_ids = files.end_token_ids().into_iter().map(TokenId).collect();
        Ok(Self { tokenizer: Arc::new(tokenizer), chat_template, end_token_ids })
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
        self.chat_template = Some(ChatTemplate::new(template, &self.tokenizer)?);
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

    /// The id of a token by its whole text.
    pub fn token_id(&self, text: &str) -> Option<TokenId> {
        self.tokenizer.token_id(text)
    }

    /// Tokens that end an answer.
    pub fn end_token_ids(&self) -> &[TokenId] {
        &self.end_token_ids
    }
}
