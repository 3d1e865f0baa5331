//! A model's tokens as the grammar library sees them.

use std::sync::Arc;

use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId as LibraryToken, TokenizerEnv};
use phalanx_proto::TokenId;

use crate::text::{TextModel, TokenBytes};

/// The trie of all tokens. No token is ever forced: the model chooses among all spellings of a text.
pub(super) struct Vocabulary {
    trie: TokTrie,
    /// Tokens that a rank can draw; the tokenizer may know fewer or more.
    vocab_size: u32,
    /// Tokens that end an answer.
    ends: Vec<u32>,
}

impl Vocabulary {
    /// Reads the tokens of a model. Takes about a microsecond a token.
    pub(super) fn new(text: &TextModel, vocab_size: u32, ends: &[TokenId]) -> Self {
        let mut words: Vec<Vec<u8>> = text.token_bytes(vocab_size).into_iter().map(word).collect();
        let mut ends: Vec<u32> = ends.iter().map(|token| token.0).filter(|token| *token < vocab_size).collect();
        ends.sort_unstable();
        ends.dedup();
        for end in &ends {
            // An end ends the text, whatever it is written as.
            if let Some(word) = words.get_mut(*end as usize) {
                *word = marked(&format!("<end_{end}>"));
            }
        }
        if words.is_empty() {
            words.push(marked("<none>"));
        }
        let info = TokRxInfo::new(words.len() as u32, ends.first().copied().unwrap_or(0));
        let trie = TokTrie::from(&info, &words);
        let trie = if ends.is_empty() { trie } else { trie.with_eos_tokens(&ends) };
        Self { trie, vocab_size, ends }
    }

    pub(super) fn into_env(self: Arc<Self>) -> TokEnv {
        self
    }

    /// Words of a mask for the ranks: what the library allows, less what they cannot draw.
    pub(super) fn words(&self, allowed: &[u32]) -> Vec<u32> {
        let num_words = self.vocab_size.div_ceil(u32::BITS) as usize;
        let mut words = allowed.to_vec();
        words.resize(num_words, 0);
        let rest = self.vocab_size % u32::BITS;
        if let (Some(last), true) = (words.last_mut(), rest > 0) {
            *last &= (1 << rest) - 1;
        }
        if self.ends.is_empty() {
            // The library needs some token to mean the end; this model has none, and token 0 is not it.
            if let Some(first) = words.first_mut()
                && self.trie.token(0).is_empty()
            {
                *first &= !1;
            }
        }
        words
    }

    /// True where a mask allows nothing but to end.
    pub(super) fn allows_only_ends(&self, words: &[u32]) -> bool {
        let mut num_ends = 0;
        for end in &self.ends {
            num_ends += words.get((end / u32::BITS) as usize).map_or(0, |word| word >> (end % u32::BITS) & 1);
        }
        num_ends > 0 && words.iter().map(|word| word.count_ones()).sum::<u32>() == num_ends
    }
}

/// The library tells control tokens by a byte that no text has.
fn marked(text: &str) -> Vec<u8> {
    let mut bytes = vec![TokTrie::SPECIAL_TOKEN_MARKER];
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

fn word(token: TokenBytes) -> Vec<u8> {
    match token {
        TokenBytes::Text(bytes) if bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) => Vec::new(),
        TokenBytes::Text(bytes) => bytes,
        TokenBytes::Special(text) => marked(&text),
        TokenBytes::Absent => Vec::new(),
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<LibraryToken> {
        self.trie.greedy_tokenize(bytes)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}
