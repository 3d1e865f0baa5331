//! Sampling over a split vocabulary, for backends whose logits are in host memory: the same token on every rank.
//!
//! Owns the sequence of gathers, the last token of every slot, and results until they are taken. The arithmetic between the
//! gathers is [`super::sample`]. All calls that gather are collective.
//!
//! **Invariant:** which gathers happen, and their sizes, depend only on the step and on what was gathered before. What a gather brought
//! is merged in rank order, so all ranks hold the same bits, and padding of the vocabulary is never seen.
//! **Invariant:** a row has a token where it has a finite logit at all: where edits leave none, the row draws without them, and where its
//! mask leaves none either, it takes the best token.

mod gather;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};

use super::edit::{TokenHistory, apply_mask};
use super::sample::{Candidate, Cut, CutParams, Histogram, MaxSum, RandomKey, draw, num_above, top_n};
use crate::{
    Collective, InputLimits, KernelError, LAST_TOKEN, SCORED_TOP_MAX, SampleRow, SamplerFeatures, SamplerKind,
    ScoreRow, StepInputs, StepResult, VocabSlice,
};
use gather::{Gather, Merged};

/// Samples and scores from this rank's slice of the logits.
#[derive(Debug, Default)]
pub struct HostSampler {
    last_tokens: Vec<u32>,
    /// The tokens of slots whose logits are edited.
    histories: HashMap<u32, TokenHistory>,
    steps_max: usize,
    current: StepResult,
    done: VecDeque<StepResult>,
    gather: Gather,
}

impl HostSampler {
    /// All that a step may ask for.
    pub const FEATURES: SamplerFeatures = SamplerFeatures { masks: true, edits: true, keeps_logits: true };

    /// Makes room for slots and steps.
    pub fn plan(&mut self, limits: &InputLimits) {
        self.last_tokens.resize(limits.slots_max, 0);
        self.steps_max = limits.steps_max;
    }

    /// Puts ids in the place of [`LAST_TOKEN`] marks.
    ///
    /// # Errors
    /// A mark names no slot.
    pub fn resolve(&self, token_ids: &mut [u32]) -> Result<(), KernelError> {
        for id in token_ids.iter_mut().filter(|id| **id & LAST_TOKEN != 0) {
            let slot = *id & !LAST_TOKEN;
            *id = *self.last_tokens.get(slot as usize).ok_or_else(|| no_slot(slot, self.last_tokens.len()))?;
        }
        Ok(())
    }

    /// Ends a step.
    ///
    /// # Errors
    /// More steps than were planned.
    pub fn submit(&mut self) -> Result<(), KernelError> {
        if self.done.len() >= self.steps_max {
            let reason = format!("{} steps are not taken yet", self.done.len());
            return Err(KernelError::Shape { op: "submit", reason });
        }
        self.done.push_back(std::mem::take(&mut self.current));
        Ok(())
    }

    /// Whether a step can be taken.
    pub fn is_done(&self) -> bool {
        !self.done.is_empty()
    }

    /// The oldest step's results.
    ///
    /// # Errors
    /// None was submitted.
    pub fn take(&mut self) -> Result<StepResult, KernelError> {
        let nothing = || KernelError::Shape { op: "take", reason: "no step was submitted".into() };
        self.done.pop_front().ok_or_else(nothing)
    }

    /// Draws one token for each of the step's samples. `logits` `[rows, width]`. Collective.
    ///
    /// # Errors
    /// A slot that was not planned, or a broken group.
    pub fn sample(
        &mut self,
        group: &mut dyn Collective,
        logits: &[f32],
        vocab: &VocabSlice,
        kind: SamplerKind,
        step: &StepInputs,
    ) -> Result<(), KernelError> {
        let rows = &step.samples;
        let mut view = View::new(vocab, logits, step.logit_rows.len());
        self.remember(step);
        self.change(&mut view, step, true);
        let mut best = self.best(group, &view, rows, kind)?;
        for with_masks in [true, false] {
            let is_changed = |index: usize| view.changed.get(index).is_some_and(Option::is_some);
            let without: Vec<usize> =
                (0..rows.len()).filter(|&index| best[index].is_none() && is_changed(index)).collect();
            if without.is_empty() {
                break;
            }
            view.changed.clear();
            if with_masks {
                self.change(&mut view, step, false);
            }
            let again = self.best(group, &view, rows, SamplerKind::NoCut)?;
            without.into_iter().for_each(|index| best[index] = again[index]);
        }
        self.keep(step, best)
    }

    /// The token of each row.
    fn best(
        &mut self,
        group: &mut dyn Collective,
        view: &View<'_>,
        rows: &[SampleRow],
        kind: SamplerKind,
    ) -> Result<Vec<Option<u32>>, KernelError> {
        let floors = match kind {
            SamplerKind::Cut => self.floors(group, view, rows)?,
            SamplerKind::Greedy | SamplerKind::NoCut => vec![0; rows.len()],
        };
        self.gather.part.clear();
        for (index, row) in rows.iter().enumerate() {
            let (local, first_id, temperature) = (view.row(index), view.vocab.first_id, row.temperature);
            let best = if temperature == 0.0 {
                Candidate::best(local, first_id)
            } else {
                let key = RandomKey { seed: row.seed, output_index: row.output_index };
                draw(local, first_id, temperature, floors[index], &key)
            };
            self.gather.part.extend_from_slice(&Candidate::to_bytes(best));
        }
        self.gather.run(group)?;
        Ok((0..rows.len()).map(|index| self.gather.best(index).map(|best| best.id)).collect())
    }

    /// Takes in the tokens of sequences whose logits are edited from now on.
    fn remember(&mut self, step: &StepInputs) {
        for edited in &step.edits {
            if let (Some(history), Some(row)) = (&edited.history, step.samples.get(edited.row as usize)) {
                self.histories.insert(row.slot, TokenHistory::clone(history));
            }
        }
    }

    /// Masks rows, and edits them where that is wanted. Scores keep to the raw logits.
    fn change(&self, view: &mut View<'_>, step: &StepInputs, with_edits: bool) {
        for mask in &step.masks {
            let first_id = view.vocab.first_id;
            apply_mask(&mask.words, view.row_mut(mask.row as usize), first_id);
        }
        for edited in step.edits.iter().filter(|_| with_edits) {
            let history = step.samples.get(edited.row as usize).and_then(|row| self.histories.get(&row.slot));
            let Some(history) = history else { continue };
            let first_id = view.vocab.first_id;
            edited.edits.apply(history, view.row_mut(edited.row as usize), first_id);
        }
    }

    /// Keeps what was drawn, for results and for later steps.
    fn keep(&mut self, step: &StepInputs, tokens: Vec<Option<u32>>) -> Result<(), KernelError> {
        for (row, token) in step.samples.iter().zip(&tokens) {
            let num_slots = self.last_tokens.len();
            let last = self.last_tokens.get_mut(row.slot as usize).ok_or_else(|| no_slot(row.slot, num_slots))?;
            *last = token.unwrap_or(*last);
        }
        for edited in &step.edits {
            let Some(row) = step.samples.get(edited.row as usize) else { continue };
            let token = tokens.get(edited.row as usize).copied().flatten();
            if let (Some(history), Some(token)) = (self.histories.get_mut(&row.slot), token) {
                history.push(token);
            }
        }
        self.current.tokens = tokens;
        Ok(())
    }

    /// The lowest key that survives each row's cut: the largest logits, then histograms of the passes that rows take part in.
    fn floors(
        &mut self,
        group: &mut dyn Collective,
        view: &View<'_>,
        rows: &[SampleRow],
    ) -> Result<Vec<u32>, KernelError> {
        let mut cuts = self.cuts(group, view, rows)?;
        let (mut histogram, mut bytes) = (Histogram::default(), vec![0; Histogram::BYTES]);
        for pass in 0..Cut::NUM_PASSES {
            let taking: Vec<usize> =
                (0..rows.len()).filter(|&i| cuts[i].as_ref().is_some_and(|cut| cut.takes_part(pass))).collect();
            if taking.is_empty() {
                continue;
            }
            self.gather.part.clear();
            for (cut, row) in taking.iter().filter_map(|&i| Some((cuts[i].as_ref()?, view.row(i)))) {
                cut.histogram(pass, row, &mut histogram);
                histogram.write_to(&mut bytes);
                self.gather.part.extend_from_slice(&bytes);
            }
            self.gather.run(group)?;
            for (entry, &index) in taking.iter().enumerate() {
                let mut merged = Histogram::default();
                self.gather.entries(entry, Histogram::BYTES).for_each(|part| merged.add_bytes(part));
                if let Some(cut) = &mut cuts[index] {
                    cut.apply(pass, &merged);
                }
            }
        }
        Ok(cuts.iter().map(|cut| cut.as_ref().map_or(0, Cut::floor)).collect())
    }

    /// The cut of each row that draws, from the row's largest logit over all ranks.
    fn cuts(
        &mut self,
        group: &mut dyn Collective,
        view: &View<'_>,
        rows: &[SampleRow],
    ) -> Result<Vec<Option<Cut>>, KernelError> {
        self.gather.part.clear();
        for index in 0..rows.len() {
            let best = Candidate::best(view.row(index), view.vocab.first_id);
            self.gather.part.extend_from_slice(&Candidate::to_bytes(best));
        }
        self.gather.run(group)?;
        let cut = |(index, row): (usize, &SampleRow)| {
            let SampleRow { temperature, top_k, top_p, min_p, .. } = *row;
            let max = self.gather.best(index).map_or(f32::NEG_INFINITY, |best| best.value as f32);
            (temperature > 0.0).then(|| Cut::new(CutParams { temperature, top_k, top_p, min_p }, max))
        };
        Ok(rows.iter().enumerate().map(cut).collect())
    }

    /// Log-probabilities of the raw logits: of each scored row's token with its rank, and of the best ones. Collective.
    ///
    /// # Errors
    /// A broken group.
    pub fn score(
        &mut self,
        group: &mut dyn Collective,
        logits: &[f32],
        vocab: &VocabSlice,
        step: &StepInputs,
    ) -> Result<(), KernelError> {
        let rows: Vec<Wanted> = step.scores.iter().filter_map(|row| self.wanted(row)).collect();
        if rows.is_empty() {
            return Ok(());
        }
        let num_top = rows.iter().map(|row| row.num_top).max().unwrap_or(0) as usize;
        let view = View::new(vocab, logits, step.logit_rows.len());
        self.gather.part.clear();
        for row in &rows {
            let local = view.row(row.row);
            self.gather.part.extend_from_slice(&MaxSum::of(local).to_bytes());
            self.gather.part.extend_from_slice(&view.logit(row).unwrap_or(f32::NEG_INFINITY).to_le_bytes());
            let top = top_n(local, vocab.first_id, num_top);
            for place in 0..num_top {
                self.gather.part.extend_from_slice(&Candidate::to_bytes(top.get(place).copied()));
            }
        }
        self.gather.run(group)?;
        let merged: Vec<Merged> =
            rows.iter().enumerate().map(|(index, row)| self.gather.merged(index, row, num_top)).collect();
        self.gather.part.clear();
        for (row, merged) in rows.iter().zip(&merged) {
            self.gather.part.extend_from_slice(&num_above(view.row(row.row), merged.logit).to_le_bytes());
        }
        self.gather.run(group)?;
        for (index, merged) in merged.into_iter().enumerate() {
            let rank = 1 + self.gather.sum(index);
            self.current.scores.push(merged.finish(rank));
        }
        Ok(())
    }

    /// The token of a scored row; `None` where it was to be sampled and could not be.
    fn wanted(&self, row: &ScoreRow) -> Option<Wanted> {
        let sampled = || self.current.tokens.get(row.row as usize).copied().flatten();
        let token = row.token.or_else(sampled)?;
        Some(Wanted { row: row.row as usize, token, num_top: row.num_top.min(SCORED_TOP_MAX) })
    }
}

fn no_slot(slot: u32, num_slots: usize) -> KernelError {
    KernelError::Shape { op: "sample", reason: format!("slot {slot} of {num_slots}") }
}

/// A row to score, its token known.
struct Wanted {
    row: usize,
    token: u32,
    num_top: u32,
}

/// Rows of the logits buffer, without padding.
struct View<'a> {
    vocab: &'a VocabSlice,
    data: &'a [f32],
    width: usize,
    /// Rows that were changed, by their index.
    changed: Vec<Option<Vec<f32>>>,
}

impl<'a> View<'a> {
    fn new(vocab: &'a VocabSlice, data: &'a [f32], num_rows: usize) -> Self {
        Self { vocab, data, width: data.len() / num_rows.max(1), changed: Vec::new() }
    }

    fn row(&self, index: usize) -> &[f32] {
        match self.changed.get(index) {
            Some(Some(row)) => row,
            _ => self.raw(index),
        }
    }

    fn raw(&self, index: usize) -> &'a [f32] {
        let begin = index * self.width;
        &self.data[begin + self.vocab.columns.start..begin + self.vocab.columns.end]
    }

    /// A copy of a row, seen in its place from now on.
    fn row_mut(&mut self, index: usize) -> &mut Vec<f32> {
        if self.changed.len() <= index {
            self.changed.resize(index + 1, None);
        }
        let raw = self.raw(index);
        self.changed[index].get_or_insert_with(|| raw.to_vec())
    }

    /// The logit of a row's token, if it is this rank's.
    fn logit(&self, row: &Wanted) -> Option<f32> {
        let index = row.token.checked_sub(self.vocab.first_id)?;
        self.row(row.row).get(index as usize).copied()
    }
}
