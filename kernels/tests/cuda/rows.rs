//! Ops that work on rows one by one: embedding, norms, sums over a group of one.

use phalanx_kernels::cuda::Dtype;
use phalanx_kernels::{HostMatrix, Ops, StepInputs};

use crate::bench::{Bench, Findings, Random, SOME_HEADS, device, reference, tolerance};

const WIDTHS: [usize; 8] = [8, 64, 96, 128, 576, 896, 1024, 4096];
/// Every kind of padding, and one step that is not recorded.
const ROWS: [usize; 8] = [1, 3, 7, 9, 33, 65, 257, 520];

fn embed_program<O: Ops>(bench: &mut Bench<O>, table: &HostMatrix, ids: &[u32], first_id: u32) -> Vec<f32> {
    let weight = bench.ops.matrix(vec![table.clone()]).unwrap();
    let mut out = bench.poisoned_terms(ids.len(), table.cols);
    let step = StepInputs { token_ids: ids.to_vec(), ..Bench::<O>::step_of(ids.len()) };
    bench.load(step);
    bench.ops.embed(&bench.inputs, &weight, first_id, &mut out).unwrap();
    bench.read_terms(out, ids.len(), table.cols)
}

/// Exact: a row is copied, or zero where another rank has it.
pub fn check_embed(dtype: Dtype) {
    let (mut device, mut reference) = (device(dtype, SOME_HEADS), reference(SOME_HEADS));
    let mut findings = Findings::default();
    for (seed, (rows, width)) in (1..).zip(ROWS.into_iter().zip(WIDTHS)) {
        let mut random = Random::new(seed, dtype);
        let table = random.matrix(19, width);
        let mut ids: Vec<u32> = (0..rows).map(|_| 95 + random.below(30) as u32).collect();
        ids[0] = [99, 100, 118, 119, 0, u32::MAX >> 1][seed as usize % 6];
        let got = embed_program(&mut device.bench, &table, &ids, 100);
        let expected = embed_program(&mut reference, &table, &ids, 100);
        findings.holds(got == expected, || format!("{rows} rows of {width}"));
    }
    findings.finish("embed");
}

fn norm_program<O: Ops>(bench: &mut Bench<O>, x: &[f32], weight: &[f32]) -> Vec<f32> {
    let (rows, width) = (x.len() / weight.len(), weight.len());
    let x = bench.filled_wide(x, width);
    let weight = bench.ops.vector(weight).unwrap();
    let mut out = bench.poisoned(rows, width);
    bench.load_rows(rows);
    bench.ops.rms_norm(&bench.inputs, &x, &weight, 1e-5, &mut out).unwrap();
    bench.read(&out, rows)
}

/// Norms of every width; a row does not depend on the rows beside it.
pub fn check_norms(dtype: Dtype) {
    let (mut device, mut reference) = (device(dtype, SOME_HEADS), reference(SOME_HEADS));
    let mut findings = Findings::default();
    for (seed, width) in (1..).zip(WIDTHS.into_iter().chain([8200, 16_384])) {
        for rows in ROWS.into_iter().filter(|rows| rows * width < 1 << 20) {
            let mut random = Random::new(seed, dtype);
            let (x, weight) = (random.floats(rows * width, 3.0), random.floats(width, 1.0));
            let got = norm_program(&mut device.bench, &x, &weight);
            let expected = norm_program(&mut reference, &x, &weight);
            let label = format!("{rows} rows of {width}");
            findings.close(&label, &got, &expected, tolerance(dtype));
            let last = (rows - 1) * width;
            let alone = norm_program(&mut device.bench, &x[last..], &weight);
            findings.holds(got[last..] == alone[..], || format!("{label}: the last one differs alone"));
        }
    }
    findings.finish("norms");
}

/// The residual stream and its norm, by the block op and by its parts.
fn sum_program<O: Ops>(bench: &mut Bench<O>, values: &[f32], weight: &[f32], fused: bool) -> Vec<f32> {
    let (rows, width) = (values.len() / 2 / weight.len(), weight.len());
    let (terms, residual) = values.split_at(values.len() / 2);
    let mut partial = bench.terms(terms, width);
    let mut stream = bench.filled_wide(residual, width);
    let weight = bench.ops.vector(weight).unwrap();
    let mut normed = bench.poisoned(rows, width);
    bench.load_rows(rows);
    let Bench { ops, inputs, .. } = bench;
    if fused {
        ops.reduce_add_norm(inputs, &mut partial, &mut stream, &weight, 1e-6, &mut normed).unwrap();
    } else {
        ops.reduce(inputs, &mut partial, &mut normed).unwrap();
        ops.add(inputs, &normed, &mut stream).unwrap();
        ops.rms_norm(inputs, &stream, &weight, 1e-6, &mut normed).unwrap();
    }
    [bench.read(&stream, rows), bench.read(&normed, rows)].concat()
}

/// In a group of one the terms are the sum: fused and in parts give the same bits.
pub fn check_sums(dtype: Dtype) {
    let (mut device, mut reference) = (device(dtype, SOME_HEADS), reference(SOME_HEADS));
    let mut findings = Findings::default();
    for (seed, (rows, width)) in (1..).zip(ROWS.into_iter().zip(WIDTHS)) {
        let mut random = Random::new(seed, dtype);
        let (values, weight) = (random.floats(2 * rows * width, 2.0), random.floats(width, 1.0));
        let fused = sum_program(&mut device.bench, &values, &weight, true);
        let parts = sum_program(&mut device.bench, &values, &weight, false);
        let expected = sum_program(&mut reference, &values, &weight, true);
        let label = format!("{rows} rows of {width}");
        findings.close(&label, &fused, &expected, tolerance(dtype));
        findings.holds(fused == parts, || format!("{label}: the parts differ from the whole"));
    }
    findings.finish("sums");
}
