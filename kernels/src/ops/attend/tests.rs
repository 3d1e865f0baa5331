//! Attention against a plain one in f64, and bit for bit against itself.

use half::f16;
use phalanx_formats::StoredType;

use super::*;
use crate::{
    KvShape,
    cpu::{
        Waiting,
        kv::{store_k, store_v},
    },
    ops::test_random::{Random, same_bits},
};

/// Sequences with the q, k and v of all their positions.
struct Model {
    shape: AttentionShape,
    dtype: StoredType,
    block_size: usize,
    /// `[position, qkv]` of each sequence.
    seqs: Vec<Vec<f32>>,
}

/// How the same work is laid out.
struct Layout {
    simd: Simd,
    num_threads: usize,
    /// Seeds the block numbers.
    blocks: u64,
    /// Steps of (sequence, tokens), in order.
    steps: Vec<Vec<(usize, usize)>>,
}

impl Model {
    fn random(random: &mut Random, shape: AttentionShape, dtype: StoredType, lens: &[usize]) -> Self {
        let width = qkv_width(&shape);
        let block_size = 16 * (1 + random.below(3));
        let seqs = lens.iter().map(|len| random.floats(len * width).iter().map(|x| x * 2.0).collect()).collect();
        Self { shape, dtype, block_size, seqs }
    }

    fn len(&self, seq: usize) -> usize {
        self.seqs[seq].len() / qkv_width(&self.shape)
    }

    fn out_width(&self) -> usize {
        self.shape.out_column + self.shape.num_heads_owned * self.shape.head_dim + 3
    }

    /// Everything in one step.
    fn at_once(&self) -> Vec<Vec<(usize, usize)>> {
        vec![(0..self.seqs.len()).map(|seq| (seq, self.len(seq))).collect()]
    }

    /// Random chunks of random sequences; the last ones are decodes.
    fn chunks(&self, random: &mut Random) -> Vec<Vec<(usize, usize)>> {
        let mut left: Vec<usize> = (0..self.seqs.len()).map(|seq| self.len(seq)).collect();
        let mut steps = Vec::new();
        while left.iter().any(|&left| left > 0) {
            let mut step = Vec::new();
            for (seq, left) in left.iter_mut().enumerate() {
                if *left > 0 && random.below(3) > 0 {
                    let num = if *left < 4 { 1 } else { 1 + random.below(*left) };
                    *left -= num;
                    step.push((seq, num));
                }
            }
            if !step.is_empty() {
                steps.push(step);
            }
        }
        steps
    }

    /// Runs all steps; the output of each position of each sequence.
    fn run(&self, layout: &Layout) -> Vec<Vec<f32>> {
        let blocks_of = |seq: usize| self.len(seq).div_ceil(self.block_size);
        let num_blocks = (0..self.seqs.len()).map(blocks_of).sum::<usize>() + 3;
        let order = Random(layout.blocks).permutation(num_blocks);
        let mut kv = CpuKvLayer::new(KvShape {
            num_blocks,
            block_size: self.block_size,
            num_kv_heads: self.shape.num_kv_heads,
            head_dim: self.shape.head_dim,
            dtype: self.dtype,
        })
        .unwrap();
        match &mut kv.store {
            KvStore::F32(heads) => poison(heads, f32::NAN),
            KvStore::F16(heads) => poison(heads, f16::NAN),
        }
        let pool = Pool::new(layout.num_threads, Waiting::Sleep).unwrap();
        let mut scratch = AttendScratch::new().unwrap();
        let mut done = vec![0; self.seqs.len()];
        let mut outputs: Vec<Vec<f32>> = vec![Vec::new(); self.seqs.len()];
        for chunks in &layout.steps {
            let mut step = StepInputs::default();
            let mut qkv = Vec::new();
            for &(seq, num) in chunks {
                let first_block = (0..seq).map(blocks_of).sum::<usize>();
                let table = &order[first_block..first_block + blocks_of(seq)];
                step.seqs.push(SeqInputs {
                    query_start: step.token_ids.len() as u32,
                    query_len: num as u32,
                    context_len: (done[seq] + num) as u32,
                    table_start: step.block_tables.len() as u32,
                });
                step.block_tables.extend(table);
                for position in done[seq]..done[seq] + num {
                    let row = &self.seqs[seq][position * qkv_width(&self.shape)..][..qkv_width(&self.shape)];
                    let slot =
                        table[position / self.block_size] as usize * self.block_size + position % self.block_size;
                    match &mut kv.store {
                        KvStore::F32(heads) => self.store(heads, row, slot, num_blocks),
                        KvStore::F16(heads) => self.store(heads, row, slot, num_blocks),
                    }
                    qkv.extend(row);
                    step.token_ids.push(0);
                }
                done[seq] += num;
            }
            let mut out = vec![f32::NAN; step.token_ids.len() * self.out_width()];
            let operands = Operands { qkv: &qkv, out: &mut out, out_width: self.out_width() };
            attend(layout.simd, &pool, &mut scratch, &step, &self.shape, &kv, operands).unwrap();
            let mut rows = out.chunks_exact(self.out_width());
            for &(seq, num) in chunks {
                rows.by_ref().take(num).for_each(|row| outputs[seq].extend(row));
            }
        }
        outputs
    }

    fn store<E: KvElement>(&self, heads: &mut KvHeads<E>, row: &[f32], slot: usize, num_blocks: usize) {
        let dim = self.shape.head_dim;
        let len = num_blocks * self.block_size * dim;
        let (_, kv) = row.split_at(self.shape.num_kv_heads * self.shape.group * dim);
        let (k, v) = kv.split_at(self.shape.num_kv_heads * dim);
        for head in 0..self.shape.num_kv_heads {
            store_k(&mut heads.k[head * len..(head + 1) * len], slot, &k[head * dim..][..dim]);
            store_v(&mut heads.v[head * len..(head + 1) * len], slot, &v[head * dim..][..dim]);
        }
    }

    /// The plain form of the op: softmax over the positions seen, in f64. NaN where nothing may be written.
    fn reference(&self) -> Vec<Vec<f32>> {
        (0..self.seqs.len()).map(|seq| (0..self.len(seq)).flat_map(|p| self.reference_row(seq, p)).collect()).collect()
    }

    fn reference_row(&self, seq: usize, position: usize) -> Vec<f32> {
        let AttentionShape { num_kv_heads, group, head_dim, num_heads_owned, out_column, scale, window, soft_cap } =
            self.shape;
        let width = qkv_width(&self.shape);
        let stored = |x: f32| if self.dtype == StoredType::F16 { f16::from_f32(x).to_f32() } else { x };
        let mut out = vec![f32::NAN; self.out_width()];
        let first = window.map_or(0, |w| (position + 1).saturating_sub(w));
        for head in 0..num_heads_owned {
            let q = &self.seqs[seq][position * width + head * head_dim..][..head_dim];
            let kv_row = |p: usize, what: usize| {
                let column = (num_kv_heads * (group + what) + head / group) * head_dim;
                &self.seqs[seq][p * width + column..][..head_dim]
            };
            let score = |p: usize| {
                let dot: f64 = q.iter().zip(kv_row(p, 0)).map(|(&q, &k)| f64::from(q) * f64::from(stored(k))).sum();
                let score = dot * f64::from(scale);
                soft_cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
            };
            let scores: Vec<f64> = (first..=position).map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            for d in 0..head_dim {
                let weighted =
                    scores.iter().zip(first..).map(|(s, p)| (s - max).exp() * f64::from(stored(kv_row(p, 1)[d])));
                out[out_column + head * head_dim + d] = (weighted.sum::<f64>() / sum) as f32;
            }
        }
        out
    }
}

fn poison<E: KvElement>(heads: &mut KvHeads<E>, with: E) {
    heads.k.fill(with);
    heads.v.fill(with);
}

fn shape(num_kv_heads: usize, group: usize, head_dim: usize) -> AttentionShape {
    AttentionShape {
        num_kv_heads,
        group,
        num_heads_owned: num_kv_heads * group,
        head_dim,
        out_column: 0,
        scale: 1.0 / (head_dim as f32).sqrt(),
        window: None,
        soft_cap: None,
    }
}

/// Against the reference, then bit for bit under other layouts.
fn check(seed: u64, shape: AttentionShape, dtype: StoredType, lens: &[usize]) {
    let mut random = Random(seed);
    let model = Model::random(&mut random, shape, dtype, lens);
    let expected = model.reference();
    let whole = Layout { simd: Simd::best(), num_threads: 1, blocks: 5, steps: model.at_once() };
    let got = model.run(&whole);
    for (seq, (got, expected)) in got.iter().zip(&expected).enumerate() {
        for (i, (a, b)) in got.iter().zip(expected).enumerate() {
            let close = (a - b).abs() < 3e-6 || (a.is_nan() && b.is_nan());
            assert!(close, "{shape:?} {dtype:?}, sequence {seq}, value {i}: {a} {b}");
        }
    }
    for simd in Simd::all() {
        for num_threads in [1, 3] {
            let layout = Layout { simd, num_threads, blocks: 1 + random.bits(), steps: model.chunks(&mut random) };
            let again = model.run(&layout);
            assert!(
                again.iter().zip(&got).all(|(a, b)| same_bits(a, b)),
                "{shape:?} {dtype:?}, {simd:?}, {num_threads} threads, {:?}",
                layout.steps
            );
        }
    }
}

#[test]
fn decode_chunks_and_mixes_agree_bit_for_bit() {
    check(1, shape(3, 3, 64), StoredType::F32, &[70, 1, 333]);
    check(2, shape(3, 3, 64), StoredType::F16, &[300, 17, 64]);
}

#[test]
fn head_dims_and_groups_of_any_size() {
    check(3, shape(1, 1, 8), StoredType::F32, &[40, 65]);
    check(4, shape(2, 2, 24), StoredType::F16, &[129]);
    check(5, shape(1, 7, 128), StoredType::F32, &[90]);
    check(6, shape(2, 4, 40), StoredType::F32, &[33, 16]);
    check(7, shape(1, 40, 16), StoredType::F16, &[35]);
    check(8, shape(4, 1, 96), StoredType::F32, &[50]);
}

#[test]
fn windows_are_counted_from_the_query() {
    for (seed, window) in [(9, 1), (10, 16), (11, 33), (12, 64), (13, 300)] {
        let shape = AttentionShape { window: Some(window), ..shape(2, 2, 16) };
        check(seed, shape, StoredType::F32, &[700, 20]);
    }
}

#[test]
fn scores_are_capped() {
    for (seed, cap, window) in [(21, 0.5, None), (22, 2.0, Some(40)), (23, 50.0, None)] {
        let shape = AttentionShape { soft_cap: Some(cap), window, ..shape(2, 3, 16) };
        check(seed, shape, StoredType::F32, &[300, 20]);
    }
}

#[test]
fn long_contexts_are_merged_in_order() {
    check(14, shape(1, 2, 16), StoredType::F32, &[1500]);
    check(15, shape(2, 1, 8), StoredType::F16, &[1024, 300]);
    // Its last steps are decodes large enough to be shared out.
    check(20, shape(1, 4, 64), StoredType::F32, &[1100]);
}

#[test]
fn padding_heads_and_other_columns_are_left_alone() {
    check(16, AttentionShape { num_heads_owned: 4, out_column: 5, ..shape(2, 3, 16) }, StoredType::F32, &[50]);
    check(17, AttentionShape { num_heads_owned: 2, out_column: 8, ..shape(3, 2, 16) }, StoredType::F16, &[50, 3]);
}

#[test]
fn large_scores_do_not_overflow() {
    let mut random = Random(18);
    let mut model = Model::random(&mut random, shape(1, 1, 16), StoredType::F32, &[300]);
    model.seqs[0].iter_mut().for_each(|x| *x *= 30.0);
    let layout = Layout { simd: Simd::best(), num_threads: 1, blocks: 5, steps: model.at_once() };
    for (a, b) in model.run(&layout)[0].iter().zip(&model.reference()[0]) {
        assert!((a - b).abs() < 2e-2 || a.is_nan() && b.is_nan(), "{a} {b}");
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let mut random = Random(19);
    let model = Model::random(&mut random, shape(1, 2, 16), StoredType::F32, &[20]);
    let kv = |head_dim| {
        CpuKvLayer::new(KvShape { num_blocks: 2, block_size: 16, num_kv_heads: 1, head_dim, dtype: StoredType::F32 })
    };
    let step = |block| StepInputs {
        token_ids: vec![0; 20],
        seqs: vec![SeqInputs { query_start: 0, query_len: 20, context_len: 20, table_start: 0 }],
        block_tables: vec![0, block],
        ..StepInputs::default()
    };
    let refused = |step: &StepInputs, kv: &CpuKvLayer, out_width: usize| {
        let pool = Pool::new(1, Waiting::Sleep).unwrap();
        let mut out = vec![0.0; 20 * out_width];
        let operands = Operands { qkv: &model.seqs[0], out: &mut out, out_width };
        let mut scratch = AttendScratch::new().unwrap();
        attend(Simd::best(), &pool, &mut scratch, step, &model.shape, kv, operands).is_err()
    };
    assert!(!refused(&step(1), &kv(16).unwrap(), 32));
    assert!(refused(&step(2), &kv(16).unwrap(), 32), "a block that the cache lacks");
    assert!(refused(&step(1), &kv(24).unwrap(), 32), "another head width");
    assert!(refused(&step(1), &kv(16).unwrap(), 31), "no room for the output");
    let mut short = step(1);
    short.block_tables.pop();
    assert!(refused(&short, &kv(16).unwrap(), 32), "a table that ends early");
    assert!(kv(12).is_err(), "a head width that is no multiple of 8");
}
