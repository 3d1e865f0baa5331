//! The work list of attention: which queries look at which part of their context, made on the host once per step.
//!
//! Owns the layout of items, merges and partial results (its other half is `cuda/attention.cuh`) and the choice of splits.
//! Knows lengths only: no tensor, no device.
//!
//! **Invariant:** every (query row, position that it sees) is in exactly one item, and no item looks at a position behind its
//! last query or wholly before the window of its first.
//! **Invariant:** a sequence's items depend on its own lengths and on the planner's fixed parameters, never on the other
//! sequences of the step, unless `partials_max` is spent: then it gets fewer splits, at worst none.
//! **Invariant:** `items`, `merges` and partial results stay below the bounds of [`AttentionPlanner::bounds`].
//!
//! Splits are 192 to 383 positions long, until a sequence has as many as there are multiprocessors per KV head. Why not longer
//! ones where the batch alone would fill the device: a result would then depend on the batch. What it costs: a split writes
//! and reads `group` f32 vectors per KV head, `2 * group * 4` bytes per dim against `length * 2 * 2` bytes of K and V: 3 % at
//! group 4 and 256 positions in f16, less from 4096 positions on. What shorter ones would cost: twice that.

/// Words of an item: query row, queries, first position, first and end position of the keys, table start, first partial
/// vector, unused.
pub const ITEM_WORDS: usize = 8;
/// Words of a merge: query row, first partial vector, splits, vectors between splits.
pub const MERGE_WORDS: usize = 4;

/// An item without partial result writes to the output itself.
const NO_PARTIAL: u32 = u32::MAX;
/// Items begin at multiples of this many positions: the kernels' tile.
const TILE: u32 = 16;
/// Splits end at multiples of this many positions from the item's begin: attention_prefill.cu masks by position of the query
/// only, so keys behind a split's end must not share a step with it; and every warp of the decode kernel gets as many tiles.
const STEP: u32 = 64;
/// Query rows (queries times heads of the group) of a decode item: one tile of the tensor cores.
const DECODE_ROWS: u32 = 16;
/// Query rows of a prefill item.
const PREFILL_ROWS: u32 = 128;
/// Length that a decode split aims at.
const DECODE_SPLIT: u32 = 256;
/// Shortest split of a prefill item, and positions of a split for each of its query rows: its partial result is as long as its
/// rows are many, and costs at most a quarter of what reading K and V costs.
const PREFILL_SPLIT_MIN: u32 = 512;
const PREFILL_POSITIONS_PER_ROW: u32 = 8;

/// One sequence of a step: `(query_start, query_len, context_len, table_start)`, as in `SeqInputs`.
pub type Lengths = (u32, u32, u32, u32);

/// Fixed parameters of one kind of layer; one planner and one work list per kind (window or none).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionPlanner {
    /// Multiprocessors of the device.
    pub sm_count: u32,
    /// KV heads on this rank, padding included.
    pub num_kv_heads: u32,
    /// Query heads of one KV head, padding included; at most 128.
    pub group: u32,
    /// Width of a head.
    pub head_dim: u32,
    /// Slots of a KV block, a multiple of 16.
    pub block_size: u32,
    /// A query sees this many positions back, itself included.
    pub window: Option<u32>,
    /// Vectors that the buffers of partial results hold.
    pub partials_max: u32,
}

/// A step's work list, in reusable memory.
#[derive(Debug, Clone, Default)]
pub struct AttentionWork {
    /// Items, [`ITEM_WORDS`] each: decode items, then prefill items.
    pub items: Vec<u32>,
    /// Merges, [`MERGE_WORDS`] each.
    pub merges: Vec<u32>,
    /// Decode items; header word 3.
    pub num_decode: u32,
    /// Prefill items; header word 4.
    pub num_prefill: u32,
    /// Merges; header word 5.
    pub num_merges: u32,
    /// Vectors of partial results in use.
    pub num_partials: u32,
}

/// What the buffers of a work list must hold at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionBounds {
    /// Items, of [`ITEM_WORDS`] u32 each.
    pub items: usize,
    /// Merges, of [`MERGE_WORDS`] u32 each.
    pub merges: usize,
    /// Partial vectors (each `head_dim + 1` f32) with which no decode of one token per sequence, and no prefill of two chunks
    /// at once, ever gets fewer splits than it should: the value for `partials_max`.
    pub partials: usize,
}

/// Consecutive queries and the positions that they look at.
struct Span {
    query_row: u32,
    num_queries: u32,
    first_position: u32,
    kv_begin: u32,
    kv_end: u32,
    table_start: u32,
}

impl AttentionWork {
    fn clear(&mut self) {
        self.items.clear();
        self.merges.clear();
        (self.num_decode, self.num_prefill, self.num_merges, self.num_partials) = (0, 0, 0, 0);
    }
}

impl AttentionPlanner {
    /// Sizes of the buffers for steps of at most `tokens_max` rows, `seqs_max` sequences and contexts of `context_max`.
    ///
    /// items = seqs * (splits + 1) + tokens / queries of a prefill item, where splits is the most that a context can have;
    /// merges = tokens; partials = seqs * splits * heads + two prefill chunks of `sm_count` items.
    pub fn bounds(&self, tokens_max: usize, seqs_max: usize, context_max: usize) -> AttentionBounds {
        let seqs = seqs_max.min(tokens_max);
        let context = u32::try_from(context_max).unwrap_or(u32::MAX);
        let splits = self.decode_splits(context) as usize;
        let queries = (PREFILL_ROWS / self.group.max(1)).max(1) as usize;
        let splits_of_prefill = (self.sm_count / self.num_kv_heads.max(1)) as usize;
        let heads = (self.num_kv_heads * self.group) as usize;
        let decode = if splits > 1 { seqs * splits * heads } else { 0 };
        let prefill = if context < 2 * PREFILL_SPLIT_MIN { 0 } else { 2 * (self.sm_count * PREFILL_ROWS) as usize };
        AttentionBounds {
            items: seqs * (splits.max(splits_of_prefill) + 1) + tokens_max / queries,
            merges: tokens_max,
            partials: decode + prefill,
        }
    }

    /// Plans a step. `out` keeps its memory: once it has held the largest step, nothing is allocated.
    ///
    /// A sequence whose queries fill at most one tile of the decode kernel becomes decode items; a step of such sequences only
    /// has no prefill items. A sequence without queries, or with more queries than context, gets no item.
    pub fn plan(&mut self, seqs: &[Lengths], out: &mut AttentionWork) {
        out.clear();
        for seq in seqs.iter().filter(|seq| self.is_decode(seq)) {
            let (query_row, num_queries, context, table_start) = *seq;
            let Some(first_position) = context.checked_sub(num_queries).filter(|_| num_queries > 0) else { continue };
            let span = self.span(query_row, num_queries, first_position, table_start);
            let splits = self.decode_splits(span.kv_end - span.kv_begin);
            out.num_decode += self.push(&span, splits, out);
        }
        for seq in seqs.iter().filter(|seq| !self.is_decode(seq)) {
            self.plan_prefill(seq, out);
        }
    }

    /// Tiles of queries, the last ones first: they are the longest, and short ones fill the end of the step.
    fn plan_prefill(&self, &(query_start, query_len, context, table_start): &Lengths, out: &mut AttentionWork) {
        let Some(first_position) = context.checked_sub(query_len) else { return };
        let queries = (PREFILL_ROWS / self.group.max(1)).max(1);
        let num_tiles = query_len.div_ceil(queries);
        for tile in (0..num_tiles).rev() {
            let begin = tile * queries;
            let num_queries = queries.min(query_len - begin);
            let span = self.span(query_start + begin, num_queries, first_position + begin, table_start);
            let splits = self.prefill_splits(num_tiles, &span);
            out.num_prefill += self.push(&span, splits, out);
        }
    }

    /// A context that decodes split.
    pub fn split_context(&self) -> u32 {
        2 * DECODE_SPLIT
    }

    fn is_decode(&self, &(_, query_len, _, _): &Lengths) -> bool {
        query_len.saturating_mul(self.group) <= DECODE_ROWS
    }

    fn span(&self, query_row: u32, num_queries: u32, first_position: u32, table_start: u32) -> Span {
        let seen_from = self.window.map_or(0, |window| (first_position + 1).saturating_sub(window));
        let kv_begin = seen_from / TILE * TILE;
        Span { query_row, num_queries, first_position, kv_begin, kv_end: first_position + num_queries, table_start }
    }

    /// Splits of a decode over `length` positions.
    fn decode_splits(&self, length: u32) -> u32 {
        let most = (self.sm_count / self.num_kv_heads.max(1)).max(1);
        (length.saturating_add(DECODE_SPLIT / 2) / DECODE_SPLIT).clamp(1, most)
    }

    /// Splits of each of a chunk's `num_tiles` items: only where the chunk alone fills less than half of the device.
    fn prefill_splits(&self, num_tiles: u32, span: &Span) -> u32 {
        let units = num_tiles.saturating_mul(self.num_kv_heads).max(1);
        let shortest = (PREFILL_POSITIONS_PER_ROW * span.num_queries * self.group).max(PREFILL_SPLIT_MIN);
        (self.sm_count / units).min((span.kv_end - span.kv_begin) / shortest).max(1)
    }

    /// Adds the span in `splits` items, or in fewer where vectors or positions are short, and its merges; answers how many.
    fn push(&self, span: &Span, splits: u32, out: &mut AttentionWork) -> u32 {
        let stride = self.num_kv_heads * span.num_queries * self.group;
        let splits = splits.min((self.partials_max - out.num_partials.min(self.partials_max)) / stride.max(1)).max(1);
        let length = span.kv_end - span.kv_begin;
        let per_split = length.div_ceil(splits).next_multiple_of(STEP);
        let splits = length.div_ceil(per_split);
        let partial = if splits > 1 { out.num_partials } else { NO_PARTIAL };
        for split in 0..splits {
            let kv_begin = span.kv_begin + split * per_split;
            let kv_end = (kv_begin + per_split).min(span.kv_end);
            let own = if splits > 1 { partial + split * stride } else { NO_PARTIAL };
            let lengths = [span.query_row, span.num_queries, span.first_position, kv_begin, kv_end, span.table_start];
            out.items.extend_from_slice(&lengths);
            out.items.extend_from_slice(&[own, 0]);
        }
        if splits > 1 {
            for query in 0..span.num_queries {
                let row = span.query_row + query;
                out.merges.extend_from_slice(&[row, partial + query * self.group, splits, stride]);
            }
            out.num_merges += span.num_queries;
            out.num_partials += splits * stride;
        }
        splits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small generator (xorshift), so that cases repeat.
    struct Random(u64);

    impl Random {
        fn below(&mut self, end: u32) -> u32 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            ((self.0 >> 33) % u64::from(end)) as u32
        }
    }

    fn planner(random: &mut Random) -> AttentionPlanner {
        AttentionPlanner {
            sm_count: [1, 60, 132, 148][random.below(4) as usize],
            num_kv_heads: 1 + random.below(16),
            group: 1 + random.below(16),
            head_dim: 64,
            block_size: 16,
            window: [None, Some(1), Some(17), Some(300), Some(4096)][random.below(5) as usize],
            partials_max: [0, 100, 20_000, 10_000_000][random.below(4) as usize],
        }
    }

    fn seqs(random: &mut Random, decode_only: bool) -> Vec<Lengths> {
        let mut row = 0;
        let mut all = Vec::new();
        for _ in 0..=random.below(6) {
            let longest = if decode_only { 1 } else { [1, 5, 40, 300][random.below(4) as usize] };
            let queries = 1 + random.below(longest);
            let before = [1, 20, 600, 5000][random.below(4) as usize];
            let context = queries + random.below(before);
            all.push((row, queries, context, row * 1000));
            row += queries;
        }
        all
    }

    /// How often each position is looked at by each query; panics where a rule of the work list is broken.
    fn check(planner: &AttentionPlanner, seqs: &[Lengths], work: &AttentionWork) {
        let num_items = work.items.len() / ITEM_WORDS;
        assert_eq!((num_items * ITEM_WORDS, work.num_decode + work.num_prefill), (work.items.len(), num_items as u32));
        assert_eq!(work.merges.len(), work.num_merges as usize * MERGE_WORDS);
        assert!(work.num_partials <= planner.partials_max);
        let mut vectors = vec![false; work.num_partials as usize];
        let rows: usize = seqs.iter().map(|seq| seq.1 as usize).sum();
        let mut seen: Vec<Vec<u8>> = vec![Vec::new(); rows];
        for &(start, len, context, _) in seqs {
            seen[start as usize..(start + len) as usize].fill(vec![0; context as usize]);
        }
        for (index, item) in work.items.chunks(ITEM_WORDS).enumerate() {
            let &[row, queries, first, begin, end, table, partial, 0] = item else { panic!("{item:?}") };
            let seq = seqs.iter().find(|seq| (seq.0..seq.0 + seq.1).contains(&row)).expect("a sequence");
            let rows_max = if (index as u32) < work.num_decode { DECODE_ROWS } else { PREFILL_ROWS };
            assert!(queries * planner.group <= rows_max && row + queries <= seq.0 + seq.1, "{item:?}");
            assert_eq!((first, table), (seq.2 - seq.1 + row - seq.0, seq.3));
            assert!(begin % TILE == 0 && begin < end && end <= first + queries, "{item:?}");
            assert!((end - begin) % STEP == 0 || end == first + queries, "{item:?} ends within a step");
            assert!(
                planner.window.is_none_or(|window| begin + TILE + window > first + 1),
                "{item:?} before the window"
            );
            for query in 0..queries {
                for position in begin..end {
                    seen[(row + query) as usize][position as usize] += 1;
                }
            }
            if partial != NO_PARTIAL {
                for used in
                    &mut vectors[partial as usize..][..(planner.num_kv_heads * queries * planner.group) as usize]
                {
                    assert!(!std::mem::replace(used, true), "{item:?} shares a partial vector");
                }
            }
        }
        for &(start, len, context, _) in seqs {
            for query in 0..len {
                let own = context - len + query;
                for (position, &times) in seen[(start + query) as usize].iter().enumerate() {
                    let position = position as u32;
                    let sees = position <= own && planner.window.is_none_or(|window| position + window > own);
                    assert!(if sees { times == 1 } else { times <= 1 }, "row {start}+{query} at {position}: {times}");
                }
            }
        }
        check_merges(planner, work, rows);
    }

    /// A split row has exactly one merge, which names the vectors that its items write.
    fn check_merges(planner: &AttentionPlanner, work: &AttentionWork, rows: usize) {
        let mut written = vec![Vec::new(); rows];
        for item in work.items.chunks(ITEM_WORDS).filter(|item| item[6] != NO_PARTIAL) {
            for query in 0..item[1] {
                written[(item[0] + query) as usize].push((item[6] + query * planner.group, item[1]));
            }
        }
        let mut merged = vec![false; rows];
        for merge in work.merges.chunks(MERGE_WORDS) {
            let &[row, partial, splits, stride] = merge else { panic!("{merge:?}") };
            assert!(splits > 1 && !std::mem::replace(&mut merged[row as usize], true), "{merge:?}");
            let named: Vec<u32> = (0..splits).map(|split| partial + split * stride).collect();
            let vectors: Vec<u32> = written[row as usize].iter().map(|vector| vector.0).collect();
            assert_eq!(named, vectors);
            let queries = written[row as usize][0].1;
            assert_eq!(stride, planner.num_kv_heads * queries * planner.group);
        }
        for (row, vectors) in written.iter().enumerate() {
            assert_eq!(merged[row], !vectors.is_empty());
        }
    }

    #[test]
    fn every_pair_is_covered_once_and_bounds_hold() {
        let mut random = Random(0x9E37_79B9_7F4A_7C15);
        let mut work = AttentionWork::default();
        for case in 0..400 {
            let mut planner = planner(&mut random);
            let seqs = seqs(&mut random, case % 4 == 0);
            planner.plan(&seqs, &mut work);
            check(&planner, &seqs, &work);
            let tokens: usize = seqs.iter().map(|seq| seq.1 as usize).sum();
            let context = seqs.iter().map(|seq| seq.2 as usize).max().unwrap_or_default();
            let bounds = planner.bounds(tokens, seqs.len(), context);
            assert!(work.items.len() / ITEM_WORDS <= bounds.items, "{planner:?} {seqs:?}");
            assert!(work.merges.len() / MERGE_WORDS <= bounds.merges);
            if case % 4 == 0 {
                assert_eq!(work.num_prefill, 0, "a decode step has no prefill items");
            }
        }
    }

    #[test]
    fn the_bound_on_partials_is_never_short_for_a_decode_step() {
        let mut random = Random(7);
        let (mut work, mut free) = (AttentionWork::default(), AttentionWork::default());
        for _ in 0..200 {
            let mut planner = planner(&mut random);
            let seqs = seqs(&mut random, true);
            let context = seqs.iter().map(|seq| seq.2 as usize).max().unwrap_or_default();
            planner.partials_max = planner.bounds(seqs.len(), seqs.len(), context).partials as u32;
            planner.plan(&seqs, &mut work);
            planner.partials_max = u32::MAX;
            planner.plan(&seqs, &mut free);
            assert_eq!(work.items, free.items);
        }
    }

    #[test]
    fn a_sequence_is_split_alike_alone_and_in_a_batch() {
        let mut planner = AttentionPlanner {
            sm_count: 132,
            num_kv_heads: 8,
            group: 4,
            head_dim: 128,
            block_size: 16,
            window: None,
            partials_max: 1 << 20,
        };
        let (mut alone, mut batch) = (AttentionWork::default(), AttentionWork::default());
        planner.plan(&[(0, 1, 3000, 0)], &mut alone);
        planner.plan(&[(1, 1, 900, 500), (0, 1, 3000, 0), (2, 700, 9000, 1000)], &mut batch);
        let of_row_0 = |work: &AttentionWork| -> Vec<[u32; 2]> {
            work.items.chunks(ITEM_WORDS).filter(|item| item[0] == 0).map(|item| [item[3], item[4]]).collect()
        };
        assert_eq!(of_row_0(&alone), of_row_0(&batch));
        assert_eq!(of_row_0(&alone).len(), 12);
    }

    #[test]
    fn an_impossible_sequence_gets_no_item() {
        let mut planner = AttentionPlanner {
            sm_count: 132,
            num_kv_heads: 1,
            group: 1,
            head_dim: 64,
            block_size: 16,
            window: None,
            partials_max: 0,
        };
        let mut work = AttentionWork::default();
        planner.plan(&[(0, 0, 5, 0), (0, 3, 2, 0), (0, 100, 20, 0)], &mut work);
        assert!(work.items.is_empty() && work.merges.is_empty());
    }
}
