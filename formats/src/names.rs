//! What files call tensors, and which of them hold several.
//!
//! Owns the translation to the names of Hugging Face's Llama, which everything behind the files uses, and back, for messages.
//!
//! **Invariant:** a name that no table has stays as it is; two tensors never get one name.

use std::collections::HashMap;

use crate::model::TensorEntry;
use crate::row_order::RowOrder;
use crate::{Geometry, LayerNames, ModelError};

/// What a family, or a kind of files, calls tensors.
pub(crate) struct NameTable {
    /// Tensors outside of layers: the name here, Llama's name.
    pub whole: &'static [(&'static str, &'static str)],
    /// What stands before a layer's number.
    pub layers: &'static str,
    /// Parts of a layer, without `.weight` and `.bias`: the name here, Llama's name.
    pub parts: &'static [(&'static str, &'static str)],
    /// The part that holds Q, K and V: for each KV head its query heads, then K, then V.
    pub fused_qkv: Option<&'static str>,
}

/// Hugging Face's Llama: nothing to translate.
pub(crate) const LLAMA: NameTable = NameTable { whole: &[], layers: LAYERS, parts: &[], fused_qkv: None };

/// What stands before a layer's number in Llama's names.
const LAYERS: &str = "model.layers.";

/// A name inside a layer, taken apart.
struct InLayer<'a> {
    layer: usize,
    part: &'a str,
    /// `weight` or `bias`.
    suffix: &'a str,
}

impl<'a> InLayer<'a> {
    fn parse(name: &'a str, layers: &str) -> Option<Self> {
        let (layer, rest) = name.strip_prefix(layers)?.split_once('.')?;
        let (part, suffix) = rest.rsplit_once('.')?;
        Some(Self { layer: layer.parse().ok()?, part, suffix })
    }
}

impl NameTable {
    /// Llama's name for a tensor of this table.
    pub(crate) fn to_llama(&self, name: &str) -> String {
        if let Some((_, llama)) = self.whole.iter().find(|(own, _)| *own == name) {
            return (*llama).to_owned();
        }
        let translated = InLayer::parse(name, self.layers).and_then(|InLayer { layer, part, suffix }| {
            let (_, llama) = self.parts.iter().find(|(own, _)| *own == part)?;
            Some(format!("{LAYERS}{layer}.{llama}.{suffix}"))
        });
        translated.unwrap_or_else(|| name.to_owned())
    }

    /// The name in files for what Llama calls so.
    pub(crate) fn in_files(&self, llama: &str) -> String {
        if let Some((own, _)) = self.whole.iter().find(|(_, name)| *name == llama) {
            return (*own).to_owned();
        }
        let Some(InLayer { layer, part, suffix }) = InLayer::parse(llama, LAYERS) else { return llama.to_owned() };
        let own = match self.fused_qkv {
            Some(fused) if ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].contains(&part) => fused,
            _ => self.parts.iter().find(|(_, name)| *name == part).map_or(part, |(own, _)| own),
        };
        format!("{}{layer}.{own}.{suffix}", self.layers)
    }

    /// Gives the tensors of a folder Llama's names; one that holds Q, K and V becomes three.
    ///
    /// # Errors
    /// A tensor of several has not the rows that the geometry says, or two tensors get one name.
    pub(crate) fn adopt(
        &self,
        geometry: &Geometry,
        stored: HashMap<String, TensorEntry>,
    ) -> Result<HashMap<String, TensorEntry>, ModelError> {
        let mut adopted = HashMap::with_capacity(stored.len());
        let mut add = |from: &str, name: String, entry| match adopted.insert(name, entry) {
            Some(_) => Err(ModelError::tensor(from, "is there twice, by two names")),
            None => Ok(()),
        };
        for (name, entry) in stored {
            match InLayer::parse(&name, self.layers).filter(|found| Some(found.part) == self.fused_qkv) {
                None => add(&name, self.to_llama(&name), entry)?,
                Some(found) => {
                    for (part, entry) in split_qkv(geometry, &name, &found, &entry)? {
                        add(&name, part, entry)?;
                    }
                }
            }
        }
        Ok(adopted)
    }
}

/// The three tensors in a fused one: each has all its bytes, and every so many rows of them.
fn split_qkv(
    geometry: &Geometry,
    name: &str,
    found: &InLayer<'_>,
    entry: &TensorEntry,
) -> Result<[(String, TensorEntry); 3], ModelError> {
    let (num_kv_heads, head_dim) = (geometry.num_kv_heads, geometry.head_dim);
    let group = geometry.num_heads / num_kv_heads;
    let (rows, cols) = (num_kv_heads * (group + 2) * head_dim, entry.shape.get(1..).unwrap_or_default());
    if entry.shape.first() != Some(&rows) {
        let reason = format!("has the shape {:?}, but Q, K and V should have {rows} rows", entry.shape);
        return Err(ModelError::tensor(name, reason));
    }
    let part = |name: &str, first: usize, taken: usize| {
        let order = RowOrder::Grouped { head_dim, first, taken, group_heads: group + 2 };
        let shape = [num_kv_heads * taken * head_dim].into_iter().chain(cols.iter().copied()).collect();
        (format!("{name}.{}", found.suffix), TensorEntry { shape, row_order: order, ..entry.clone() })
    };
    let [q, k, v] = LayerNames::new(found.layer).qkv;
    Ok([part(&q, 0, group), part(&k, group, 1), part(&v, group + 1, 1)])
}

#[cfg(test)]
mod tests {
    use crate::Architecture;

    fn check(architecture: Architecture, own: &str, llama: &str) {
        let names = architecture.family().names;
        assert_eq!((names.to_llama(own), names.in_files(llama)), (llama.to_owned(), own.to_owned()));
    }

    #[test]
    fn names_are_translated_both_ways() {
        check(Architecture::InternLm2, "output.weight", "lm_head.weight");
        check(Architecture::InternLm2, "model.norm.weight", "model.norm.weight");
        check(Architecture::InternLm2, "model.layers.7.attention.wo.weight", "model.layers.7.self_attn.o_proj.weight");
        check(
            Architecture::InternLm2,
            "model.layers.0.ffn_norm.weight",
            "model.layers.0.post_attention_layernorm.weight",
        );
        check(Architecture::Mistral, "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight");
        let names = Architecture::InternLm2.family().names;
        assert_eq!(names.in_files("model.layers.3.self_attn.k_proj.bias"), "model.layers.3.attention.wqkv.bias");
        for strange in
            ["", "model.layers.", "model.layers.x.ffn_norm.weight", "model.layers.1.ffn_norm", "blk.0.attn_q.weight"]
        {
            assert_eq!(names.to_llama(strange), strange);
        }
    }
}
