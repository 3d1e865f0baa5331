//! Tokens to text as they come: a piece is released once its characters are whole.

use std::sync::Arc;

use phalanx_proto::TokenId;

use super::Tokenizer;

/// Tokens held back at the most: a model that writes endless broken characters gets them shown as such.
const HELD_TOKENS_MAX: usize = 64;

/// One sequence's text so far.
///
/// Decoders look at neighbours (a leading space, bytes of one character), so each piece is the difference of two decodings
/// that begin at the same token.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    /// Tokens from the start of the last released piece on.
    window: Vec<TokenId>,
    /// Of these, how many are released.
    released: usize,
    /// Text of the released ones.
    released_text: String,
}

impl Detokenizer {
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, window: Vec::new(), released: 0, released_text: String::new() }
    }

    /// Takes the next token; returns the text that is now certain, which may be empty.
    pub fn push(&mut self, token: TokenId) -> String {
        self.window.push(token);
        let text = self.tokenizer.decode(&self.window, self.skip_special);
        let held = self.window.len() - self.released;
        let whole = text.len() > self.released_text.len() && !text.ends_with('\u{fffd}');
        if !whole && held < HELD_TOKENS_MAX {
            return String::new();
        }
        let piece = rest(&text, &self.released_text);
        self.window.drain(..self.released);
        self.released = self.window.len();
        self.released_text = self.tokenizer.decode(&self.window, self.skip_special);
        piece
    }

    /// The end of the text: what was held back, broken characters included.
    pub fn finish(&mut self) -> String {
        let text = self.tokenizer.decode(&self.window, self.skip_special);
        let piece = rest(&text, &self.released_text);
        self.released = self.window.len();
        self.released_text = text;
        piece
    }
}

/// What `text` has behind the first `released.len()` bytes.
fn rest(text: &str, released: &str) -> String {
    text.get(released.len()..).unwrap_or_default().to_owned()
}
