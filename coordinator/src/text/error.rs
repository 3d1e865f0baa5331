//! What can go wrong with text.

use std::path::PathBuf;

/// A text operation that cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The model's files hold no tokenizer.
    #[error("the model has no tokenizer; send token ids")]
    NoTokenizer,
    /// The model's files hold no chat template.
    #[error("the model has no chat template; use /v1/completions or --chat-template")]
    NoChatTemplate,
    /// A tokenizer file cannot be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A tokenizer that cannot be used.
    #[error("the tokenizer cannot be used: {reason}")]
    Tokenizer {
        /// What is wrong with it.
        reason: String,
    },
    /// A chat template that does not parse.
    #[error("the chat template cannot be used: {0}")]
    Template(#[source] minijinja::Error),
    /// A chat template that is longer than any is.
    #[error("the chat template has {bytes} bytes; at most {limit} are read")]
    LongTemplate {
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// The chat template refuses a conversation.
    #[error("the chat template refused the messages: {reason}")]
    Render {
        /// The template's own words where it raised, else the engine's.
        reason: String,
    },
}
