//! Sampling over a split vocabulary, for backends whose logits are in host memory: the same token on every rank.
//!
//! Owns the sequence of gathers, the last token of every slot, and results until they are taken. The arithmetic between the
//! gathers is [`super::sample`]. All calls that gather are collective.
//!
//! **Invariant:** which gathers happen, and their sizes, depend only on the step and on what was gathered before. What a gather brought
//! is merged in rank order, so all ranks hold the same bits, and padding of the vocabulary is never seen.
//! **Invariant:** a row has a token where it has a finite logit at all: where edits leave none, the row draws without them, and where its
//! mask leaves none either, it takes the best token.

use std::collections::{HashMap, VecDeque};

use super::edit::{TokenHistory, apply_mask};
use super::sample::{Candidate, Cut, CutParams, Histogram, MaxSum, RandomKey, draw, merge_top_n, num_above, top_n};
use crate::{
    Collective, InputLimits, KernelError, LAST_TOKEN, SCORED_TOP_MAX, SampleRow, SamplerFeatures, SamplerKind,
    ScoreRow, Scored, StepInputs, StepResult, VocabSlice,
};

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

/// One row over all ranks, before its token's rank is known.
struct Merged {
    token: u32,
    logit: f32,
    log_sum_exp: f64,
    top: Vec<Candidate>,
}

impl Merged {
    fn finish(self, rank: u32) -> Scored {
        let logprob = |logit: f64| (logit - self.log_sum_exp) as f32;
        Scored {
            token: self.token,
            logprob: logprob(f64::from(self.logit)),
            rank,
            top: self.top.iter().map(|best| (best.id, logprob(best.value))).collect(),
        }
    }
}

/// What this rank sends, and what all ranks sent.
#[derive(Debug, Default)]
struct Gather {
    part: Vec<u8>,
    all: Vec<u8>,
}

impl Gather {
    fn run(&mut self, group: &mut dyn Collective) -> Result<(), KernelError> {
        self.all.resize(self.part.len() * group.world_size(), 0);
        Ok(group.all_gather(&self.part, &mut self.all)?)
    }

    /// Entry `index` of each rank, in rank order, where all entries have `len` bytes.
    fn entries(&self, index: usize, len: usize) -> impl Iterator<Item = &[u8]> + Clone {
        self.all.chunks_exact(self.part.len().max(1)).map(move |part| &part[index * len..][..len])
    }

    /// The best of the ranks' candidates for a row.
    fn best(&self, index: usize) -> Option<Candidate> {
        Candidate::merge(self.entries(index, Candidate::BYTES).map(candidate))
    }

    /// The sum of the ranks' counts for a row.
    fn sum(&self, index: usize) -> u32 {
        self.entries(index, 4).filter_map(|part| part.first_chunk()).map(|part| u32::from_le_bytes(*part)).sum()
    }

    /// A row as `score` sends it: its sum, its token's logit, its best tokens.
    fn merged(&self, index: usize, row: &Wanted, num_top: usize) -> Merged {
        let entries = self.entries(index, MaxSum::BYTES + 4 + num_top * Candidate::BYTES);
        let sums = entries.clone().filter_map(|part| part.first_chunk()).map(MaxSum::from_bytes);
        let logits = entries.clone().filter_map(|part| part[MaxSum::BYTES..].first_chunk());
        let best = entries.flat_map(|part| part[MaxSum::BYTES + 4..].chunks_exact(Candidate::BYTES));
        Merged {
            token: row.token,
            logit: logits.map(|bytes| f32::from_le_bytes(*bytes)).fold(f32::NEG_INFINITY, f32::max),
            log_sum_exp: MaxSum::merge(sums).log_sum_exp(),
            top: merge_top_n(best.filter_map(candidate), (row.num_top as usize).min(num_top)),
        }
    }
}

/// A candidate as it came from the wire.
fn candidate(bytes: &[u8]) -> Option<Candidate> {
    bytes.first_chunk().and_then(Candidate::from_bytes)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::edit::LogitEdits;
    use super::*;
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
}
