//! Sampling and scoring on logits that are the same bits on both backends: the same tokens, places and best tokens.

use phalanx_kernels::cuda::Dtype;
use phalanx_kernels::{Ops, SampleRow, SamplerKind, ScoreRow, StepInputs, StepResult, VocabSlice};

use crate::bench::{Bench, Findings, Random, SOME_HEADS, device, reference};
use crate::products::exact_logits;

/// Vocabularies that nothing divides, and one that is looked at in parts.
const VOCABULARIES: [usize; 3] = [17, 1003, 20_011];

/// Logits over a vocabulary, some of which is padding that nobody may draw, and what is wanted of them.
pub struct Case {
    pub logits: Vec<f32>,
    pub rows: usize,
    pub slice: VocabSlice,
    pub kind: SamplerKind,
    pub samples: Vec<Vec<SampleRow>>,
    pub scores: Vec<ScoreRow>,
}

impl Case {
    /// `rows` rows; the first and last columns belong to nobody and hold what would win.
    pub fn new(random: &mut Random, rows: usize, vocab: usize, kind: SamplerKind) -> Self {
        let mut logits = random.floats(rows * vocab, 9.0);
        for row in logits.chunks_mut(vocab) {
            (row[0], row[vocab - 1]) = (20.0, 30.0);
        }
        let slice = VocabSlice { columns: 1..vocab - 1, first_id: 5 };
        Self { logits, rows, slice, kind, samples: Vec::new(), scores: Vec::new() }
    }

    /// Parameters of one more step.
    pub fn draw(&mut self, random: &mut Random, output_index: u32) {
        let greedy = self.kind == SamplerKind::Greedy;
        let cut = self.kind == SamplerKind::Cut;
        let row = |slot: usize| SampleRow {
            slot: slot as u32,
            output_index,
            seed: random.bits(),
            temperature: if greedy || slot % 7 == 6 { 0.0 } else { [0.3, 0.7, 1.0, 2.5][random.below(4)] },
            top_k: if cut { [0, 1, 2, 20, 100][random.below(5)] } else { 0 },
            top_p: if cut { [1.0, 0.1, 0.5, 0.9, 0.99][random.below(5)] } else { 1.0 },
            min_p: if cut { [0.0, 0.05, 0.5][random.below(3)] } else { 0.0 },
        };
        self.samples.push((0..self.rows).map(row).collect());
    }
}

/// Samples and scores step by step.
pub fn program<O: Ops>(bench: &mut Bench<O>, case: &Case, dtype: Dtype) -> Vec<StepResult> {
    let (x, head) = exact_logits(bench, &case.logits, case.rows, dtype);
    let mut logits = bench.ops.wide_buffer(case.rows, case.logits.len() / case.rows).unwrap();
    let mut results = Vec::new();
    for samples in &case.samples {
        let logit_rows = (0..case.rows as u32).collect();
        let (samples, scores) = (samples.clone(), case.scores.clone());
        bench.load(StepInputs { logit_rows, samples, scores, ..Bench::<O>::step_of(case.rows) });
        let Bench { ops, inputs, .. } = bench;
        ops.logits(inputs, &x, &head, &mut logits).unwrap();
        ops.sample(inputs, &logits, &case.slice, case.kind).unwrap();
        ops.score(inputs, &logits, &case.slice).unwrap();
        ops.submit(inputs).unwrap();
        results.push(ops.take().unwrap());
    }
    results
}

/// The highest logit, ties to the lower id; none where a row has no finite logit.
pub fn check_greedy(dtype: Dtype) {
    let (mut device, mut reference) = (device(dtype, SOME_HEADS), reference(SOME_HEADS));
    let mut findings = Findings::default();
    for (seed, vocab) in (1..).zip(VOCABULARIES) {
        for rows in [1, 5, 33] {
            let mut random = Random::new(seed * 100 + rows as u64, dtype);
            let mut case = Case::new(&mut random, rows, vocab, SamplerKind::Greedy);
            case.draw(&mut random, 0);
            let got = program(&mut device.bench, &case, dtype);
            let expected = program(&mut reference, &case, dtype);
            findings.holds(got == expected, || format!("{rows} rows of {vocab}: {got:?}, not {expected:?}"));
        }
    }
    check_row_without_tokens(&mut device.bench, &mut findings);
    findings.finish("greedy");
}

/// A row of NaN samples nothing, and the rows beside it do not suffer.
fn check_row_without_tokens<O: Ops>(bench: &mut Bench<O>, findings: &mut Findings) {
    let (rows, vocab) = (3, 64);
    let values: Vec<f32> = (0..rows * 8).map(|i| if i / 8 == 1 { f32::NAN } else { (i % 8) as f32 }).collect();
    let x = bench.filled(&values, 8);
    let head = Random::new(1, Dtype::Bf16).matrix(vocab, 8);
    let head = bench.ops.matrix(vec![head]).unwrap();
    let mut logits = bench.ops.wide_buffer(rows, vocab).unwrap();
    let row = SampleRow { slot: 0, output_index: 0, seed: 1, temperature: 1.0, top_k: 5, top_p: 0.9, min_p: 0.0 };
    let samples = (0..rows as u32).map(|slot| SampleRow { slot, ..row }).collect();
    bench.load(StepInputs { logit_rows: vec![0, 1, 2], samples, ..Bench::<O>::step_of(rows) });
    let slice = VocabSlice { columns: 0..vocab, first_id: 0 };
    for kind in [SamplerKind::Greedy, SamplerKind::NoCut, SamplerKind::Cut] {
        let Bench { ops, inputs, .. } = bench;
        ops.logits(inputs, &x, &head, &mut logits).unwrap();
        ops.sample(inputs, &logits, &slice, kind).unwrap();
        ops.submit(inputs).unwrap();
        let tokens = ops.take().unwrap().tokens;
        let holds = tokens[0].is_some() && tokens[1].is_none() && tokens[2].is_some();
        findings.holds(holds, || format!("{kind:?} with a row of NaN: {tokens:?}"));
    }
}

/// Draws with and without a cut: the tokens of the host's sampler, which is held to reference distributions.
///
/// The device sums masses as integers and the host in f64: a top-p may end one token further where its edge lies within
/// rounding of it. One draw in two hundred may differ for that.
pub fn check_draws(dtype: Dtype) {
    let (mut device, mut reference) = (device(dtype, SOME_HEADS), reference(SOME_HEADS));
    let mut findings = Findings::default();
    let (mut num_draws, mut num_different) = (0, 0);
    for (seed, vocab) in (1..).zip(VOCABULARIES) {
        for kind in [SamplerKind::NoCut, SamplerKind::Cut] {
            for (rows, steps) in [(1, 8), (7, 8), (40, 12)] {
                let mut random = Random::new(seed * 100 + rows as u64, dtype);
                let mut case = Case::new(&mut random, rows, vocab, kind);
                (0..steps).for_each(|index| case.draw(&mut random, index));
                let got = program(&mut device.bench, &case, dtype);
                let expected = program(&mut reference, &case, dtype);
                for (got, expected) in got.iter().zip(&expected) {
                    let own = |token: &Option<u32>| token.is_some_and(|id| (5..vocab as u32 + 3).contains(&id));
                    findings.holds(got.tokens.len() == rows && got.tokens.iter().all(own), || format!("{got:?}"));
                    num_draws += rows;
                    num_different += got.tokens.iter().zip(&expected.tokens).filter(|(a, b)| a != b).count();
                }
            }
        }
    }
    println!("{num_different} of {num_draws} draws differ from the host's");
    findings.holds(num_different * 200 <= num_draws, || format!("{num_different} of {num_draws} draws differ"));
    findings.finish("draws");
}

/// Log-probabilities, ranks and best tokens, of given tokens and of sampled ones.
pub fn check_scores(dtype: Dtype) {
    let (mut device, mut reference) = (device(dtype, SOME_HEADS), reference(SOME_HEADS));
    let mut findings = Findings::default();
    for (seed, vocab) in (1..).zip(VOCABULARIES) {
        for (rows, num_scores) in [(1, 1), (5, 3), (9, 9), (33, 33)] {
            let mut random = Random::new(seed * 100 + rows as u64, dtype);
            let mut case = Case::new(&mut random, rows, vocab, SamplerKind::Greedy);
            case.scores = scores(&mut random, rows, num_scores, vocab);
            case.draw(&mut random, 0);
            let got = program(&mut device.bench, &case, dtype);
            let expected = program(&mut reference, &case, dtype);
            compare_scores(&format!("{num_scores} of {rows} rows of {vocab}"), &got, &expected, &mut findings);
        }
    }
    findings.finish("scores");
}

/// Scored rows: given tokens and sampled ones, with few and many alternatives.
pub fn scores(random: &mut Random, rows: usize, num: usize, vocab: usize) -> Vec<ScoreRow> {
    let score = |index: usize| ScoreRow {
        row: (index % rows) as u32,
        token: (index % 2 == 1).then(|| 5 + random.below(vocab - 2) as u32),
        num_top: [0, 1, 5, 20][index % 4],
    };
    (0..num).map(score).collect()
}

/// Tokens, places and alternatives are the same; log-probabilities differ by the rounding of one sum.
pub fn compare_scores(label: &str, got: &[StepResult], expected: &[StepResult], findings: &mut Findings) {
    for (got, expected) in got.iter().zip(expected) {
        findings
            .holds(got.tokens == expected.tokens, || format!("{label}: {:?} and {:?}", got.tokens, expected.tokens));
        findings.holds(got.scores.len() == expected.scores.len(), || format!("{label}: {} scores", got.scores.len()));
        for (got, expected) in got.scores.iter().zip(&expected.scores) {
            let ids = |top: &[(u32, f32)]| top.iter().map(|(id, _)| *id).collect::<Vec<u32>>();
            let same = (got.token, got.rank) == (expected.token, expected.rank) && ids(&got.top) == ids(&expected.top);
            let pairs = got.top.iter().zip(&expected.top).map(|(a, b)| (a.1, b.1));
            let near = |(a, b): (f32, f32)| (a - b).abs() <= 2e-5 + b.abs() * 2e-6;
            let all_near = pairs.chain([(got.logprob, expected.logprob)]).all(near);
            findings.holds(same && all_near, || format!("{label}: {got:?}, not {expected:?}"));
        }
    }
}
