//! Causal attention of a step's queries over the paged cache: decode, chunked prefill and both at once.
//!
//! Work is cut into tiles: some consecutive queries of a sequence, all heads of one KV head. Where there are few tiles and long
//! contexts, a tile's segments are computed apart and merged in order. The kernel says what is added to what; see
//! [`attention`](crate::cpu::attention).
//!
//! **Invariant:** the cut into tiles and parts never changes a bit of the result.

use std::{
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
};

use crate::{
    AttentionShape, KernelError, SeqInputs, StepInputs,
    cpu::{
        CpuKvLayer, Pool,
        attention::{Attend, Merge, PagedHead, QueryTile, ROWS, Sums, Workspace, padded},
        disjoint::Disjoint,
        kv::{KvElement, KvHeads, KvStore, num_slots},
        lanes::Simd,
        memory::AlignedVec,
    },
    ops::{fit, rope_store::qkv_width},
};

/// Tiles for each thread, below which segments are computed apart.
const TILES_OF_THREAD: usize = 4;

/// Below this many multiply-adds the caller works alone: sharing out would take longer.
const ALONE_MAX: usize = 1 << 19;

/// Memory of the op: grows to the largest step seen, and then stays.
pub(crate) struct AttendScratch {
    tiles: Vec<Tile>,
    parts: Vec<Part>,
    workspaces: AlignedVec<f32>,
    sums: AlignedVec<f32>,
}

/// Queries of one sequence for one KV head.
#[derive(Debug, Clone, Copy)]
struct Tile {
    seq: SeqInputs,
    kv_head: usize,
    /// First row of the batch.
    row: usize,
    queries: QueryTile,
    /// Where its parts begin, if it has several.
    parts: Option<usize>,
}

/// Some segments of a tile.
#[derive(Debug, Clone, Copy)]
struct Part {
    tile: usize,
    first_segment: usize,
    end_segment: usize,
    /// Where its sums go; `None` where it is the whole tile.
    sums: Option<usize>,
}

impl AttendScratch {
    pub(crate) fn new() -> Result<Self, KernelError> {
        let (workspaces, sums) = (AlignedVec::zeroed(0)?, AlignedVec::zeroed(0)?);
        Ok(Self { tiles: Vec::new(), parts: Vec::new(), workspaces, sums })
    }

    /// Cuts a step into tiles and parts.
    fn plan(&mut self, step: &StepInputs, shape: &AttentionShape, num_threads: usize) -> Result<(), KernelError> {
        self.tiles.clear();
        self.parts.clear();
        for seq in &step.seqs {
            for kv_head in 0..shape.num_kv_heads {
                self.cut_queries(seq, kv_head, shape);
            }
        }
        let apart = self.tiles.len() < num_threads * TILES_OF_THREAD && num_threads > 1;
        let mut num_sums = 0;
        for (index, tile) in self.tiles.iter_mut().enumerate() {
            let Range { start, end } = tile.queries.segments();
            if !apart || end - start < 2 {
                self.parts.push(Part { tile: index, first_segment: start, end_segment: end, sums: None });
                continue;
            }
            tile.parts = Some(self.parts.len());
            for segment in start..end {
                self.parts.push(Part {
                    tile: index,
                    first_segment: segment,
                    end_segment: segment + 1,
                    sums: Some(num_sums),
                });
                num_sums += Sums::len(tile.queries.num_rows(), shape.head_dim);
            }
        }
        grow(&mut self.sums, num_sums)?;
        grow(&mut self.workspaces, num_threads * workspace_len(shape))
    }

    /// Later queries first: they see more.
    fn cut_queries(&mut self, seq: &SeqInputs, kv_head: usize, shape: &AttentionShape) {
        let group = shape.num_heads_owned.saturating_sub(kv_head * shape.group).min(shape.group);
        let num_queries = seq.query_len as usize;
        if group == 0 || num_queries == 0 {
            return;
        }
        let of_tile = (ROWS / group).max(1);
        for tile in (0..num_queries.div_ceil(of_tile)).rev() {
            let first = tile * of_tile;
            let queries = QueryTile {
                first: (seq.context_len - seq.query_len) as usize + first,
                num_queries: of_tile.min(num_queries - first),
                group,
                window: shape.window,
            };
            self.tiles.push(Tile { seq: *seq, kv_head, row: seq.query_start as usize + first, queries, parts: None });
        }
    }
}

fn grow(memory: &mut AlignedVec<f32>, len: usize) -> Result<(), KernelError> {
    if memory.len() < len {
        *memory = AlignedVec::zeroed(len)?;
    }
    Ok(())
}

fn workspace_len(shape: &AttentionShape) -> usize {
    Workspace::len(ROWS.max(shape.group), shape.head_dim)
}

/// Where `attend` reads and writes.
pub(crate) struct Operands<'a> {
    /// `[tokens, (kv * group + 2 kv) * head_dim]`.
    pub(crate) qkv: &'a [f32],
    /// `[tokens, out_width]`.
    pub(crate) out: &'a mut [f32],
    /// Columns of `out`.
    pub(crate) out_width: usize,
}

/// Attends; the step's K and V are in the cache already.
pub(crate) fn attend(
    simd: Simd,
    pool: &Pool,
    scratch: &mut AttendScratch,
    step: &StepInputs,
    shape: &AttentionShape,
    kv: &CpuKvLayer,
    operands: Operands<'_>,
) -> Result<(), KernelError> {
    check(step, shape, kv, &operands)?;
    let num_threads = if num_products(step, shape) < ALONE_MAX { 1 } else { pool.num_threads() };
    scratch.plan(step, shape, num_threads)?;
    let Operands { qkv, out, out_width } = operands;
    let block_size = kv.shape.block_size;
    let head_len = num_slots(&kv.shape) * shape.head_dim;
    let out = Disjoint::new(out);
    let job = Job { simd, num_threads, step, shape, qkv, out, out_width, block_size, head_len };
    match &kv.store {
        KvStore::F32(heads) => job.run(pool, heads, scratch),
        KvStore::F16(heads) => job.run(pool, heads, scratch),
    }
    Ok(())
}

fn check(
    step: &StepInputs,
    shape: &AttentionShape,
    kv: &CpuKvLayer,
    operands: &Operands<'_>,
) -> Result<(), KernelError> {
    let op = "attend";
    let rows = step.token_ids.len();
    let Operands { qkv, out, out_width } = operands;
    let columns = shape.out_column + shape.num_heads_owned * shape.head_dim;
    let heads = shape.num_heads_owned <= shape.num_kv_heads * shape.group && shape.window != Some(0);
    let fits = qkv.len() == rows * qkv_width(shape) && out.len() == rows * out_width && columns <= *out_width;
    fit(op, fits && heads, || format!("{shape:?}, {rows} rows, {} into {} by {out_width}", qkv.len(), out.len()))?;
    let same = kv.shape.num_kv_heads == shape.num_kv_heads && kv.shape.head_dim == shape.head_dim;
    fit(op, same, || format!("{shape:?} on {:?}", kv.shape))?;
    for seq in &step.seqs {
        let table = table_of(step, seq, kv.shape.block_size);
        let fits = table.is_some_and(|t| t.iter().all(|&block| (block as usize) < kv.shape.num_blocks));
        fit(op, fits, || format!("{seq:?}: block table {table:?} for {:?}", kv.shape))?;
    }
    Ok(())
}

/// Multiply-adds of a step, at most.
fn num_products(step: &StepInputs, shape: &AttentionShape) -> usize {
    let pairs: usize = step.seqs.iter().map(|seq| seq.query_len as usize * seq.context_len as usize).sum();
    pairs * shape.num_heads_owned * shape.head_dim * 2
}

/// The blocks of a sequence's context.
fn table_of<'a>(step: &'a StepInputs, seq: &SeqInputs, block_size: usize) -> Option<&'a [u32]> {
    let start = seq.table_start as usize;
    step.block_tables.get(start..start + (seq.context_len as usize).div_ceil(block_size))
}

struct Job<'a> {
    simd: Simd,
    num_threads: usize,
    step: &'a StepInputs,
    shape: &'a AttentionShape,
    qkv: &'a [f32],
    out: Disjoint<'a, f32>,
    out_width: usize,
    block_size: usize,
    head_len: usize,
}

impl Job<'_> {
    fn run<E: KvElement>(&self, pool: &Pool, heads: &KvHeads<E>, scratch: &mut AttendScratch) {
        let AttendScratch { tiles, parts, workspaces, sums } = scratch;
        let (tiles, parts) = (&tiles[..], &parts[..]);
        let (k, v) = (&heads.k[..], &heads.v[..]);
        let (workspaces, sums) = (Disjoint::new(&mut workspaces[..]), Disjoint::new(&mut sums[..]));
        let next = AtomicUsize::new(0);
        pool.run(self.num_threads.min(parts.len()), |thread| {
            // SAFETY: threads differ.
            let memory = unsafe { workspaces.slice(thread * workspace_len(self.shape), workspace_len(self.shape)) };
            while let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.attend_part(&tiles[part.tile], part, (k, v), memory, &sums);
            }
        });
        // Little work: there are few such tiles, and a wake-up would take longer.
        for tile in tiles {
            if let Some(first) = tile.parts {
                let parts = &parts[first..first + tile.queries.segments().len()];
                // SAFETY: all threads are done.
                let memory = unsafe { workspaces.slice(0, workspace_len(self.shape)) };
                self.merge_parts(tile, parts, memory, &sums);
            }
        }
    }

    fn attend_part<E: KvElement>(
        &self,
        tile: &Tile,
        part: &Part,
        (k, v): (&[E], &[E]),
        memory: &mut [f32],
        sums: &Disjoint<'_, f32>,
    ) {
        let (rows, dim) = (tile.queries.num_rows(), self.shape.head_dim);
        let mut work = Workspace::cut(&mut memory[..Workspace::len(rows, dim)], rows, dim);
        self.scale_queries(tile, work.q);
        let head = tile.kv_head * self.head_len..(tile.kv_head + 1) * self.head_len;
        let context = PagedHead {
            k: &k[head.clone()],
            v: &v[head],
            table: table_of(self.step, &tile.seq, self.block_size).unwrap_or_default(),
            block_size: self.block_size,
            head_dim: dim,
        };
        let segments = part.first_segment..part.end_segment;
        let soft_cap = self.shape.soft_cap;
        self.simd.run(Attend { context, tile: tile.queries, segments, soft_cap, work: &mut work });
        match part.sums {
            None => self.finish(tile, &work.total),
            Some(at) => {
                // SAFETY: parts have sums of their own.
                let to = Sums::cut(unsafe { sums.slice(at, Sums::len(rows, dim)) }, rows);
                to.max.copy_from_slice(work.total.max);
                to.sum.copy_from_slice(work.total.sum);
                to.acc.copy_from_slice(work.total.acc);
            }
        }
    }

    fn merge_parts(&self, tile: &Tile, parts: &[Part], memory: &mut [f32], sums: &Disjoint<'_, f32>) {
        let (rows, dim) = (tile.queries.num_rows(), self.shape.head_dim);
        let mut total = Sums::cut(&mut memory[..Sums::len(rows, dim)], rows);
        let mut segments = parts.iter().filter_map(|part| part.sums).map(|at| {
            // SAFETY: a tile's parts are merged once, after all have been written.
            Sums::cut(unsafe { sums.slice(at, Sums::len(rows, dim)) }, rows)
        });
        self.simd.run(Merge { head_dim: dim, segments: &mut segments, total: &mut total });
        self.finish(tile, &total);
    }

    /// Gathers a tile's queries, times the scale.
    fn scale_queries(&self, tile: &Tile, q: &mut [f32]) {
        let dim = self.shape.head_dim;
        let first_column = tile.kv_head * self.shape.group * dim;
        for (row, q) in q.chunks_exact_mut(dim).enumerate() {
            let (query, head) = (tile.row + row / tile.queries.group, row % tile.queries.group);
            let from = query * qkv_width(self.shape) + first_column + head * dim;
            for (q, x) in q.iter_mut().zip(&self.qkv[from..from + dim]) {
                *q = x * self.shape.scale;
            }
        }
    }

    /// Divides and writes out.
    fn finish(&self, tile: &Tile, total: &Sums<'_>) {
        let dim = self.shape.head_dim;
        let first_column = self.shape.out_column + tile.kv_head * self.shape.group * dim;
        for (row, acc) in total.acc.chunks_exact(padded(dim)).enumerate() {
            let (query, head) = (tile.row + row / tile.queries.group, row % tile.queries.group);
            // SAFETY: tiles differ in their rows of the batch or in their heads.
            let out = unsafe { self.out.slice(query * self.out_width + first_column + head * dim, dim) };
            let factor = 1.0 / total.sum[row];
            for (out, acc) in out.iter_mut().zip(acc) {
                *out = acc * factor;
            }
        }
    }
}

#[cfg(test)]
mod tests;
