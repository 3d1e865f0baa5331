//! Edits of a sequence's logits, and their way over the wire ahead of the plan that starts the sequence.
//!
//! **Invariant:** edits that leave [`EditStaging::complete`] have finite numbers and a repetition penalty above 0.
//! **Invariant:** what a rank keeps of edits is bounded by [`EDIT_IDS_STAGED_MAX`].

use std::collections::HashMap;
use std::sync::Arc;

use crate::{Fnv, SeqId, StepPlan, TokenId, WireError, pb};

/// Most numbers of the lists in one message: with five bytes each and a bias beside it stays under [`crate::PLAN_BYTES_MAX`].
const EDIT_IDS_MESSAGE_MAX: usize = 5 * 1024;
/// Most numbers that a rank keeps for plans to come.
const EDIT_IDS_STAGED_MAX: usize = 16 << 20;

/// How a sequence's logits are edited before a token is drawn. Ranges were checked where the request was parsed.
#[derive(Debug, Clone, PartialEq)]
pub struct LogitEdits {
    /// Subtracted from tokens of the output.
    pub presence_penalty: f32,
    /// Subtracted for each time that a token stands in the output.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies other logits of tokens in prompt or output.
    pub repetition_penalty: f32,
    /// Tokens of the output before which `end_tokens` may not be drawn.
    pub min_tokens: u32,
    /// The tokens that would end the output.
    pub end_tokens: Vec<TokenId>,
    /// Added to the logits of single tokens.
    pub bias: Vec<(TokenId, f32)>,
    /// The only tokens that may be drawn; empty: all.
    pub allowed: Vec<TokenId>,
    /// Sequences of tokens that may not stand in the output.
    pub bad_words: Vec<Vec<TokenId>>,
    /// Edits nothing: tokens whose log-probabilities are told beside each drawn one.
    pub scored: Vec<TokenId>,
    /// Edits nothing: the same for the prompt's tokens from `scored_prompt_start` on, a list for each.
    pub scored_prompt: Vec<Vec<TokenId>>,
    /// Position of the token that the first of these lists is for.
    pub scored_prompt_start: u32,
}

impl Default for LogitEdits {
    fn default() -> Self {
        Self {
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            min_tokens: 0,
            end_tokens: Vec::new(),
            bias: Vec::new(),
            allowed: Vec::new(),
            bad_words: Vec::new(),
            scored: Vec::new(),
            scored_prompt: Vec::new(),
            scored_prompt_start: 0,
        }
    }
}

impl LogitEdits {
    /// True where no logit is changed, whatever is scored.
    pub fn changes_nothing(&self) -> bool {
        let unscored = Self { scored: Vec::new(), scored_prompt: Vec::new(), scored_prompt_start: 0, ..self.clone() };
        unscored.is_neutral()
    }

    /// True where nothing is edited.
    pub fn is_neutral(&self) -> bool {
        *self == Self { end_tokens: self.end_tokens.clone(), ..Self::default() }
    }

    /// A number that tells edits apart; not a defence.
    pub(crate) fn digest(&self) -> u64 {
        let mut hash = Fnv::new(1);
        for number in [self.presence_penalty, self.frequency_penalty, self.repetition_penalty] {
            // A zero loses its sign on the wire.
            hash.add((number + 0.0).to_bits().into());
        }
        hash.add(self.min_tokens.into());
        hash.add(self.scored_prompt_start.into());
        let lists = [&self.end_tokens, &self.allowed, &self.scored].into_iter();
        for list in lists.chain(&self.bad_words).chain(&self.scored_prompt) {
            hash.add(list.len() as u64);
            for token in list {
                hash.add(token.0.into());
            }
        }
        for (token, bias) in &self.bias {
            hash.add(token.0.into()).add(bias.to_bits().into());
        }
        hash.finish()
    }

    fn numbers(&self) -> pb::LogitEdits {
        pb::LogitEdits {
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            repetition_penalty: self.repetition_penalty,
            min_tokens: self.min_tokens,
            scored_prompt_start: self.scored_prompt_start,
            ..pb::LogitEdits::default()
        }
    }

    /// In parts of at most [`EDIT_IDS_MESSAGE_MAX`] numbers, one at least.
    fn parts(&self) -> Vec<pb::LogitEdits> {
        let raw = |tokens: &[TokenId]| tokens.iter().map(|token| token.0).collect::<Vec<u32>>();
        let joined = |lists: &[Vec<TokenId>]| -> Vec<u32> {
            lists.iter().flat_map(|list| [vec![list.len() as u32], raw(list)].concat()).collect()
        };
        let mut parts = vec![self.numbers()];
        for ids in self.end_tokens.chunks(EDIT_IDS_MESSAGE_MAX) {
            parts.push(pb::LogitEdits { end_tokens: raw(ids), ..self.numbers() });
        }
        for ids in self.allowed.chunks(EDIT_IDS_MESSAGE_MAX) {
            parts.push(pb::LogitEdits { allowed: raw(ids), ..self.numbers() });
        }
        for ids in joined(&self.bad_words).chunks(EDIT_IDS_MESSAGE_MAX) {
            parts.push(pb::LogitEdits { bad_words: ids.to_vec(), ..self.numbers() });
        }
        for ids in self.scored.chunks(EDIT_IDS_MESSAGE_MAX) {
            parts.push(pb::LogitEdits { scored: raw(ids), ..self.numbers() });
        }
        for ids in joined(&self.scored_prompt).chunks(EDIT_IDS_MESSAGE_MAX) {
            parts.push(pb::LogitEdits { scored_prompt: ids.to_vec(), ..self.numbers() });
        }
        for biases in self.bias.chunks(EDIT_IDS_MESSAGE_MAX) {
            let (bias_tokens, bias_values) = biases.iter().map(|(token, bias)| (token.0, *bias)).unzip();
            parts.push(pb::LogitEdits { bias_tokens, bias_values, ..self.numbers() });
        }
        parts
    }
}

impl TryFrom<pb::LogitEdits> for LogitEdits {
    type Error = WireError;

    fn try_from(e: pb::LogitEdits) -> Result<Self, WireError> {
        let numbers = [e.presence_penalty, e.frequency_penalty, e.repetition_penalty];
        if numbers.iter().chain(&e.bias_values).any(|number| !number.is_finite()) || e.repetition_penalty <= 0.0 {
            return Err(invalid("finite numbers, repetition_penalty above 0", format!("{numbers:?}")));
        }
        if e.bias_tokens.len() != e.bias_values.len() {
            return Err(invalid("a value for each bias", e.bias_tokens.len().to_string()));
        }
        let ids = |ids: Vec<u32>| ids.into_iter().map(TokenId).collect::<Vec<_>>();
        Ok(Self {
            presence_penalty: e.presence_penalty,
            frequency_penalty: e.frequency_penalty,
            repetition_penalty: e.repetition_penalty,
            min_tokens: e.min_tokens,
            end_tokens: ids(e.end_tokens),
            bias: e.bias_tokens.into_iter().map(TokenId).zip(e.bias_values).collect(),
            allowed: ids(e.allowed),
            bad_words: lists(&e.bad_words)?,
            scored: ids(e.scored),
            scored_prompt: lists(&e.scored_prompt)?,
            scored_prompt_start: e.scored_prompt_start,
        })
    }
}

/// Lists that stand behind each other, each behind its length.
fn lists(joined: &[u32]) -> Result<Vec<Vec<TokenId>>, WireError> {
    let (mut lists, mut rest) = (Vec::new(), joined);
    while let Some((len, behind)) = rest.split_first() {
        let (list, behind) = behind
            .split_at_checked(*len as usize)
            .ok_or_else(|| invalid("lists as long as they say", len.to_string()))?;
        lists.push(list.iter().copied().map(TokenId).collect());
        rest = behind;
    }
    Ok(lists)
}

/// The messages that carry the edits of a plan's new sequences.
pub fn edit_messages(plan: &StepPlan) -> Vec<pb::HeadToRank> {
    let mut messages = Vec::new();
    for new in &plan.new_sequences {
        for part in new.sampling.edits.iter().flat_map(|edits| edits.parts()) {
            let part = pb::StageEdits { seq_id: new.seq_id.0, edits: Some(part) };
            messages.push(pb::HeadToRank { message: Some(pb::head_to_rank::Message::StageEdits(part)) });
        }
    }
    messages
}

/// Edits that have come and wait for the plan that starts their sequence.
#[derive(Debug, Default)]
pub struct EditStaging {
    edits: HashMap<SeqId, pb::LogitEdits>,
    num_ids: usize,
}

impl EditStaging {
    /// Keeps a part.
    ///
    /// # Errors
    /// More than may be kept.
    pub fn keep(&mut self, part: pb::StageEdits) -> Result<(), WireError> {
        let edits = part.edits.ok_or(WireError::Missing { message: "StageEdits", field: "edits" })?;
        // A part of numbers alone counts too, so that their number is bounded.
        self.num_ids += 1 + num_ids(&edits);
        if self.num_ids > EDIT_IDS_STAGED_MAX {
            return Err(invalid("within the limit of staged edits", self.num_ids.to_string()));
        }
        let kept = self.edits.entry(SeqId(part.seq_id)).or_default();
        kept.presence_penalty = edits.presence_penalty;
        kept.frequency_penalty = edits.frequency_penalty;
        kept.repetition_penalty = edits.repetition_penalty;
        kept.min_tokens = edits.min_tokens;
        kept.end_tokens.extend(edits.end_tokens);
        kept.bias_tokens.extend(edits.bias_tokens);
        kept.bias_values.extend(edits.bias_values);
        kept.allowed.extend(edits.allowed);
        kept.bad_words.extend(edits.bad_words);
        kept.scored.extend(edits.scored);
        kept.scored_prompt.extend(edits.scored_prompt);
        kept.scored_prompt_start = edits.scored_prompt_start;
        Ok(())
    }

    /// Gives the new sequences of a plan the edits that came before it; what came for others is dropped.
    ///
    /// # Errors
    /// Edits that did not come, or are none.
    pub fn complete(&mut self, plan: &mut StepPlan) -> Result<(), WireError> {
        let mut staged = std::mem::take(self);
        for new in &mut plan.new_sequences {
            let Some(edits) = &mut new.sampling.edits else { continue };
            let missing = WireError::Missing { message: "StageEdits", field: "edits" };
            *edits = Arc::new(staged.edits.remove(&new.seq_id).ok_or(missing)?.try_into()?);
        }
        Ok(())
    }
}

fn num_ids(edits: &pb::LogitEdits) -> usize {
    let lists = [&edits.end_tokens, &edits.bias_tokens, &edits.allowed, &edits.bad_words];
    lists.into_iter().chain([&edits.scored, &edits.scored_prompt]).map(Vec::len).sum()
}

fn invalid(expected: &'static str, value: String) -> WireError {
    WireError::Invalid { field: "edits", value, expected }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::{NewSequence, PLAN_BYTES_MAX, SamplingParams, SeqSlot};

    fn plan(edits: LogitEdits) -> StepPlan {
        let sampling = SamplingParams { edits: Some(Arc::new(edits)), ..SamplingParams::default() };
        let new = NewSequence {
            slot: SeqSlot(0),
            seq_id: SeqId(9),
            tokens: vec![TokenId(1)],
            num_prompt_tokens: 1,
            blocks: vec![],
            sampling,
        };
        StepPlan { new_sequences: vec![new], ..StepPlan::default() }
    }

    /// Sends a plan over the wire; gives how many messages its edits took.
    #[track_caller]
    fn check(edits: LogitEdits, num_messages: usize) {
        let plan = plan(edits);
        let messages = edit_messages(&plan);
        assert_eq!(messages.len(), num_messages);
        let mut staging = EditStaging::default();
        for message in messages {
            assert!(message.encoded_len() <= PLAN_BYTES_MAX);
            let Some(pb::head_to_rank::Message::StageEdits(part)) = message.message else { panic!() };
            staging.keep(part).unwrap();
        }
        let mut received = StepPlan::try_from(pb::Plan::from(&plan)).unwrap();
        assert_ne!(received.chain(0), plan.chain(0), "the chain sees edits");
        staging.complete(&mut received).unwrap();
        assert_eq!(received, plan);
        assert_eq!(received.chain(0), plan.chain(0));
    }

    #[test]
    fn a_zero_that_loses_its_sign_is_the_same_plan() {
        check(LogitEdits { presence_penalty: -0.0, frequency_penalty: 0.5, ..LogitEdits::default() }, 1);
    }

    #[test]
    fn edits_survive_the_wire_in_parts() {
        let ids = |num: u32| (0..num).map(|id| TokenId(id + 3_000_000_000)).collect::<Vec<_>>();
        check(LogitEdits { repetition_penalty: 1.5, ..LogitEdits::default() }, 1);
        check(LogitEdits { allowed: ids(12_000), ..LogitEdits::default() }, 4);
        check(
            LogitEdits {
                presence_penalty: -0.5,
                min_tokens: 3,
                end_tokens: ids(2),
                bias: ids(7000).into_iter().map(|id| (id, 0.25)).collect(),
                bad_words: vec![ids(1), ids(5000), ids(300)],
                scored: ids(128),
                scored_prompt: vec![ids(20), vec![], ids(5200)],
                scored_prompt_start: 7,
                ..LogitEdits::default()
            },
            9,
        );
    }

    #[test]
    fn lying_edits_are_refused() {
        let keep = |edits: pb::LogitEdits| {
            let mut staging = EditStaging::default();
            staging.keep(pb::StageEdits { seq_id: 9, edits: Some(edits) })?;
            staging.complete(&mut plan(LogitEdits::default()))
        };
        let fine = pb::LogitEdits { repetition_penalty: 1.0, ..pb::LogitEdits::default() };
        assert!(keep(fine.clone()).is_ok());
        assert!(keep(pb::LogitEdits { repetition_penalty: 0.0, ..fine.clone() }).is_err());
        assert!(keep(pb::LogitEdits { presence_penalty: f32::NAN, ..fine.clone() }).is_err());
        assert!(keep(pb::LogitEdits { bias_tokens: vec![1], ..fine.clone() }).is_err());
        assert!(keep(pb::LogitEdits { bad_words: vec![2, 1], ..fine }).is_err());
        assert!(EditStaging::default().complete(&mut plan(LogitEdits::default())).is_err(), "no edits came");
    }

    #[test]
    fn what_edits_nothing_is_neutral() {
        assert!(LogitEdits { end_tokens: vec![TokenId(1)], ..LogitEdits::default() }.is_neutral());
        assert!(!LogitEdits { min_tokens: 1, ..LogitEdits::default() }.is_neutral());
        let scored = LogitEdits { scored: vec![TokenId(1)], ..LogitEdits::default() };
        assert!(scored.changes_nothing() && !scored.is_neutral());
    }
}
