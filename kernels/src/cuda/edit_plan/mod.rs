//! What the device is told of masks and edits, step by step: the records and lists that `cuda/edit.cu` takes.
//!
//! Owns the tokens of sequences whose logits are edited, as far as the host knows them. Of the tokens of steps in flight it knows
//! how many there are: the device has them in a ring, where bans and penalties look them up. Plain arithmetic: knows no driver.
//!
//! **Invariant:** a token is in the ring from the step that draws it, and here from the moment that this step was taken; no token counts
//! twice, and none of a sequence that has left its slot counts at all.

#[cfg(test)]
mod tests;

use std::collections::HashMap;

use crate::ops::edit::{LogitEdits, TokenHistory};
use crate::{SampleEdits, StepInputs};

/// Words of a row's record.
pub(super) const ROW_WORDS: usize = 16;
/// Longest ring that kernels take.
pub(super) const RING_MAX: usize = 64;

const CHANGED: u32 = 1;
const ALLOWS: u32 = 2;
const MASKED: u32 = 4;
const KEEPS: u32 = 8;
const PENALISES: u32 = 16;
/// The count of a token that stands nowhere: it has a bias.
const NOWHERE: u32 = u32::MAX;

/// A token that is edited: its id, how often it stands in the output, its bias.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Item {
    token: u32,
    count: u32,
    bias: f32,
}

/// The tokens of a sequence in a slot.
#[derive(Debug)]
struct History {
    /// Tells it from others in its slot.
    id: u64,
    items: Vec<Item>,
    places: HashMap<u32, usize>,
    output: Vec<u32>,
    penalises: bool,
    num_drawn: u32,
    num_pending: u32,
}

/// A row of a step that draws a token which is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Drawn {
    row: u32,
    slot: u32,
    id: u64,
}

/// Writes each step's records.
#[derive(Debug)]
pub(super) struct EditPlanner {
    ring: usize,
    histories: HashMap<u32, History>,
    num_histories: u64,
    /// Rows of the step that was written last, until it is submitted.
    current: Vec<Drawn>,
}

impl EditPlanner {
    /// For as many steps in flight.
    pub fn new(steps_max: usize) -> Self {
        // One more may be written than is submitted, and one more submitted than is planned for.
        let ring = (steps_max + 2).next_power_of_two();
        Self { ring, histories: HashMap::new(), num_histories: 0, current: Vec::new() }
    }

    /// Places of a slot's ring.
    pub fn ring(&self) -> usize {
        self.ring
    }

    /// Forgets the step that was written last, where it was not submitted.
    pub fn abandon(&mut self) {
        for drawn in self.current.drain(..) {
            if let Some(history) = found(&mut self.histories, drawn) {
                history.num_drawn = history.num_drawn.wrapping_sub(1);
                history.num_pending -= 1;
            }
        }
    }

    /// Writes the records of `num_rows` rows, and the lists behind them.
    pub fn write(&mut self, step: &StepInputs, num_rows: usize, blob: &mut Vec<u32>) {
        self.abandon();
        blob.clear();
        blob.resize(num_rows * ROW_WORDS, 0);
        let places = self.ring as u32 - 1;
        let mut records: HashMap<u32, Record> = HashMap::new();
        for mask in &step.masks {
            let record = records.entry(mask.row).or_default();
            record.flags |= CHANGED | ALLOWS | MASKED;
            record.mask = list(blob, &mask.words);
        }
        for edited in &step.edits {
            let Some(sample) = step.samples.get(edited.row as usize) else { continue };
            let Some(history) = self.remember(sample.slot, edited) else { continue };
            let record = records.entry(edited.row).or_default();
            history.write(&edited.edits, record, blob);
            let drawn = Drawn { row: edited.row, slot: sample.slot, id: history.id };
            (record.slot, record.place) = (sample.slot, history.num_drawn & places);
            history.num_drawn = history.num_drawn.wrapping_add(1);
            history.num_pending += 1;
            self.current.push(drawn);
        }
        for (row, record) in records {
            if let Some(words) = blob.as_chunks_mut::<ROW_WORDS>().0.get_mut(row as usize) {
                *words = record.words();
            }
        }
    }

    /// The step that was written last is submitted: its rows, to be given back with their tokens.
    pub fn submit(&mut self) -> Vec<Drawn> {
        std::mem::take(&mut self.current)
    }

    /// A submitted step was taken.
    pub fn take(&mut self, drawn: &[Drawn], tokens: &[Option<u32>]) {
        for drawn in drawn {
            if let Some(history) = found(&mut self.histories, *drawn) {
                history.num_pending -= 1;
                if let Some(token) = tokens.get(drawn.row as usize).copied().flatten() {
                    history.push(token);
                }
            }
        }
    }

    /// The tokens of an edited row: new ones where it brings them.
    fn remember(&mut self, slot: u32, edited: &SampleEdits) -> Option<&mut History> {
        if let Some(tokens) = &edited.history {
            self.num_histories += 1;
            self.histories.insert(slot, History::new(self.num_histories, &edited.edits, tokens));
        }
        self.histories.get_mut(&slot)
    }
}

/// The tokens that a row belongs to, if its sequence still has its slot.
fn found(histories: &mut HashMap<u32, History>, drawn: Drawn) -> Option<&mut History> {
    histories.get_mut(&drawn.slot).filter(|history| history.id == drawn.id)
}

/// Appends a list: where it begins, and its words.
fn list(blob: &mut Vec<u32>, words: &[u32]) -> [u32; 2] {
    let at = blob.len() as u32;
    blob.extend_from_slice(words);
    [at, words.len() as u32]
}

/// A row's record.
#[derive(Debug, Default)]
struct Record {
    flags: u32,
    slot: u32,
    place: u32,
    num_recents: u32,
    mask: [u32; 2],
    allowed: [u32; 2],
    bans: [u32; 2],
    items: [u32; 2],
    repetition: f32,
    frequency: f32,
    presence: f32,
}

impl Record {
    /// `EditRow` of `edit.cu`.
    fn words(&self) -> [u32; ROW_WORDS] {
        let Self { flags, slot, place, num_recents, mask, allowed, bans, items, .. } = *self;
        let [repetition, frequency, presence] = [self.repetition, self.frequency, self.presence].map(f32::to_bits);
        let ([m, mn], [a, an], [b, bn], [i, n]) = (mask, allowed, bans, items);
        [flags, slot, place, num_recents, m, mn, a, an, b, bn, i, n, repetition, frequency, presence, 0]
    }
}

impl History {
    fn new(id: u64, edits: &LogitEdits, tokens: &TokenHistory) -> Self {
        let penalises = edits.penalises();
        let mut history = Self {
            id,
            items: Vec::new(),
            places: HashMap::new(),
            output: tokens.output().to_vec(),
            penalises,
            num_drawn: 0,
            num_pending: 0,
        };
        for (token, bias) in &edits.bias {
            history.item(*token).bias += bias;
        }
        if penalises {
            tokens.counts().for_each(|(token, count)| history.item(token).count = count);
        }
        history
    }

    /// A token's item; a new one stands nowhere.
    fn item(&mut self, token: u32) -> &mut Item {
        let place = *self.places.entry(token).or_insert(self.items.len());
        if place == self.items.len() {
            self.items.push(Item { token, count: NOWHERE, bias: 0.0 });
        }
        &mut self.items[place]
    }

    fn push(&mut self, token: u32) {
        self.output.push(token);
        if self.penalises {
            let item = self.item(token);
            item.count = if item.count == NOWHERE { 1 } else { item.count + 1 };
        }
    }

    /// Writes what is known of a row's edits.
    fn write(&self, edits: &LogitEdits, record: &mut Record, blob: &mut Vec<u32>) {
        record.flags |= CHANGED | KEEPS;
        record.num_recents = self.num_pending;
        if let Some(words) = &edits.allowed {
            record.flags |= ALLOWS;
            // A list of no words allows nothing; the kernel takes it for no list.
            record.allowed = list(blob, if words.is_empty() { &[0] } else { words });
        }
        let at = blob.len();
        let num_bans = self.write_bans(edits, blob);
        if num_bans > 0 {
            record.flags |= ALLOWS;
            record.bans = [at as u32, num_bans];
        }
        if self.penalises {
            record.flags |= PENALISES;
            (record.repetition, record.frequency) = (edits.repetition_penalty, edits.frequency_penalty);
            record.presence = edits.presence_penalty;
        }
        record.items = [blob.len() as u32, self.items.len() as u32];
        blob.extend(self.items.iter().flat_map(|item| [item.token, item.count, item.bias.to_bits()]));
    }

    /// Writes bans that hold, or may hold by the tokens that only the device knows: `2 + num_pending` words each.
    fn write_bans(&self, edits: &LogitEdits, blob: &mut Vec<u32>) -> u32 {
        let num_pending = self.num_pending as usize;
        let len = self.output.len() + num_pending;
        let mut num_bans = 0;
        let mut ban = |token: u32, unknown: &[u32]| {
            blob.extend([token, unknown.len() as u32]);
            blob.extend_from_slice(unknown);
            blob.resize(blob.len() + num_pending - unknown.len(), 0);
            num_bans += 1;
        };
        for word in &edits.bad_words {
            let Some((last, before)) = word.split_last() else { continue };
            let (known, unknown) = before.split_at(before.len().saturating_sub(num_pending));
            if before.len() <= len && self.output.ends_with(known) {
                ban(*last, unknown);
            }
        }
        if len < edits.min_tokens as usize {
            edits.end_tokens.iter().for_each(|token| ban(*token, &[]));
        }
        num_bans
    }
}
