//! Sampling over a split vocabulary: the same token on every rank.
//!
//! Owns the sequence of gathers; the arithmetic between them is `phalanx_kernels::ops::sample`. All calls are collective.
//!
//! **Invariant:** which gathers happen, and their sizes, depend only on the plan. What a gather brought is merged in rank
//! order, so all ranks hold the same bits, and padding of the vocabulary is never seen.

use std::ops::Range;

use phalanx_formats::ShardPlan;
use phalanx_kernels::ops::sample::{
    Candidate, Cut, CutParams, Histogram, MaxSum, RandomKey, draw, merge_top_n, num_above, top_n,
};
use phalanx_kernels::{Collective, KernelError, Ops};
use phalanx_proto::{SamplerVariant, SamplingParams, SeqSlot, TokenId, TokenLogprobs};

/// Most alternatives that are reported beside a token.
pub const LOGPROBS_MAX: u32 = 20;

/// A row whose next token is wanted. Rows of the logits buffer, in order.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleRow {
    /// The sequence's slot.
    pub slot: SeqSlot,
    /// How it is sampled.
    pub sampling: SamplingParams,
    /// Index of the output token that is drawn.
    pub output_index: u32,
}

/// A token whose log-probability is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoreRow {
    /// Row of the logits buffer.
    pub row: usize,
    /// The token.
    pub token: TokenId,
    /// Alternatives to report, at most [`LOGPROBS_MAX`].
    pub num_top: u32,
}

/// Samples and scores from this rank's slice of the logits.
pub struct Sampler {
    slice: Slice,
    gather: Gather,
}

impl Sampler {
    /// For the vocabulary of `plan`.
    pub fn new(plan: &ShardPlan) -> Self {
        let vocab = &plan.vocab;
        let columns = vocab.lead..vocab.lead + vocab.owned.len();
        let slice = Slice { columns, width: vocab.padded, first_id: vocab.owned.start as u32 };
        Self { slice, gather: Gather { part: Vec::new(), all: Vec::new(), world_size: plan.world_size } }
    }

    /// Draws one token for each row; `None` where a row has no finite logit at all. `logits` `[rows, vocab.padded]`.
    ///
    /// # Errors
    /// A device fault or a broken group.
    pub fn sample<B: Ops>(
        &mut self,
        ops: &mut B,
        logits: &B::Buffer,
        variant: SamplerVariant,
        rows: &[SampleRow],
    ) -> Result<Vec<Option<TokenId>>, KernelError> {
        let floors = match variant {
            SamplerVariant::Cut => self.floors(ops, logits, rows)?,
            SamplerVariant::Greedy | SamplerVariant::NoCut => vec![0; rows.len()],
        };
        let view = self.slice.view(ops.read(logits, rows.len())?);
        self.gather.part.clear();
        for (index, row) in rows.iter().enumerate() {
            let (local, first_id, temperature) = (view.row(index), view.slice.first_id, row.sampling.temperature);
            let best = if temperature == 0.0 {
                Candidate::best(local, first_id)
            } else {
                let key = RandomKey { seed: row.sampling.seed, output_index: row.output_index };
                draw(local, first_id, temperature, floors[index], &key)
            };
            self.gather.part.extend_from_slice(&Candidate::to_bytes(best));
        }
        self.gather.run(ops.collective())?;
        Ok((0..rows.len()).map(|index| self.gather.best(index).map(|best| TokenId(best.id))).collect())
    }

    /// The lowest key that survives each row's cut: the largest logits, then histograms of the passes that rows take part in.
    fn floors<B: Ops>(&mut self, ops: &mut B, logits: &B::Buffer, rows: &[SampleRow]) -> Result<Vec<u32>, KernelError> {
        let mut cuts = self.cuts(ops, logits, rows)?;
        let (mut histogram, mut bytes) = (Histogram::default(), vec![0; Histogram::BYTES]);
        for pass in 0..Cut::NUM_PASSES {
            let taking: Vec<usize> =
                (0..rows.len()).filter(|&i| cuts[i].as_ref().is_some_and(|cut| cut.takes_part(pass))).collect();
            if taking.is_empty() {
                continue;
            }
            let view = self.slice.view(ops.read(logits, rows.len())?);
            self.gather.part.clear();
            for cut_and_row in taking.iter().filter_map(|&i| Some((cuts[i].as_ref()?, view.row(i)))) {
                cut_and_row.0.histogram(pass, cut_and_row.1, &mut histogram);
                histogram.write_to(&mut bytes);
                self.gather.part.extend_from_slice(&bytes);
            }
            self.gather.run(ops.collective())?;
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
    fn cuts<B: Ops>(
        &mut self,
        ops: &mut B,
        logits: &B::Buffer,
        rows: &[SampleRow],
    ) -> Result<Vec<Option<Cut>>, KernelError> {
        let view = self.slice.view(ops.read(logits, rows.len())?);
        self.gather.part.clear();
        for index in 0..rows.len() {
            let best = Candidate::best(view.row(index), view.slice.first_id);
            self.gather.part.extend_from_slice(&Candidate::to_bytes(best));
        }
        self.gather.run(ops.collective())?;
        let cut = |(index, row): (usize, &SampleRow)| {
            let SamplingParams { temperature, top_k, top_p, min_p, .. } = row.sampling;
            let max = self.gather.best(index).map_or(f32::NEG_INFINITY, |best| best.value as f32);
            (temperature > 0.0).then(|| Cut::new(CutParams { temperature, top_k, top_p, min_p }, max))
        };
        Ok(rows.iter().enumerate().map(cut).collect())
    }

    /// Log-probabilities of the raw logits: of each row's token with its rank, and of the best ones.
    ///
    /// # Errors
    /// A device fault or a broken group.
    pub fn score<B: Ops>(
        &mut self,
        ops: &mut B,
        logits: &B::Buffer,
        rows: &[ScoreRow],
    ) -> Result<Vec<TokenLogprobs>, KernelError> {
        let Some(num_rows) = rows.iter().map(|row| row.row + 1).max() else { return Ok(Vec::new()) };
        let num_top = rows.iter().map(|row| row.num_top).max().unwrap_or(0).min(LOGPROBS_MAX) as usize;
        let view = self.slice.view(ops.read(logits, num_rows)?);
        self.gather.part.clear();
        for row in rows {
            let local = view.row(row.row);
            self.gather.part.extend_from_slice(&MaxSum::of(local).to_bytes());
            self.gather.part.extend_from_slice(&view.logit(row).unwrap_or(f32::NEG_INFINITY).to_le_bytes());
            let top = top_n(local, view.slice.first_id, num_top);
            for place in 0..num_top {
                self.gather.part.extend_from_slice(&Candidate::to_bytes(top.get(place).copied()));
            }
        }
        self.gather.run(ops.collective())?;
        let merged: Vec<Merged> =
            rows.iter().enumerate().map(|(index, row)| self.gather.merged(index, row, num_top)).collect();
        let view = self.slice.view(ops.read(logits, num_rows)?);
        self.gather.part.clear();
        for (row, merged) in rows.iter().zip(&merged) {
            self.gather.part.extend_from_slice(&num_above(view.row(row.row), merged.logit).to_le_bytes());
        }
        self.gather.run(ops.collective())?;
        Ok(merged.into_iter().enumerate().map(|(index, merged)| merged.finish(1 + self.gather.sum(index))).collect())
    }
}

/// Where this rank's tokens stand in a row of the logits buffer.
struct Slice {
    columns: Range<usize>,
    width: usize,
    first_id: u32,
}

impl Slice {
    fn view<'a>(&'a self, data: &'a [f32]) -> View<'a> {
        View { slice: self, data }
    }
}

/// Rows of the logits buffer, without padding.
struct View<'a> {
    slice: &'a Slice,
    data: &'a [f32],
}

impl View<'_> {
    fn row(&self, index: usize) -> &[f32] {
        let begin = index * self.slice.width;
        &self.data[begin + self.slice.columns.start..begin + self.slice.columns.end]
    }

    /// The logit of a row's token, if it is this rank's.
    fn logit(&self, row: &ScoreRow) -> Option<f32> {
        let index = row.token.0.checked_sub(self.slice.first_id)?;
        self.row(row.row).get(index as usize).copied()
    }
}

/// One row over all ranks, before its token's rank is known.
struct Merged {
    token: TokenId,
    logit: f32,
    log_sum_exp: f64,
    top: Vec<Candidate>,
}

impl Merged {
    fn finish(self, rank: u32) -> TokenLogprobs {
        let logprob = |logit: f64| (logit - self.log_sum_exp) as f32;
        TokenLogprobs {
            token: self.token,
            logprob: logprob(f64::from(self.logit)),
            rank,
            top: self.top.iter().map(|best| (TokenId(best.id), logprob(best.value))).collect(),
        }
    }
}

/// What this rank sends, and what all ranks sent.
struct Gather {
    part: Vec<u8>,
    all: Vec<u8>,
    world_size: usize,
}

impl Gather {
    fn run(&mut self, group: &mut dyn Collective) -> Result<(), KernelError> {
        self.all.resize(self.part.len() * self.world_size, 0);
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
    fn merged(&self, index: usize, row: &ScoreRow, num_top: usize) -> Merged {
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
