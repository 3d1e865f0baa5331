//! Frames of streams. As they come from a server: any bytes, in any cuts, give the same frames. As they are written: what goes
//! in comes out, whatever the text holds.
#![no_main]

use libfuzzer_sys::fuzz_target;
use phalanx_coordinator::api::Frames;
use phalanx_coordinator::cli::frames::{Frame, FrameReader};
use serde_json::{Value, json};

/// All frames up to the first that cannot be read, and whether there was one.
fn read<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Frame>, bool) {
    let mut reader = FrameReader::default();
    let mut frames = Vec::new();
    for piece in pieces {
        reader.push(piece);
        loop {
            match reader.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(_) => return (frames, true),
            }
        }
    }
    (frames, false)
}

fuzz_target!(|data: &[u8]| {
    let Some((width, data)) = data.split_first() else { return };
    let width = usize::from(*width) + 1;
    let whole = read([data].into_iter());
    assert_eq!(read(data.chunks(width)), whole);
    assert_eq!(read(data.chunks(1)), whole);

    let text = String::from_utf8_lossy(data);
    let mut frames = Frames::default();
    let mut expected = Vec::new();
    for piece in text.split('|') {
        let value: Value = json!({"choices": [{"delta": {"content": piece}}]});
        frames.push(&value);
        expected.push(Frame::Data(value));
    }
    frames.push_done();
    expected.push(Frame::Done);
    let written = frames.take();
    assert_eq!(read(written.chunks(width)), (expected, false));
});
