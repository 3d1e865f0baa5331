//! Server-sent events as the client reads them: bytes in, frames out.
//!
//! **Invariant:** the frames depend on the bytes alone, never on how they were cut into reads; no frame is longer than
//! [`FRAME_BYTES_MAX`].

use bytes::{Bytes, BytesMut};
use serde_json::Value;

/// Longest frame of a stream.
pub const FRAME_BYTES_MAX: usize = 16 << 20;

/// What a stream says at once.
#[derive(Debug, Clone, PartialEq)]
pub enum Frame {
    /// A piece of the answer.
    Data(Value),
    /// `[DONE]`.
    Done,
}

/// Why a stream cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Its frame does not end.
    #[error("a frame is larger than {FRAME_BYTES_MAX} bytes")]
    TooLong,
    /// Its frame is no JSON.
    #[error("a frame is no JSON: {0}")]
    NotJson(#[source] serde_json::Error),
}

/// Finds the frames of one stream.
#[derive(Debug, Default)]
pub struct FrameReader {
    received: BytesMut,
    /// Bytes at the start of `received` that hold no end of a frame.
    searched: usize,
}

impl FrameReader {
    /// Takes what was read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.received.extend_from_slice(bytes);
    }

    /// The next frame that is there whole; comments are passed over.
    ///
    /// # Errors
    /// The frame is no JSON, or does not end within its limit: the stream is of no use any more.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        while let Some(frame) = self.take() {
            match frame.strip_prefix(b"data: ") {
                None => {}
                Some(b"[DONE]") => return Ok(Some(Frame::Done)),
                Some(data) => {
                    return serde_json::from_slice(data)
                        .map(|value| Some(Frame::Data(value)))
                        .map_err(FrameError::NotJson);
                }
            }
        }
        if self.received.len() > FRAME_BYTES_MAX { Err(FrameError::TooLong) } else { Ok(None) }
    }

    /// Takes the first frame with its end off.
    fn take(&mut self) -> Option<Bytes> {
        let start = self.searched.saturating_sub(1);
        let Some(at) = self.received.get(start..)?.windows(2).position(|pair| pair == b"\n\n") else {
            self.searched = self.received.len();
            return None;
        };
        self.searched = 0;
        let mut frame = self.received.split_to(start + at + 2);
        frame.truncate(start + at);
        Some(frame.freeze())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(parts: &[&str]) -> Vec<Frame> {
        let mut reader = FrameReader::default();
        let mut frames = Vec::new();
        for part in parts {
            reader.push(part.as_bytes());
            while let Some(frame) = reader.next_frame().unwrap() {
                frames.push(frame);
            }
        }
        frames
    }

    #[test]
    fn frames_are_found_across_reads() {
        let parts = ["data: {\"a\"", ":1}\n", "\ndata: 2\n\n: note\n\nda", "ta: [DONE]\n\n"];
        assert_eq!(read(&parts), [Frame::Data(json!({"a": 1})), Frame::Data(json!(2)), Frame::Done]);
    }

    #[test]
    fn every_cut_gives_the_same_frames() {
        let stream = "data: {\"a\": \"你\\n\\n\"}\n\n: x\n\ndata: [1]\n\ndata: [DONE]\n\n";
        let whole = read(&[stream]);
        assert_eq!(whole.len(), 3);
        for (at, _) in stream.char_indices() {
            assert_eq!(read(&[&stream[..at], &stream[at..]]), whole, "cut at {at}");
        }
    }

    #[test]
    fn what_is_no_json_ends_the_stream() {
        let mut reader = FrameReader::default();
        reader.push(b"data: {\n\n");
        assert!(matches!(reader.next_frame(), Err(FrameError::NotJson(_))));
        reader.push(&vec![b'x'; FRAME_BYTES_MAX + 1]);
        assert!(matches!(reader.next_frame(), Err(FrameError::TooLong)));
    }
}
