//! Times attention, rotary storage and sampling on shapes of a small model: 9 query heads, 3 KV heads of width 64.
//!
//! `cargo bench -p phalanx-kernels --bench attention`. It measures and asserts nothing.

use std::{hint::black_box, time::Instant};

use phalanx_formats::StoredType;
use phalanx_kernels::{
    AttentionShape, Collective, CollectiveError, InputLimits, KernelError, KvShape, Ops, RopeTable, SeqInputs,
    StepInputs,
    cpu::{Activations, CpuOps, Pool, Waiting},
    ops::sample::{Cut, CutParams, Histogram, MaxSum, RandomKey, draw},
};

const POSITIONS: usize = 16_384;
const BLOCK: usize = 16;

struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }
    fn world_size(&self) -> usize {
        1
    }
    fn all_reduce_sum(&mut self, _: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }
    fn all_gather(&mut self, part: &[u8], out: &mut [u8]) -> Result<(), CollectiveError> {
        out.copy_from_slice(part);
        Ok(())
    }
}

/// The best of some runs, in microseconds.
fn best<T>(mut work: impl FnMut() -> T) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..12 {
        let start = Instant::now();
        black_box(work());
        best = best.min(start.elapsed().as_secs_f64() * 1e6);
    }
    best
}

/// `num_seqs` sequences with `query` new tokens and `context` in all.
fn step(num_seqs: usize, query: usize, context: usize) -> StepInputs {
    let mut step = StepInputs::default();
    let blocks = context.div_ceil(BLOCK);
    for seq in 0..num_seqs {
        step.seqs.push(SeqInputs {
            query_start: step.token_ids.len() as u32,
            query_len: query as u32,
            context_len: context as u32,
            table_start: step.block_tables.len() as u32,
        });
        let first = seq * blocks;
        for position in context - query..context {
            step.token_ids.push(0);
            step.positions.push(position as u32);
            step.kv_slots.push((first * BLOCK + position) as u32);
        }
        step.block_tables.extend(first as u32..(first + blocks) as u32);
    }
    step
}

fn attention(num_threads: usize, dtype: StoredType) -> Result<(), KernelError> {
    let pool = Pool::new(num_threads, Waiting::SpinThenSleep)?;
    let mut ops = CpuOps::new(pool, Activations::Float32, Box::new(Alone))?;
    let shape = AttentionShape {
        num_kv_heads: 3,
        group: 3,
        num_heads_owned: 9,
        head_dim: 64,
        out_column: 0,
        scale: 0.125,
        window: None,
        soft_cap: None,
    };
    let num_blocks = POSITIONS / BLOCK;
    let mut kv = ops.kv_layer(KvShape { num_blocks, block_size: BLOCK, num_kv_heads: 3, head_dim: 64, dtype })?;
    let table = vec![0.5; POSITIONS * 32];
    let rope = ops.rope_table(RopeTable { cos: table.clone(), sin: table, head_dim: 64 })?;
    let limits = InputLimits {
        tokens_max: 512,
        seqs_max: 64,
        table_entries_max: num_blocks,
        logit_rows_max: 1,
        ..InputLimits::default()
    };
    let mut inputs = ops.inputs(limits)?;
    let (mut qkv, mut out) = (ops.buffer(512, 15 * 64)?, ops.buffer(512, 9 * 64)?);
    let cases = [
        (1, 1, 128),
        (1, 1, 512),
        (1, 1, 4096),
        (1, 1, 16_384),
        (16, 1, 512),
        (1, 32, 512),
        (1, 512, 512),
        (1, 512, 4096),
    ];
    for (num_seqs, query, context) in cases {
        ops.load_inputs(&step(num_seqs, query, context), &mut inputs)?;
        let stored = best(|| ops.rope_store(&inputs, &shape, &rope, &mut qkv, &mut kv));
        let attended = best(|| ops.attend(&inputs, &shape, &qkv, &kv, &mut out));
        println!(
            "{num_threads} threads {dtype:?}: {num_seqs:2} x {query:3} of {context:5}: rope_store {stored:7.1} us, \
             attend {attended:9.1} us, {:7.3} us a token",
            attended / (num_seqs * query) as f64
        );
    }
    Ok(())
}

fn sampling(vocab: usize) {
    let logits: Vec<f32> = (0..vocab).map(|i| ((i * 7919) % 10_007) as f32 * 0.0025 - 12.0).collect();
    let params = CutParams { temperature: 0.8, top_k: 50, top_p: 0.95, min_p: 0.0 };
    let key = RandomKey { seed: 1, output_index: 3 };
    let all = best(|| MaxSum::of(&logits));
    let max = MaxSum::of(&logits).max;
    let mut part = Histogram::default();
    let mut bytes = vec![0; Histogram::BYTES];
    let mut cut_by = |params: CutParams| {
        let mut cut = Cut::new(params, max);
        for pass in (0..Cut::NUM_PASSES).filter(|&p| Cut::new(params, max).takes_part(p)) {
            cut.histogram(pass, &logits, &mut part);
            part.write_to(&mut bytes);
            let mut merged = Histogram::default();
            merged.add_bytes(&bytes);
            cut.apply(pass, &merged);
        }
        cut.floor()
    };
    let cut = best(|| cut_by(params));
    let top_p = best(|| cut_by(CutParams { top_k: 0, ..params }));
    let floor = cut_by(params);
    let drawn = best(|| draw(&logits, 0, 0.8, 0, &key));
    let drawn_cut = best(|| draw(&logits, 0, 0.8, floor, &key));
    println!(
        "vocabulary {vocab}: max and sum {all:.0} us, top-k and top-p {cut:.0} us, top-p {top_p:.0} us, draw {drawn:.0} us, \
         draw after a cut {drawn_cut:.0} us"
    );
}

fn main() -> Result<(), KernelError> {
    for num_threads in [1, 2] {
        attention(num_threads, StoredType::F32)?;
        attention(num_threads, StoredType::F16)?;
    }
    sampling(49_152);
    sampling(151_936);
    Ok(())
}
