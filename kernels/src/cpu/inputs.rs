//! Buffers and step inputs in host memory.
//!
//! **Invariant:** inputs that were loaded are consistent: an op may index rows and tables by them.

use super::memory::AlignedVec;
use crate::{InputLimits, KernelError, StepInputs};

/// Activations, `[rows_max, width]`.
pub struct CpuBuffer {
    pub(crate) data: AlignedVec<f32>,
    pub(crate) rows_max: usize,
    pub(crate) width: usize,
}

impl CpuBuffer {
    pub(crate) fn new(rows_max: usize, width: usize) -> Result<Self, KernelError> {
        Ok(Self { data: AlignedVec::zeroed(rows_max.saturating_mul(width))?, rows_max, width })
    }

    /// The first `rows` rows.
    pub(crate) fn rows(&self, op: &'static str, rows: usize) -> Result<&[f32], KernelError> {
        self.data.get(..rows * self.width).ok_or_else(|| too_many(op, rows, self.rows_max))
    }

    /// The first `rows` rows.
    pub(crate) fn rows_mut(&mut self, op: &'static str, rows: usize) -> Result<&mut [f32], KernelError> {
        let rows_max = self.rows_max;
        self.data.get_mut(..rows * self.width).ok_or_else(|| too_many(op, rows, rows_max))
    }
}

fn too_many(op: &'static str, rows: usize, rows_max: usize) -> KernelError {
    KernelError::Shape { op, reason: format!("{rows} rows in a buffer of {rows_max}") }
}

/// A step's inputs.
pub struct CpuInputs {
    limits: InputLimits,
    pub(crate) step: StepInputs,
}

impl CpuInputs {
    /// Plans inputs of up to `limits`.
    pub(crate) fn new(limits: InputLimits) -> Self {
        let tokens = || Vec::with_capacity(limits.tokens_max);
        let step = StepInputs {
            token_ids: tokens(),
            positions: tokens(),
            kv_slots: tokens(),
            seqs: Vec::with_capacity(limits.seqs_max),
            block_tables: Vec::with_capacity(limits.table_entries_max),
            logit_rows: Vec::with_capacity(limits.logit_rows_max),
            samples: Vec::with_capacity(limits.logit_rows_max),
            masks: Vec::with_capacity(limits.logit_rows_max),
            edits: Vec::new(),
            scores: Vec::with_capacity(limits.logit_rows_max),
        };
        Self { limits, step }
    }

    /// Rows of the step.
    pub(crate) fn num_rows(&self) -> usize {
        self.step.token_ids.len()
    }

    /// Takes a step in.
    ///
    /// # Errors
    /// More than was planned, or rows, sequences and tables that do not fit each other.
    pub(crate) fn load(&mut self, step: &StepInputs) -> Result<(), KernelError> {
        check(step, &self.limits)?;
        let own = &mut self.step;
        copy(&mut own.token_ids, &step.token_ids);
        copy(&mut own.positions, &step.positions);
        copy(&mut own.kv_slots, &step.kv_slots);
        copy(&mut own.seqs, &step.seqs);
        copy(&mut own.block_tables, &step.block_tables);
        copy(&mut own.logit_rows, &step.logit_rows);
        copy(&mut own.samples, &step.samples);
        own.masks.clone_from(&step.masks);
        own.edits.clone_from(&step.edits);
        copy(&mut own.scores, &step.scores);
        Ok(())
    }
}

fn copy<T: Copy>(to: &mut Vec<T>, from: &[T]) {
    to.clear();
    to.extend_from_slice(from);
}

/// What must hold of any step: shared by backends on the host.
pub(crate) fn check(step: &StepInputs, limits: &InputLimits) -> Result<(), KernelError> {
    let rows = step.token_ids.len();
    let within = [
        ("tokens", rows, limits.tokens_max),
        ("sequences", step.seqs.len(), limits.seqs_max),
        ("table entries", step.block_tables.len(), limits.table_entries_max),
        ("rows with logits", step.logit_rows.len(), limits.logit_rows_max),
    ];
    for (what, found, planned) in within {
        if found > planned {
            return Err(bad(format!("{found} {what}, {planned} planned")));
        }
    }
    if step.positions.len() != rows || step.kv_slots.len() != rows {
        return Err(bad(format!("{rows} tokens, {} positions, {} slots", step.positions.len(), step.kv_slots.len())));
    }
    if step.logit_rows.iter().any(|&row| row as usize >= rows) {
        return Err(bad(format!("logits of a row past {rows}")));
    }
    let num_logits = step.logit_rows.len();
    if step.samples.len() > num_logits || step.scores.iter().any(|score| score.row as usize >= num_logits) {
        return Err(bad(format!("a sample or a score of a row past {num_logits} rows with logits")));
    }
    if step.masks.iter().any(|mask| mask.row as usize >= step.samples.len()) {
        return Err(bad(format!("a mask of a row past {} samples", step.samples.len())));
    }
    if step.edits.iter().any(|edited| edited.row as usize >= step.samples.len()) {
        return Err(bad(format!("edits of a row past {} samples", step.samples.len())));
    }
    if let Some(sample) = step.samples.iter().find(|sample| sample.slot as usize >= limits.slots_max) {
        return Err(bad(format!("slot {}, {} planned", sample.slot, limits.slots_max)));
    }
    let mut next = 0;
    for seq in &step.seqs {
        if seq.query_start as usize != next || seq.query_len > seq.context_len {
            return Err(bad(format!("{seq:?} where row {next} is next")));
        }
        if seq.table_start as usize > step.block_tables.len() {
            return Err(bad(format!("{seq:?} among {} table entries", step.block_tables.len())));
        }
        next += seq.query_len as usize;
    }
    if next != rows { Err(bad(format!("sequences have {next} of {rows} rows"))) } else { Ok(()) }
}

fn bad(reason: String) -> KernelError {
    KernelError::Shape { op: "load_inputs", reason }
}
