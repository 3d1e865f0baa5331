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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Architecture, RopeScaling};

    fn geometry(num_kv_heads: usize, group: usize, head_dim: usize, inner: usize, vocab_size: usize) -> Geometry {
        Geometry {
            architecture: Architecture::Llama,
            hidden_size: 64,
            intermediate_size: inner,
            num_layers: 2,
            num_heads: num_kv_heads * group,
            num_kv_heads,
            head_dim,
            vocab_size,
            max_position: 128,
            norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            tied_embeddings: true,
            qkv_bias: false,
            sliding_window: None,
        }
    }

    fn plans(geometry: &Geometry, world_size: usize, attention_block: usize, inner_block: usize) -> Vec<ShardPlan> {
        (0..world_size).map(|rank| ShardPlan::new(geometry, world_size, rank, attention_block, inner_block)).collect()
    }

    /// Ranges in rank order cover `0..total`, each index once.
    fn assert_partition<'a>(ranges: impl Iterator<Item = &'a Range<usize>>, total: usize) {
        let mut at = 0;
        for range in ranges {
            assert_eq!(range.start, at);
            assert!(range.end >= range.start);
            at = range.end;
        }
        assert_eq!(at, total);
    }

    fn assert_split(split: &Split, block: usize, total: usize) {
        assert!(split.padded.is_multiple_of(PADDING) && split.padded.is_multiple_of(block), "{split:?}");
        assert!(split.padded > 0 && split.lead + split.owned.len() <= split.padded, "{split:?}");
        if !split.owned.is_empty() {
            assert_eq!(split.lead, split.owned.start % block);
            let held_end = split.owned.end.next_multiple_of(block).min(total);
            assert!(held_end - (split.owned.start - split.lead) <= split.padded, "{split:?}");
        }
    }

    fn check_invariants(geometry: &Geometry, plans: &[ShardPlan], attention_block: usize, inner_block: usize) {
        assert_partition(plans.iter().map(|plan| &plan.heads), geometry.num_heads);
        assert_partition(plans.iter().map(|plan| &plan.attention.owned), geometry.query_width());
        assert_partition(plans.iter().map(|plan| &plan.inner.owned), geometry.intermediate_size);
        assert_partition(plans.iter().map(|plan| &plan.vocab.owned), geometry.vocab_size);
        let group = geometry.num_heads / geometry.num_kv_heads;
        let shape = |plan: &ShardPlan| {
            (plan.local_kv_heads, plan.group, plan.attention.padded, plan.inner.padded, plan.vocab.padded)
        };
        for plan in plans {
            assert_eq!(shape(plan), shape(&plans[0]));
            assert!(plan.kv_heads.len() <= plan.local_kv_heads);
            assert!(plan.heads.len() <= plan.local_kv_heads * plan.group);
            assert_eq!(plan.attention.owned, plan.heads.start * geometry.head_dim..plan.heads.end * geometry.head_dim);
            for (local, head) in plan.heads.clone().enumerate() {
                assert_eq!(head / group, plan.kv_heads.start + local / plan.group);
                assert!(plan.kv_heads.contains(&(head / group)));
            }
            assert_split(&plan.attention, attention_block, geometry.query_width());
            assert_split(&plan.inner, inner_block, geometry.intermediate_size);
            assert_split(&plan.vocab, 1, geometry.vocab_size);
            if inner_block > 1 {
                assert!(plan.inner.owned.start.is_multiple_of(inner_block) || plan.inner.owned.is_empty());
            }
        }
    }

    proptest! {
        #[test]
        fn any_geometry_on_any_number_of_ranks(
            num_kv_heads in 1usize..12,
            group in 1usize..10,
            half_dim in 1usize..80,
            inner in 1usize..3000,
            vocab in 1usize..3000,
            world_size in 1usize..=16,
            attention_block in prop_oneof![Just(1), Just(32), Just(256)],
            inner_block in prop_oneof![Just(1), Just(32), Just(256)],
        ) {
            let geometry = geometry(num_kv_heads, group, half_dim * 2, inner, vocab);
            let plans = plans(&geometry, world_size, attention_block, inner_block);
            check_invariants(&geometry, &plans, attention_block, inner_block);
        }
    }

    #[test]
    fn nine_heads_on_four_ranks() {
        let plans = plans(&geometry(3, 3, 64, 1536, 49152), 4, 32, 32);
        let heads: Vec<_> = plans.iter().map(|plan| (plan.heads.clone(), plan.kv_heads.clone())).collect();
        assert_eq!(heads, [(0..2, 0..1), (2..3, 0..1), (3..6, 1..2), (6..9, 2..3)]);
        assert_eq!((plans[0].local_kv_heads, plans[0].group, plans[0].attention.padded), (1, 3, 192));
        assert_eq!(plans[1].inner, Split { owned: 384..768, lead: 0, padded: 384 });
    }

    #[test]
    fn nine_heads_on_two_ranks_keep_their_groups() {
        let plans = plans(&geometry(3, 3, 64, 1536, 49152), 2, 1, 1);
        assert_eq!((plans[0].heads.clone(), plans[1].heads.clone()), (0..6, 6..9));
        assert_eq!((plans[0].local_kv_heads, plans[0].group), (2, 3));
    }

    #[test]
    fn a_block_may_begin_before_the_range() {
        let plans = plans(&geometry(2, 1, 80, 512, 512), 2, 32, 32);
        assert_eq!(plans[1].attention, Split { owned: 80..160, lead: 16, padded: 128 });
    }

    #[test]
    fn ranks_may_have_nothing() {
        let plans = plans(&geometry(1, 2, 16, 64, 40), 8, 1, 32);
        assert!(plans[7].heads.is_empty() && plans[7].kv_heads.is_empty() && plans[7].inner.owned.is_empty());
        assert_eq!((plans[7].local_kv_heads, plans[7].group), (1, 1));
    }
}
