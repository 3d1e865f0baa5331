//! Sampling and scoring on the device, and results until they are taken.
//!
//! Owns the memory between the phases and the pinned memory that results come back in. The phases are described in
//! `cuda/sample.cu`; between two of them the group gathers every rank's small records.
//!
//! **Invariant:** the sequence of kernels and gathers depends on the sampler's kind, the padded rows, and whether the step has masks or
//! edits.

use std::collections::VecDeque;

use super::buffers::CudaBuffer;
use super::inputs::{CudaInputs, NONE};
use super::{CudaOps, STEP_DEADLINE};
use crate::cuda::edit_plan::Drawn;
use crate::cuda::{Context, CudaError, DeviceMemory, LaunchConfig, PinnedMemory, ReadBack, Span};
use crate::ops::sample::{Candidate, MaxSum, merge_top_n};
use crate::{InputLimits, KernelError, SCORED_TOP_MAX, SamplerKind, Scored, StepResult, VocabSlice, kernel_args};

/// Bytes of `Best`, `CutState`, `Bins`, of a row's masses kept from pass 0, and of `ScoreRecord`.
const BEST_BYTES: usize = 16;
const CUT_BYTES: usize = 48;
const BINS_BYTES: usize = 24_576;
const FIRSTS_BYTES: usize = 2048 * 8;
const RECORD_BYTES: usize = 24 + SCORED_TOP_MAX as usize * 8;
/// Passes of a row with a top-k and a top-p.
const NUM_CUT_PASSES: u32 = 5;
/// Parts that all rows together are split into, about.
const SPLITS_TOTAL: usize = 1024;
/// Fewest tokens of a part.
const SPLIT_TOKENS_MIN: usize = 4096;

/// Memory of the sampler.
pub(super) struct Sampling {
    rows_max: usize,
    best: DeviceMemory,
    gathered: DeviceMemory,
    cuts: DeviceMemory,
    bins: DeviceMemory,
    firsts: DeviceMemory,
    /// Tokens, then counts and records of scores.
    results: DeviceMemory,
    free: Vec<PinnedMemory>,
    pending: VecDeque<Pending>,
}

/// A submitted step.
struct Pending {
    read: ReadBack,
    num_samples: usize,
    scores: Scores,
    /// Rows whose tokens edits look at.
    drawn: Vec<Drawn>,
}

/// Scored rows of a step, and where their results lie behind the tokens.
#[derive(Debug, Clone, Copy, Default)]
struct Scores {
    num: usize,
    counts: usize,
    records: usize,
    end: usize,
}

/// This rank's slice of the logits, as kernels take it.
#[derive(Clone, Copy)]
pub(super) struct Slice {
    pub logits: Span,
    pub width: u32,
    pub lead: u32,
    pub owned: u32,
    pub first_id: u32,
}

impl Sampling {
    pub(super) fn new(context: &Context, limits: &InputLimits, world_size: usize) -> Result<Self, CudaError> {
        let rows = super::buckets::padded(limits.logit_rows_max);
        let alloc = |bytes: usize| DeviceMemory::alloc(context, bytes);
        let best_bytes = (rows + SPLITS_TOTAL) * BEST_BYTES;
        let scores = Scores::at(rows, limits.logit_rows_max, world_size);
        let gathered_bytes = if world_size > 1 { world_size * best_bytes.max(rows * BINS_BYTES) } else { 0 };
        let pinned = |_| PinnedMemory::alloc(context, scores.end);
        Ok(Self {
            rows_max: rows,
            best: alloc(best_bytes)?,
            gathered: alloc(gathered_bytes)?,
            cuts: alloc(rows * CUT_BYTES)?,
            bins: alloc(rows * BINS_BYTES)?,
            firsts: alloc(rows * FIRSTS_BYTES)?,
            results: alloc(scores.end)?,
            free: (0..=limits.steps_max).map(pinned).collect::<Result<_, _>>()?,
            pending: VecDeque::with_capacity(limits.steps_max),
        })
    }

    fn tokens(&self) -> Result<Span, CudaError> {
        self.results.part(0..self.rows_max * 4)
    }
}

/// Two records are a multiple of 16 bytes.
const _: () = assert!((2 * RECORD_BYTES).is_multiple_of(16));

impl Scores {
    /// Behind `rows` tokens. Own records come first, then those of all ranks.
    fn at(rows: usize, num: usize, world_size: usize) -> Self {
        let counts = (rows * 4).next_multiple_of(256);
        let count_bytes = (num * 4).next_multiple_of(16);
        let records = (counts + (1 + world_size) * count_bytes).next_multiple_of(256);
        let mut scores = Self { num, counts, records, end: records };
        scores.end += (1 + world_size) * scores.record_bytes();
        scores
    }

    fn count_bytes(&self) -> usize {
        (self.num * 4).next_multiple_of(16)
    }

    /// Bytes of a rank's records: whole records, which kernels count in, and a multiple of 16, as gathers want it.
    fn record_bytes(&self) -> usize {
        self.num.next_multiple_of(2) * RECORD_BYTES
    }
}

/// Parts of a row.
fn splits(rows: usize, owned: usize) -> usize {
    (SPLITS_TOTAL / rows.max(1)).clamp(1, (owned / SPLIT_TOKENS_MIN).max(1))
}

impl CudaOps {
    fn sampling(&self) -> Result<&Sampling, KernelError> {
        let nothing = || KernelError::Shape { op: "sample", reason: "no inputs were planned".into() };
        self.sampling.as_ref().ok_or_else(nothing)
    }

    fn slice(&self, logits: &CudaBuffer, vocab: &VocabSlice, rows: usize) -> Result<Slice, KernelError> {
        let columns = &vocab.columns;
        if columns.end > logits.width {
            let reason = format!("columns to {} of {}", columns.end, logits.width);
            return Err(KernelError::Shape { op: "sample", reason });
        }
        Ok(Slice {
            logits: logits.typed("sample", rows, super::Dtype::F32)?,
            width: logits.width as u32,
            lead: columns.start as u32,
            owned: columns.len() as u32,
            first_id: vocab.first_id,
        })
    }

    /// Draws the step's tokens.
    pub(super) fn sample_rows(
        &self,
        inputs: &CudaInputs,
        logits: &CudaBuffer,
        vocab: &VocabSlice,
        kind: SamplerKind,
    ) -> Result<(), KernelError> {
        let (sampling, kernels, rows) = (self.sampling()?, &self.kernels.sampling, inputs.shape.logit_rows);
        let slice = self.slice(logits, vocab, rows)?;
        let Slice { logits, width, lead, owned, first_id } = slice;
        let (samples, splits) = (inputs.arrays.samples, splits(rows, vocab.columns.len()));
        let (world, stride, num_splits) = (self.group.world_size() as u32, rows as u32, splits as u32);
        let per_part = LaunchConfig::new([num_splits, stride, 1], [256, 1, 1]);
        let best_bytes = rows * splits * BEST_BYTES;
        let best = sampling.best.part(0..best_bytes)?;
        let cuts = (kind == SamplerKind::Cut).then(|| sampling.cuts.span());
        if inputs.shape.is_edited {
            self.edit_rows(inputs, slice, num_splits, [best, sampling.gathered.span()])?;
        }
        if kind != SamplerKind::NoCut {
            let args = kernel_args![logits, width, lead, owned, first_id, samples, best];
            // SAFETY: all memory was planned for the padded rows; this holds for every launch here.
            unsafe { self.launch(&kernels.best, per_part, args)? };
        }
        if let Some(cuts) = cuts {
            let gathered = self.gather(best, sampling.gathered.span())?;
            let per_row = |threads| LaunchConfig::linear(stride, threads);
            let args = kernel_args![gathered, world, stride, num_splits, samples, cuts, &sampling.bins];
            // SAFETY: as above.
            unsafe { self.launch(&kernels.cut_begin, per_row(256), args)? };
            for pass in 0..NUM_CUT_PASSES {
                let bins = sampling.bins.part(0..rows * BINS_BYTES)?;
                let args = kernel_args![logits, width, lead, owned, first_id, samples, cuts, bins, pass];
                // SAFETY: as above.
                unsafe { self.launch(&kernels.cut_count, per_part, args)? };
                let gathered = self.gather(bins, sampling.gathered.span())?;
                let args = kernel_args![gathered, world, stride, bins, &sampling.firsts, samples, cuts, pass];
                // SAFETY: as above.
                unsafe { self.launch(&kernels.cut_apply, per_row(512), args)? };
            }
        }
        if kind != SamplerKind::Greedy {
            let args = kernel_args![logits, width, lead, owned, first_id, samples, cuts, best];
            // SAFETY: as above.
            unsafe { self.launch(&kernels.draw, per_part, args)? };
        }
        let gathered = self.gather(best, sampling.gathered.span())?;
        let args = kernel_args![
            gathered,
            world,
            stride,
            num_splits,
            samples,
            stride,
            inputs.arrays.last_tokens,
            sampling.tokens()?,
            None::<Span>,
        ];
        let config = LaunchConfig::linear((rows * 32).div_ceil(256) as u32, 256);
        // SAFETY: as above.
        unsafe { self.launch(&kernels.commit, config, args)? };
        if inputs.shape.is_edited { self.keep_drawn(inputs, sampling.tokens()?) } else { Ok(()) }
    }

    /// Scores the step's scored rows.
    pub(super) fn score_rows(
        &self,
        inputs: &CudaInputs,
        logits: &CudaBuffer,
        vocab: &VocabSlice,
    ) -> Result<(), KernelError> {
        let num = inputs.shape.scores;
        if num == 0 {
            return Ok(());
        }
        let (sampling, kernels) = (self.sampling()?, &self.kernels.sampling);
        let Slice { logits, width, lead, owned, first_id } = self.slice(logits, vocab, inputs.shape.logit_rows)?;
        let (scores, world) = (inputs.arrays.scores, self.group.world_size());
        let at = Scores::at(sampling.rows_max, num, world);
        let part = |begin: usize, bytes: usize| sampling.results.part(begin..begin + bytes);
        let records = part(at.records, at.record_bytes())?;
        let config = LaunchConfig::linear(num as u32, 1024);
        let args = kernel_args![logits, width, lead, owned, first_id, scores, sampling.tokens()?, records];
        // SAFETY: as in `sample_rows`.
        unsafe { self.launch(&kernels.score_rows, config, args)? };
        let everyones = part(at.records + at.record_bytes(), world * at.record_bytes())?;
        let gathered = self.gather(records, everyones)?;
        let counts = part(at.counts, at.count_bytes())?;
        let stride = at.record_bytes() / RECORD_BYTES;
        let args =
            kernel_args![logits, width, lead, owned, first_id, scores, gathered, world as u32, stride as u32, counts];
        // SAFETY: as in `sample_rows`.
        unsafe { self.launch(&kernels.score_rank, config, args)? };
        self.gather(counts, part(at.counts + at.count_bytes(), world * at.count_bytes())?)?;
        Ok(())
    }

    /// Sends the step's results to the host.
    pub(super) fn submit_results(&mut self, inputs: &CudaInputs) -> Result<(), KernelError> {
        let (shape, world) = (inputs.shape, self.group.world_size());
        let nothing = |reason: &str| KernelError::Shape { op: "submit", reason: reason.into() };
        let sampling = self.sampling.as_mut().ok_or_else(|| nothing("no inputs were planned"))?;
        let pinned = sampling.free.pop().ok_or_else(|| nothing("more steps than planned are not taken yet"))?;
        let scores = if shape.scores > 0 {
            Scores::at(sampling.rows_max, shape.scores, world)
        } else {
            Scores { end: shape.logit_rows * 4, ..Scores::default() }
        };
        let read = self.stream.read_back(sampling.results.part(0..scores.end)?, pinned)?;
        let drawn = match &mut self.editing {
            Some(editing) => editing.submit(&self.stream)?,
            None => Vec::new(),
        };
        sampling.pending.push_back(Pending { read, num_samples: shape.samples, scores, drawn });
        Ok(())
    }

    /// Whether the oldest step's results are there.
    pub(super) fn results_arrived(&self) -> Result<bool, KernelError> {
        match self.sampling.as_ref().and_then(|sampling| sampling.pending.front()) {
            Some(pending) => Ok(pending.read.is_ready()?),
            None => Ok(false),
        }
    }

    /// The oldest step's results.
    pub(super) fn take_results(&mut self) -> Result<StepResult, KernelError> {
        let nothing = || KernelError::Shape { op: "take", reason: "no step was submitted".into() };
        let world = self.group.world_size();
        let sampling = self.sampling.as_mut().ok_or_else(nothing)?;
        let Pending { read, num_samples, scores, drawn } = sampling.pending.pop_front().ok_or_else(nothing)?;
        let memory = read.wait(STEP_DEADLINE, "a step")?;
        self.group.check()?;
        let words = memory.slice::<u32>();
        let tokens: Vec<Option<u32>> =
            words[..num_samples].iter().map(|token| (*token != NONE).then_some(*token)).collect();
        let scores = (0..scores.num).map(|row| scores.row(memory.slice(), row, world)).collect();
        sampling.free.push(memory);
        if let Some(editing) = &mut self.editing {
            editing.take(&drawn, &tokens);
        }
        Ok(StepResult { tokens, scores })
    }
}

impl Scores {
    /// One row's records of all ranks, merged.
    fn row(&self, bytes: &[u8], row: usize, world_size: usize) -> Scored {
        // With one rank nothing was gathered: its own records are all.
        let first = usize::from(world_size > 1);
        let of_rank = |begin: usize, each: usize, size: usize| {
            (0..world_size).map(move |rank| &bytes[begin + (first + rank) * each + row * size..][..size])
        };
        let records = of_rank(self.records, self.record_bytes(), RECORD_BYTES).map(Record::parse);
        let counts = of_rank(self.counts, self.count_bytes(), 4).map(|count| word(count, 0));
        let records: Vec<Record> = records.collect();
        let log_sum_exp = MaxSum::merge(records.iter().map(|record| record.sum)).log_sum_exp();
        let logit = records.iter().map(|record| record.logit).fold(f32::NEG_INFINITY, f32::max);
        let num_top = records.first().map_or(0, |record| record.num_top);
        let top = merge_top_n(records.iter().flat_map(|record| record.top.iter().copied()), num_top);
        let logprob = |logit: f64| (logit - log_sum_exp) as f32;
        Scored {
            token: records.first().map_or(0, |record| record.token),
            logprob: logprob(f64::from(logit)),
            rank: 1 + counts.sum::<u32>(),
            top: top.iter().map(|best| (best.id, logprob(best.value))).collect(),
        }
    }
}

/// `ScoreRecord` of `sample.cu`.
struct Record {
    sum: MaxSum,
    token: u32,
    logit: f32,
    num_top: usize,
    top: Vec<Candidate>,
}

impl Record {
    fn parse(bytes: &[u8]) -> Self {
        let sum = f64::from_bits(u64::from(word(bytes, 0)) | u64::from(word(bytes, 4)) << 32);
        let num_top = (word(bytes, 20) as usize).min(SCORED_TOP_MAX as usize);
        let alternative = |index: usize| {
            let (logit, id) = (f32::from_bits(word(bytes, 24 + index * 8)), word(bytes, 28 + index * 8));
            (id != NONE).then_some(Candidate { value: f64::from(logit), id })
        };
        Self {
            sum: MaxSum { max: f32::from_bits(word(bytes, 8)), sum },
            token: word(bytes, 12),
            logit: f32::from_bits(word(bytes, 16)),
            num_top,
            top: (0..num_top).filter_map(alternative).collect(),
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}
