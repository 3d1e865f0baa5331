//! Embedding and output head, split by vocabulary.
//!
//! Source: Megatron-LM, arXiv:1909.08053, section 3.

use phalanx_formats::{EMBEDDING, HEAD};
use phalanx_kernels::{KernelError, Ops};

use super::{Activations, Build, BuildError};

/// This rank's rows of the embedding and of the output head; one matrix where they are tied.
pub struct Vocabulary<B: Ops> {
    embedding: B::Matrix,
    head: Option<B::Matrix>,
    first_id: u32,
}

impl<B: Ops> Vocabulary<B> {
    /// Reads this rank's rows.
    ///
    /// # Errors
    /// A tensor is absent or has another shape; no memory.
    pub fn load(build: &mut Build<'_, B>) -> Result<Self, BuildError> {
        let vocab = &build.plan.vocab;
        let rows = build.weights.vocab_rows();
        let table = build.weights.rows(EMBEDDING, &rows)?;
        let embedding = build.matrix(vec![table])?;
        let head = if build.geometry.tied_embeddings {
            None
        } else {
            let table = build.weights.rows(HEAD, &rows)?;
            Some(build.matrix(vec![table])?)
        };
        Ok(Self { embedding, head, first_id: vocab.owned.start.saturating_sub(vocab.lead) as u32 })
    }

    /// Begins the residual stream with the tokens' embeddings. Collective: a token's row lies on one rank.
    ///
    /// # Errors
    /// A device fault or a broken group.
    pub fn embed(&self, ops: &mut B, inputs: &B::Inputs, act: &mut Activations<B>) -> Result<(), KernelError> {
        ops.embed(inputs, &self.embedding, self.first_id, &mut act.term)?;
        ops.reduce(inputs, &mut act.term, &mut act.residual)
    }

    /// Logits of this rank's tokens for the step's logit rows, from `normed`.
    ///
    /// # Errors
    /// A device fault.
    pub fn logits(&self, ops: &mut B, inputs: &B::Inputs, act: &mut Activations<B>) -> Result<(), KernelError> {
        ops.logits(inputs, &act.normed, self.head.as_ref().unwrap_or(&self.embedding), &mut act.logits)
    }
}
