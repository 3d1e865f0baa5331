//! Headers of safetensors files, beside a sound `config.json`. What is accepted can be read to its end.
#![no_main]

mod file;

use libfuzzer_sys::fuzz_target;

const CONFIG: &[u8] = include_bytes!("../../tests/goldens/tiny-qwen2/config.json");

fuzz_target!(|data: &[u8]| {
    let folder = file::folder();
    if !folder.join("config.json").exists() {
        file::write("config.json", CONFIG);
    }
    file::write("model.safetensors", data);
    let _ = file::open(&folder);
});
