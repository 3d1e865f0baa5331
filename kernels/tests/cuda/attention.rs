//! Projection, rotary embedding, the paged cache and attention, over several steps of two sequences.

use phalanx_kernels::cuda::Dtype;
use phalanx_kernels::{AttentionLimits, AttentionShape, KvShape, Ops, RopeTable, SeqInputs, StepInputs};

use crate::bench::{Bench, Findings, Random, device, reference, tolerance};

const POSITIONS: usize = 2048;
const HIDDEN: usize = 48;

/// Sequence lengths before and after a step.
type Step = &'static [(usize, usize)];

/// Prompts, decodes beside prompts, a chunk of a prompt at an offset, decodes over contexts that are split.
const STEPS: [Step; 6] = [
    &[(0, 70), (0, 1)],
    &[(70, 71), (1, 40)],
    &[(71, 330), (40, 41)],
    &[(330, 331), (41, 42), (0, 3)],
    &[(331, 760), (42, 43)],
    &[(760, 761), (43, 44), (3, 4)],
];

/// A long prompt in chunks, then single tokens.
const LONG_STEPS: [Step; 3] = [&[(0, 1000)], &[(1000, 2000), (0, 1)], &[(2000, 2001), (1, 2)]];

/// A rotary table of some frequencies.
fn rope(head_dim: usize) -> RopeTable {
    let half = head_dim / 2;
    let angle = |i: usize| (i / half) as f32 * 100f32.powf(-2.0 * (i % half) as f32 / head_dim as f32);
    let len = POSITIONS * half;
    let (cos, sin) = ((0..len).map(|i| angle(i).cos()).collect(), (0..len).map(|i| angle(i).sin()).collect());
    RopeTable { cos, sin, head_dim }
}

/// The inputs of a step over sequences that own blocks for all positions each, backwards.
fn step_inputs(lens: Step, block_size: usize) -> StepInputs {
    let blocks = POSITIONS / block_size;
    let mut step = StepInputs::default();
    for (seq, &(before, after)) in lens.iter().enumerate() {
        let table: Vec<u32> = (0..blocks).map(|i| (seq * blocks + blocks - 1 - i) as u32).collect();
        step.seqs.push(SeqInputs {
            query_start: step.token_ids.len() as u32,
            query_len: (after - before) as u32,
            context_len: after as u32,
            table_start: step.block_tables.len() as u32,
        });
        for position in before..after {
            step.token_ids.push(0);
            step.positions.push(position as u32);
            step.kv_slots.push(table[position / block_size] * block_size as u32 + (position % block_size) as u32);
        }
        step.block_tables.extend(table);
    }
    step
}

/// Heads of a test, and the blocks that they are stored in.
#[derive(Debug, Clone, Copy)]
struct Heads {
    shape: AttentionShape,
    block_size: usize,
}

impl Heads {
    fn limits(&self) -> AttentionLimits {
        let AttentionShape { num_kv_heads, group, head_dim, window, .. } = self.shape;
        AttentionLimits { num_kv_heads, group, head_dim, block_size: self.block_size, window }
    }
}

/// Projects, rotates, stores and attends in several steps: rotated q, then the heads' outputs and what is beside them.
fn program<O: Ops>(bench: &mut Bench<O>, seed: u64, heads: &Heads, dtype: Dtype, steps: &[Step]) -> Vec<f32> {
    let (random, Heads { shape, block_size }) = (&mut Random::new(seed, dtype), heads);
    let AttentionShape { num_kv_heads, group, head_dim, .. } = *shape;
    let (num_q, width) = (num_kv_heads * group * head_dim, num_kv_heads * (group + 2) * head_dim);
    let weight = bench.ops.matrix(vec![random.matrix(width, HIDDEN)]).unwrap();
    let bias = bench.ops.vector(&random.floats(width, 0.3)).unwrap();
    let rope = bench.ops.rope_table(rope(head_dim)).unwrap();
    let num_blocks = 3 * POSITIONS / block_size;
    let kv_dtype = bench.ops.kv_dtype();
    let kv = KvShape { num_blocks, block_size: *block_size, num_kv_heads, head_dim, dtype: kv_dtype };
    let mut layer = bench.ops.kv_layer(kv).unwrap();
    let out_width = shape.out_column + shape.num_heads_owned * head_dim + 8;
    let mut outputs = Vec::new();
    for (index, lens) in steps.iter().enumerate() {
        bench.load(step_inputs(lens, *block_size));
        let rows = bench.step.token_ids.len();
        let x = bench.filled(&random.floats(rows * HIDDEN, 1.0), HIDDEN);
        let mut qkv = bench.poisoned(rows, width);
        let mut out = bench.poisoned(rows, out_width);
        let Bench { ops, inputs, .. } = bench;
        if index % 2 == 0 {
            ops.qkv_rope_store(inputs, shape, &x, &weight, Some(&bias), &rope, &mut qkv, &mut layer).unwrap();
        } else {
            ops.linear(inputs, &x, &weight, None, &mut qkv).unwrap();
            ops.rope_store(inputs, shape, &rope, &mut qkv, &mut layer).unwrap();
        }
        ops.attend(inputs, shape, &qkv, &layer, &mut out).unwrap();
        // The cache alone holds rotated k, and v: a device need not write them back.
        outputs.extend(bench.read(&qkv, rows).chunks(width).flat_map(|row| row[..num_q].to_vec()));
        outputs.extend(bench.read(&out, rows));
    }
    outputs
}

fn heads(num_kv_heads: usize, group: usize, head_dim: usize, num_heads_owned: usize, window: Option<usize>) -> Heads {
    let scale = 1.0 / (head_dim as f32).sqrt();
    let out_column = if num_kv_heads.is_multiple_of(2) { head_dim } else { 0 };
    let shape =
        AttentionShape { num_kv_heads, group, num_heads_owned, head_dim, out_column, scale, window, soft_cap: None };
    Heads { shape, block_size: if group.is_multiple_of(2) { 16 } else { 32 } }
}

/// Scores here are of about this size, so the cap bends them well.
fn capped(num_kv_heads: usize, group: usize, head_dim: usize, num_heads_owned: usize, window: Option<usize>) -> Heads {
    let mut heads = heads(num_kv_heads, group, head_dim, num_heads_owned, window);
    heads.shape.soft_cap = Some(1.5);
    heads
}

fn check_heads(dtype: Dtype, cases: &[Heads], steps: &[Step], what: &str) {
    let mut findings = Findings::default();
    for (seed, heads) in (1..).zip(cases) {
        let limits = heads.limits();
        let mut device = device(dtype, limits);
        let got = program(&mut device.bench, seed, heads, dtype, steps);
        drop(device);
        let expected = program(&mut reference(limits), seed, heads, dtype, steps);
        findings.close(&format!("{:?}", heads.shape), &got, &expected, tolerance(dtype));
    }
    findings.finish(what);
}

/// Head sizes with kernels of their own and without, groups of 1 to 20, padded heads, windows.
pub fn check_attention(dtype: Dtype) {
    let cases = [
        heads(1, 4, 16, 3, None),
        heads(2, 1, 40, 2, Some(33)),
        heads(3, 3, 64, 9, None),
        heads(2, 7, 64, 13, Some(100)),
        heads(1, 2, 80, 2, None),
        heads(2, 2, 96, 3, Some(300)),
        heads(1, 8, 128, 8, None),
        heads(2, 4, 128, 8, Some(129)),
        heads(1, 2, 256, 2, None),
        heads(1, 16, 64, 16, None),
        heads(1, 20, 64, 20, None),
        capped(2, 1, 40, 2, Some(33)),
        capped(3, 3, 64, 9, None),
        capped(2, 2, 96, 3, Some(300)),
        capped(2, 4, 128, 8, Some(129)),
        capped(1, 2, 256, 2, None),
        capped(1, 16, 64, 16, None),
    ];
    check_heads(dtype, &cases, &STEPS, "heads");
}

/// Contexts of 2000 positions.
pub fn check_large(dtype: Dtype) {
    let cases = [heads(2, 4, 128, 8, None), heads(3, 3, 64, 9, None), heads(8, 4, 128, 32, Some(700))];
    check_heads(dtype, &cases, &LONG_STEPS, "heads_large");
}
