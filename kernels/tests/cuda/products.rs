//! Matrix products: every way that a row count takes (streamed up to 16 rows, library above, plain in f32), fused ends.

use phalanx_kernels::cuda::Dtype;
use phalanx_kernels::{GateActivation, HostMatrix, Ops, StepInputs};

use crate::bench::{Bench, Findings, Random, SOME_HEADS, device, reference, stored, tolerance};

/// One, few, the edge of the streaming kernels and of recorded steps, with and without padding.
const ROWS: [usize; 11] = [1, 2, 3, 7, 9, 16, 17, 33, 100, 300, 520];

fn linear_program<O: Ops>(bench: &mut Bench<O>, x: &[f32], parts: &[HostMatrix], bias: Option<&[f32]>) -> Vec<f32> {
    let cols = parts[0].cols;
    let (rows, n) = (x.len() / cols, parts.iter().map(|p| p.rows).sum());
    let x = bench.filled(x, cols);
    let weight = bench.ops.matrix(parts.to_vec()).unwrap();
    let bias = bias.map(|b| bench.ops.vector(b).unwrap());
    let mut out = bench.poisoned(rows, n);
    let mut terms = bench.poisoned_terms(rows, n);
    bench.load_rows(rows);
    bench.ops.linear(&bench.inputs, &x, &weight, bias.as_ref(), &mut out).unwrap();
    let mut values = bench.read(&out, rows);
    bench.ops.linear_partial(&bench.inputs, &x, &weight, &mut terms).unwrap();
    values.extend(bench.read_terms(terms, rows, n));
    values
}

fn check_shapes(dtype: Dtype, shapes: &[(usize, usize)], rows: &[usize], what: &str) {
    let (mut device, mut reference) = (device(dtype, SOME_HEADS), reference(SOME_HEADS));
    let mut findings = Findings::default();
    for (seed, &(n, k)) in (1..).zip(shapes) {
        for &rows in rows {
            let mut random = Random::new(seed * 1000 + rows as u64, dtype);
            let parts = [random.matrix(n, k), random.matrix(8, k)];
            let (x, bias) = (random.floats(rows * k, 1.0), random.floats(n + 8, 1.0));
            let with_bias = (rows % 2 == 1).then_some(&bias[..]);
            let got = linear_program(&mut device.bench, &x, &parts, with_bias);
            let expected = linear_program(&mut reference, &x, &parts, with_bias);
            findings.close(&format!("{rows} rows, {} x {k}", n + 8), &got, &expected, tolerance(dtype));
        }
    }
    findings.finish(what);
}

pub fn check_linear(dtype: Dtype) {
    let shapes = [(64, 8), (96, 64), (40, 96), (200, 128), (576, 576), (128, 896), (24, 1024), (1144, 160)];
    check_shapes(dtype, &shapes, &ROWS, "linear");
}

/// Widths of models of 0.5B and 8B parameters.
pub fn check_large(dtype: Dtype) {
    check_shapes(dtype, &[(3064, 1024), (1024, 2816), (6136, 4096)], &[1, 5, 16, 31, 130, 600], "linear_large");
    check_shapes(dtype, &[(4088, 14_336)], &[2, 8, 40], "linear_large, many columns");
}

fn gate_up_program<O: Ops>(bench: &mut Bench<O>, x: &[f32], gate: &HostMatrix, up: &HostMatrix) -> Vec<f32> {
    let rows = x.len() / gate.cols;
    let x = bench.filled(x, gate.cols);
    let weight = bench.ops.gate_up_matrix(gate.clone(), up.clone()).unwrap();
    let mut out = bench.poisoned(rows, gate.rows);
    bench.load_rows(rows);
    [GateActivation::Silu, GateActivation::GeluTanh]
        .into_iter()
        .flat_map(|activation| {
            bench.ops.gate_up_act(&bench.inputs, &x, &weight, activation, &mut out).unwrap();
            bench.read(&out, rows)
        })
        .collect()
}

/// Inner widths are multiples of 16: shards are padded to it.
pub fn check_gate_up(dtype: Dtype) {
    let (mut device, mut reference) = (device(dtype, SOME_HEADS), reference(SOME_HEADS));
    let mut findings = Findings::default();
    for (seed, (inner, k)) in (1..).zip([(16, 64), (64, 96), (176, 128), (1536, 576), (352, 896), (1408, 1024)]) {
        for rows in ROWS {
            let mut random = Random::new(seed * 1000 + rows as u64, dtype);
            let (gate, up) = (random.matrix(inner, k), random.matrix(inner, k));
            let x = random.floats(rows * k, 2.0);
            let got = gate_up_program(&mut device.bench, &x, &gate, &up);
            let expected = gate_up_program(&mut reference, &x, &gate, &up);
            findings.close(&format!("{rows} rows, {inner} x {k}"), &got, &expected, tolerance(dtype));
        }
    }
    findings.finish("gate_up");
}

fn logits_program<O: Ops>(bench: &mut Bench<O>, x: &[f32], head: &HostMatrix, wanted: &[u32]) -> Vec<f32> {
    let rows = x.len() / head.cols;
    let x = bench.filled(x, head.cols);
    let weight = bench.ops.matrix(vec![head.clone()]).unwrap();
    // A width that eight does not divide cannot be filled: what is not written would be zero, which no product here is.
    let mut out = if head.rows.is_multiple_of(8) {
        bench.poisoned_wide(wanted.len().max(1), head.rows)
    } else {
        bench.ops.wide_buffer(wanted.len().max(1), head.rows).unwrap()
    };
    bench.load(StepInputs { logit_rows: wanted.to_vec(), ..Bench::<O>::step_of(rows) });
    bench.ops.logits(&bench.inputs, &x, &weight, &mut out).unwrap();
    if wanted.is_empty() { Vec::new() } else { bench.read(&out, wanted.len()) }
}

/// Some rows, all, the last, none; vocabularies that nothing divides.
///
/// Logits are f32 in every type; tensor cores cut bits off as they add, which costs a few in a million.
pub fn check_logits(dtype: Dtype) {
    let (mut device, mut reference) = (device(dtype, SOME_HEADS), reference(SOME_HEADS));
    let mut findings = Findings::default();
    for (seed, (vocab, k)) in (1..).zip([(515, 64), (1003, 128), (1000, 576), (5001, 896), (8192, 1024)]) {
        for rows in [1u32, 9, 64, 129] {
            let mut random = Random::new(seed * 1000 + u64::from(rows), dtype);
            let head = random.matrix(vocab, k);
            let x = random.floats(rows as usize * k, 1.0);
            let some: Vec<u32> = (0..rows).filter(|row| row % 3 != 1).collect();
            for wanted in [some, (0..rows).collect(), (rows / 2..rows).collect(), vec![rows - 1], Vec::new()] {
                let got = logits_program(&mut device.bench, &x, &head, &wanted);
                let expected = logits_program(&mut reference, &x, &head, &wanted);
                let label = format!("{} of {rows} rows, {vocab} x {k}", wanted.len());
                let tolerance = if dtype == Dtype::F32 { tolerance(dtype) } else { 5e-5 };
                findings.close(&label, &got, &expected, tolerance);
            }
        }
    }
    findings.finish("logits");
}

/// Logits that are exactly `values` `[rows, vocab]` on every backend and in every type: one-hot rows by a head of the values.
pub fn exact_logits<O: Ops>(bench: &mut Bench<O>, values: &[f32], rows: usize, dtype: Dtype) -> (O::Buffer, O::Matrix) {
    let (vocab, cols) = (values.len() / rows, rows.next_multiple_of(8));
    let mut head = vec![0.0; vocab * cols];
    for (row, logits) in values.chunks(vocab).enumerate() {
        logits.iter().enumerate().for_each(|(id, logit)| head[id * cols + row] = *logit);
    }
    let mut x = vec![0.0; rows * cols];
    (0..rows).for_each(|row| x[row * cols + row] = 1.0);
    let x = bench.filled(&x, cols);
    (x, bench.ops.matrix(vec![stored(&head, cols, dtype)]).unwrap())
}
