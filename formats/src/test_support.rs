//! For tests: small GGUF files written to order, and where the reference data is.
//!
//! Compiled for tests only (feature `test-support` for those of other crates).

use std::path::{Path, PathBuf};

use crate::architecture::{GgufRows, Switch};
use crate::{Architecture, Geometry, RopeScaling, StoredType};

/// A metadata value to write.
#[derive(Debug, Clone)]
pub enum Entry {
    /// 32-bit unsigned.
    U32(u32),
    /// 64-bit unsigned.
    U64(u64),
    /// 32-bit float.
    F32(f32),
    /// A switch.
    Bool(bool),
    /// A text.
    Text(String),
    /// An array of texts.
    Texts(Vec<String>),
    /// An array of 32-bit floats.
    Floats(Vec<f32>),
    /// An array of 32-bit integers.
    Integers(Vec<i32>),
    /// The type's number and raw bytes, for files that lie.
    Raw(u32, Vec<u8>),
}

/// A tensor to write.
#[derive(Debug, Clone)]
struct Tensor {
    name: String,
    shape: Vec<u64>,
    type_id: u32,
    offset: Option<u64>,
    data: Vec<u8>,
}

/// Writes GGUF files, true ones and lying ones.
#[derive(Debug, Clone)]
pub struct GgufBuilder {
    version: u32,
    alignment: usize,
    entries: Vec<(String, Entry)>,
    tensors: Vec<Tensor>,
    counts: Option<(u64, u64)>,
}

impl Default for GgufBuilder {
    fn default() -> Self {
        Self { version: 3, alignment: 32, entries: Vec::new(), tensors: Vec::new(), counts: None }
    }
}

impl GgufBuilder {
    /// Sets the version in the header.
    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    /// Sets the alignment of the data, and says so.
    pub fn alignment(mut self, alignment: usize) -> Self {
        self.alignment = alignment;
        self.entry("general.alignment", Entry::U32(alignment as u32))
    }

    /// Claims these counts of tensors and entries.
    pub fn counts(mut self, tensors: u64, entries: u64) -> Self {
        self.counts = Some((tensors, entries));
        self
    }

    /// Adds a metadata entry.
    pub fn entry(mut self, key: &str, entry: Entry) -> Self {
        self.entries.push((key.to_owned(), entry));
        self
    }

    /// Replaces the entry of this key, or adds one.
    pub fn replace(mut self, key: &str, entry: Entry) -> Self {
        self.entries.retain(|(known, _)| known != key);
        self.entry(key, entry)
    }

    /// Adds a tensor; `shape` is outermost first.
    pub fn tensor(mut self, name: &str, shape: &[usize], dtype: StoredType, data: Vec<u8>) -> Self {
        let shape = shape.iter().map(|dim| *dim as u64).collect();
        self.tensors.push(Tensor { name: name.to_owned(), shape, type_id: type_id(dtype), offset: None, data });
        self
    }

    /// Adds a tensor whose description may lie.
    pub fn lying_tensor(mut self, name: &str, shape: &[u64], type_id: u32, offset: u64) -> Self {
        let shape = shape.to_vec();
        self.tensors.push(Tensor { name: name.to_owned(), shape, type_id, offset: Some(offset), data: Vec::new() });
        self
    }

    /// Takes a tensor out.
    pub fn without(mut self, name: &str) -> Self {
        self.tensors.retain(|tensor| tensor.name != name);
        self
    }

    /// The file's bytes.
    pub fn build(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        let (tensors, entries) = self.counts.unwrap_or((self.tensors.len() as u64, self.entries.len() as u64));
        out.extend(tensors.to_le_bytes());
        out.extend(entries.to_le_bytes());
        for (key, entry) in &self.entries {
            put_text(&mut out, key);
            put_entry(&mut out, entry);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            put_text(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            for dim in tensor.shape.iter().rev() {
                out.extend(dim.to_le_bytes());
            }
            out.extend(tensor.type_id.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(offset).to_le_bytes());
            offset += tensor.data.len().next_multiple_of(self.alignment) as u64;
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&tensor.data);
        }
        out
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_entry(out: &mut Vec<u8>, entry: &Entry) {
    let array = |out: &mut Vec<u8>, kind: u32, len: usize| {
        out.extend(9u32.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend((len as u64).to_le_bytes());
    };
    match entry {
        Entry::U32(value) => out.extend([4u32.to_le_bytes(), value.to_le_bytes()].concat()),
        Entry::F32(value) => out.extend([6u32.to_le_bytes(), value.to_le_bytes()].concat()),
        Entry::U64(value) => {
            out.extend(10u32.to_le_bytes());
            out.extend(value.to_le_bytes());
        }
        Entry::Bool(value) => {
            out.extend(7u32.to_le_bytes());
            out.push(u8::from(*value));
        }
        Entry::Text(value) => {
            out.extend(8u32.to_le_bytes());
            put_text(out, value);
        }
        Entry::Texts(values) => {
            array(out, 8, values.len());
            values.iter().for_each(|value| put_text(out, value));
        }
        Entry::Floats(values) => {
            array(out, 6, values.len());
            values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
        Entry::Integers(values) => {
            array(out, 5, values.len());
            values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
        Entry::Raw(kind, bytes) => {
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        }
    }
}

/// The number of a type in a GGUF file.
pub const fn type_id(dtype: StoredType) -> u32 {
    match dtype {
        StoredType::F32 => 0,
        StoredType::F16 => 1,
        StoredType::Q4_0 => 2,
        StoredType::Q4_1 => 3,
        StoredType::Q5_0 => 6,
        StoredType::Q5_1 => 7,
        StoredType::Q8_0 => 8,
        StoredType::Q4K => 12,
        StoredType::Q5K => 13,
        StoredType::Q6K => 14,
        StoredType::IQ4NL => 20,
        StoredType::BF16 => 30,
    }
}

/// A small geometry: 3 layers of 96, heads of 32, 9 query heads on 3 KV heads.
pub fn small_geometry(architecture: Architecture) -> Geometry {
    Geometry {
        architecture,
        hidden_size: 96,
        intermediate_size: 160,
        num_layers: 3,
        num_heads: 9,
        num_kv_heads: 3,
        head_dim: 32,
        vocab_size: 70,
        max_position: 512,
        norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        tied_embeddings: false,
        qkv_bias: matches!(architecture.family().qkv_bias, Switch::On),
        sliding_window: None,
    }
}

/// A whole GGUF model of this geometry: matrices of `dtype` with bytes that depend on name, row and place, vectors of floats.
///
/// Rows lie as the architecture's files have them, so each byte of Hugging Face row `i` is [`byte_at`] of row `i`.
pub fn gguf_model(geometry: &Geometry, dtype: StoredType) -> GgufBuilder {
    let name = geometry.architecture.family().model_type;
    let key = |part: &str| format!("{name}.{part}");
    let mut builder = GgufBuilder::default()
        .entry("general.architecture", Entry::Text(name.to_owned()))
        .entry(&key("embedding_length"), Entry::U32(geometry.hidden_size as u32))
        .entry(&key("feed_forward_length"), Entry::U32(geometry.intermediate_size as u32))
        .entry(&key("block_count"), Entry::U32(geometry.num_layers as u32))
        .entry(&key("attention.head_count"), Entry::U32(geometry.num_heads as u32))
        .entry(&key("attention.head_count_kv"), Entry::U32(geometry.num_kv_heads as u32))
        .entry(&key("attention.key_length"), Entry::U32(geometry.head_dim as u32))
        .entry(&key("context_length"), Entry::U32(geometry.max_position as u32))
        .entry(&key("attention.layer_norm_rms_epsilon"), Entry::F32(geometry.norm_eps));
    for spec in geometry.tensors() {
        let stored = if spec.cols.is_some() { dtype } else { StoredType::F32 };
        let row_bytes = stored.row_bytes(spec.cols.unwrap_or(1)).unwrap_or_default();
        let gguf_name = gguf_name(&spec.name);
        let (mut data, seed) = (Vec::new(), seed(&spec.name));
        for place in 0..spec.rows {
            let row = hugging_face_row(geometry, &gguf_name, place);
            data.extend((0..row_bytes).map(|at| seeded_byte(seed, row, at)));
        }
        builder = builder.tensor(&gguf_name, &spec.shape(), stored, data);
    }
    builder
}

/// The byte that [`gguf_model`] puts at `at` of Hugging Face row `row` of a tensor.
pub fn byte_at(name: &str, row: usize, at: usize) -> u8 {
    seeded_byte(seed(name), row, at)
}

fn seed(name: &str) -> u32 {
    name.bytes().fold(17, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()))
}

fn seeded_byte(seed: u32, row: usize, at: usize) -> u8 {
    let hash = seed.wrapping_add((row as u32).wrapping_mul(7919)).wrapping_add((at as u32).wrapping_mul(104_729));
    // No byte has all exponent bits, so that floats made of them are finite.
    (hash.wrapping_mul(2_654_435_761) >> 24) as u8 & 0x3f
}

/// The row of a head that lies at `place`: the two halves alternate in files of the Llama family.
fn hugging_face_row(geometry: &Geometry, gguf_name: &str, place: usize) -> usize {
    let is_rotated = gguf_name.contains("attn_q.") || gguf_name.contains("attn_k.");
    if geometry.architecture.family().gguf != Some(GgufRows::Interleaved) || !is_rotated {
        return place;
    }
    let (head, within) = (place / geometry.head_dim, place % geometry.head_dim);
    head * geometry.head_dim + (within % 2) * (geometry.head_dim / 2) + within / 2
}

/// What GGUF files call a tensor.
pub fn gguf_name(name: &str) -> String {
    const PARTS: [(&str, &str); 13] = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    PARTS.iter().fold(name.to_owned(), |name, (hugging_face, gguf)| name.replace(hugging_face, gguf))
}

/// The folder with the reference data.
pub fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens")
}
