//! Sums over the ranks of a group.

use crate::CollectiveError;

/// A rank's term of a sum over ranks: only a collective op makes a value of it.
#[derive(Debug)]
pub struct Partial<B>(pub(crate) B);

impl<B> Partial<B> {
    /// Marks a buffer as a place for terms.
    pub fn new(buffer: B) -> Self {
        Self(buffer)
    }
}

/// Host collectives of a group; every call is made by all ranks, in the same order, with the same sizes.
///
/// Sums are formed in rank order, so that all ranks hold the same bits. Each call has a deadline.
pub trait Collective: Send {
    /// This rank.
    fn rank(&self) -> usize;
    /// Ranks in the group.
    fn world_size(&self) -> usize;
    /// Replaces `data` by the sum over ranks.
    ///
    /// # Errors
    /// A peer is late or gone: the group is broken, and the caller leaves its epoch.
    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError>;
    /// Concatenates every rank's `part` in rank order: `out.len() == part.len() * world_size`.
    ///
    /// # Errors
    /// As `all_reduce_sum`.
    fn all_gather(&mut self, part: &[u8], out: &mut [u8]) -> Result<(), CollectiveError>;
}
