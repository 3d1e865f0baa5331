//! Which part of a model a rank holds: any head count on any number of ranks.

use std::ops::Range;

/// A range of a dimension that a rank owns, and how it lies in the rank's padded local dimension.
///
/// Local index `lead + i` is global index `owned.start + i`; every other local index is zero padding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// Global indices that this rank owns.
    pub owned: Range<usize>,
    /// Where they begin locally: whole quantisation blocks are held, and a block may begin before `owned`.
    pub lead: usize,
    /// Local length, the same on all ranks.
    pub padded: usize,
}

/// The part of every tensor that one rank holds.
///
/// Query heads: the rank's query head `i` (global `heads.start + i`) belongs to local KV head `i / group`.
/// Where there are at least as many KV heads as ranks, ranks hold whole groups; otherwise KV heads are replicated
/// and a group's query heads are split among its replicas. Local shapes are the same on all ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardPlan {
    /// Ranks in the group.
    pub world_size: usize,
    /// This rank.
    pub rank: usize,
    /// Global query heads that this rank owns.
    pub heads: Range<usize>,
    /// Global KV heads whose K and V it holds.
    pub kv_heads: Range<usize>,
    /// KV heads locally, padded to the same number on all ranks.
    pub local_kv_heads: usize,
    /// Query heads of one local KV head, padded to the same number on all ranks. Local query heads: `local_kv_heads * group`.
    pub group: usize,
    /// Columns of the attention output and of `o_proj` (row-parallel), in values. With block formats `lead` may be above 0.
    pub attention: Split,
    /// Rows of gate and up, columns of down.
    pub inner: Split,
    /// Rows of the embedding and of the output head.
    pub vocab: Split,
}
