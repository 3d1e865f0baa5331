//! SmolLM2 as a Hugging Face folder: the weights of the GGUF, dequantised and rounded to bfloat16.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use half::bf16;
use phalanx_formats::{ModelFiles, TensorView};
use phalanx_kernels::HostMatrix;
use phalanx_kernels::cpu::{Activations, CpuMatrix};
use serde_json::{Map, Value, json};

/// Writes the folder beside the GGUF, once; the values are those of the reference `hf_bf16`.
pub fn hugging_face_folder(gguf: &Path) -> PathBuf {
    let folder = gguf.with_file_name("smollm2-bf16");
    let target = folder.join("model.safetensors");
    if target.exists() {
        return folder;
    }
    fs::create_dir_all(&folder).expect("a folder");
    let files = ModelFiles::open(gguf).expect("the model");
    fs::write(folder.join("config.json"), config(&files).to_string()).expect("config.json");
    let part = folder.join(format!("part-{}", std::process::id()));
    write_tensors(&files, &part);
    fs::rename(part, target).expect("model.safetensors");
    folder
}

fn config(files: &ModelFiles) -> Value {
    let g = files.geometry();
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": g.hidden_size, "intermediate_size": g.intermediate_size, "num_hidden_layers": g.num_layers,
        "num_attention_heads": g.num_heads, "num_key_value_heads": g.num_kv_heads, "vocab_size": g.vocab_size,
        "max_position_embeddings": g.max_position, "rms_norm_eps": 1e-5, "rope_theta": g.rope_theta,
        "tie_word_embeddings": g.tied_embeddings, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    })
}

fn write_tensors(files: &ModelFiles, path: &Path) {
    let tensors = files.geometry().tensors();
    let (mut header, mut offset) = (Map::new(), 0);
    for tensor in &tensors {
        let end = offset + 2 * tensor.shape().iter().product::<usize>();
        let entry = json!({"dtype": "BF16", "shape": tensor.shape(), "data_offsets": [offset, end]});
        header.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let header = Value::Object(header).to_string();
    let mut out = std::io::BufWriter::new(fs::File::create(path).expect("a file"));
    let mut write = |bytes: &[u8]| out.write_all(bytes).expect("room on the disk");
    write(&(header.len() as u64).to_le_bytes());
    write(header.as_bytes());
    for tensor in &tensors {
        for value in values(&files.tensor(&tensor.name).expect("a tensor")) {
            write(&bf16::from_f32(value).to_le_bytes());
        }
    }
}

/// All values of a tensor, row by row.
fn values(view: &TensorView<'_>) -> Vec<f32> {
    let (rows, cols) = (view.num_rows(), view.cols());
    let data = (0..rows).flat_map(|row| view.row(row).to_vec()).collect();
    let host = HostMatrix { dtype: view.dtype, rows, cols, data };
    let matrix = CpuMatrix::pack(vec![host], Activations::Float32).expect("a known format");
    let mut values = vec![0.0; rows * cols];
    for (row, out) in values.chunks_mut(cols).enumerate() {
        matrix.row(row, out).expect("a row");
    }
    values
}
