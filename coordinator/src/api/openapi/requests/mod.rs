//! What clients send, as types: the source of the request schemas.
//!
//! Bodies are read field by field elsewhere, so that every error names its field; a test sends each field that stands here
//! and sees it read.
//!
//! **Invariant:** no field stands here that its endpoint would ignore.
#![expect(dead_code, reason = "the generator of schemas reads these types, nobody else does")]

mod anthropic;
mod chat;
mod prompts;
mod responses;
mod sampling;

pub use anthropic::{CountTokensRequest, MessageRequest};
pub use chat::ChatCompletionRequest;
pub use prompts::{CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest};
pub use responses::ResponseRequest;
