//! What the device is told gives the logits of the reference.

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
            let sample =
                SampleRow { slot: *slot, output_index: 0, seed: 0, temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
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
