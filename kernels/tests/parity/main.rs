//! Every op of the contract, and every stored format, on the CPU backend against the reference: random shapes, odd sizes, outputs
//! full of NaN beforehand. A test runs one program on both backends, through the contract only.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bench;

use phalanx_formats::StoredType;
use phalanx_kernels::{
    AttentionShape, GateActivation, HostMatrix, InputLimits, KvShape, Ops, RopeTable, SeqInputs, StepInputs,
    cpu::Activations,
};
use proptest::prelude::*;

use bench::{Bench, Random, cpu, reference, typical, worst};

/// Runs `program` on both backends.
macro_rules! both {
    ($program:expr, $rows:expr) => {{
        let got = $program(&mut Bench::new(cpu(Activations::Float32, 2, 1), $rows));
        let expected = $program(&mut Bench::new(reference(1), $rows));
        (got, expected)
    }};
}

fn linear_program<O: Ops>(bench: &mut Bench<O>, x: &[f32], parts: &[HostMatrix], bias: Option<&[f32]>) -> Vec<f32> {
    let cols = parts[0].cols;
    let (rows, n) = (x.len() / cols, parts.iter().map(|p| p.rows).sum());
    let x = bench.filled(x, cols);
    let weight = bench.ops.matrix(parts.to_vec()).unwrap();
    let bias = bias.map(|b| bench.ops.vector(b).unwrap());
    let mut out = bench.poisoned(rows, n);
    bench.ops.linear(&bench.inputs, &x, &weight, bias.as_ref(), &mut out).unwrap();
    let mut values = bench.read(&out, rows);
    let mut terms = bench.poisoned_terms(rows, n);
    bench.ops.linear_partial(&bench.inputs, &x, &weight, &mut terms).unwrap();
    values.extend(bench.read_terms(terms, rows, n));
    values
}

#[test]
fn embed_reads_every_format_and_leaves_other_ranks_ids_zero() {
    for (seed, dtype) in (1..).zip(StoredType::ALL) {
        let table = Random(seed).matrix(dtype, 19, 45);
        fn program<O: Ops>(bench: &mut Bench<O>, table: &HostMatrix) -> Vec<f32> {
            let width = table.cols;
            let ids = vec![99, 100, 118, 119, 104, 0, u32::MAX >> 1, 107];
            let weight = bench.ops.matrix(vec![table.clone()]).unwrap();
            let mut out = bench.poisoned_terms(ids.len(), width);
            let rows = ids.len();
            let step = StepInputs { token_ids: ids, ..bench.step.clone() };
            bench.load(step);
            bench.ops.embed(&bench.inputs, &weight, 100, &mut out).unwrap();
            bench.read_terms(out, rows, width)
        }
        let (got, expected) = both!(|b: &mut _| program(b, &table), 8);
        assert_eq!(got, expected, "{dtype:?}");
        assert!(
            got[..table.cols].iter().all(|&x| x == 0.0) && got[table.cols..2 * table.cols].iter().any(|&x| x != 0.0)
        );
    }
}

#[test]
fn linear_layers_of_every_format() {
    for (seed, dtype) in (1..).zip(StoredType::ALL) {
        for (rows, n, k) in [(1, 33, 300), (7, 5, 64), (35, 130, 37), (17, 64, 512)] {
            let mut random = Random(seed * 77);
            let parts = [random.matrix(dtype, n, k), random.matrix(dtype, 3, k)];
            let x = random.floats(rows * parts[0].cols);
            let bias = random.floats(n + 3);
            let with_bias = (n % 2 == 0).then_some(&bias[..]);
            let (got, expected) = both!(|b: &mut _| linear_program(b, &x, &parts, with_bias), rows);
            assert!(worst(&got, &expected) < 2e-6, "{dtype:?} {rows} {n} {k}: {}", worst(&got, &expected));
            let mut quantised = Bench::new(cpu(Activations::Int8, 2, 1), rows);
            let got = linear_program(&mut quantised, &x, &parts, with_bias);
            assert!(typical(&got, &expected) < 0.012, "int8 {dtype:?} {rows} {n} {k}: {}", typical(&got, &expected));
        }
    }
}

#[test]
fn gate_and_up_of_every_format() {
    fn program<O: Ops>(bench: &mut Bench<O>, x: &[f32], gate: &HostMatrix, up: &HostMatrix) -> Vec<f32> {
        let rows = x.len() / gate.cols;
        let x = bench.filled(x, gate.cols);
        let weight = bench.ops.gate_up_matrix(gate.clone(), up.clone()).unwrap();
        let mut out = bench.poisoned(rows, gate.rows);
        [GateActivation::Silu, GateActivation::GeluTanh]
            .into_iter()
            .flat_map(|activation| {
                bench.ops.gate_up_act(&bench.inputs, &x, &weight, activation, &mut out).unwrap();
                bench.read(&out, rows)
            })
            .collect()
    }
    for (seed, dtype) in (1..).zip(StoredType::ALL) {
        for (rows, inner, k, up_dtype) in [(1, 37, 96, dtype), (9, 64, 256, dtype), (20, 16, 512, StoredType::Q8_0)] {
            let mut random = Random(seed * 131);
            let k = k.max(dtype.block_len());
            let (gate, up) = (random.matrix(dtype, inner, k), random.matrix(up_dtype, inner, k));
            let x = random.floats(rows * k);
            let (got, expected) = both!(|b: &mut _| program(b, &x, &gate, &up), rows);
            assert!(worst(&got, &expected) < 3e-6, "{dtype:?} {rows} {inner} {k}: {}", worst(&got, &expected));
            let got = program(&mut Bench::new(cpu(Activations::Int8, 2, 1), rows), &x, &gate, &up);
            assert!(typical(&got, &expected) < 0.02, "int8 {dtype:?}: {}", typical(&got, &expected));
        }
    }
}

#[test]
fn logits_of_wanted_rows() {
    fn program<O: Ops>(bench: &mut Bench<O>, x: &[f32], head: &HostMatrix, wanted: &[u32]) -> Vec<f32> {
        let rows = x.len() / head.cols;
        let x = bench.filled(x, head.cols);
        let weight = bench.ops.matrix(vec![head.clone()]).unwrap();
        let mut out = bench.poisoned(70, head.rows);
        let step = StepInputs { logit_rows: wanted.to_vec(), ..bench.step.clone() };
        bench.load(step);
        assert_eq!(rows, bench.step.token_ids.len());
        bench.ops.logits(&bench.inputs, &x, &weight, &mut out).unwrap();
        bench.read(&out, 70)
    }
    let mut random = Random(5);
    for (dtype, rows) in [(StoredType::BF16, 64), (StoredType::Q8_0, 9), (StoredType::F32, 1)] {
        let head = random.matrix(dtype, 515, 64);
        let x = random.floats(rows as usize * 64);
        let some: Vec<u32> = (0..rows).filter(|r| r % 3 != 1).collect();
        for wanted in [some, (rows / 2..rows).collect(), vec![rows - 1], Vec::new()] {
            let (got, expected) = both!(|b: &mut _| program(b, &x, &head, &wanted), rows as usize);
            assert!(worst(&got, &expected) < 2e-6, "{dtype:?} {wanted:?}");
        }
    }
}

fn norm_program<O: Ops>(bench: &mut Bench<O>, x: &[f32], weight: &[f32]) -> Vec<f32> {
    let (rows, width) = (x.len() / weight.len(), weight.len());
    let x = bench.filled(x, width);
    let weight = bench.ops.vector(weight).unwrap();
    let mut out = bench.poisoned(rows, width);
    bench.ops.rms_norm(&bench.inputs, &x, &weight, 1e-5, &mut out).unwrap();
    bench.read(&out, rows)
}

/// Sums over ranks, alone and as the fused block op; the residual stream and its norm.
fn reduce_program<O: Ops>(bench: &mut Bench<O>, values: &[f32], weight: &[f32], fused: bool) -> Vec<f32> {
    let (rows, width) = (values.len() / 2 / weight.len(), weight.len());
    let (terms, residual) = values.split_at(values.len() / 2);
    let mut partial = bench.terms(terms, width);
    let mut residual = bench.terms(residual, width);
    let weight = bench.ops.vector(weight).unwrap();
    let mut stream = bench.poisoned(rows, width);
    bench.ops.reduce(&bench.inputs, &mut residual, &mut stream).unwrap();
    let mut normed = bench.poisoned(rows, width);
    if fused {
        bench.ops.reduce_add_norm(&bench.inputs, &mut partial, &mut stream, &weight, 1e-6, &mut normed).unwrap();
    } else {
        bench.ops.reduce(&bench.inputs, &mut partial, &mut normed).unwrap();
        bench.ops.add(&bench.inputs, &normed, &mut stream).unwrap();
        bench.ops.rms_norm(&bench.inputs, &stream, &weight, 1e-6, &mut normed).unwrap();
    }
    [bench.read(&stream, rows), bench.read(&normed, rows)].concat()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn norms_of_any_width(seed in 1u64.., rows in 1usize..70, width in 1usize..700) {
        let mut random = Random(seed);
        let (x, weight) = (random.floats(rows * width), random.floats(width));
        let (got, expected) = both!(|b: &mut _| norm_program(b, &x, &weight), rows);
        prop_assert!(worst(&got, &expected) < 2e-6);
        // A row's result does not depend on the rows beside it.
        let last = (rows - 1) * width;
        let alone = norm_program(&mut Bench::new(cpu(Activations::Float32, 1, 1), 1), &x[last..], &weight);
        prop_assert_eq!(&got[last..], &alone[..]);
    }

    #[test]
    fn sums_over_ranks_fused_and_alone(seed in 1u64.., rows in 1usize..40, width in 1usize..700, world_size in 1usize..5) {
        let mut random = Random(seed);
        let (values, weight) = (random.floats(2 * rows * width), random.floats(width));
        let run = |fused| {
            let mut bench = Bench::new(cpu(Activations::Float32, 2, world_size), rows);
            reduce_program(&mut bench, &values, &weight, fused)
        };
        let fused = run(true);
        prop_assert_eq!(&fused, &run(false));
        let expected = reduce_program(&mut Bench::new(reference(world_size), rows), &values, &weight, true);
        prop_assert!(worst(&fused, &expected) < 2e-6);
    }
}

/// A rotary table of some frequencies.
fn rope(head_dim: usize, positions: usize) -> RopeTable {
    let angle =
        |i: usize| (i / (head_dim / 2)) as f32 * 100f32.powf(-2.0 * (i % (head_dim / 2)) as f32 / head_dim as f32);
    let len = positions * head_dim / 2;
    let (cos, sin) = ((0..len).map(|i| angle(i).cos()).collect(), (0..len).map(|i| angle(i).sin()).collect());
    RopeTable { cos, sin, head_dim }
}

/// Sequence lengths before and after a step.
type Step<'a> = &'a [(usize, usize)];

/// The inputs of a step over sequences that own 40 blocks each, backwards.
fn attention_step(lens: Step<'_>, block_size: usize) -> StepInputs {
    let mut step = StepInputs::default();
    for (seq, &(before, after)) in lens.iter().enumerate() {
        let table: Vec<u32> = (0..40).map(|i| (seq * 40 + 39 - i) as u32).collect();
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

/// Projects, rotates, stores and attends in several steps.
fn attention_program<O: Ops>(
    mut bench: Bench<O>,
    random: &mut Random,
    shape: &AttentionShape,
    kv: KvShape,
    steps: &[Step<'_>],
) -> Vec<f32> {
    let hidden = 48;
    let width = shape.num_kv_heads * (shape.group + 2) * shape.head_dim;
    let weight = bench.ops.matrix(vec![random.matrix(StoredType::F32, width, hidden)]).unwrap();
    let bias = bench.ops.vector(&random.floats(width)).unwrap();
    let rope = bench.ops.rope_table(rope(shape.head_dim, 600)).unwrap();
    let mut layer = bench.ops.kv_layer(kv).unwrap();
    let out_width = shape.out_column + shape.num_heads_owned * shape.head_dim + 5;
    let mut outputs = Vec::new();
    for lens in steps {
        bench.load(attention_step(lens, kv.block_size));
        let rows = bench.step.token_ids.len();
        let x = bench.filled(&random.floats(rows * hidden), hidden);
        let mut qkv = bench.poisoned(rows, width);
        let mut out = bench.poisoned(rows, out_width);
        let Bench { ops, inputs, .. } = &mut bench;
        ops.qkv_rope_store(inputs, shape, &x, &weight, Some(&bias), &rope, &mut qkv, &mut layer).unwrap();
        ops.attend(inputs, shape, &qkv, &layer, &mut out).unwrap();
        outputs.extend(bench.read(&qkv, rows));
        outputs.extend(bench.read(&out, rows));
    }
    outputs
}

#[test]
fn rotary_embedding_cache_and_attention_over_several_steps() {
    let steps: [Step<'_>; 4] =
        [&[(0, 70), (0, 1)], &[(70, 71), (1, 40)], &[(71, 300), (40, 41)], &[(300, 301), (41, 42)]];
    let shape = |num_kv_heads, group, head_dim, num_heads_owned, window| AttentionShape {
        num_kv_heads,
        group,
        num_heads_owned,
        head_dim,
        out_column: 3,
        scale: 1.0 / (head_dim as f32).sqrt(),
        window,
        soft_cap: None,
    };
    let shapes = [
        shape(3, 3, 64, 9, None),
        shape(1, 4, 16, 3, None),
        shape(2, 1, 40, 2, Some(33)),
        shape(2, 2, 8, 3, Some(100)),
        shape(1, 8, 128, 8, None),
        AttentionShape { soft_cap: Some(1.5), ..shape(2, 2, 40, 4, Some(33)) },
    ];
    for (seed, shape) in (1..).zip(shapes) {
        for (dtype, tolerance) in [(StoredType::F32, 5e-6), (StoredType::F16, 2e-3)] {
            let AttentionShape { num_kv_heads, head_dim, .. } = shape;
            let kv = KvShape { num_blocks: 80, block_size: 16, num_kv_heads, head_dim, dtype };
            let first = StepInputs::default();
            let ours = Bench::with_step(cpu(Activations::Float32, 3, 1), first.clone());
            let got = attention_program(ours, &mut Random(seed), &shape, kv, &steps);
            let theirs = Bench::with_step(reference(1), first);
            let expected = attention_program(theirs, &mut Random(seed), &shape, kv, &steps);
            assert!(worst(&got, &expected) < tolerance, "{shape:?} {dtype:?}: {}", worst(&got, &expected));
        }
    }
}

#[test]
fn steps_that_lie_are_refused() {
    fn refused<O: Ops>(mut ops: O) {
        let mut inputs = ops
            .inputs(InputLimits {
                tokens_max: 4,
                seqs_max: 2,
                table_entries_max: 4,
                logit_rows_max: 2,
                ..InputLimits::default()
            })
            .unwrap();
        let good = Bench::<O>::step_of(3);
        ops.load_inputs(&good, &mut inputs).unwrap();
        let bad = [
            Bench::<O>::step_of(5),
            StepInputs { logit_rows: vec![3], ..good.clone() },
            StepInputs { positions: vec![0], ..good.clone() },
            StepInputs { seqs: Vec::new(), ..good.clone() },
            StepInputs { seqs: vec![SeqInputs { context_len: 2, ..good.seqs[0] }], ..good.clone() },
            StepInputs { seqs: vec![SeqInputs { table_start: 5, ..good.seqs[0] }], ..good.clone() },
        ];
        for step in bad {
            assert!(ops.load_inputs(&step, &mut inputs).is_err(), "{step:?}");
        }
    }
    refused(cpu(Activations::Float32, 1, 1));
    refused(reference(1));
}
