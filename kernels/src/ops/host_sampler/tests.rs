//! Masks, edits and histories of one rank.

use std::sync::Arc;

use super::*;
use crate::ops::edit::LogitEdits;
use crate::{CollectiveError, SampleEdits, SampleMask};

const NONE: f32 = f32::NEG_INFINITY;

struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }
    fn world_size(&self) -> usize {
        1
    }
    fn all_reduce_sum(&mut self, _data: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }
    fn all_gather(&mut self, part: &[u8], out: &mut [u8]) -> Result<(), CollectiveError> {
        out.copy_from_slice(part);
        Ok(())
    }
}

fn row(slot: u32) -> SampleRow {
    SampleRow { slot, output_index: 0, seed: 0, temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 }
}

fn step() -> StepInputs {
    StepInputs { logit_rows: vec![0, 1], samples: vec![row(0), row(1)], ..StepInputs::default() }
}

fn edited(edits: LogitEdits, history: Option<TokenHistory>) -> SampleEdits {
    SampleEdits { row: 1, edits: Arc::new(edits), history: history.map(Arc::new) }
}

/// Two rows over three columns that stand for tokens 31 to 33, with one column of padding.
const LOGITS: [f32; 8] = [1.0, 2.0, 3.0, 9.0, 4.0, 5.0, 6.0, 9.0];

fn vocab() -> VocabSlice {
    VocabSlice { first_id: 31, columns: 0..3 }
}

fn sampled(sampler: &mut HostSampler, step: &StepInputs) -> Vec<Option<u32>> {
    sampler.sample(&mut Alone, &LOGITS, &vocab(), SamplerKind::Greedy, step).unwrap();
    sampler.submit().unwrap();
    sampler.take().unwrap().tokens
}

fn sampler() -> HostSampler {
    let mut sampler = HostSampler::default();
    sampler.plan(&InputLimits { slots_max: 4, steps_max: 1, ..InputLimits::default() });
    sampler
}

#[test]
fn masked_rows_keep_what_they_may_draw() {
    let (vocab, mut step) = (vocab(), step());
    let mut view = View::new(&vocab, &LOGITS, 2);
    step.masks = vec![SampleMask { row: 1, words: [1 << 31, 1 << 1].into() }];
    sampler().change(&mut view, &step, true);
    assert_eq!((view.row(0), view.row(1)), (&[1.0, 2.0, 3.0][..], &[4.0, NONE, 6.0][..]));
    assert_eq!(sampled(&mut sampler(), &step), [Some(33), Some(33)]);
}

#[test]
fn histories_grow_in_their_slot_until_another_sequence_takes_it() {
    let (mut sampler, mut step) = (sampler(), step());
    let penalty = || LogitEdits { frequency_penalty: 0.75, ..LogitEdits::default() };
    step.edits = vec![edited(penalty(), Some(TokenHistory::new(&[], &[])))];
    assert_eq!(sampled(&mut sampler, &step)[1], Some(33));
    step.edits = vec![edited(penalty(), None)];
    assert_eq!(sampled(&mut sampler, &step)[1], Some(33), "5.25 is above 5");
    assert_eq!(sampled(&mut sampler, &step), [Some(33), Some(32)], "4.5 is not");
    step.edits = vec![edited(penalty(), Some(TokenHistory::new(&[], &[])))];
    assert_eq!(sampled(&mut sampler, &step)[1], Some(33));
}

#[test]
fn rows_that_may_draw_nothing_take_the_best_that_their_mask_leaves() {
    let (mut sampler, mut step) = (sampler(), step());
    let nothing = LogitEdits { allowed: Some(vec![0]), ..LogitEdits::default() };
    step.edits = vec![edited(nothing, Some(TokenHistory::new(&[], &[])))];
    assert_eq!(sampled(&mut sampler, &step), [Some(33), Some(33)]);
    step.masks = vec![SampleMask { row: 1, words: [1 << 31].into() }];
    assert_eq!(sampled(&mut sampler, &step), [Some(33), Some(31)]);
    step.masks = vec![SampleMask { row: 1, words: [0].into() }];
    assert_eq!(sampled(&mut sampler, &step), [Some(33), Some(33)]);
}
