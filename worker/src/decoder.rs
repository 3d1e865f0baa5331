//! A decoder-only transformer on one rank: embedding, pre-norm layers, a last norm, the output head.
//!
//! One for all families: what differs between them is in the geometry (bias, window, tied embeddings, rotary scaling), and the
//! names in their files are translated where files are read. Knows no plan, no session and no file format.
//!
//! **Invariant:** it calls block ops only, so that fusing never touches it; its forward allocates nothing and reads no data
//! back.
//!
//! Source: arXiv:1706.03762, with the norms before the blocks.

use phalanx_formats::{FINAL_NORM, LayerNames};
use phalanx_kernels::{KernelError, Ops};

use crate::layers::{Activations, Build, BuildError, DecoderLayer, RmsNorm, Vocabulary, rope_table};

/// One rank's shard of a model.
pub struct Decoder<B: Ops> {
    vocabulary: Vocabulary<B>,
    layers: Vec<DecoderLayer<B>>,
    norm: RmsNorm<B>,
    rope: B::Rope,
    act: Activations<B>,
}

impl<B: Ops> Decoder<B> {
    /// Reads this rank's shard.
    ///
    /// # Errors
    /// A tensor is absent or has another shape; the device does not take it.
    pub fn load(build: &mut Build<'_, B>) -> Result<Self, BuildError> {
        let vocabulary = Vocabulary::load(build)?;
        let layers = (0..build.geometry.num_layers)
            .map(|index| DecoderLayer::load(build, &LayerNames::new(index)))
            .collect::<Result<_, _>>()?;
        let norm = RmsNorm::load(build, FINAL_NORM)?;
        let rope = build.ops.rope_table(rope_table(build.geometry, build.max_model_len))?;
        Ok(Self { vocabulary, layers, norm, rope, act: Activations::new(build)? })
    }

    /// From the step's tokens to their normalised hidden states; stores their K and V. Collective.
    ///
    /// # Errors
    /// A device fault or a broken group.
    pub fn forward(&mut self, ops: &mut B, inputs: &B::Inputs, kv: &mut [B::KvLayer]) -> Result<(), KernelError> {
        let Self { vocabulary, layers, norm, rope, act } = self;
        vocabulary.embed(ops, inputs, act)?;
        layers.first().map_or(&*norm, DecoderLayer::input_norm).forward(ops, inputs, act)?;
        for (index, (layer, kv)) in layers.iter().zip(kv).enumerate() {
            let next = layers.get(index + 1).map_or(&*norm, DecoderLayer::input_norm);
            layer.forward(ops, inputs, rope, kv, next, act)?;
        }
        Ok(())
    }

    /// Computes logits for the step's logit rows from the hidden states of the last forward.
    ///
    /// # Errors
    /// A device fault.
    pub fn project(&mut self, ops: &mut B, inputs: &B::Inputs) -> Result<(), KernelError> {
        self.vocabulary.logits(ops, inputs, &mut self.act)
    }

    /// What `forward` wrote last: normalised hidden states, whole on every rank, `[tokens, hidden]`.
    pub fn hidden(&self) -> &B::Buffer {
        &self.act.normed
    }

    /// What `project` wrote last: logits of this rank's tokens, `[logit rows, vocab.padded]`.
    pub fn logits(&self) -> &B::Buffer {
        &self.act.logits
    }
}
