//! Qwen1.5, Qwen2 and Qwen2.5. Source: arXiv:2309.16609, arXiv:2407.10671.
//!
//! Configuration: bias on Q, K and V only; a large rotary base.
//! Layers: grouped-query or multi-head attention, gated MLP; the head is the embedding in small models.

use phalanx_kernels::{KernelError, Ops};

use super::Model;
use crate::layers::{
    Activations, AttentionNames, Build, BuildError, DecoderLayer, DecoderNames, MlpNames, RmsNorm, VocabNames,
    Vocabulary, rope_table,
};

/// A Qwen2 decoder on one rank.
pub struct Qwen2<B: Ops> {
    vocabulary: Vocabulary<B>,
    layers: Vec<DecoderLayer<B>>,
    norm: RmsNorm<B>,
    rope: B::Rope,
    act: Activations<B>,
}

fn layer_names(index: usize) -> DecoderNames {
    let at = |name: &str| format!("model.layers.{index}.{name}");
    DecoderNames {
        input_norm: at("input_layernorm.weight"),
        attention: AttentionNames {
            qkv: [at("self_attn.q_proj"), at("self_attn.k_proj"), at("self_attn.v_proj")],
            output: at("self_attn.o_proj"),
        },
        mlp_norm: at("post_attention_layernorm.weight"),
        mlp: MlpNames {
            gate: at("mlp.gate_proj.weight"),
            up: at("mlp.up_proj.weight"),
            down: at("mlp.down_proj.weight"),
        },
    }
}

impl<B: Ops> Qwen2<B> {
    /// Reads this rank's shard.
    ///
    /// # Errors
    /// A tensor is absent or has another shape; the device does not take it.
    pub fn load(build: &mut Build<'_, B>) -> Result<Self, BuildError> {
        let names = VocabNames { embedding: "model.embed_tokens.weight".into(), head: "lm_head.weight".into() };
        let vocabulary = Vocabulary::load(build, &names)?;
        let layers = (0..build.geometry.num_layers)
            .map(|index| DecoderLayer::load(build, &layer_names(index)))
            .collect::<Result<_, _>>()?;
        let norm = RmsNorm::load(build, "model.norm.weight")?;
        let rope = build.ops.rope_table(rope_table(build.geometry, build.max_model_len))?;
        Ok(Self { vocabulary, layers, norm, rope, act: Activations::new(build)? })
    }
}

impl<B: Ops> Model<B> for Qwen2<B> {
    fn forward(&mut self, ops: &mut B, inputs: &B::Inputs, kv: &mut [B::KvLayer]) -> Result<(), KernelError> {
        let Self { vocabulary, layers, norm, rope, act } = self;
        vocabulary.embed(ops, inputs, act)?;
        layers.first().map_or(&*norm, DecoderLayer::input_norm).forward(ops, inputs, act)?;
        for (index, (layer, kv)) in layers.iter().zip(kv).enumerate() {
            let next = layers.get(index + 1).map_or(&*norm, DecoderLayer::input_norm);
            layer.forward(ops, inputs, rope, kv, next, act)?;
        }
        Ok(())
    }

    fn project(&mut self, ops: &mut B, inputs: &B::Inputs) -> Result<(), KernelError> {
        self.vocabulary.logits(ops, inputs, &mut self.act)
    }

    fn logits(&self) -> &B::Buffer {
        &self.act.logits
    }

    fn hidden(&self) -> &B::Buffer {
        &self.act.normed
    }
}
