//! Beam search over single steps: which beams go on, which have ended, and when no better one can come.
//!
//! Pure: knows tokens and their log-probabilities, no engine, no text and no time. Whoever drives it asks a model for the best next
//! tokens of each beam.
//!
//! Two definitions are in use, and they differ in scores and end. One is that of vLLM: all steps are made, and a score counts prompt and
//! output without the end token. The other is that of transformers, and of vLLM's older engine: a score counts the output with its end
//! token, only the best `width` candidates of a step may end, and the search ends early by one of three rules.
//!
//! **Invariant:** at most `width` beams go on, and at most `width` ended ones are kept.
//! **Invariant:** no beam is longer than `max_tokens`, and each that was kept has either an end token or that length.

use phalanx_proto::{TokenId, TokenLogprobs};

/// When a search ends, and what its scores count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BeamRule {
    /// All steps are made; scores count prompt and output, without the end token.
    Exhaustive,
    /// As soon as `width` beams have ended.
    FirstFull,
    /// Then, once no running beam is better at its present length than the worst of them.
    Estimate,
    /// Then, once no running beam can become better than the worst of them at any length.
    Bound,
}

/// What is searched.
#[derive(Debug, Clone, PartialEq)]
pub struct BeamSettings {
    /// Beams that go on, and that are given in the end.
    pub width: usize,
    /// Longest output.
    pub max_tokens: u32,
    /// Tokens before the output.
    pub num_prompt_tokens: u32,
    /// Tokens that end a beam.
    pub end_tokens: Vec<TokenId>,
    /// A score is divided by length to this power.
    pub length_penalty: f64,
    /// When it ends.
    pub rule: BeamRule,
    /// Alternatives to keep beside each token; none: tokens are kept without log-probabilities.
    pub num_top: Option<usize>,
}

/// One text so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Beam {
    /// Its tokens, the end token included.
    pub tokens: Vec<TokenId>,
    /// Their log-probabilities, where they are wanted.
    pub logprobs: Vec<TokenLogprobs>,
    /// The sum of the log-probabilities of its tokens.
    pub logprob: f64,
    /// The token that ended it; none where it is as long as it may be.
    pub end: Option<TokenId>,
}

/// A beam with one more token.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    beam: usize,
    /// Its place among the best tokens behind the beam.
    place: usize,
    token: TokenId,
    logprob: f64,
    ends: bool,
}

/// A search that runs.
#[derive(Debug)]
pub struct BeamSearch {
    settings: BeamSettings,
    live: Vec<Beam>,
    /// Ended ones with their scores, best first.
    ended: Vec<(f64, Beam)>,
}

impl BeamSettings {
    /// The best next tokens that each beam must bring: enough that `width` go on whatever ends.
    pub fn num_candidates(&self) -> usize {
        self.width + self.width.max(self.end_tokens.len())
    }

    /// The score of an output of so many tokens.
    fn score(&self, logprob: f64, num_tokens: usize, ends: bool) -> f64 {
        let counted = match self.rule {
            BeamRule::Exhaustive => self.num_prompt_tokens as usize + num_tokens - usize::from(ends),
            BeamRule::FirstFull | BeamRule::Estimate | BeamRule::Bound => num_tokens,
        };
        logprob / (counted as f64).powf(self.length_penalty)
    }
}

impl BeamSearch {
    /// One beam without tokens.
    pub fn new(settings: BeamSettings) -> Self {
        Self { settings, live: vec![Beam::default()], ended: Vec::new() }
    }

    /// The beams whose next token is to be found; empty at the end.
    pub fn live(&self) -> &[Beam] {
        &self.live
    }

    /// Takes what may follow each live beam, in their order: its best tokens, best first.
    pub fn advance(&mut self, next: &[TokenLogprobs]) {
        let num_tokens = self.live.first().map_or(0, |beam| beam.tokens.len()) + 1;
        let is_last = num_tokens >= self.settings.max_tokens as usize;
        let candidates = self.candidates(next);
        let (live, mut ended) = match self.settings.rule {
            BeamRule::Exhaustive => self.choose_exhaustive(candidates, num_tokens),
            _ => self.choose_best(candidates, is_last),
        };
        let live: Vec<Beam> = live.into_iter().filter_map(|candidate| self.extended(candidate, next)).collect();
        let mut new: Vec<Beam> = ended.drain(..).filter_map(|candidate| self.extended(candidate, next)).collect();
        self.live = live;
        if is_last {
            new.append(&mut self.live);
        }
        self.keep(new);
        if self.is_decided(num_tokens) {
            self.live.clear();
        }
    }

    /// The best texts, best first.
    pub fn finish(self) -> Vec<Beam> {
        self.ended.into_iter().map(|(_, beam)| beam).collect()
    }

    fn candidates(&self, next: &[TokenLogprobs]) -> Vec<Candidate> {
        let num_candidates = self.settings.num_candidates();
        let mut candidates = Vec::with_capacity(self.live.len() * num_candidates);
        for (beam, (before, after)) in self.live.iter().zip(next).enumerate() {
            for (place, &(token, logprob)) in after.top.iter().take(num_candidates).enumerate() {
                let ends = self.settings.end_tokens.contains(&token);
                candidates.push(Candidate { beam, place, token, logprob: before.logprob + f64::from(logprob), ends });
            }
        }
        candidates
    }

    /// All that end are set aside; the others go on by their scores.
    fn choose_exhaustive(&self, candidates: Vec<Candidate>, num_tokens: usize) -> (Vec<Candidate>, Vec<Candidate>) {
        let (ended, mut live): (Vec<_>, Vec<_>) = candidates.into_iter().partition(|candidate| candidate.ends);
        let score = |candidate: &Candidate| self.settings.score(candidate.logprob, num_tokens, false);
        live.sort_by(|a, b| score(b).total_cmp(&score(a)));
        live.truncate(self.settings.width);
        (live, ended)
    }

    /// Of the best `width` those that end are set aside, all of them at the last step; the best of the others go on.
    fn choose_best(&self, mut candidates: Vec<Candidate>, is_last: bool) -> (Vec<Candidate>, Vec<Candidate>) {
        let width = self.settings.width;
        candidates.sort_by(|a, b| b.logprob.total_cmp(&a.logprob));
        let ended = candidates.iter().take(width).filter(|candidate| candidate.ends || is_last).copied().collect();
        let live = candidates.iter().filter(|candidate| !candidate.ends && !is_last).take(width).copied().collect();
        (live, ended)
    }

    fn extended(&self, candidate: Candidate, next: &[TokenLogprobs]) -> Option<Beam> {
        let mut beam = self.live.get(candidate.beam)?.clone();
        let top = &next.get(candidate.beam)?.top;
        beam.tokens.push(candidate.token);
        beam.logprob = candidate.logprob;
        beam.end = candidate.ends.then_some(candidate.token);
        if let Some(num_top) = self.settings.num_top {
            let (token, logprob) = *top.get(candidate.place)?;
            let top = top.iter().take(num_top).copied().collect();
            beam.logprobs.push(TokenLogprobs { token, logprob, rank: candidate.place as u32 + 1, top });
        }
        Some(beam)
    }

    /// Puts ended beams among those that are kept; of equal ones the older stays in front.
    fn keep(&mut self, beams: Vec<Beam>) {
        let settings = &self.settings;
        let scored = |beam: Beam| (settings.score(beam.logprob, beam.tokens.len(), beam.end.is_some()), beam);
        self.ended.extend(beams.into_iter().map(scored));
        self.ended.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        self.ended.truncate(settings.width);
    }

    /// True where no beam that goes on can change the result, by the rule.
    fn is_decided(&self, num_tokens: usize) -> bool {
        let settings = &self.settings;
        let (Some(best), Some((worst, _))) = (self.live.first(), self.ended.get(settings.width - 1)) else {
            return false;
        };
        let longest = settings.max_tokens as usize;
        match settings.rule {
            BeamRule::Exhaustive => false,
            BeamRule::FirstFull => true,
            BeamRule::Bound if settings.length_penalty > 0.0 => settings.score(best.logprob, longest, false) <= *worst,
            BeamRule::Estimate | BeamRule::Bound => settings.score(best.logprob, num_tokens, false) <= *worst,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: TokenId = TokenId(0);

    fn settings(rule: BeamRule) -> BeamSettings {
        BeamSettings {
            width: 2,
            max_tokens: 3,
            num_prompt_tokens: 5,
            end_tokens: vec![END],
            length_penalty: 1.0,
            rule,
            num_top: Some(1),
        }
    }

    fn next(top: &[(u32, f32)]) -> TokenLogprobs {
        let top: Vec<_> = top.iter().map(|(token, logprob)| (TokenId(*token), *logprob)).collect();
        TokenLogprobs { token: top[0].0, logprob: top[0].1, rank: 1, top }
    }

    /// Runs a model that says the same behind every text.
    fn run(settings: BeamSettings, top: &[(u32, f32)]) -> (usize, Vec<(Vec<u32>, f64)>) {
        let mut search = BeamSearch::new(settings);
        let mut steps = 0;
        while !search.live().is_empty() {
            search.advance(&vec![next(top); search.live().len()]);
            steps += 1;
            assert!(search.live().len() <= 2);
        }
        let ids = |beam: Beam| (beam.tokens.iter().map(|token| token.0).collect(), beam.logprob);
        (steps, search.finish().into_iter().map(ids).collect())
    }

    #[test]
    fn the_likeliest_texts_are_found() {
        let (steps, beams) = run(settings(BeamRule::Exhaustive), &[(1, -0.5), (2, -1.0), (3, -2.0), (4, -3.0)]);
        assert_eq!(steps, 3);
        assert_eq!(beams[0], (vec![1, 1, 1], -1.5));
        assert_eq!(beams[1].1, -2.0, "one of the three with a single 2");
    }

    #[test]
    fn rules_end_a_search_at_their_own_time() {
        let top = [(0, -0.1), (1, -4.0), (2, -4.5), (3, -5.0)];
        // Ends at -0.1 and -4.1: behind them nothing is better, at any length up to three but for the bound's.
        assert_eq!(run(settings(BeamRule::FirstFull), &top).0, 2);
        assert_eq!(run(settings(BeamRule::Estimate), &top).0, 2);
        assert_eq!(run(settings(BeamRule::Exhaustive), &top).0, 3);
        let (_, beams) = run(settings(BeamRule::FirstFull), &top);
        assert_eq!((&beams[0].0, &beams[1].0), (&vec![0], &vec![1, 0]));
    }

    #[test]
    fn lengths_are_weighed() {
        let top = [(1, -0.4), (0, -0.5), (2, -3.0), (3, -4.0)];
        let short = BeamSettings { length_penalty: 0.0, ..settings(BeamRule::Exhaustive) };
        assert_eq!(run(short, &top).1[0].0, [0]);
        let long = BeamSettings { length_penalty: 3.0, ..settings(BeamRule::Bound) };
        assert_eq!(run(long, &top).1[0].0.len(), 3);
    }

    #[test]
    fn log_probabilities_follow_their_tokens() {
        let mut search = BeamSearch::new(BeamSettings { max_tokens: 1, ..settings(BeamRule::Estimate) });
        search.advance(&[next(&[(4, -0.5), (0, -1.0), (7, -2.0)])]);
        let beams = search.finish();
        assert_eq!((beams[1].end, beams[1].logprobs[0].rank), (Some(END), 2));
        assert_eq!(beams[1].logprobs[0].top, [(TokenId(4), -0.5)]);
    }
}
