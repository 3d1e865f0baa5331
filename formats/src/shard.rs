//! Which part of a model a rank holds: any head count on any number of ranks.
//!
//! **Invariant:** over all ranks each query head, inner index and vocabulary row is owned exactly once; local shapes are the
//! same on all ranks; a rank that owns a query head holds its KV head.

use std::ops::Range;

use crate::Geometry;

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

/// Local inner, attention and vocabulary dimensions are multiples of this, so that kernels see whole tiles.
const PADDING: usize = 64;
/// Ranges of a float dimension begin at multiples of this.
const FLOAT_UNIT: usize = 16;

impl ShardPlan {
    /// Plans one rank's part of a model, for any head count and any number of ranks.
    ///
    /// `attention_block` and `inner_block` are the longest quantisation blocks along the columns of the layers' `o_proj`
    /// and `down_proj`: 1 for floats, see [`ModelFiles::attention_block`](crate::ModelFiles::attention_block).
    ///
    /// # Panics
    /// `rank` is not below `world_size`, or a block is empty: the caller's mistake.
    pub fn new(
        geometry: &Geometry,
        world_size: usize,
        rank: usize,
        attention_block: usize,
        inner_block: usize,
    ) -> Self {
        assert!(rank < world_size, "rank {rank} of {world_size}");
        assert!(attention_block > 0 && inner_block > 0, "an empty quantisation block");
        let (heads, kv_heads) = head_ranges(geometry, world_size, rank);
        let (local_kv_heads, group) = local_heads(geometry, world_size);
        let inner_unit = if inner_block > 1 { inner_block } else { FLOAT_UNIT };
        Self {
            world_size,
            rank,
            attention: attention_split(geometry, world_size, rank, attention_block),
            inner: even_split(geometry.intermediate_size, inner_unit, world_size, rank),
            vocab: even_split(geometry.vocab_size, FLOAT_UNIT, world_size, rank),
            heads,
            kv_heads,
            local_kv_heads,
            group,
        }
    }
}

/// Part `index` of `total` things dealt to `parts` in order, as evenly as can be: the first ones get one more.
fn deal(total: usize, parts: usize, index: usize) -> Range<usize> {
    let (each, more) = (total / parts, total % parts);
    let start = index * each + index.min(more);
    start..start + each + usize::from(index < more)
}

/// Query heads that a rank owns, and the KV heads that it holds for them.
fn head_ranges(geometry: &Geometry, world_size: usize, rank: usize) -> (Range<usize>, Range<usize>) {
    let num_kv = geometry.num_kv_heads;
    let group = geometry.num_heads / num_kv;
    if num_kv >= world_size {
        let kv_heads = deal(num_kv, world_size, rank);
        return (kv_heads.start * group..kv_heads.end * group, kv_heads);
    }
    // Ranks are dealt to KV heads: those of one KV head are its replicas and share its query heads.
    let mut kv_head = 0;
    while !deal(world_size, num_kv, kv_head).contains(&rank) {
        kv_head += 1;
    }
    let replicas = deal(world_size, num_kv, kv_head);
    let share = deal(group, replicas.len(), rank - replicas.start);
    let heads = kv_head * group + share.start..kv_head * group + share.end;
    let kv_heads = if heads.is_empty() { kv_head..kv_head } else { kv_head..kv_head + 1 };
    (heads, kv_heads)
}

/// KV heads of the fullest rank, and query heads of its fullest KV head.
fn local_heads(geometry: &Geometry, world_size: usize) -> (usize, usize) {
    let num_kv = geometry.num_kv_heads;
    let group = geometry.num_heads / num_kv;
    if num_kv >= world_size { (num_kv.div_ceil(world_size), group) } else { (1, group.div_ceil(world_size / num_kv)) }
}

fn attention_split(geometry: &Geometry, world_size: usize, rank: usize, block: usize) -> Split {
    let head_dim = geometry.head_dim;
    let columns = |rank| {
        let (heads, _) = head_ranges(geometry, world_size, rank);
        heads.start * head_dim..heads.end * head_dim
    };
    let held = |owned: &Range<usize>| {
        if owned.is_empty() { 0 } else { owned.end.next_multiple_of(block) - owned.start / block * block }
    };
    let widest = (0..world_size).map(|rank| held(&columns(rank))).max().unwrap_or(0);
    let owned = columns(rank);
    let lead = if owned.is_empty() { 0 } else { owned.start % block };
    Split { owned, lead, padded: widest.next_multiple_of(padding(block)) }
}

/// A dimension in units; the last unit may be cut.
fn even_split(total: usize, unit: usize, world_size: usize, rank: usize) -> Split {
    let num_units = total.div_ceil(unit);
    let units = deal(num_units, world_size, rank);
    let owned = (units.start * unit).min(total)..(units.end * unit).min(total);
    let widest = num_units.div_ceil(world_size) * unit;
    Split { owned, lead: 0, padded: widest.next_multiple_of(padding(unit)) }
}

/// Smallest multiple of both the padding and the unit.
fn padding(unit: usize) -> usize {
    let (mut a, mut b) = (PADDING, unit);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    PADDING / a * unit
}
