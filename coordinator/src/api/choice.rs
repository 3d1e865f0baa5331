//! One output of a request as it grows: tokens in, text and log-probabilities out.
//!
//! The same for chat and completions, streamed or not. Knows no JSON.
//!
//! **Invariant:** a choice ends with exactly one [`End`] or one error; dropping it before aborts its sequence.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Instant;

use futures::stream::{self, BoxStream, SelectAll};
use futures::{Stream, StreamExt};
use phalanx_proto::{TokenId, TokenLogprobs};

use super::error::ApiError;
use super::meter::OutputMeter;
use super::patience::Patience;
use super::repetition::LoopDetector;
use crate::engine::{FinishReason, TokenEvent, TokenStream};
use crate::text::{Detokenizer, StopMatcher};

/// What ended an output that stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopCause {
    /// The model's own end token.
    EndOfText,
    /// A token that the request named.
    Token(TokenId),
    /// A string that the request named.
    Text(String),
}

/// Why an output ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndReason {
    /// It stopped.
    Stop(StopCause),
    /// It is as long as it may be.
    Length,
    /// It repeats itself, and the request asked to end then.
    Repetition,
    /// The engine dropped it.
    Abort,
}

/// The end of an output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// Why.
    pub reason: EndReason,
    /// Tokens of the whole output, what ended it included.
    pub completion_tokens: u32,
    /// Prompt tokens that the prefix cache had, where the engine told.
    pub cached_tokens: Option<u32>,
}

/// What one event added to an output.
#[derive(Debug, Clone, Default)]
pub struct Delta {
    /// Which output.
    pub index: usize,
    /// Text that is certain now.
    pub text: String,
    /// Tokens that came.
    pub tokens: Vec<TokenId>,
    /// Their log-probabilities, where asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Log-probabilities of the prompt from its second token on.
    pub prompt_logprobs: Option<Vec<TokenLogprobs>>,
    /// Present on the last one.
    pub end: Option<End>,
}

impl Delta {
    /// Takes in what came behind it.
    fn append(&mut self, later: Self) {
        self.text.push_str(&later.text);
        self.tokens.extend(later.tokens);
        self.logprobs.extend(later.logprobs);
        self.prompt_logprobs = self.prompt_logprobs.take().or(later.prompt_logprobs);
        self.end = self.end.take().or(later.end);
    }
}

/// Which tokens end an output.
#[derive(Debug, Clone, Default)]
pub struct StopTokens {
    /// The model's own; empty where the request ignores them.
    pub model: Vec<TokenId>,
    /// The request's.
    pub request: Vec<TokenId>,
}

impl StopTokens {
    /// All of them, each once.
    pub fn all(&self) -> Vec<TokenId> {
        let mut all = self.model.clone();
        all.extend(self.request.iter().filter(|token| !self.model.contains(token)));
        all
    }

    fn contains(&self, token: TokenId) -> bool {
        self.model.contains(&token) || self.request.contains(&token)
    }

    /// What it means that one of them came.
    pub fn cause(&self, token: TokenId) -> StopCause {
        if self.request.contains(&token) { StopCause::Token(token) } else { StopCause::EndOfText }
    }
}

/// Tokens to text; absent for models without a tokenizer.
pub struct OutputText {
    detokenizer: Detokenizer,
    stops: Option<StopMatcher>,
}

impl OutputText {
    /// Text that ends at the first of `stops`.
    pub fn new(detokenizer: Detokenizer, stops: &[String], include_stop: bool) -> Self {
        let stops = (!stops.is_empty()).then(|| StopMatcher::new(stops.to_vec(), include_stop));
        Self { detokenizer, stops }
    }

    /// The text of tokens that are all known, whatever stops it.
    pub fn whole(mut self, tokens: &[TokenId]) -> String {
        let mut text: String = tokens.iter().map(|token| self.push(*token, false).0).collect();
        text.push_str(&self.finish().0);
        text
    }

    /// The text that a token makes certain, and the stop string that it completed where it may stop.
    fn push(&mut self, token: TokenId, may_stop: bool) -> (String, Option<String>) {
        let piece = self.detokenizer.push(token);
        if may_stop { self.matched(piece) } else { (piece, None) }
    }

    /// What was held back until the end.
    fn finish(&mut self) -> (String, Option<String>) {
        let piece = self.detokenizer.finish();
        let (mut text, stopped) = self.matched(piece);
        if let (Some(stops), None) = (&mut self.stops, &stopped) {
            text.push_str(&stops.finish());
        }
        (text, stopped)
    }

    fn matched(&mut self, piece: String) -> (String, Option<String>) {
        match &mut self.stops {
            None => (piece, None),
            Some(stops) => {
                let step = stops.push(&piece);
                (step.text, step.stopped)
            }
        }
    }
}

/// In which pieces an output is given: the first and the last at once, so many tokens in each of the others.
#[derive(Debug, Default)]
pub struct Pace {
    /// Tokens of a piece; none: as they come.
    pub interval: Option<NonZeroU32>,
    opened: bool,
    /// Ends the output behind the piece that was given before it.
    error: Option<ApiError>,
}

impl Pace {
    /// Pieces of `interval` tokens.
    pub fn new(interval: Option<NonZeroU32>) -> Self {
        Self { interval, ..Self::default() }
    }

    /// Whether a piece is given as it is.
    fn is_full(&self, piece: &Delta) -> bool {
        let Some(interval) = self.interval else { return true };
        !self.opened || piece.end.is_some() || piece.tokens.len() >= interval.get() as usize
    }
}

/// One output that is being made.
pub struct Choice {
    /// Its place in the answer.
    pub index: usize,
    /// Absent once it has ended.
    pub stream: Option<TokenStream>,
    /// Absent where there is no tokenizer.
    pub text: Option<OutputText>,
    /// What ends it, apart from strings.
    pub stop_tokens: Arc<StopTokens>,
    /// Whether a stop token's text is kept.
    pub include_stop: bool,
    /// Tokens within which no string ends it.
    pub min_tokens: u32,
    /// Tokens so far.
    pub num_tokens: u32,
    /// Ends it where it repeats itself.
    pub loops: Option<LoopDetector>,
    /// In which pieces it is given.
    pub pace: Pace,
    /// How long it may take.
    pub patience: Patience,
    /// Its measures.
    pub meter: OutputMeter,
}

impl Choice {
    /// What comes next; `None` after the end.
    pub async fn next(&mut self) -> Option<Result<Delta, ApiError>> {
        let event = match self.patience.next(self.stream.as_mut()?).await {
            Ok(event) => event,
            Err(error) => return Some(Err(self.on_failed(error))),
        };
        Some(match event {
            Some(TokenEvent::PromptLogprobs(logprobs)) => {
                Ok(Delta { index: self.index, prompt_logprobs: Some(logprobs), ..Delta::default() })
            }
            Some(TokenEvent::Token { token, logprobs, .. }) => Ok(self.on_token(token, logprobs)),
            Some(TokenEvent::Pooled(_)) => Ok(Delta { index: self.index, ..Delta::default() }),
            Some(TokenEvent::Finished { reason, usage }) => Ok(self.on_finished(reason, usage.cached_tokens)),
            Some(TokenEvent::Failed(error)) => Err(self.on_failed(error.into())),
            None => Err(self.on_failed(ApiError::EngineGone)),
        })
    }

    /// The next piece, as the pace has it; `None` after the end.
    async fn piece(&mut self) -> Option<Result<Delta, ApiError>> {
        if let Some(error) = self.pace.error.take() {
            return Some(Err(error));
        }
        let mut piece = match self.next().await? {
            Ok(piece) => piece,
            Err(error) => return Some(Err(error)),
        };
        while !self.pace.is_full(&piece) {
            match self.next().await {
                Some(Ok(later)) => piece.append(later),
                Some(Err(error)) => {
                    self.pace.error = Some(error);
                    break;
                }
                None => break,
            }
        }
        self.pace.opened |= !piece.tokens.is_empty();
        Some(Ok(piece))
    }

    fn on_token(&mut self, token: TokenId, logprobs: Option<TokenLogprobs>) -> Delta {
        self.num_tokens += 1;
        self.meter.token(Instant::now());
        let stops = self.stop_tokens.contains(token);
        let silent = stops && !self.include_stop;
        let (mut text, stopped) = match &mut self.text {
            Some(text) if !silent => text.push(token, self.num_tokens > self.min_tokens),
            _ => (String::new(), None),
        };
        let may_end = !stops && self.num_tokens >= self.min_tokens;
        let loops = self.loops.as_mut().is_some_and(|loops| loops.push(token)) && may_end;
        let end = match stopped {
            Some(stop) => Some(self.end(EndReason::Stop(StopCause::Text(stop)), None)),
            None if loops => {
                text.push_str(&self.text.as_mut().map(OutputText::finish).unwrap_or_default().0);
                Some(self.end(EndReason::Repetition, None))
            }
            None => None,
        };
        Delta {
            index: self.index,
            text,
            tokens: vec![token],
            logprobs: logprobs.into_iter().collect(),
            prompt_logprobs: None,
            end,
        }
    }

    fn on_finished(&mut self, reason: FinishReason, cached_tokens: u32) -> Delta {
        let (text, stopped) = self.text.as_mut().map(OutputText::finish).unwrap_or_default();
        let reason = match (stopped, reason) {
            (Some(stop), _) => EndReason::Stop(StopCause::Text(stop)),
            (None, FinishReason::Stop(token)) => EndReason::Stop(self.stop_tokens.cause(token)),
            (None, FinishReason::Complete) => EndReason::Stop(StopCause::EndOfText),
            (None, FinishReason::Length) => EndReason::Length,
            (None, FinishReason::Aborted) => EndReason::Abort,
        };
        let end = self.end(reason, Some(cached_tokens));
        Delta { index: self.index, text, end: Some(end), ..Delta::default() }
    }

    fn on_failed(&mut self, error: ApiError) -> ApiError {
        self.stream = None;
        self.meter.end("error");
        error
    }

    /// Ends the sequence: where the engine has not ended it, dropping the stream does.
    fn end(&mut self, reason: EndReason, cached_tokens: Option<u32>) -> End {
        self.stream = None;
        self.meter.end(match reason {
            EndReason::Stop(_) => "stop",
            EndReason::Length => "length",
            EndReason::Repetition => "repetition",
            EndReason::Abort => "abort",
        });
        End { reason, completion_tokens: self.num_tokens, cached_tokens }
    }
}

/// The deltas of all choices as they come. Dropping it aborts what still runs.
pub fn merged(choices: Vec<Choice>) -> impl Stream<Item = Result<Delta, ApiError>> + Send + Unpin + 'static {
    let mut all: SelectAll<BoxStream<'static, _>> = SelectAll::new();
    for choice in choices {
        all.push(stream::unfold(choice, async |mut choice| Some((choice.piece().await?, choice))).boxed());
    }
    all
}

/// One output, whole.
#[derive(Debug, Clone, Default)]
pub struct Output {
    /// Its text.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<TokenId>,
    /// Their log-probabilities, where asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Log-probabilities of the prompt from its second token on.
    pub prompt_logprobs: Option<Vec<TokenLogprobs>>,
    /// Its end.
    pub end: Option<End>,
}

impl Output {
    fn add(&mut self, delta: Delta) {
        self.text.push_str(&delta.text);
        self.tokens.extend(delta.tokens);
        self.logprobs.extend(delta.logprobs);
        self.prompt_logprobs = self.prompt_logprobs.take().or(delta.prompt_logprobs);
        self.end = self.end.take().or(delta.end);
    }

    /// Log-probability of all its tokens together, by which the best are chosen.
    fn cumulative_logprob(&self) -> f64 {
        self.logprobs.iter().map(|entry| f64::from(entry.logprob)).sum()
    }
}

/// Waits for all choices; outputs come in order of their index.
///
/// # Errors
/// The first error of any choice; the others are aborted.
pub async fn collect(choices: Vec<Choice>) -> Result<Vec<Output>, ApiError> {
    let mut outputs = vec![Output::default(); choices.len()];
    let mut deltas = merged(choices);
    while let Some(delta) = deltas.next().await {
        let delta = delta?;
        if let Some(output) = outputs.get_mut(delta.index) {
            output.add(delta);
        }
    }
    Ok(outputs)
}

/// Of each run of `made` outputs the `kept` best, best first.
pub fn keep_best(outputs: Vec<Output>, made: usize, kept: usize) -> Vec<Output> {
    if made == kept {
        return outputs;
    }
    let mut best = Vec::with_capacity(outputs.len() / made * kept);
    let mut rest = outputs.into_iter();
    loop {
        let mut group: Vec<Output> = rest.by_ref().take(made).collect();
        if group.is_empty() {
            return best;
        }
        group.sort_by(|a, b| b.cumulative_logprob().total_cmp(&a.cumulative_logprob()));
        group.truncate(kept);
        best.append(&mut group);
    }
}
