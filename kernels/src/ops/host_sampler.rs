//! Sampling over a split vocabulary, for backends whose logits are in host memory: the same token on every rank.
//!
//! Owns the sequence of gathers, the last token of every slot, and results until they are taken. The arithmetic between the
//! gathers is [`super::sample`]. All calls that gather are collective.
//!
//! **Invariant:** which gathers happen, and their sizes, depend only on the step. What a gather brought is merged in rank
//! order, so all ranks hold the same bits, and padding of the vocabulary is never seen.

use std::collections::VecDeque;

use super::sample::{Candidate, Cut, CutParams, Histogram, MaxSum, RandomKey, draw, merge_top_n, num_above, top_n};
use crate::{
    Collective, InputLimits, KernelError, LAST_TOKEN, SCORED_TOP_MAX, SampleRow, SamplerKind, ScoreRow, Scored,
    StepInputs, StepResult, VocabSlice,
};

/// Samples and scores from this rank's slice of the logits.
#[derive(Debug, Default)]
pub struct HostSampler {
    last_tokens: Vec<u32>,
    steps_max: usize,
    current: StepResult,
    done: VecDeque<StepResult>,
    gather: Gather,
}

impl HostSampler {
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
        let masked = masked(logits, vocab, step);
        let view = View::new(vocab, masked.as_deref().unwrap_or(logits), step.logit_rows.len());
        let floors = match kind {
            SamplerKind::Cut => self.floors(group, &view, rows)?,
            SamplerKind::Greedy | SamplerKind::NoCut => vec![0; rows.len()],
        };
        self.gather.part.clear();
        for (index, row) in rows.iter().enumerate() {
            let (local, first_id, temperature) = (view.row(index), vocab.first_id, row.temperature);
            let best = if temperature == 0.0 {
                Candidate::best(local, first_id)
            } else {
                let key = RandomKey { seed: row.seed, output_index: row.output_index };
                draw(local, first_id, temperature, floors[index], &key)
            };
            self.gather.part.extend_from_slice(&Candidate::to_bytes(best));
        }
        self.gather.run(group)?;
        for (index, row) in rows.iter().enumerate() {
            let token = self.gather.best(index).map(|best| best.id);
            let num_slots = self.last_tokens.len();
            let last = self.last_tokens.get_mut(row.slot as usize).ok_or_else(|| no_slot(row.slot, num_slots))?;
            *last = token.unwrap_or(*last);
            self.current.tokens.push(token);
        }
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

/// The logits with everything at minus infinity that a row may not draw; none where no row is masked. Scores keep to the raw
/// ones.
fn masked(logits: &[f32], vocab: &VocabSlice, step: &StepInputs) -> Option<Vec<f32>> {
    if step.masks.is_empty() {
        return None;
    }
    let mut masked = logits.to_vec();
    let width = logits.len() / step.logit_rows.len().max(1);
    for mask in &step.masks {
        let begin = mask.row as usize * width;
        let own = &mut masked[begin + vocab.columns.start..begin + vocab.columns.end];
        for (token, logit) in (vocab.first_id..).zip(own) {
            let word = mask.words.get((token / u32::BITS) as usize).copied().unwrap_or(0);
            if word >> (token % u32::BITS) & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    Some(masked)
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
}

impl<'a> View<'a> {
    fn new(vocab: &'a VocabSlice, data: &'a [f32], num_rows: usize) -> Self {
        Self { vocab, data, width: data.len() / num_rows.max(1) }
    }

    fn row(&self, index: usize) -> &[f32] {
        let begin = index * self.width;
        &self.data[begin + self.vocab.columns.start..begin + self.vocab.columns.end]
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
    use super::*;
    use crate::SampleMask;

    /// Two rows over three columns that stand for tokens 31 to 33, with one column of padding.
    #[test]
    fn masked_rows_keep_what_they_may_draw() {
        let vocab = VocabSlice { first_id: 31, columns: 0..3 };
        let mut step = StepInputs { logit_rows: vec![0, 1], ..StepInputs::default() };
        let logits = [1.0, 2.0, 3.0, 9.0, 4.0, 5.0, 6.0, 9.0];
        assert_eq!(masked(&logits, &vocab, &step), None);
        step.masks = vec![SampleMask { row: 1, words: [1 << 31, 1 << 1].into() }];
        let none = f32::NEG_INFINITY;
        assert_eq!(masked(&logits, &vocab, &step), Some(vec![1.0, 2.0, 3.0, 9.0, 4.0, none, 6.0, 9.0]));
        step.masks = vec![SampleMask { row: 0, words: [0].into() }];
        assert_eq!(masked(&logits, &vocab, &step), Some(vec![none, none, none, 9.0, 4.0, 5.0, 6.0, 9.0]));
    }
}
