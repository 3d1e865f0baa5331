//! The bytes that each token of a vocabulary stands for, as the tokenizer's own decoder would join them.

use std::collections::HashMap;

use serde_json::Value;

use super::Tokenizer;

/// What a token adds to a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenBytes {
    /// Bytes of text, which may be part of a character.
    Text(Vec<u8>),
    /// A control token: it marks something and is no text.
    Special(String),
    /// Nothing: there is no such token.
    Absent,
}

/// How a vocabulary writes bytes.
enum Spelling {
    /// Each byte as one printable character.
    ByteLevel(HashMap<char, u8>),
    /// `▁` for a space, and `<0xHH>` for bytes without a piece of their own.
    Pieces,
    /// As it is.
    Plain,
}

impl Tokenizer {
    /// The bytes of each token, by id, for ids below `num_tokens`.
    pub fn token_bytes(&self, num_tokens: u32) -> Vec<TokenBytes> {
        let spelling = Spelling::of(&self.decoder_kinds());
        let added = self.added_tokens();
        let bytes = |id: u32| match (added.get(&id), self.token(id)) {
            (Some((text, true)), _) => TokenBytes::Special(text.clone()),
            (Some((text, false)), _) => TokenBytes::Text(text.clone().into_bytes()),
            (None, Some(token)) => TokenBytes::Text(spelling.bytes(&token)),
            (None, None) => TokenBytes::Absent,
        };
        (0..num_tokens).map(bytes).collect()
    }
}

impl Spelling {
    fn of(decoder_kinds: &[String]) -> Self {
        let has = |kind: &str| decoder_kinds.iter().any(|other| other == kind);
        if has("ByteLevel") {
            Self::ByteLevel(byte_characters().collect())
        } else if has("ByteFallback") || has("Metaspace") || has("Replace") {
            Self::Pieces
        } else {
            Self::Plain
        }
    }

    fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            Self::ByteLevel(characters) => {
                let byte = |c: char| characters.get(&c).copied();
                let all: Option<Vec<u8>> = token.chars().map(byte).collect();
                all.unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Self::Pieces => match raw_byte(token) {
                Some(byte) => vec![byte],
                None => token.replace('▁', " ").into_bytes(),
            },
            Self::Plain => token.as_bytes().to_vec(),
        }
    }
}

/// `<0xHH>`.
fn raw_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// The characters of byte-level vocabularies: printable Latin-1 bytes stand for themselves, the others for characters from
/// U+0100 on (GPT-2, `bytes_to_unicode`).
fn byte_characters() -> impl Iterator<Item = (char, u8)> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut num_others = 0;
    (0..=u8::MAX).filter_map(move |byte| {
        let code = if printable(byte) {
            u32::from(byte)
        } else {
            num_others += 1;
            0xff + num_others
        };
        Some((char::from_u32(code)?, byte))
    })
}

/// The names of all steps of a decoder as `tokenizer.json` writes it.
pub(super) fn kinds(decoder: &Value, found: &mut Vec<String>) {
    if let Some(kind) = decoder["type"].as_str() {
        found.push(kind.to_owned());
    }
    for step in decoder["decoders"].as_array().into_iter().flatten() {
        kinds(step, found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_level_characters_are_bytes() {
        let spelling = Spelling::of(&["ByteLevel".into()]);
        assert_eq!(spelling.bytes("Ġhi"), b" hi");
        assert_eq!(spelling.bytes("Ċ"), b"\n");
        assert_eq!(spelling.bytes("Ã¼"), "ü".as_bytes());
        assert_eq!(byte_characters().count(), 256);
    }

    #[test]
    fn pieces_have_spaces_and_raw_bytes() {
        let spelling = Spelling::of(&["Sequence".into(), "Replace".into(), "ByteFallback".into()]);
        assert_eq!(spelling.bytes("▁hi▁"), b" hi ");
        assert_eq!(spelling.bytes("<0x0A>"), b"\n");
        assert_eq!(spelling.bytes("<0xZZ>"), b"<0xZZ>");
    }
}
