//! Steps one behind the other: tokens that stay on the device, results in order, recorded parts.

use phalanx_kernels::cuda::{CudaOps, CudaSettings, Dtype};
use phalanx_kernels::{
    GateActivation, KernelError, LAST_TOKEN, Ops, Partial, SampleRow, SamplerKind, StepInputs, StepPart, StepResult,
    VocabSlice,
};

use crate::bench::{Bench, Findings, Random, SOME_HEADS, device, device_with, reference, settings, tolerance};

const VOCAB: usize = 64;
const WIDTH: usize = 96;
const INNER: usize = 160;

/// A model of one layer without attention.
struct Model<O: Ops> {
    table: O::Matrix,
    norm: O::Vector,
    gate_up: O::Matrix,
    down: O::Matrix,
    head: O::Matrix,
    residual: O::Buffer,
    normed: O::Buffer,
    inner: O::Buffer,
    partial: Partial<O::Buffer>,
    logits: O::Buffer,
}

impl<O: Ops> Model<O> {
    fn new(bench: &mut Bench<O>, rows_max: usize, dtype: Dtype) -> Self {
        let mut random = Random::new(3, dtype);
        let ops = &mut bench.ops;
        Self {
            table: ops.matrix(vec![random.matrix(VOCAB, WIDTH)]).unwrap(),
            norm: ops.vector(&random.floats(WIDTH, 1.0)).unwrap(),
            gate_up: ops.gate_up_matrix(random.matrix(INNER, WIDTH), random.matrix(INNER, WIDTH)).unwrap(),
            down: ops.matrix(vec![random.matrix(WIDTH, INNER)]).unwrap(),
            head: ops.matrix(vec![random.matrix(VOCAB, WIDTH)]).unwrap(),
            residual: ops.wide_buffer(rows_max, WIDTH).unwrap(),
            normed: ops.buffer(rows_max, WIDTH).unwrap(),
            inner: ops.buffer(rows_max, INNER).unwrap(),
            partial: Partial::new(ops.buffer(rows_max, WIDTH).unwrap()),
            logits: ops.wide_buffer(rows_max.min(64), VOCAB).unwrap(),
        }
    }

    fn forward(&mut self, ops: &mut O, inputs: &O::Inputs) -> Result<(), KernelError> {
        ops.embed(inputs, &self.table, 0, &mut self.partial)?;
        ops.reduce(inputs, &mut self.partial, &mut self.residual)?;
        ops.rms_norm(inputs, &self.residual, &self.norm, 1e-5, &mut self.normed)?;
        ops.gate_up_act(inputs, &self.normed, &self.gate_up, GateActivation::Silu, &mut self.inner)?;
        ops.linear_partial(inputs, &self.inner, &self.down, &mut self.partial)?;
        let (partial, residual) = (&mut self.partial, &mut self.residual);
        ops.reduce_add_norm(inputs, partial, residual, &self.norm, 1e-5, &mut self.normed)
    }

    fn sample(&mut self, ops: &mut O, inputs: &O::Inputs, kind: SamplerKind) -> Result<(), KernelError> {
        ops.logits(inputs, &self.normed, &self.head, &mut self.logits)?;
        ops.sample(inputs, &self.logits, &VocabSlice { columns: 0..VOCAB, first_id: 0 }, kind)
    }
}

/// Rows that each are a sequence's token and sample the next one.
fn decode_step(random: &mut Random, rows: usize, output_index: u32, kind: SamplerKind) -> StepInputs {
    let row = |slot: usize| SampleRow {
        slot: slot as u32,
        output_index,
        seed: random.bits(),
        temperature: if kind == SamplerKind::Greedy { 0.0 } else { 1.0 },
        top_k: if kind == SamplerKind::Cut { 9 } else { 0 },
        top_p: if kind == SamplerKind::Cut { 0.95 } else { 1.0 },
        min_p: 0.0,
    };
    let samples: Vec<SampleRow> = (0..rows.min(64)).map(row).collect();
    let token_ids = (0..rows).map(|_| random.below(VOCAB) as u32).collect();
    let logit_rows = (0..samples.len() as u32).collect();
    StepInputs { token_ids, logit_rows, samples, ..Bench::<CudaOps>::step_of(rows) }
}

/// Several steps in flight; each but the first consumes what the one before sampled, without the host knowing it.
fn chain<O: Ops>(bench: &mut Bench<O>, dtype: Dtype, rows: usize, kind: SamplerKind) -> (Vec<StepResult>, bool) {
    let mut model = Model::new(bench, rows, dtype);
    let mut random = Random::new(rows as u64, dtype);
    let mut results = Vec::new();
    let mut refused = false;
    for round in 0..3u32 {
        for index in 0..3u32 {
            let mut step = decode_step(&mut random, rows, round * 3 + index, kind);
            if round + index > 0 {
                step.token_ids = (0..rows as u32).rev().map(|slot| LAST_TOKEN | slot).collect();
            }
            bench.load(step);
            let Bench { ops, inputs, .. } = bench;
            model.forward(ops, inputs).unwrap();
            model.sample(ops, inputs, kind).unwrap();
            ops.submit(inputs).unwrap();
        }
        results.extend((0..3).map(|_| bench.ops.take().unwrap()));
        refused = bench.ops.take().is_err();
    }
    (results, refused)
}

pub fn check_last_tokens(dtype: Dtype) {
    let (mut device, mut reference) = (device(dtype, SOME_HEADS), reference(SOME_HEADS));
    let mut findings = Findings::default();
    for kind in [SamplerKind::Greedy, SamplerKind::NoCut, SamplerKind::Cut] {
        for rows in [1, 5, 40] {
            let (got, refused) = chain(&mut device.bench, dtype, rows, kind);
            let again = chain(&mut device.bench, dtype, rows, kind).0;
            findings.holds(got == again, || format!("{kind:?} {rows} rows: another run gives other tokens"));
            findings.holds(refused, || "a step that was not submitted was taken".into());
            if dtype != Dtype::F32 {
                continue;
            }
            // Half types leave a chain where two tokens are near each other; f32 hardly ever does.
            let expected = chain(&mut reference, dtype, rows, kind).0;
            let pairs = got.iter().zip(&expected).flat_map(|(a, b)| a.tokens.iter().zip(&b.tokens));
            let different = pairs.filter(|(a, b)| a != b).count();
            findings.holds(different * 50 <= rows * 9, || format!("{kind:?} {rows} rows: {different} tokens differ"));
        }
    }
    findings.finish("last_tokens");
}

/// What came out of the steps of a case.
#[derive(PartialEq)]
pub struct Outputs {
    values: Vec<f32>,
    tokens: Vec<u32>,
}

/// A case, and how often its work was asked for.
pub struct RunCase {
    label: String,
    pub outputs: Outputs,
    num_runs: usize,
}

/// Steps whose parts go through [`Ops::run`]: what came out, and how often work was asked for.
fn through_run(
    bench: &mut Bench<CudaOps>,
    model: &mut Model<CudaOps>,
    rows: usize,
    kind: SamplerKind,
) -> (Outputs, usize) {
    let mut random = Random::new(rows as u64, Dtype::F32);
    let (mut outputs, mut num_runs) = (Outputs { values: Vec::new(), tokens: Vec::new() }, 0);
    for index in 0..4 {
        bench.load(decode_step(&mut random, rows, index, kind));
        let Bench { ops, inputs, .. } = bench;
        ops.run(inputs, StepPart::Forward, &mut |ops| {
            num_runs += 1;
            model.forward(ops, inputs)
        })
        .unwrap();
        ops.run(inputs, StepPart::Sample(kind), &mut |ops| model.sample(ops, inputs, kind)).unwrap();
        ops.submit(inputs).unwrap();
        outputs.tokens.extend(ops.take().unwrap().tokens.into_iter().flatten());
        outputs.values.extend(bench.read(&model.normed, rows));
    }
    (outputs, num_runs)
}

/// Every case on one backend and model: recordings hold their addresses.
pub fn through_runs(bench: &mut Bench<CudaOps>, dtype: Dtype) -> Vec<RunCase> {
    let mut model = Model::new(bench, 600, dtype);
    let mut all = Vec::new();
    for kind in [SamplerKind::Greedy, SamplerKind::NoCut, SamplerKind::Cut] {
        for rows in [1, 5, 16, 33, 500, 600] {
            let (outputs, num_runs) = through_run(bench, &mut model, rows, kind);
            all.push(RunCase { label: format!("{kind:?} {rows} rows"), outputs, num_runs });
        }
    }
    all
}

/// A replayed step gives the bits of an eager one; steps of more than 512 rows are not recorded.
pub fn check_recording(dtype: Dtype) {
    let mut findings = Findings::default();
    let run = |enforce_eager| {
        let settings = CudaSettings { enforce_eager, ..settings(dtype, SOME_HEADS) };
        through_runs(&mut device_with(&settings, SOME_HEADS).bench, dtype)
    };
    let (all_recorded, all_eager) = (run(false), run(true));
    for (index, (RunCase { label, outputs, num_runs }, eager)) in all_recorded.iter().zip(&all_eager).enumerate() {
        let (num_eager, eager) = (&eager.num_runs, &eager.outputs);
        findings.holds(outputs.values == eager.values, || format!("{label}: values differ from the eager ones"));
        findings.holds(outputs.tokens == eager.tokens, || format!("{label}: tokens differ from the eager ones"));
        // The first kind runs a shape once and records it; the others find it recorded.
        let expected = if label.ends_with("600 rows") { 4 } else { 2 * usize::from(index < 6) };
        findings.holds(*num_runs == expected, || format!("{label}: work was asked for {num_runs} times"));
        findings.holds(*num_eager == 4, || format!("{label}: eager work was asked for {num_eager} times"));
    }
    check_against_reference(dtype, &mut findings);
    findings.finish("recording");
}

fn check_against_reference(dtype: Dtype, findings: &mut Findings) {
    fn program<O: Ops>(bench: &mut Bench<O>, dtype: Dtype) -> Vec<f32> {
        let mut model = Model::new(bench, 33, dtype);
        bench.load(decode_step(&mut Random::new(33, dtype), 33, 0, SamplerKind::Greedy));
        model.forward(&mut bench.ops, &bench.inputs).unwrap();
        bench.read(&model.normed, 33)
    }
    let got = program(&mut device(dtype, SOME_HEADS).bench, dtype);
    let expected = program(&mut reference(SOME_HEADS), dtype);
    // Two layers' roundings, then a norm of both.
    findings.close("the whole model", &got, &expected, 2.0 * tolerance(dtype));
}
