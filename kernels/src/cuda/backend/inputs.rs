//! A step's inputs on the device: one blob in pinned memory, unpacked by one kernel into arrays at fixed addresses.
//!
//! Owns the arrays, the ring of blobs and the work list of attention. What a step has, and what it is padded to, is known on
//! the host before anything runs ([`StepShape`]).
//!
//! **Invariant:** addresses never change, so recorded steps read what was loaded last; padding names no slot and no block.

use super::buckets::{RECORDED_TOKENS_MAX, padded};
use crate::cuda::attention_plan::{AttentionPlanner, AttentionWork, ITEM_WORDS, Lengths, MERGE_WORDS};
use crate::cuda::{Context, CudaError, DeviceMemory, PinnedRing, Span};
use crate::{InputLimits, KernelError, StepInputs};

/// Words of the header: counts that kernels look up.
const HEADER_WORDS: usize = 16;
/// Words of a sampled row.
const SAMPLE_WORDS: usize = 8;
/// Words of a scored row.
const SCORE_WORDS: usize = 4;
/// No slot, no token.
pub(super) const NONE: u32 = u32::MAX;
/// Sections of `load_step`'s argument.
const SECTIONS_MAX: usize = 16;

/// What a step has, and what it is padded to: all that its kernels' grids depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct StepShape {
    /// Rows, padded.
    pub tokens: usize,
    /// Rows with logits, padded.
    pub logit_rows: usize,
    /// Scored rows.
    pub scores: usize,
    /// Rows that sample.
    pub samples: usize,
    /// Whether attention has prompt tiles.
    pub has_prefill: bool,
    /// Whether it has contexts that were split.
    pub has_merges: bool,
    /// Whether some row has a mask or edits.
    pub is_edited: bool,
}

impl StepShape {
    /// Whether steps of this size are recorded.
    pub fn is_recorded(&self) -> bool {
        self.tokens <= RECORDED_TOKENS_MAX
    }
}

/// Arrays of the step, at fixed addresses.
#[derive(Debug)]
pub(super) struct Arrays {
    pub header: Span,
    pub token_ids: Span,
    pub positions: Span,
    pub kv_slots: Span,
    pub block_tables: Span,
    pub logit_rows: Span,
    pub samples: Span,
    pub scores: Span,
    pub items: Span,
    pub merges: Span,
    /// The last sampled token of each slot.
    pub last_tokens: Span,
}

/// A step's inputs.
pub struct CudaInputs {
    pub(super) limits: InputLimits,
    pub(super) shape: StepShape,
    pub(super) arrays: Arrays,
    pub(super) planner: AttentionPlanner,
    lengths: Vec<Lengths>,
    work: AttentionWork,
    ring: PinnedRing,
    _memory: DeviceMemory,
}

/// Where a section goes and how it is padded.
struct Section {
    to: Span,
    offset: usize,
    len: usize,
    padded: usize,
    pad: u32,
    pad_mask: u32,
}

impl CudaInputs {
    /// Plans arrays and ring.
    pub(super) fn new(context: &Context, limits: InputLimits, planner: AttentionPlanner) -> Result<Self, CudaError> {
        let (tokens, rows) = (padded(limits.tokens_max), padded(limits.logit_rows_max));
        let bounds = planner.bounds(limits.tokens_max, limits.seqs_max, limits.positions_max);
        let words = [
            HEADER_WORDS,
            tokens,
            tokens,
            tokens,
            limits.table_entries_max,
            rows,
            rows * SAMPLE_WORDS,
            limits.logit_rows_max * SCORE_WORDS,
            bounds.items * ITEM_WORDS,
            bounds.merges * MERGE_WORDS,
            limits.slots_max,
        ];
        let memory = DeviceMemory::alloc(context, words.iter().map(|words| aligned(*words) * 4).sum())?;
        let mut at = 0;
        let mut spans = words.iter().map(|words| {
            let span = memory.part(at..at + words * 4);
            at += aligned(*words) * 4;
            span
        });
        let mut next = || spans.next().unwrap_or_else(|| Err(CudaError::refused("inputs", "no such array")));
        let arrays = Arrays {
            header: next()?,
            token_ids: next()?,
            positions: next()?,
            kv_slots: next()?,
            block_tables: next()?,
            logit_rows: next()?,
            samples: next()?,
            scores: next()?,
            items: next()?,
            merges: next()?,
            last_tokens: next()?,
        };
        let blob_bytes = words.iter().map(|words| (words + 4) * 4).sum();
        let ring = PinnedRing::new(context, limits.steps_max + 1, blob_bytes)?;
        let (lengths, work) = (Vec::with_capacity(limits.seqs_max), AttentionWork::default());
        Ok(Self { limits, shape: StepShape::default(), arrays, planner, lengths, work, ring, _memory: memory })
    }

    /// Packs a checked step into the ring's next blob and lends it to `launch`, with the argument of `load_step` and its grid.
    pub(super) fn load(
        &mut self,
        step: &StepInputs,
        stream: &crate::cuda::Stream,
        deadline: std::time::Duration,
        launch: impl FnOnce(&[u8], u32) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        self.lengths.clear();
        self.lengths.extend(step.seqs.iter().map(|s| (s.query_start, s.query_len, s.context_len, s.table_start)));
        self.planner.plan(&self.lengths, &mut self.work);
        self.shape = StepShape {
            tokens: padded(step.token_ids.len()),
            logit_rows: padded(step.logit_rows.len()),
            scores: step.scores.len(),
            samples: step.samples.len(),
            has_prefill: self.work.num_prefill > 0,
            has_merges: self.work.num_merges > 0,
            is_edited: !step.masks.is_empty() || !step.edits.is_empty(),
        };
        let mut entry = self.ring.entry(deadline)?;
        let (sections, num_units) = {
            let mut blob = Blob { words: entry.words_mut(), at: 0, sections: Vec::with_capacity(SECTIONS_MAX) };
            blob.write(&self.arrays, &self.shape, step, &self.work);
            let units = blob.sections.iter().map(|section| section.padded.div_ceil(4)).sum::<usize>();
            (blob.sections, units as u32)
        };
        let last_tokens = (self.arrays.last_tokens, self.limits.slots_max as u32);
        entry.lend(stream, |blob| {
            let argument = load_step_argument(blob, last_tokens, &sections, num_units);
            launch(&argument, num_units.div_ceil(256))
        })
    }
}

/// Arrays begin at multiples of 256 bytes.
fn aligned(words: usize) -> usize {
    words.next_multiple_of(64)
}

/// A blob that is being written.
struct Blob<'a> {
    words: &'a mut [u32],
    at: usize,
    sections: Vec<Section>,
}

impl Blob<'_> {
    fn write(&mut self, arrays: &Arrays, shape: &StepShape, step: &StepInputs, work: &AttentionWork) {
        let pad = |padded, pad, pad_mask| Some((padded, pad, pad_mask));
        self.section(arrays.token_ids, &step.token_ids, pad(shape.tokens, 0, 0));
        self.section(arrays.positions, &step.positions, pad(shape.tokens, 0, 0));
        self.section(arrays.kv_slots, &step.kv_slots, pad(shape.tokens, NONE, 0));
        let mut header = [0; HEADER_WORDS];
        header[..6].copy_from_slice(&[
            step.token_ids.len() as u32,
            step.seqs.len() as u32,
            step.logit_rows.len() as u32,
            work.num_decode,
            work.num_prefill,
            work.num_merges,
        ]);
        self.section(arrays.header, &header, None);
        self.section(arrays.block_tables, &step.block_tables, None);
        self.section(arrays.logit_rows, &step.logit_rows, pad(shape.logit_rows, 0, 0));
        let samples: Vec<u32> = step.samples.iter().flat_map(sample_words).collect();
        self.section(arrays.samples, &samples, pad(shape.logit_rows * SAMPLE_WORDS, NONE, SAMPLE_WORDS as u32 - 1));
        let scores: Vec<u32> =
            step.scores.iter().flat_map(|score| [score.row, score.token.unwrap_or(NONE), score.num_top, 0]).collect();
        self.section(arrays.scores, &scores, None);
        self.section(arrays.items, &work.items, None);
        self.section(arrays.merges, &work.merges, None);
    }

    /// Appends a section, padded to `(words, padding, mask)`; an empty one takes no part.
    fn section(&mut self, to: Span, words: &[u32], pad: Option<(usize, u32, u32)>) {
        let (padded, pad, pad_mask) = pad.unwrap_or((words.len(), 0, 0));
        if padded == 0 {
            return;
        }
        let (offset, len) = (self.at, words.len());
        self.words[offset..offset + len].copy_from_slice(words);
        self.at = (offset + len).next_multiple_of(4);
        self.sections.push(Section { to, offset, len, padded, pad, pad_mask });
    }
}

fn sample_words(sample: &crate::SampleRow) -> [u32; SAMPLE_WORDS] {
    let (seed_lo, seed_hi) = (sample.seed as u32, (sample.seed >> 32) as u32);
    let (temperature, top_p, min_p) = (sample.temperature.to_bits(), sample.top_p.to_bits(), sample.min_p.to_bits());
    [sample.slot, sample.output_index, seed_lo, seed_hi, temperature, sample.top_k, top_p, min_p]
}

/// The struct `LoadStep` of `elementwise.cu`.
fn load_step_argument(blob: Span, last_tokens: (Span, u32), sections: &[Section], num_units: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(32 + SECTIONS_MAX * 32);
    bytes.extend(blob.address().to_le_bytes());
    bytes.extend(last_tokens.0.address().to_le_bytes());
    for word in [last_tokens.1, sections.len() as u32, num_units, 0] {
        bytes.extend(word.to_le_bytes());
    }
    let mut first_unit = 0;
    for section in sections {
        bytes.extend(section.to.address().to_le_bytes());
        for word in [section.offset, section.len, section.padded, first_unit] {
            bytes.extend((word as u32).to_le_bytes());
        }
        bytes.extend(section.pad.to_le_bytes());
        bytes.extend(section.pad_mask.to_le_bytes());
        first_unit += section.padded.div_ceil(4);
    }
    bytes.resize(32 + SECTIONS_MAX * 32, 0);
    bytes
}
