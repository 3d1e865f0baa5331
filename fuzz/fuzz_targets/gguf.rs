//! GGUF files: headers, geometry, vocabulary. What is accepted can be read to its end.
#![no_main]

mod file;

use libfuzzer_sys::fuzz_target;
use phalanx_coordinator::text::TextModel;

fuzz_target!(|data: &[u8]| {
    let path = file::write("model.gguf", data);
    let Some(files) = file::open(&path) else { return };
    // A vocabulary is as long as its file says: large ones only cost time here.
    if files.geometry().vocab_size <= 4096
        && let Ok(text) = TextModel::load(&files)
    {
        let _ = text.encode("Hi, 你好 <|im_start|>", true);
    }
});
