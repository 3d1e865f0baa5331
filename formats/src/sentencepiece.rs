//! `tokenizer.model`: the vocabulary of a SentencePiece model.
//!
//! Owns as much of the file's format as says which pieces there are, with which scores. Does not tokenize.
//!
//! Source: `sentencepiece_model.proto` of SentencePiece, and the encoding of Protocol Buffers.
//!
//! **Invariant:** a model that would tokenize otherwise than by the scores of its pieces is refused.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{GgufVocab, ModelError};

/// Largest file that is believed.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// Most pieces that are believed.
const PIECES_MAX: usize = 1 << 24;
/// `SentencePiece.Type`, the same numbers as in GGUF: what a piece is where nothing is said.
const NORMAL: i32 = 1;
/// Never text of a prompt.
const CONTROL: i32 = 3;
/// Found in text before all else.
const USER_DEFINED: i32 = 4;
/// Not used.
const UNUSED: i32 = 5;
/// `TrainerSpec.ModelType`: merges by score.
const BPE: u64 = 2;

/// A `tokenizer.model` and what stands beside it.
#[derive(Debug, Clone, PartialEq)]
pub struct SentencePieceFiles {
    /// Path of `tokenizer.model`.
    pub tokenizer_model: PathBuf,
    /// Contents of `tokenizer_config.json`.
    pub tokenizer_config: Option<Value>,
    /// The default chat template, from whichever file has it.
    pub chat_template: Option<String>,
}

impl SentencePieceFiles {
    /// The vocabulary, as a GGUF file would have it: with the names that `added_tokens_decoder` gives.
    ///
    /// # Errors
    /// The file cannot be read, is damaged, or tokenizes in a way that is not known: it is to be converted to `tokenizer.json`.
    pub fn read(&self) -> Result<GgufVocab, ModelError> {
        let path = &self.tokenizer_model;
        let io = |source| ModelError::Io { path: path.clone(), source };
        let length = std::fs::metadata(path).map_err(io)?.len();
        if length > FILE_BYTES_MAX {
            let reason = format!("it has {length} bytes; at most {FILE_BYTES_MAX} are believed");
            return Err(ModelError::damaged(path, reason));
        }
        let mut vocab = vocabulary(path, &std::fs::read(path).map_err(io)?)?;
        vocab.chat_template = self.chat_template.clone();
        if let Some(config) = &self.tokenizer_config {
            vocab.add_bos = config.get("add_bos_token").and_then(Value::as_bool);
            rename(path, &mut vocab, config)?;
        }
        Ok(vocab)
    }
}

/// Names of ids that the settings have otherwise than the model, and ids behind its last.
fn rename(path: &Path, vocab: &mut GgufVocab, config: &Value) -> Result<(), ModelError> {
    let Some(added) = config.get("added_tokens_decoder").and_then(Value::as_object) else { return Ok(()) };
    for (id, token) in added {
        let text = token.get("content").and_then(Value::as_str);
        let (Ok(id), Some(text)) = (id.parse::<usize>(), text) else { continue };
        if id >= PIECES_MAX {
            return Err(ModelError::damaged(path, format!("the settings add a token {id}")));
        }
        while vocab.tokens.len() <= id {
            vocab.tokens.push(format!("<unused {}>", vocab.tokens.len()));
            vocab.scores.push(0.0);
            vocab.token_types.push(UNUSED);
        }
        let is_special = token.get("special").and_then(Value::as_bool).unwrap_or(false);
        text.clone_into(&mut vocab.tokens[id]);
        // What stands for the unknown stays what it is.
        if vocab.unk != u32::try_from(id).ok() {
            vocab.token_types[id] = if is_special { CONTROL } else { USER_DEFINED };
        }
    }
    Ok(())
}

/// `ModelProto`.
fn vocabulary(path: &Path, bytes: &[u8]) -> Result<GgufVocab, ModelError> {
    let convert = |reason: &str| {
        let reason =
            format!("it is a SentencePiece model that {reason}, which is not read: convert it to tokenizer.json");
        ModelError::NotAModel { path: path.to_owned(), reason }
    };
    let damaged = || ModelError::damaged(path, "it is not a SentencePiece model");
    let mut vocab = GgufVocab {
        model: "llama".into(),
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        add_space_prefix: Some(true),
        ..GgufVocab::default()
    };
    let mut model_type = 1;
    let mut removes_spaces = true;
    for field in Fields(bytes) {
        match field.ok_or_else(damaged)? {
            (1, Content::Bytes(piece)) => add_piece(&mut vocab, piece).ok_or_else(damaged)?,
            (2, Content::Bytes(trainer)) => {
                model_type = read_trainer(&mut vocab, trainer, model_type).ok_or_else(damaged)?;
            }
            (3, Content::Bytes(normalizer)) => {
                for field in Fields(normalizer) {
                    match field.ok_or_else(damaged)? {
                        (2, Content::Bytes(rules)) if !rules.is_empty() => {
                            return Err(convert("rewrites text by rules"));
                        }
                        (3, Content::Number(adds)) => vocab.add_space_prefix = Some(adds != 0),
                        (4, Content::Number(removes)) => removes_spaces = removes != 0,
                        (5, Content::Number(0)) => return Err(convert("keeps spaces as they are")),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    if vocab.tokens.is_empty() {
        return Err(damaged());
    }
    match model_type {
        BPE if removes_spaces => Err(convert("removes spaces")),
        BPE => Ok(vocab),
        _ => Err(convert("is no BPE model")),
    }
}

/// `SentencePiece`.
fn add_piece(vocab: &mut GgufVocab, bytes: &[u8]) -> Option<()> {
    let (mut text, mut score, mut kind) = ("", 0.0, NORMAL);
    for field in Fields(bytes) {
        match field? {
            (1, Content::Bytes(piece)) => text = std::str::from_utf8(piece).ok()?,
            (2, Content::Word(bits)) => score = f32::from_bits(bits),
            (3, Content::Number(number)) => kind = i32::try_from(number).ok()?,
            _ => {}
        }
    }
    vocab.tokens.push(text.to_owned());
    vocab.scores.push(score);
    vocab.token_types.push(kind);
    (vocab.tokens.len() <= PIECES_MAX).then_some(())
}

/// `TrainerSpec`; gives its model type.
fn read_trainer(vocab: &mut GgufVocab, bytes: &[u8], mut model_type: u64) -> Option<u64> {
    for field in Fields(bytes) {
        let (number, Content::Number(value)) = field? else { continue };
        // Ids are signed: -1 is none.
        let id = u32::try_from(value).ok().filter(|id| i32::try_from(*id).is_ok());
        match number {
            3 => model_type = value,
            40 => vocab.unk = id,
            41 => vocab.bos = id,
            42 => vocab.eos = id,
            43 => vocab.pad = id,
            _ => {}
        }
    }
    Some(model_type)
}

/// Contents of a field.
enum Content<'a> {
    Number(u64),
    Word(u32),
    Bytes(&'a [u8]),
}

/// Fields of a message with their numbers; `None` where it is damaged, and nothing after that.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn number(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u64, Content<'a>)> {
        let tag = self.number()?;
        let content = match tag & 7 {
            0 => Content::Number(self.number()?),
            1 => Content::Bytes(self.take(8)?),
            2 => {
                let len = usize::try_from(self.number()?).ok()?;
                Content::Bytes(self.take(len)?)
            }
            5 => Content::Word(u32::from_le_bytes(*self.take(4)?.first_chunk()?)),
            _ => return None,
        };
        Some((tag >> 3, content))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u64, Content<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn bytes(number: u8, content: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, content.len() as u8], content].concat()
    }

    fn piece(text: &str, score: f32, kind: u8) -> Vec<u8> {
        let fields = [bytes(1, text.as_bytes()), [&[0x15], &score.to_le_bytes()[..]].concat(), vec![0x18, kind]];
        bytes(1, &fields.concat())
    }

    /// Three pieces, a trainer with this model type, a normalizer with these fields.
    fn model(model_type: u8, normalizer: &[u8]) -> Vec<u8> {
        let pieces = [piece("<unk>", 0.0, 2), piece("<s>", 0.0, 3), piece("</s>", 0.0, 3), piece("▁a", -1.5, 1)];
        // `pad_id` is -1, in ten bytes.
        let trainer = [&[0x18, model_type, 0xd8, 2][..], &[0xff; 9], &[1]].concat();
        [pieces.concat(), bytes(2, &trainer), bytes(3, normalizer)].concat()
    }

    fn read(bytes: &[u8]) -> Result<GgufVocab, ModelError> {
        vocabulary(Path::new("tokenizer.model"), bytes)
    }

    const KEEPS_SPACES: [u8; 2] = [0x20, 0];

    #[test]
    fn pieces_scores_and_kinds_are_read() {
        let vocab = read(&model(2, &[0x18, 0, 0x20, 0])).unwrap();
        assert_eq!(vocab.tokens, ["<unk>", "<s>", "</s>", "▁a"]);
        assert_eq!((vocab.scores, vocab.token_types), (vec![0.0, 0.0, 0.0, -1.5], vec![2, 3, 3, 1]));
        assert_eq!((vocab.unk, vocab.bos, vocab.eos, vocab.pad), (Some(0), Some(1), Some(2), None));
        assert_eq!(vocab.add_space_prefix, Some(false));
        assert_eq!(read(&model(2, &KEEPS_SPACES)).unwrap().add_space_prefix, Some(true));
    }

    #[test]
    fn settings_name_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.model");
        std::fs::write(&path, model(2, &KEEPS_SPACES)).unwrap();
        let decoder = json!({"3": {"content": "<|im_end|>", "special": true}, "5": {"content": "<tool>"}});
        let config = json!({"add_bos_token": false, "added_tokens_decoder": decoder});
        let files = SentencePieceFiles {
            tokenizer_model: path,
            tokenizer_config: Some(config),
            chat_template: Some("t".into()),
        };
        let vocab = files.read().unwrap();
        assert_eq!(vocab.tokens[3..], ["<|im_end|>", "<unused 4>", "<tool>"]);
        assert_eq!(vocab.token_types[3..], [CONTROL, UNUSED, USER_DEFINED]);
        assert_eq!((vocab.add_bos, vocab.chat_template.as_deref()), (Some(false), Some("t")));
    }

    #[test]
    fn other_ways_to_tokenize_are_refused() {
        let check = |bytes: Vec<u8>, words: &str| {
            let message = read(&bytes).unwrap_err().to_string();
            assert!(message.contains(words), "{message:?} does not say {words:?}");
        };
        check(model(1, &KEEPS_SPACES), "is no BPE model, which is not read: convert it to tokenizer.json");
        check(model(2, &[]), "removes spaces");
        check(model(2, &bytes(2, b"nmt")), "rewrites text");
        check(b"{\"a\": 1}".to_vec(), "not a SentencePiece model");
        check(Vec::new(), "not a SentencePiece model");
        let whole = model(2, &KEEPS_SPACES);
        for cut in 0..whole.len() {
            // Whole fields may remain; nothing panics.
            let _ = read(&whole[..cut]);
        }
    }
}
