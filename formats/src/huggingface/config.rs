//! `config.json` to [`Geometry`].
//!
//! Reads both styles: `rope_theta` and `rope_scaling` at the top, or inside `rope_parameters`. What a config asks for and no
//! code does is refused here, not ignored.

use std::path::Path;

use serde_json::Value;

use crate::architecture::{Family, Switch, Window};
use crate::json::Fields;
use crate::{Architecture, Geometry, ModelError, RopeScaling, StoredType};

/// Reads the geometry.
///
/// # Errors
/// The architecture is unknown, a field is missing or wrong, or the model needs something that is not supported.
pub(crate) fn geometry(path: &Path, config: &Value) -> Result<Geometry, ModelError> {
    let fields = Fields::root(path, config)?;
    let architecture = architecture(fields)?;
    let family = architecture.family();
    refuse_unsupported(fields)?;
    let hidden_size = fields.required_count("hidden_size")?;
    let num_heads = fields.required_count("num_attention_heads")?;
    let num_layers = fields.required_count("num_hidden_layers")?;
    let (rope_theta, rope_scaling) = rope(fields)?;
    let geometry = Geometry {
        architecture,
        hidden_size,
        intermediate_size: fields.required_count("intermediate_size")?,
        num_layers,
        num_heads,
        num_kv_heads: fields.count("num_key_value_heads")?.unwrap_or(num_heads),
        head_dim: head_dim(fields, hidden_size, num_heads)?,
        vocab_size: fields.required_count("vocab_size")?,
        max_position: fields.count("max_position_embeddings")?.unwrap_or(family.max_position),
        norm_eps: fields.float("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta,
        rope_scaling,
        tied_embeddings: fields.switch("tie_word_embeddings")?.unwrap_or(false),
        qkv_bias: match family.qkv_bias {
            Switch::On => true,
            Switch::Field { name, absent } => fields.switch(name)?.unwrap_or(absent),
        },
        sliding_window: sliding_window(fields, family, num_layers)?,
    };
    geometry.check(path)?;
    Ok(geometry)
}

/// The type that the config says its weights have; what dummy weights are made in.
pub(crate) fn declared_dtype(path: &Path, config: &Value) -> Result<StoredType, ModelError> {
    let fields = Fields::root(path, config)?;
    let word = match fields.word("torch_dtype")? {
        Some(word) => word,
        None => fields.word("dtype")?.unwrap_or("bfloat16"),
    };
    match word {
        "float32" => Ok(StoredType::F32),
        "float16" => Ok(StoredType::F16),
        _ => Ok(StoredType::BF16),
    }
}

/// The known architectures, for messages.
pub(crate) fn known_architectures() -> String {
    Architecture::ALL.iter().map(|known| known.family().class_name).collect::<Vec<_>>().join(", ")
}

fn architecture(fields: Fields<'_>) -> Result<Architecture, ModelError> {
    let classes: Vec<&str> = match fields.get("architectures") {
        Some(Value::Array(classes)) => classes.iter().filter_map(Value::as_str).collect(),
        Some(other) => return Err(fields.error("architectures", format!("is {other}, not a list of names"))),
        None => Vec::new(),
    };
    let model_type = fields.word("model_type")?;
    if classes.is_empty() && model_type.is_none() {
        return Err(fields.error("architectures", "is missing, and so is model_type"));
    }
    let known = Architecture::ALL.iter().find(|known| {
        let Family { class_name, model_type: name, .. } = known.family();
        if classes.is_empty() { model_type == Some(*name) } else { classes.contains(class_name) }
    });
    known.copied().ok_or_else(|| ModelError::UnknownArchitecture {
        found: if classes.is_empty() { model_type.unwrap_or_default().to_owned() } else { classes.join(", ") },
        known: known_architectures(),
    })
}

fn refuse_unsupported(fields: Fields<'_>) -> Result<(), ModelError> {
    if let Some(activation) = fields.word("hidden_act")?
        && activation != "silu"
    {
        return Err(fields.error("hidden_act", format!("is {activation}; only silu is supported")));
    }
    if fields.switch("mlp_bias")? == Some(true) {
        return Err(fields.error("mlp_bias", "is true; a bias in the MLP is not supported"));
    }
    if fields.float("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(fields.error("partial_rotary_factor", "is not 1; only whole heads can be rotated"));
    }
    if let Some(method) = fields.get("quantization_config") {
        let name = method.get("quant_method").and_then(Value::as_str).unwrap_or("an unnamed method");
        let reason = format!("names {name}, which is not supported; use an unquantised model or a GGUF file");
        return Err(fields.error("quantization_config", reason));
    }
    Ok(())
}

fn head_dim(fields: Fields<'_>, hidden_size: usize, num_heads: usize) -> Result<usize, ModelError> {
    if let Some(head_dim) = fields.count("head_dim")? {
        return Ok(head_dim);
    }
    if num_heads == 0 || !hidden_size.is_multiple_of(num_heads) {
        let reason =
            format!("is {num_heads}, which does not divide hidden_size {hidden_size}, and there is no head_dim");
        return Err(fields.error("num_attention_heads", reason));
    }
    Ok(hidden_size / num_heads)
}

fn sliding_window(fields: Fields<'_>, family: &Family, num_layers: usize) -> Result<Option<usize>, ModelError> {
    let window = match family.window {
        Window::Never => None,
        Window::Switched { absent } if fields.switch("use_sliding_window")?.unwrap_or(absent) => {
            fields.count("sliding_window")?
        }
        Window::Switched { .. } => None,
        Window::Length { absent } if fields.value.get("sliding_window").is_none() => Some(absent),
        Window::Length { .. } => fields.count("sliding_window")?,
    };
    if window.is_none() {
        return Ok(None);
    }
    // Layers below this one see everything.
    match fields.count("max_window_layers")?.unwrap_or(0) {
        0 => Ok(window),
        first if first >= num_layers => Ok(None),
        first => {
            let reason = format!("is {first} of {num_layers}; a window on some layers only is not supported");
            Err(fields.error("max_window_layers", reason))
        }
    }
}

fn rope(fields: Fields<'_>) -> Result<(f32, RopeScaling), ModelError> {
    let object = |name: &'static str, prefix: &'static str| match fields.get(name) {
        None => Ok(None),
        Some(value) if value.is_object() => Ok(Some(Fields { path: fields.path, prefix, value })),
        Some(value) => Err(fields.error(name, format!("is {value}, not an object"))),
    };
    let parameters = object("rope_parameters", "rope_parameters.")?;
    let scaling = object("rope_scaling", "rope_scaling.")?;
    let inner_theta = match parameters {
        Some(parameters) => parameters.float("rope_theta")?,
        None => None,
    };
    let theta = match inner_theta {
        Some(theta) => theta,
        None => fields.float("rope_theta")?.unwrap_or(10_000.0),
    };
    if let Some(parameters) = parameters
        && parameters.get("full_attention").is_some()
    {
        return Err(fields.error("rope_parameters", "differs between layers, which is not supported"));
    }
    let trained = fields.count("original_max_position_embeddings")?;
    match parameters.or(scaling) {
        None => Ok((theta, RopeScaling::None)),
        Some(rules) => Ok((theta, rope_scaling(rules, trained)?)),
    }
}

fn rope_scaling(rules: Fields<'_>, trained: Option<usize>) -> Result<RopeScaling, ModelError> {
    let kind = match rules.word("rope_type")? {
        Some(kind) => kind,
        None => rules.word("type")?.unwrap_or("default"),
    };
    let required = |name: &str| rules.float(name)?.ok_or_else(|| rules.error(name, "is missing"));
    match kind {
        // Dynamic: frequencies change only in sequences longer than the trained length, and none is.
        "default" | "dynamic" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: required("factor")? }),
        "llama3" => {
            let name = "original_max_position_embeddings";
            let original = rules.count(name)?.or(trained).ok_or_else(|| rules.error(name, "is missing"))?;
            Ok(RopeScaling::Llama3 {
                factor: required("factor")?,
                low_freq_factor: required("low_freq_factor")?,
                high_freq_factor: required("high_freq_factor")?,
                original_max_position: u32::try_from(original)
                    .map_err(|_| rules.error(name, format!("is {original}, which is absurd")))?,
            })
        }
        other => Err(rules.error("rope_type", format!("is {other}; known are default, dynamic, linear, llama3"))),
    }
}
