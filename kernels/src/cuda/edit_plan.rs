//! What the device is told of masks and edits, step by step: the records and lists that `cuda/edit.cu` takes.
//!
//! Owns the tokens of sequences whose logits are edited, as far as the host knows them. Of the tokens of steps in flight it knows
//! how many there are: the device has them in a ring, where bans and penalties look them up. Plain arithmetic: knows no driver.
//!
//! **Invariant:** a token is in the ring from the step that draws it, and here from the moment that this step was taken; no token counts
//! twice, and none of a sequence that has left its slot counts at all.

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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::ops::edit::apply_mask;
    use crate::{SampleMask, SampleRow};

    const VOCAB: usize = 75;
    const SLOTS: u32 = 6;
    const NONE: f32 = f32::NEG_INFINITY;

    /// The kernels of `edit.cu`, line by line.
    struct Device {
        recents: Vec<u32>,
        ring: usize,
    }

    impl Device {
        fn recents(&self, row: &[u32; ROW_WORDS]) -> Vec<u32> {
            let [_, slot, place, num, ..] = *row;
            let at = |i: u32| (place.wrapping_sub(num).wrapping_add(i)) & (self.ring as u32 - 1);
            (0..num).map(|i| self.recents[slot as usize * self.ring + at(i) as usize]).collect()
        }

        /// `edit_load`: bits of the tokens that are allowed, and of those that the mask allows.
        fn load(&self, row: &[u32; ROW_WORDS], blob: &[u32]) -> [Vec<bool>; 2] {
            let [flags, _, _, num_recents, mask_at, mask_len, allowed_at, allowed_len, bans_at, num_bans, ..] = *row;
            let (mut allowed, mut masked) = (vec![true; VOCAB], vec![true; VOCAB]);
            let bit = |at: u32, len: u32, token: usize| {
                let word = if (token / 32) < len as usize { blob[at as usize + token / 32] } else { 0 };
                word >> (token % 32) & 1 == 1
            };
            if flags & ALLOWS == 0 {
                return [allowed, masked];
            }
            for token in 0..VOCAB {
                if flags & MASKED != 0 {
                    masked[token] = bit(mask_at, mask_len, token);
                }
                allowed[token] = masked[token] && (allowed_len == 0 || bit(allowed_at, allowed_len, token));
            }
            let recents = self.recents(row);
            for ban in blob[bans_at as usize..].chunks(2 + num_recents as usize).take(num_bans as usize) {
                let unknown = &ban[2..2 + ban[1] as usize];
                if recents.ends_with(unknown) && (ban[0] as usize) < VOCAB {
                    allowed[ban[0] as usize] = false;
                }
            }
            [allowed, masked]
        }

        /// `edit_survey` and `edit_apply` of a row of one rank.
        fn apply(&self, row: &[u32; ROW_WORDS], blob: &[u32], logits: &mut [f32]) {
            let [allowed, masked] = self.load(row, blob);
            let lives = |bits: &[bool]| bits.iter().zip(&*logits).any(|(bit, logit)| *bit && *logit > NONE);
            let everything = vec![true; VOCAB];
            let (all, bits) = match (lives(&allowed), lives(&masked)) {
                (true, _) => (true, &allowed),
                (false, true) => (false, &masked),
                (false, false) => (false, &everything),
            };
            if all {
                self.edit_tokens(row, blob, bits, logits);
            }
            logits.iter_mut().zip(bits).filter(|(_, bit)| !**bit).for_each(|(logit, _)| *logit = NONE);
        }

        fn edit_tokens(&self, row: &[u32; ROW_WORDS], blob: &[u32], allowed: &[bool], logits: &mut [f32]) {
            let [flags, .., items_at, num_items, repetition, frequency, presence, _] = *row;
            let [repetition, frequency, presence] = [repetition, frequency, presence].map(f32::from_bits);
            let recents = if flags & PENALISES != 0 { self.recents(row) } else { Vec::new() };
            let mut edit = |token: u32, stands: bool, count: u32, bias: f32| {
                let Some(logit) = logits.get_mut(token as usize).filter(|_| allowed[token as usize]) else { return };
                *logit += bias;
                if flags & PENALISES != 0 && stands {
                    *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
                    if count > 0 {
                        *logit -= frequency * count as f32;
                        *logit -= presence;
                    }
                }
            };
            let mut found = vec![false; recents.len()];
            for item in blob[items_at as usize..].chunks(3).take(num_items as usize) {
                let equal = || recents.iter().enumerate().filter(|(_, recent)| **recent == item[0]);
                equal().for_each(|(place, _)| found[place] = true);
                let known = if item[1] == NOWHERE { 0 } else { item[1] };
                let stands = item[1] != NOWHERE || equal().count() > 0;
                edit(item[0], stands, known + equal().count() as u32, f32::from_bits(item[2]));
            }
            for (place, token) in recents.iter().enumerate() {
                if !found[place] && !recents[..place].contains(token) {
                    edit(*token, true, recents.iter().filter(|other| *other == token).count() as u32, 0.0);
                }
            }
        }

        /// `edit_keep`.
        fn keep(&mut self, blob: &[u32], tokens: &[Option<u32>]) {
            for (row, token) in blob.as_chunks::<ROW_WORDS>().0.iter().zip(tokens) {
                if row[0] & KEEPS != 0 {
                    self.recents[row[1] as usize * self.ring + row[2] as usize] = token.unwrap_or(u32::MAX);
                }
            }
        }
    }

    struct Random(u64);

    impl Random {
        fn below(&mut self, end: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) as usize % end
        }

        fn token(&mut self) -> u32 {
            self.below(9) as u32 * 8
        }

        fn tokens(&mut self, len_max: usize) -> Vec<u32> {
            (0..self.below(len_max + 1)).map(|_| self.token()).collect()
        }

        fn edits(&mut self) -> LogitEdits {
            let mut edits = LogitEdits { bad_words: (0..4).map(|_| self.tokens(3)).collect(), ..LogitEdits::default() };
            if self.below(2) == 0 {
                edits.repetition_penalty = 1.5;
                (edits.frequency_penalty, edits.presence_penalty) = (0.5, -0.25);
            }
            if self.below(3) == 0 {
                edits.allowed = Some((0..VOCAB / 32 + 1).map(|_| 0x0101_0101 | self.0 as u32).collect());
            }
            edits.bias = self
                .tokens(3)
                .into_iter()
                .collect::<std::collections::BTreeSet<_>>()
                .into_iter()
                .map(|t| (t, 1.5))
                .collect();
            edits.min_tokens = self.below(5) as u32;
            edits.end_tokens = self.tokens(2);
            edits
        }
    }

    /// A sequence as the reference knows it.
    struct Sequence {
        edits: Arc<LogitEdits>,
        history: TokenHistory,
        is_new: bool,
    }

    impl Sequence {
        fn new(random: &mut Random) -> Self {
            let history = TokenHistory::new(&random.tokens(6), &random.tokens(4));
            Self { edits: Arc::new(random.edits()), history, is_new: true }
        }
    }

    fn masked(logits: &[f32], step: &StepInputs, row: u32) -> Vec<f32> {
        let mut logits = logits.to_vec();
        step.masks.iter().filter(|mask| mask.row == row).for_each(|mask| apply_mask(&mask.words, &mut logits, 0));
        logits
    }

    fn best(logits: &[f32]) -> Option<u32> {
        let all = (0..).zip(logits).filter(|(_, logit)| **logit > NONE);
        all.fold(None::<(u32, f32)>, |best, (token, logit)| match best {
            Some((_, most)) if most >= *logit => best,
            _ => Some((token, *logit)),
        })
        .map(|(token, _)| token)
    }

    /// Steps with up to three in flight give the logits that the reference gives, which knows every token at once.
    #[test]
    fn what_the_device_is_told_gives_the_logits_of_the_reference() {
        let mut random = Random(7);
        let mut planner = EditPlanner::new(3);
        let ring = planner.ring();
        let mut device = Device { recents: vec![77; SLOTS as usize * ring], ring };
        let mut sequences: Vec<Sequence> = (0..SLOTS).map(|_| Sequence::new(&mut random)).collect();
        let (mut flying, mut blob) = (std::collections::VecDeque::new(), Vec::new());
        let mut num_fallen = 0;
        for _ in 0..600 {
            let slots: Vec<u32> = (0..SLOTS).filter(|_| random.below(3) > 0).collect();
            let mut step = StepInputs::default();
            for (row, slot) in (0..).zip(&slots) {
                let sequence = &mut sequences[*slot as usize];
                if random.below(12) == 0 {
                    *sequence = Sequence::new(&mut random);
                }
                let history = std::mem::take(&mut sequence.is_new).then(|| Arc::new(sequence.history.clone()));
                step.edits.push(SampleEdits { row, edits: Arc::clone(&sequence.edits), history });
                if random.below(3) == 0 {
                    let words: Vec<u32> = (0..random.below(4)).map(|_| 1 << (random.below(4) * 8)).collect();
                    step.masks.push(SampleMask { row, words: words.into() });
                }
                let sample = SampleRow {
                    slot: *slot,
                    output_index: 0,
                    seed: 0,
                    temperature: 0.0,
                    top_k: 0,
                    top_p: 1.0,
                    min_p: 0.0,
                };
                step.samples.push(sample);
            }
            if random.below(9) == 0 {
                planner.write(&step, slots.len() + 1, &mut blob);
                step.edits.iter_mut().for_each(|edited| edited.history = None);
            }
            planner.write(&step, slots.len() + 1, &mut blob);
            let mut tokens = Vec::new();
            for (row, slot) in (0..).zip(&slots) {
                let logits: Vec<f32> = (0..VOCAB).map(|_| random.below(64) as f32 / 4.0 - 8.0).collect();
                let sequence = &mut sequences[*slot as usize];
                let mut expected = masked(&logits, &step, row);
                sequence.edits.apply(&sequence.history, &mut expected, 0);
                for fallback in [masked(&logits, &step, row), logits.clone()] {
                    if best(&expected).is_none() {
                        expected = fallback;
                        num_fallen += 1;
                    }
                }
                let mut got = logits;
                device.apply(&blob.as_chunks().0[row as usize], &blob, &mut got);
                assert_eq!(got, expected, "{:?} {:?}", sequence.edits, sequence.history);
                tokens.push(best(&got));
                sequence.history.push(best(&got).unwrap());
            }
            assert_eq!(blob[slots.len() * ROW_WORDS..][..ROW_WORDS], [0; ROW_WORDS], "padding");
            device.keep(&blob, &tokens);
            flying.push_back((planner.submit(), tokens));
            while flying.len() > random.below(4) {
                let (drawn, tokens) = flying.pop_front().unwrap();
                planner.take(&drawn, &tokens);
            }
        }
        assert!(num_fallen > 20, "{num_fallen} rows fell back");
    }
}
