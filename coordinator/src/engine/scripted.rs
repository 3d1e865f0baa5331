//! An engine whose answers are written beforehand: real handle, real streams, no group. For the tests of other rooms.

use std::sync::{Arc, Mutex, PoisonError};

use phalanx_proto::{SamplingParams, SeqId, TokenId};
use tokio::sync::mpsc;

use super::handle::{Command, Shared};
use super::{EngineHandle, EngineLimits, EngineSnapshot, TokenEvent};

/// What was submitted.
pub(crate) struct Submitted {
    /// Which submission, from 0.
    pub(crate) number: usize,
    /// The prompt.
    pub(crate) prompt: Vec<TokenId>,
    /// How it is to be sampled.
    pub(crate) sampling: SamplingParams,
    /// Where its events go; dropping it ends the stream.
    pub(crate) events: mpsc::Sender<TokenEvent>,
}

/// Sequences whose streams were dropped before their end.
#[derive(Clone, Default)]
pub(crate) struct Cancelled(Arc<Mutex<Vec<SeqId>>>);

impl Cancelled {
    pub(crate) fn count(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// Starts it within the current runtime; `script` is called for each submission.
pub(crate) fn spawn(
    limits: EngineLimits,
    snapshot: EngineSnapshot,
    mut script: impl FnMut(Submitted) + Send + 'static,
) -> (EngineHandle, Cancelled) {
    let (handle, mut inbox, _groups) = EngineHandle::new(Shared::new(limits, snapshot));
    let cancelled = Cancelled::default();
    let seen = cancelled.clone();
    tokio::spawn(async move {
        // They keep their places: this engine never ends one.
        let mut sequences = Vec::new();
        while let Some(command) = inbox.recv().await {
            match command {
                Command::Submit { sequence, stream } => {
                    let prompt = sequence.tokens().to_vec();
                    let (number, sampling) = (sequences.len(), sequence.sampling.clone());
                    script(Submitted { number, prompt, sampling, events: stream });
                    sequences.push(sequence);
                }
                Command::Cancel(id) => seen.0.lock().unwrap_or_else(PoisonError::into_inner).push(id),
            }
        }
    });
    (handle, cancelled)
}
