//! Masks and edits of logits on the device, in steps that have some.
//!
//! Owns the records and lists of such a step on their way to the device, which tokens each row may draw, and the ring of tokens that
//! the host has not taken yet. The kernels are described in `cuda/edit.cu`, what they are told in `edit_plan`.
//!
//! **Invariant:** a step without masks and edits launches nothing of this; in a step with some, what is recorded depends on the padded
//! rows only.
//! **Invariant:** a blob is written again only when the kernels of the step that it belongs to have ended.

use std::rc::Rc;

use super::inputs::CudaInputs;
use super::sampling::Slice;
use super::{CudaOps, STEP_DEADLINE};
use crate::cuda::edit_plan::{Drawn, EditPlanner, RING_MAX, ROW_WORDS};
use crate::cuda::{Context, CudaError, DeviceMemory, Event, LaunchConfig, PinnedMemory, Span, Stream};
use crate::{InputLimits, KernelError, SamplerFeatures, StepInputs, kernel_args};

/// Bytes that a blob has at first; it grows to what a step needs.
const BLOB_BYTES_MIN: usize = 64 << 10;

/// Memory of edits.
pub(super) struct Editing {
    planner: EditPlanner,
    vocab_size: usize,
    /// `EditRow`s, and the addresses of their items.
    rows: DeviceMemory,
    items: DeviceMemory,
    /// Bits of the tokens that rows may draw, with edits and with masks alone.
    allowed: DeviceMemory,
    masked: DeviceMemory,
    recents: DeviceMemory,
    blobs: Blobs,
    /// What is to be written into a blob.
    words: Vec<u32>,
}

/// Records and lists of steps where the device reads them, each with the end of the kernels that do.
struct Blobs {
    all: Vec<(PinnedMemory, Event)>,
    next: usize,
    /// That of the step that was loaded last, until the step is submitted.
    loaded: Option<usize>,
}

impl Blobs {
    fn new(context: &Context, num: usize) -> Result<Self, CudaError> {
        let blob = |_| Ok((PinnedMemory::alloc(context, BLOB_BYTES_MIN)?, Event::new(context)?));
        Ok(Self { all: (0..num).map(blob).collect::<Result<_, CudaError>>()?, next: 0, loaded: None })
    }

    /// Writes into the next one: its address.
    fn load(&mut self, context: &Context, words: &[u32]) -> Result<Span, CudaError> {
        let index = self.next;
        self.next = (index + 1) % self.all.len();
        let (memory, read) = &mut self.all[index];
        read.wait(STEP_DEADLINE, "the edits of an earlier step")?;
        if memory.len() < size_of_val(words) {
            *memory = PinnedMemory::alloc(context, size_of_val(words).next_power_of_two())?;
        }
        memory.slice_mut()[..words.len()].copy_from_slice(words);
        self.loaded = Some(index);
        Ok(memory.span())
    }

    /// All kernels that read the one that was loaded are in the stream.
    fn close(&mut self, stream: &Stream) -> Result<(), CudaError> {
        self.loaded.take().map_or(Ok(()), |index| self.all[index].1.record(stream))
    }
}

impl Drop for Blobs {
    fn drop(&mut self) {
        for (index, (memory, read)) in self.all.drain(..).enumerate() {
            if self.loaded == Some(index) || !read.is_reached().unwrap_or(false) {
                // The device may still read it, and nobody may wait here: it stays allocated until the process ends.
                std::mem::forget(memory);
            }
        }
    }
}

impl Editing {
    pub(super) fn new(context: &Context, limits: &InputLimits) -> Result<Self, CudaError> {
        let rows = super::buckets::padded(limits.logit_rows_max);
        let planner = EditPlanner::new(limits.steps_max);
        let bits = rows * num_words(limits.vocab_size) * 4;
        let alloc = |bytes: usize| DeviceMemory::alloc(context, bytes);
        Ok(Self {
            vocab_size: limits.vocab_size,
            rows: alloc(rows * ROW_WORDS * 4)?,
            items: alloc(rows * 8)?,
            allowed: alloc(bits)?,
            masked: alloc(bits)?,
            recents: alloc(limits.slots_max * planner.ring() * 4)?,
            blobs: Blobs::new(context, limits.steps_max + 1)?,
            words: Vec::new(),
            planner,
        })
    }

    /// What steps may have.
    fn features(&self) -> SamplerFeatures {
        let edits = self.vocab_size > 0 && self.planner.ring() <= RING_MAX;
        SamplerFeatures { masks: edits, edits, keeps_logits: false }
    }

    /// The step's kernels are in the stream: which rows keep what they draw.
    pub(super) fn submit(&mut self, stream: &Stream) -> Result<Vec<Drawn>, CudaError> {
        self.blobs.close(stream)?;
        Ok(self.planner.submit())
    }

    /// A submitted step was taken.
    pub(super) fn take(&mut self, drawn: &[Drawn], tokens: &[Option<u32>]) {
        self.planner.take(drawn, tokens);
    }
}

/// Words of a bit for each token.
fn num_words(vocab_size: usize) -> usize {
    vocab_size.div_ceil(u32::BITS as usize)
}

fn unplanned() -> KernelError {
    KernelError::Shape { op: "sample", reason: "no inputs were planned for edits".into() }
}

impl CudaOps {
    /// What the sampler can do beside drawing.
    pub(super) fn planned_features(&self) -> SamplerFeatures {
        self.editing.as_ref().map(Editing::features).unwrap_or_default()
    }

    /// Takes a step's masks and edits in.
    pub(super) fn load_edits(&mut self, step: &StepInputs, num_rows: usize) -> Result<(), KernelError> {
        let (features, stream) = (self.planned_features(), Rc::clone(&self.stream));
        let Some(editing) = &mut self.editing else { return Ok(()) };
        // What was loaded and not submitted may still be read.
        editing.blobs.close(&stream)?;
        if step.masks.is_empty() && step.edits.is_empty() {
            editing.planner.abandon();
            return Ok(());
        }
        if !features.edits {
            let what = "masks and edits without a vocabulary, or with that many steps in flight".into();
            return Err(KernelError::Unsupported { backend: "cuda", op: "sample", what });
        }
        editing.planner.write(step, num_rows, &mut editing.words);
        let blob = editing.blobs.load(&self.context, &editing.words)?;
        let editing = self.editing.as_ref().ok_or_else(unplanned)?;
        let (ring, words) = (editing.planner.ring() as u32, num_words(editing.vocab_size) as u32);
        let Editing { recents, rows, items, allowed, masked, .. } = editing;
        let args = kernel_args![blob, recents, ring, words, rows, items, allowed, masked];
        // SAFETY: all memory was planned for the padded rows; the blob holds their records and what these name.
        unsafe { self.launch(&self.kernels.editing.load, LaunchConfig::linear(num_rows as u32, 256), args) }
    }

    /// Edits the logits of the loaded step's rows. Collective. `best` and `gathered` are free until the sampler begins.
    pub(super) fn edit_rows(
        &self,
        inputs: &CudaInputs,
        slice: Slice,
        num_splits: u32,
        [best, gathered]: [Span; 2],
    ) -> Result<(), KernelError> {
        let (editing, kernels) = (self.editing.as_ref().ok_or_else(unplanned)?, &self.kernels.editing);
        let Slice { logits, width, lead, owned, first_id } = slice;
        if (first_id + owned) as usize > editing.vocab_size {
            let reason = format!("tokens to {} of {}", first_id + owned, editing.vocab_size);
            return Err(KernelError::Shape { op: "sample", reason });
        }
        let (samples, num_rows) = (inputs.arrays.samples, inputs.shape.logit_rows as u32);
        let (ring, words) = (editing.planner.ring() as u32, num_words(editing.vocab_size) as u32);
        let Editing { rows, items, allowed, masked, recents, .. } = editing;
        let args = kernel_args![logits, width, lead, owned, first_id, samples, rows, allowed, masked, words, best];
        let per_part = |parts: u32| LaunchConfig::new([parts, num_rows, 1], [256, 1, 1]);
        // SAFETY: all memory was planned for the padded rows, and for the slice's tokens.
        unsafe { self.launch(&kernels.survey, per_part(num_splits), args)? };
        let (alive, world) = (self.gather(best, gathered)?, self.group.world_size() as u32);
        let args = kernel_args![
            logits, width, lead, owned, first_id, samples, rows, items, recents, ring, allowed, masked, words, alive,
            world, num_rows,
        ];
        // SAFETY: as above.
        unsafe { self.launch(&kernels.apply, per_part(num_splits + 1), args) }
    }

    /// Keeps what edited rows drew for the steps behind. `tokens` as the sampler left them.
    pub(super) fn keep_drawn(&self, inputs: &CudaInputs, tokens: Span) -> Result<(), KernelError> {
        let editing = self.editing.as_ref().ok_or_else(unplanned)?;
        let (num_rows, ring) = (inputs.shape.logit_rows as u32, editing.planner.ring() as u32);
        let args = kernel_args![&editing.rows, num_rows, tokens, &editing.recents, ring];
        let config = LaunchConfig::linear(num_rows.div_ceil(256), 256);
        // SAFETY: as above.
        unsafe { self.launch(&self.kernels.editing.keep, config, args) }
    }
}
