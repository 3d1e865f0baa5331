//! Masks and edits of logits: the same values and tokens as on the host, with steps in flight whose tokens only the device knows.

use std::sync::Arc;

use phalanx_kernels::cuda::{CudaSettings, Dtype};
use phalanx_kernels::ops::edit::{LogitEdits, TokenHistory, apply_mask};
use phalanx_kernels::{Ops, SampleEdits, SampleMask, SamplerKind, StepInputs, StepPart, StepResult};

use crate::bench::{Bench, Findings, Random, SOME_HEADS, device, device_with, reference, settings};
use crate::products::exact_logits;
use crate::sampling::{Case, compare_scores, scores};

/// Steps of a case; three are in flight at a time.
const NUM_STEPS: u32 = 9;
const IN_FLIGHT: usize = 3;

/// A case with masks and edits in some of its steps and rows.
pub struct Edited {
    pub case: Case,
    changes: Vec<(Vec<SampleMask>, Vec<SampleEdits>)>,
}

/// Edits of a row of tokens from 5 up to `end`. A bias lifts few tokens above all others, so that bans and penalties meet them.
fn edits(random: &mut Random, end: usize) -> (LogitEdits, TokenHistory) {
    let mut best: Vec<u32> = (0..5).map(|_| 5 + random.below(end - 5) as u32).collect();
    best.dedup();
    let of = |random: &mut Random, len: usize| (0..len).map(|_| best[random.below(best.len())]).collect::<Vec<u32>>();
    let mut bias: Vec<(u32, f32)> = best.iter().zip([14.0, 14.5, 15.0, 15.25, 16.0]).map(|(t, b)| (*t, b)).collect();
    bias.sort_by_key(|(token, _)| *token);
    bias.dedup_by_key(|(token, _)| *token);
    let one_in = |random: &mut Random, n: usize| random.below(n) == 0;
    let words = end.div_ceil(32);
    let edits = LogitEdits {
        presence_penalty: [0.0, 0.75, -0.5][random.below(3)],
        frequency_penalty: [0.0, 1.5, 0.3, -0.2][random.below(4)],
        repetition_penalty: [1.0, 1.7, 0.6][random.below(3)],
        bias: if one_in(random, 4) { Vec::new() } else { bias },
        allowed: match random.below(8) {
            0 => Some(vec![0]),
            1 | 2 => Some((0..words).map(|_| random.bits() as u32 | random.bits() as u32).collect()),
            _ => None,
        },
        bad_words: (0..random.below(7)).map(|index| of(random, index % 4)).collect(),
        min_tokens: random.below(8) as u32,
        end_tokens: of(random, 2),
    };
    let mut prompt: Vec<u32> = (0..random.below(40)).map(|_| random.below(end) as u32).collect();
    prompt.extend(of(random, 2));
    let output = of(random, 3);
    (edits, TokenHistory::new(&prompt, &output))
}

impl Edited {
    /// What is changed comes from `random`, which is the same on all ranks; tokens reach to `end`.
    pub fn new(mut case: Case, random: &mut Random, end: usize) -> Self {
        let rows = case.rows;
        let mut sequences: Vec<_> = (0..rows).map(|_| edits(random, end)).collect();
        let mut is_new = vec![true; rows];
        let mut changes = Vec::new();
        for index in 0..NUM_STEPS {
            case.draw(random, index);
            // Between edited steps there is a plain one, and later another sequence comes to a slot.
            let is_plain = index == 4;
            if index == 6 {
                (sequences[0], is_new[0]) = (edits(random, end), true);
            }
            let (mut masks, mut all) = (Vec::new(), Vec::new());
            for row in (0..rows).filter(|_| !is_plain) {
                let masked = row % 3 == 1 && random.below(4) > 0;
                let words: Vec<u32> = (0..end.div_ceil(32)).map(|_| random.bits() as u32).collect();
                let words = if random.below(6) == 0 { vec![0; random.below(3)] } else { words };
                if masked {
                    masks.push(SampleMask { row: row as u32, words: words.into() });
                }
                if row % 4 != 3 {
                    let (edits, history) = &sequences[row];
                    let history = std::mem::take(&mut is_new[row]).then(|| Arc::new(history.clone()));
                    all.push(SampleEdits { row: row as u32, edits: Arc::new(edits.clone()), history });
                }
            }
            changes.push((masks, all));
        }
        Self { case, changes }
    }

    fn step<O: Ops>(&self, index: usize) -> StepInputs {
        let Case { rows, samples, scores, .. } = &self.case;
        let (masks, edits) = self.changes[index].clone();
        let (samples, scores) = (samples[index].clone(), scores.clone());
        let logit_rows = (0..*rows as u32).collect();
        StepInputs { logit_rows, samples, scores, masks, edits, ..Bench::<O>::step_of(*rows) }
    }
}

/// Samples and scores step by step, several in flight. Recorded parts hold addresses: then this runs once on a backend.
pub fn program<O: Ops>(bench: &mut Bench<O>, edited: &Edited, dtype: Dtype, recorded: bool) -> Vec<StepResult> {
    let Case { logits: values, rows, slice, kind, samples, .. } = &edited.case;
    let (x, head) = exact_logits(bench, values, *rows, dtype);
    let mut logits = bench.ops.wide_buffer(*rows, values.len() / rows).unwrap();
    let mut results = Vec::new();
    for index in 0..samples.len() {
        bench.load(edited.step::<O>(index));
        let Bench { ops, inputs, .. } = bench;
        let mut work = |ops: &mut O| {
            ops.logits(inputs, &x, &head, &mut logits)?;
            ops.sample(inputs, &logits, slice, *kind)
        };
        if recorded {
            ops.run(inputs, StepPart::Sample(*kind), &mut work).unwrap()
        } else {
            work(ops).unwrap()
        }
        ops.logits(inputs, &x, &head, &mut logits).unwrap();
        ops.score(inputs, &logits, slice).unwrap();
        ops.submit(inputs).unwrap();
        if (index + 1) % IN_FLIGHT == 0 {
            results.extend((0..IN_FLIGHT).map(|_| ops.take().unwrap()));
        }
    }
    results
}

/// Greedy steps are equal. Of draws: how many rows part from the reference somewhere, which they then stay (see `check_draws`).
fn num_parted(
    label: &str,
    kind: SamplerKind,
    got: &[StepResult],
    expected: &[StepResult],
    findings: &mut Findings,
) -> usize {
    if kind == SamplerKind::Greedy {
        compare_scores(label, got, expected, findings);
        return 0;
    }
    let rows = expected.first().map_or(0, |step| step.tokens.len());
    findings.holds(got.len() == expected.len(), || format!("{label}: {} steps", got.len()));
    let parts = |row: &usize| got.iter().zip(expected).any(|(got, expected)| got.tokens[*row] != expected.tokens[*row]);
    (0..rows).filter(parts).count()
}

/// Every kind of sampler, vocabularies that nothing divides, rows with and without edits.
pub fn check_tokens(dtype: Dtype) {
    let (mut device, mut reference) = (device(dtype, SOME_HEADS), reference(SOME_HEADS));
    let mut findings = Findings::default();
    let (mut num_drawn, mut num_different) = (0, 0);
    for (seed, vocab) in (1..).zip([35, 1003, 20_011]) {
        for kind in [SamplerKind::Greedy, SamplerKind::NoCut, SamplerKind::Cut] {
            for rows in [1, 5, 40] {
                let mut random = Random::new(seed * 100 + rows as u64, dtype);
                let mut case = Case::new(&mut random, rows, vocab, kind);
                case.scores = scores(&mut random, rows, rows, vocab);
                let edited = Edited::new(case, &mut random, vocab + 3);
                let got = program(&mut device.bench, &edited, dtype, false);
                let expected = program(&mut reference, &edited, dtype, false);
                let label = format!("{kind:?} {rows} rows of {vocab}");
                num_different += num_parted(&label, kind, &got, &expected, &mut findings);
                num_drawn += rows;
            }
        }
    }
    println!("{num_different} of {num_drawn} rows part from the host's");
    findings.holds(num_different * 30 <= num_drawn, || format!("{num_different} of {num_drawn} rows part"));
    findings.finish("edits");
}

/// A row as the host changes it; where that leaves nothing, with its mask alone, or as it is.
fn changed(edited: &Edited, row: usize, raw: &[f32]) -> Vec<f32> {
    let (masks, edits) = &edited.changes[0];
    let first_id = edited.case.slice.first_id;
    let mut masked = raw.to_vec();
    for mask in masks.iter().filter(|mask| mask.row as usize == row) {
        apply_mask(&mask.words, &mut masked, first_id);
    }
    let mut all = masked.clone();
    for edit in edits.iter().filter(|edit| edit.row as usize == row) {
        edit.edits.apply(edit.history.as_deref().unwrap(), &mut all, first_id);
    }
    let lives = |logits: &Vec<f32>| logits.iter().any(|logit| *logit > f32::NEG_INFINITY);
    [all, masked].into_iter().find(lives).unwrap_or_else(|| raw.to_vec())
}

/// Each logit of each row is what the host makes of it, bit by bit; columns that belong to nobody stay as they are.
pub fn check_values(dtype: Dtype) {
    let mut device = device(dtype, SOME_HEADS);
    let mut findings = Findings::default();
    for (seed, vocab) in (1..).zip([17, 35, 1003, 20_011]) {
        for rows in [1, 7, 40] {
            let mut random = Random::new(seed * 1000 + rows as u64, dtype);
            let case = Case::new(&mut random, rows, vocab, SamplerKind::Greedy);
            let edited = Edited::new(case, &mut random, vocab + 3);
            let (bench, slice) = (&mut device.bench, &edited.case.slice);
            let (x, head) = exact_logits(bench, &edited.case.logits, rows, dtype);
            let mut logits = bench.ops.wide_buffer(rows, vocab).unwrap();
            bench.load(edited.step::<phalanx_kernels::cuda::CudaOps>(0));
            bench.ops.logits(&bench.inputs, &x, &head, &mut logits).unwrap();
            let raw = bench.read(&logits, rows);
            bench.ops.sample(&bench.inputs, &logits, slice, SamplerKind::Greedy).unwrap();
            bench.ops.submit(&bench.inputs).unwrap();
            bench.ops.take().unwrap();
            let got = bench.read(&logits, rows);
            for (row, (got, raw)) in got.chunks(vocab).zip(raw.chunks(vocab)).enumerate() {
                let mut expected = raw.to_vec();
                expected[slice.columns.clone()].copy_from_slice(&changed(&edited, row, &raw[slice.columns.clone()]));
                let wrong = got.iter().zip(&expected).position(|(got, expected)| got != expected);
                findings.holds(wrong.is_none(), || {
                    let at = wrong.unwrap_or_default();
                    format!("row {row} of {rows}, column {at} of {vocab}: {}, not {}", got[at], expected[at])
                });
            }
        }
    }
    findings.finish("edited_values");
}

/// Recorded steps, edited and plain ones in turn, give the tokens of eager ones.
pub fn check_recording(dtype: Dtype) {
    let mut findings = Findings::default();
    for kind in [SamplerKind::Greedy, SamplerKind::Cut] {
        let mut random = Random::new(77, dtype);
        let case = Case::new(&mut random, 5, 1003, kind);
        let edited = Edited::new(case, &mut random, 1006);
        let [recorded, eager] = [false, true].map(|enforce_eager| {
            let settings = CudaSettings { enforce_eager, ..settings(dtype, SOME_HEADS) };
            program(&mut device_with(&settings, SOME_HEADS).bench, &edited, dtype, true)
        });
        findings.holds(recorded == eager, || format!("{kind:?}: {recorded:?}, eager {eager:?}"));
        let expected = program(&mut reference(SOME_HEADS), &edited, dtype, false);
        let num_different = num_parted(&format!("{kind:?}"), kind, &recorded, &expected, &mut findings);
        findings.holds(num_different < 2, || format!("{kind:?}: {num_different} of 5 rows part from the host's"));
    }
    findings.finish("recorded_edits");
}
