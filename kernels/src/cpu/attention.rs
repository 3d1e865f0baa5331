//! The attention kernel: rows of queries that share a KV head, against their paged context.
//!
//! The order of arithmetic along a context is fixed by positions alone. Positions lie in segments of 256, segments in spans
//! of 64. Within a segment an online softmax goes span by span; segments start afresh and are merged in order. So a query's
//! output has the same bits in any chunk, batch and tiling, and on any number of threads: segments may be computed apart.
//! Source: online softmax, arXiv:1805.02867; merging of parts, arXiv:2205.14135.
//!
//! **Invariant:** only positions that a query sees touch its output, whatever lies in the other slots.

use std::ops::Range;

use super::{
    kv::{KvElement, TILE},
    lanes::{HALF, Kernel, LANES, Lanes},
    math::exp,
};

/// Positions of a segment.
pub(crate) const SEGMENT: usize = 256;
/// Positions of a span.
const SPAN: usize = 64;
/// Rows that a tile of queries aims at.
pub(crate) const ROWS: usize = 32;

/// K and V of one head, and where a sequence's positions lie.
#[derive(Clone, Copy)]
pub(crate) struct PagedHead<'a, E> {
    /// `[tile][head_dim][16]`.
    pub(crate) k: &'a [E],
    /// `[slot][head_dim]`.
    pub(crate) v: &'a [E],
    /// Blocks of the sequence.
    pub(crate) table: &'a [u32],
    /// Slots of a block.
    pub(crate) block_size: usize,
    /// Width of a head.
    pub(crate) head_dim: usize,
}

impl<E: KvElement> PagedHead<'_, E> {
    /// The slot of a position.
    #[inline(always)]
    fn slot(&self, position: usize) -> usize {
        self.table[position / self.block_size] as usize * self.block_size + position % self.block_size
    }

    /// K of the 16 positions from `position` on, which begin a tile.
    #[inline(always)]
    fn k_tile(&self, position: usize) -> &[[E; TILE]] {
        let start = self.slot(position) * self.head_dim;
        self.k[start..start + TILE * self.head_dim].as_chunks().0
    }

    /// V of the positions from `position` to the end of its tile.
    #[inline(always)]
    fn v_rows(&self, position: usize) -> &[E] {
        let slot = self.slot(position);
        let end = (slot / TILE + 1) * TILE;
        &self.v[slot * self.head_dim..end * self.head_dim]
    }
}

/// Which queries a tile holds: consecutive ones of a sequence, each with `group` heads. Row `r` is query `r / group`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QueryTile {
    /// Position of the first query.
    pub(crate) first: usize,
    /// Queries.
    pub(crate) num_queries: usize,
    /// Rows of a query.
    pub(crate) group: usize,
    /// A query sees this many positions back, itself included.
    pub(crate) window: Option<usize>,
}

impl QueryTile {
    /// Rows of the tile.
    pub(crate) fn num_rows(&self) -> usize {
        self.num_queries * self.group
    }

    /// Positions that a query sees.
    #[inline(always)]
    fn seen(&self, query: usize) -> Range<usize> {
        let end = self.first + query + 1;
        self.window.map_or(0, |w| end.saturating_sub(w))..end
    }

    /// Segments that the tile's queries see.
    pub(crate) fn segments(&self) -> Range<usize> {
        if self.num_queries == 0 {
            return 0..0;
        }
        self.seen(0).start / SEGMENT..(self.seen(self.num_queries - 1).end).div_ceil(SEGMENT)
    }

    /// Rows that see any of `positions`. They are consecutive, as later queries see later positions.
    #[inline(always)]
    fn rows_seeing(&self, positions: &Range<usize>) -> Range<usize> {
        let sees = |q: &usize| self.seen(*q).start < positions.end && self.seen(*q).end > positions.start;
        let start = (0..self.num_queries).find(sees).unwrap_or(self.num_queries);
        let len = (start..self.num_queries).take_while(sees).count();
        start * self.group..(start + len) * self.group
    }
}

/// Sums over a part of the context, row by row: before the division by `sum`.
pub(crate) struct Sums<'a> {
    /// Largest score; -inf where the row has seen nothing.
    pub(crate) max: &'a mut [f32],
    /// Sum of `exp(score - max)`.
    pub(crate) sum: &'a mut [f32],
    /// Sum of `exp(score - max) * v`, `[rows, padded(head_dim)]`.
    pub(crate) acc: &'a mut [f32],
}

impl Sums<'_> {
    /// Numbers that `rows` rows need.
    pub(crate) fn len(rows: usize, head_dim: usize) -> usize {
        rows * (padded(head_dim) + 2)
    }

    /// Cuts a run of [`Self::len`] numbers.
    pub(crate) fn cut(all: &mut [f32], rows: usize) -> Sums<'_> {
        let (max, all) = all.split_at_mut(rows);
        let (sum, acc) = all.split_at_mut(rows);
        Sums { max, sum, acc }
    }

    /// Forgets everything.
    #[inline(always)]
    fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.acc.fill(0.0);
    }
}

/// A head's width in whole vectors.
pub(crate) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES)
}

/// A thread's memory for one tile.
pub(crate) struct Workspace<'a> {
    /// Scaled queries, `[rows, head_dim]`.
    pub(crate) q: &'a mut [f32],
    /// Scores, then weights, `[rows, SPAN]`.
    scores: &'a mut [f32],
    /// Sums of weights by lane, `[rows, LANES]`.
    lane_sums: &'a mut [f32],
    /// One segment.
    segment: Sums<'a>,
    /// All segments so far.
    pub(crate) total: Sums<'a>,
}

impl Workspace<'_> {
    /// Numbers that `rows` rows need.
    pub(crate) fn len(rows: usize, head_dim: usize) -> usize {
        rows * (head_dim + SPAN + LANES) + 2 * Sums::len(rows, head_dim)
    }

    /// Cuts a run of [`Self::len`] numbers.
    pub(crate) fn cut(all: &mut [f32], rows: usize, head_dim: usize) -> Workspace<'_> {
        let (q, all) = all.split_at_mut(rows * head_dim);
        let (scores, all) = all.split_at_mut(rows * SPAN);
        let (lane_sums, all) = all.split_at_mut(rows * LANES);
        let (segment, total) = all.split_at_mut(Sums::len(rows, head_dim));
        Workspace { q, scores, lane_sums, segment: Sums::cut(segment, rows), total: Sums::cut(total, rows) }
    }
}

/// Attends some segments and leaves their merged sums in `work.total`.
pub(crate) struct Attend<'a, 'w, E> {
    pub(crate) context: PagedHead<'a, E>,
    pub(crate) tile: QueryTile,
    pub(crate) segments: Range<usize>,
    /// Scores become `cap * tanh(score / cap)`.
    pub(crate) soft_cap: Option<f32>,
    pub(crate) work: &'a mut Workspace<'w>,
}

impl<E: KvElement> Kernel for Attend<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(mut self, simd: S) {
        self.work.total.clear();
        for segment in self.segments.clone() {
            self.attend_segment(simd, segment * SEGMENT);
            let Workspace { segment, total, .. } = &mut *self.work;
            merge(simd, self.context.head_dim, segment, total);
        }
    }
}

impl<E: KvElement> Attend<'_, '_, E> {
    #[inline(always)]
    fn attend_segment<S: Lanes>(&mut self, simd: S, start: usize) {
        self.work.segment.clear();
        self.work.lane_sums.fill(0.0);
        for span in (start..start + SEGMENT).step_by(SPAN) {
            let rows = self.tile.rows_seeing(&(span..span + SPAN));
            if !rows.is_empty() {
                let end = self.tile.seen((rows.end - 1) / self.tile.group).end.min(span + SPAN);
                self.scores(simd, rows.clone(), span..end);
                for row in rows.clone() {
                    self.soften(simd, row, span);
                }
                self.weigh(simd, rows, span);
            }
        }
        for (sum, lanes) in self.work.segment.sum.iter_mut().zip(self.work.lane_sums.as_chunks().0) {
            *sum = simd.sum(simd.load(lanes));
        }
    }

    /// `q . k` for rows and the tiles that begin in `positions`.
    #[inline(always)]
    fn scores<S: Lanes>(&mut self, simd: S, rows: Range<usize>, positions: Range<usize>) {
        let num_tiles = positions.len().div_ceil(TILE);
        let mut row = rows.start;
        while row < rows.end {
            let left = rows.end - row;
            row += if S::WIDE && left >= 8 {
                self.score_rows::<S, 8, 2>(simd, row, positions.start, num_tiles)
            } else if S::WIDE && left >= 4 {
                self.score_rows::<S, 4, 4>(simd, row, positions.start, num_tiles)
            } else if S::WIDE && left == 3 {
                self.score_rows::<S, 3, 4>(simd, row, positions.start, num_tiles)
            } else if left >= 4 {
                self.score_rows::<S, 4, 1>(simd, row, positions.start, num_tiles)
            } else if left >= 2 {
                self.score_rows::<S, 2, 2>(simd, row, positions.start, num_tiles)
            } else {
                self.score_rows::<S, 1, 4>(simd, row, positions.start, num_tiles)
            };
        }
    }

    #[inline(always)]
    fn score_rows<S: Lanes, const R: usize, const T: usize>(
        &mut self,
        simd: S,
        row: usize,
        start: usize,
        num_tiles: usize,
    ) -> usize {
        let mut tile = 0;
        while tile < num_tiles {
            if num_tiles - tile >= T {
                self.score_block::<S, R, T>(simd, row, start, tile);
                tile += T;
            } else {
                self.score_block::<S, R, 1>(simd, row, start, tile);
                tile += 1;
            }
        }
        R
    }

    /// A score is one chain of multiply-adds along the head, whatever the block.
    #[inline(always)]
    fn score_block<S: Lanes, const R: usize, const T: usize>(
        &mut self,
        simd: S,
        row: usize,
        start: usize,
        tile: usize,
    ) {
        let dim = self.context.head_dim;
        let mut k = [&[][..]; T];
        for (t, k) in k.iter_mut().enumerate() {
            *k = &self.context.k_tile(start + (tile + t) * TILE)[..dim];
        }
        let mut q = [&[][..]; R];
        for (r, q) in q.iter_mut().enumerate() {
            *q = &self.work.q[(row + r) * dim..][..dim];
        }
        let mut acc = [[simd.zero(); T]; R];
        for d in 0..dim {
            let mut column = [simd.zero(); T];
            for t in 0..T {
                column[t] = E::load(simd, &k[t][d]);
            }
            for r in 0..R {
                let x = simd.splat(q[r][d]);
                for t in 0..T {
                    acc[r][t] = simd.fma(x, column[t], acc[r][t]);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            let scores = &mut self.work.scores[(row + r) * SPAN..(row + r + 1) * SPAN];
            let tiles = scores.as_chunks_mut::<LANES>().0;
            for (t, acc) in acc.iter().enumerate() {
                simd.store(*acc, &mut tiles[tile + t]);
            }
        }
    }

    /// Turns a row's scores of a span into weights, and rescales the row's sums to the new maximum.
    #[inline(always)]
    fn soften<S: Lanes>(&mut self, simd: S, row: usize, span: usize) {
        let seen = self.seen_in_span(row, span);
        let scores = &mut self.work.scores[row * SPAN..(row + 1) * SPAN];
        if let Some(cap) = self.soft_cap {
            for score in &mut scores[seen.clone()] {
                *score = cap * (*score / cap).tanh();
            }
        }
        scores[..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end..].fill(f32::NEG_INFINITY);
        let tiles = scores.as_chunks_mut::<LANES>().0;
        let mut largest = simd.splat(f32::NEG_INFINITY);
        for tile in tiles.iter() {
            largest = simd.max(largest, simd.load(tile));
        }
        let old = self.work.segment.max[row];
        let largest = simd.max_lane(largest);
        let new = if largest > old { largest } else { old };
        let lane_sums = &mut self.work.lane_sums.as_chunks_mut::<LANES>().0[row];
        let mut sums = simd.load(lane_sums);
        if new != old {
            let factor = exp(simd, simd.splat(old - new));
            sums = simd.mul(sums, factor);
            let width = padded(self.context.head_dim);
            let acc = &mut self.work.segment.acc[row * width..(row + 1) * width];
            for chunk in acc.as_chunks_mut::<LANES>().0 {
                simd.store(simd.mul(simd.load(chunk), factor), chunk);
            }
            self.work.segment.max[row] = new;
        }
        let shift = simd.splat(new);
        for tile in tiles {
            let weight = exp(simd, simd.sub(simd.load(tile), shift));
            sums = simd.add(sums, weight);
            simd.store(weight, tile);
        }
        simd.store(sums, lane_sums);
    }

    /// The offsets in a span that a row sees.
    #[inline(always)]
    fn seen_in_span(&self, row: usize, span: usize) -> Range<usize> {
        let seen = self.tile.seen(row / self.tile.group);
        seen.start.saturating_sub(span)..(seen.end - span).min(SPAN)
    }

    /// Adds `weight * v` over a span; rows that see the same positions share the loads of V.
    #[inline(always)]
    fn weigh<S: Lanes>(&mut self, simd: S, rows: Range<usize>, span: usize) {
        let mut row = rows.start;
        while row < rows.end {
            let seen = self.seen_in_span(row, span);
            let same = (row..rows.end).take(4).take_while(|&r| self.seen_in_span(r, span) == seen).count();
            let positions = span + seen.start..span + seen.end;
            row += match same {
                4 if S::WIDE => self.weigh_rows::<S, 4, 4>(simd, row, span, positions),
                3 if S::WIDE => self.weigh_rows::<S, 3, 4>(simd, row, span, positions),
                2..=4 => self.weigh_rows::<S, 2, 2>(simd, row, span, positions),
                _ => self.weigh_rows::<S, 1, 4>(simd, row, span, positions),
            };
        }
    }

    #[inline(always)]
    fn weigh_rows<S: Lanes, const R: usize, const C: usize>(
        &mut self,
        simd: S,
        row: usize,
        span: usize,
        positions: Range<usize>,
    ) -> usize {
        let dim = self.context.head_dim;
        let mut column = 0;
        while column < dim {
            let left = dim - column;
            if left >= C * LANES {
                self.weigh_block::<S, R, C, false>(simd, row, column, span, positions.clone());
                column += C * LANES;
            } else if left >= LANES {
                self.weigh_block::<S, R, 1, false>(simd, row, column, span, positions.clone());
                column += LANES;
            } else {
                self.weigh_block::<S, R, 1, true>(simd, row, column, span, positions.clone());
                column += HALF;
            }
        }
        R
    }

    /// An output value is one chain of multiply-adds along the positions, whatever the block.
    #[inline(always)]
    fn weigh_block<S: Lanes, const R: usize, const C: usize, const HALF_COLUMN: bool>(
        &mut self,
        simd: S,
        row: usize,
        column: usize,
        span: usize,
        positions: Range<usize>,
    ) {
        let dim = self.context.head_dim;
        let width = padded(dim);
        let weights = &self.work.scores.as_chunks::<SPAN>().0[row..row + R];
        let weights: [&[f32; SPAN]; R] = std::array::from_fn(|r| &weights[r]);
        let mut acc = [[simd.zero(); C]; R];
        for (r, acc) in acc.iter_mut().enumerate() {
            let from = &self.work.segment.acc[(row + r) * width + column..(row + r + 1) * width];
            for (acc, from) in acc.iter_mut().zip(from.as_chunks().0) {
                *acc = simd.load(from);
            }
        }
        let mut offset = positions.start - span;
        while span + offset < positions.end {
            let tile = self.context.v_rows(span + offset);
            let left = positions.end - span - offset;
            for v in tile.chunks_exact(dim).take(left) {
                let Some((_, v)) = v.split_at_checked(column) else { return };
                let mut values = [simd.zero(); C];
                if HALF_COLUMN {
                    let Some((half, _)) = v.split_first_chunk() else { return };
                    values[0] = E::load_half(simd, half);
                } else {
                    for (value, chunk) in values.iter_mut().zip(v.as_chunks().0) {
                        *value = E::load(simd, chunk);
                    }
                }
                if offset >= SPAN {
                    return;
                }
                for r in 0..R {
                    let weight = simd.splat(weights[r][offset]);
                    for c in 0..C {
                        acc[r][c] = simd.fma(weight, values[c], acc[r][c]);
                    }
                }
                offset += 1;
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            let to = &mut self.work.segment.acc[(row + r) * width + column..(row + r + 1) * width];
            for (acc, to) in acc.iter().zip(to.as_chunks_mut().0) {
                simd.store(*acc, to);
            }
        }
    }
}

/// Merges a segment's sums into those of the segments before it.
#[inline(always)]
fn merge<S: Lanes>(simd: S, head_dim: usize, segment: &Sums<'_>, total: &mut Sums<'_>) {
    let width = padded(head_dim);
    let rows = segment.acc.chunks_exact(width).zip(total.acc.chunks_exact_mut(width));
    for (row, (from, to)) in rows.enumerate() {
        let (a, b) = (total.max[row], segment.max[row]);
        if segment.sum[row] == 0.0 {
            continue;
        }
        if total.sum[row] == 0.0 {
            total.max[row] = b;
            total.sum[row] = segment.sum[row];
            to.copy_from_slice(from);
            continue;
        }
        let max = if b > a { b } else { a };
        let mut factors = [a - max; LANES];
        factors[1] = b - max;
        simd.store(exp(simd, simd.load(&factors)), &mut factors);
        total.max[row] = max;
        total.sum[row] = total.sum[row].mul_add(factors[0], segment.sum[row] * factors[1]);
        let (old, new) = (simd.splat(factors[0]), simd.splat(factors[1]));
        for (from, to) in from.as_chunks().0.iter().zip(to.as_chunks_mut().0) {
            let fresh = simd.mul(simd.load(from), new);
            simd.store(simd.fma(simd.load(to), old, fresh), to);
        }
    }
}

/// Merges sums of consecutive segments that were computed apart into `total`.
pub(crate) struct Merge<'a, 'w> {
    pub(crate) head_dim: usize,
    pub(crate) segments: &'a mut dyn Iterator<Item = Sums<'a>>,
    pub(crate) total: &'a mut Sums<'w>,
}

impl Kernel for Merge<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        self.total.clear();
        for segment in self.segments {
            merge(simd, self.head_dim, &segment, self.total);
        }
    }
}
