//! The devices of a group: how terms are summed and records gathered.

use super::CudaOps;
use super::buffers::Dtype;
use crate::cuda::{Context, ModuleSet, Span, Stream};
use crate::{Collective, CollectiveError, KernelError};

/// The device's part in its group.
pub(super) enum Group {
    /// A group of one.
    One,
}

impl Group {
    /// Forms the group. Collective.
    pub(super) fn form(
        _context: &Context,
        _stream: &Stream,
        _modules: &ModuleSet,
        _dtype: Dtype,
        collective: &mut dyn Collective,
    ) -> Result<Self, KernelError> {
        if collective.world_size() == 1 {
            return Ok(Self::One);
        }
        let reason = "groups of several devices are not there yet".into();
        Err(CollectiveError::Setup { reason }.into())
    }

    /// Ranks.
    pub(super) fn world_size(&self) -> usize {
        1
    }

    /// Whether all exchanges so far have ended well.
    pub(super) fn check(&self) -> Result<(), KernelError> {
        Ok(())
    }
}

impl CudaOps {
    /// Replaces `length` terms by their sum over the ranks.
    pub(super) fn all_reduce(&self, _terms: Span, _length: usize) -> Result<(), KernelError> {
        Ok(())
    }

    /// Sums terms, adds them to the residual stream and normalises it in one kernel; false where there is none for the shape.
    pub(super) fn reduce_add_norm_at_once(
        &self,
        _terms: Span,
        _residual: Span,
        _weight: Span,
        _normed: Span,
        _shape: (usize, usize),
        _eps: f32,
    ) -> Result<bool, KernelError> {
        Ok(false)
    }

    /// Every rank's `own`, in rank order: `own` itself in a group of one.
    pub(super) fn gather(&self, own: Span, _into: Span) -> Result<Span, KernelError> {
        Ok(own)
    }
}
