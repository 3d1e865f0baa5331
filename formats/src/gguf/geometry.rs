//! GGUF metadata to [`Geometry`].

use super::metadata::Metadata;
use crate::architecture::{Switch, Window};
use crate::{Architecture, Geometry, ModelError, RopeScaling, StoredType};

/// Reads the geometry.
///
/// # Errors
/// The architecture is unknown, an entry is missing or wrong, or the model needs something that is not supported.
pub(crate) fn geometry(metadata: Metadata<'_>) -> Result<Geometry, ModelError> {
    let architecture = architecture(metadata)?;
    let family = architecture.family();
    let key = |name: &str| format!("{}.{name}", family.model_type);
    if metadata.count(&key("expert_count"))?.is_some_and(|experts| experts > 0) {
        return Err(metadata.error(&key("expert_count"), "is above 0; mixtures of experts are not supported"));
    }
    let hidden_size = metadata.required_count(&key("embedding_length"))?;
    let num_heads = metadata.required_count(&key("attention.head_count"))?;
    let head_dim = head_dim(metadata, &key, hidden_size, num_heads)?;
    let eps_key = key("attention.layer_norm_rms_epsilon");
    let geometry = Geometry {
        architecture,
        hidden_size,
        intermediate_size: metadata.required_count(&key("feed_forward_length"))?,
        num_layers: metadata.required_count(&key("block_count"))?,
        num_heads,
        num_kv_heads: metadata.count(&key("attention.head_count_kv"))?.unwrap_or(num_heads),
        head_dim,
        vocab_size: vocab_size(metadata, &key)?,
        max_position: metadata.required_count(&key("context_length"))?,
        norm_eps: metadata.float(&eps_key)?.ok_or_else(|| metadata.error(&eps_key, "is missing"))?,
        rope_theta: metadata.float(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        rope_scaling: rope_scaling(metadata, &key)?,
        tied_embeddings: !has_tensor(metadata, "output.weight"),
        qkv_bias: matches!(family.qkv_bias, Switch::On) || has_tensor(metadata, "blk.0.attn_q.bias"),
        sliding_window: match family.window {
            // 0 is how files say that there is none.
            Window::Switched { absent: true } | Window::Length { .. } => {
                metadata.count(&key("attention.sliding_window"))?.filter(|window| *window > 0)
            }
            Window::Switched { absent: false } | Window::Never => None,
        },
    };
    geometry.check(metadata.path)?;
    Ok(geometry)
}

fn has_tensor(metadata: Metadata<'_>, name: &str) -> bool {
    metadata.header.tensors.iter().any(|tensor| tensor.name == name)
}

fn architecture(metadata: Metadata<'_>) -> Result<Architecture, ModelError> {
    let name = "general.architecture";
    let found = metadata.text(name)?.ok_or_else(|| metadata.error(name, "is missing"))?;
    let in_gguf = || Architecture::ALL.iter().filter(|architecture| architecture.is_in_gguf());
    let known = in_gguf().find(|architecture| architecture.family().model_type == found);
    known.copied().ok_or_else(|| ModelError::UnknownArchitecture {
        found: found.to_owned(),
        known: in_gguf().map(|architecture| architecture.family().model_type).collect::<Vec<_>>().join(", "),
    })
}

fn head_dim(
    metadata: Metadata<'_>,
    key: &impl Fn(&str) -> String,
    hidden_size: usize,
    num_heads: usize,
) -> Result<usize, ModelError> {
    let head_dim = match metadata.count(&key("attention.key_length"))? {
        Some(head_dim) => head_dim,
        None if num_heads > 0 && hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            let reason = format!("is {num_heads}, which does not divide the embedding length {hidden_size}");
            return Err(metadata.error(&key("attention.head_count"), reason));
        }
    };
    for name in ["attention.value_length", "rope.dimension_count"] {
        if let Some(other) = metadata.count(&key(name))?
            && other != head_dim
        {
            let reason = format!("is {other}, but heads have {head_dim}; that is not supported");
            return Err(metadata.error(&key(name), reason));
        }
    }
    Ok(head_dim)
}

/// Rows of the embedding; files without tensors say it in words or by their tokens.
fn vocab_size(metadata: Metadata<'_>, key: &impl Fn(&str) -> String) -> Result<usize, ModelError> {
    let embedding = metadata.header.tensors.iter().find(|tensor| tensor.name == "token_embd.weight");
    if let Some(rows) = embedding.and_then(|tensor| tensor.shape.first()) {
        return Ok(*rows);
    }
    if let Some(size) = metadata.count(&key("vocab_size"))? {
        return Ok(size);
    }
    let tokens = metadata.array("tokenizer.ggml.tokens", &[super::value::Kind::String])?;
    tokens.map(|tokens| tokens.len).ok_or_else(|| metadata.error(&key("vocab_size"), "is missing"))
}

fn rope_scaling(metadata: Metadata<'_>, key: &impl Fn(&str) -> String) -> Result<RopeScaling, ModelError> {
    let linear = match metadata.text(&key("rope.scaling.type"))? {
        None => metadata.float(&key("rope.scale_linear"))?,
        Some("none") => None,
        Some("linear") => {
            let name = key("rope.scaling.factor");
            Some(metadata.float(&name)?.ok_or_else(|| metadata.error(&name, "is missing"))?)
        }
        Some(other) => {
            return Err(metadata.error(&key("rope.scaling.type"), format!("is {other}; known are none, linear")));
        }
    };
    let linear = linear.filter(|factor| *factor != 1.0);
    let factors = frequency_factors(metadata)?;
    match (linear, factors) {
        (None, None) => Ok(RopeScaling::None),
        (Some(factor), None) => Ok(RopeScaling::Linear { factor }),
        (None, Some(factors)) => Ok(RopeScaling::Factors { factors }),
        (Some(_), Some(_)) => {
            Err(metadata.error(&key("rope.scaling.type"), "is linear, and rope_freqs.weight is there too"))
        }
    }
}

/// Llama 3.1's scaling comes as one divisor for each frequency.
fn frequency_factors(metadata: Metadata<'_>) -> Result<Option<Vec<f32>>, ModelError> {
    let name = "rope_freqs.weight";
    let Some(tensor) = metadata.header.tensors.iter().find(|tensor| tensor.name == name) else { return Ok(None) };
    if tensor.dtype != Ok(StoredType::F32) || tensor.shape.len() != 1 {
        return Err(ModelError::tensor(name, "is not a vector of 32-bit floats"));
    }
    let bytes = metadata.bytes.get(tensor.range.clone()).unwrap_or_default();
    let factors: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect();
    Ok(Some(factors).filter(|factors| factors.iter().any(|factor| *factor != 1.0)))
}
