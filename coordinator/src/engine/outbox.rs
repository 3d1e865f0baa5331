//! Events on their way from the engine's thread to the streams of the API runtime: one message a step.
//!
//! A stream's channel has room for everything that its request can produce, so a slow client holds neither the engine nor
//! the dispatcher up, and what it can pile up is bounded by its own `max_tokens`.
//!
//! **Invariant:** the dispatcher never waits for a stream, so the engine never waits for a client.

use std::collections::HashMap;
use std::time::Duration;

use phalanx_proto::SeqId;
use tokio::sync::mpsc;

use super::moving::Moving;
use super::request::{EngineError, TokenEvent};
use super::scheduler::SeqEvent;

/// Batches between engine and dispatcher.
const BATCHES_MAX: usize = 64;
/// How long the API runtime may take none.
const DISPATCH_DEADLINE: Duration = Duration::from_secs(30);

/// The events of one step, and the streams that were opened since the last one.
struct Batch {
    opened: Vec<(SeqId, mpsc::Sender<TokenEvent>)>,
    events: Vec<SeqEvent>,
    /// Sequences that leave for another engine after these events.
    moved: Vec<Moving>,
}

/// The engine's end.
pub(super) struct Outbox {
    batches: mpsc::Sender<Batch>,
    opened: Vec<(SeqId, mpsc::Sender<TokenEvent>)>,
    pub(super) moved: Vec<Moving>,
}

/// The API runtime's end.
pub(super) struct Dispatcher {
    batches: mpsc::Receiver<Batch>,
    streams: HashMap<SeqId, mpsc::Sender<TokenEvent>>,
}

/// Both ends.
pub(super) fn outbox() -> (Outbox, Dispatcher) {
    let (sender, receiver) = mpsc::channel(BATCHES_MAX);
    (
        Outbox { batches: sender, opened: Vec::new(), moved: Vec::new() },
        Dispatcher { batches: receiver, streams: HashMap::new() },
    )
}

/// True for the event that ends a stream.
pub(super) fn is_last(event: &TokenEvent) -> bool {
    matches!(event, TokenEvent::Finished { .. } | TokenEvent::Failed(_))
}

impl Outbox {
    /// Opens a stream; the dispatcher learns of it before its first event.
    pub(super) fn open(&mut self, id: SeqId, stream: mpsc::Sender<TokenEvent>) {
        self.opened.push((id, stream));
    }

    /// Sends the events of a step.
    ///
    /// # Errors
    /// The API runtime is gone or stuck: there is nobody to serve.
    pub(super) async fn send(&mut self, events: Vec<SeqEvent>) -> Result<(), EngineError> {
        if events.is_empty() && self.opened.is_empty() && self.moved.is_empty() {
            return Ok(());
        }
        let (opened, moved) = (std::mem::take(&mut self.opened), std::mem::take(&mut self.moved));
        let batch = Batch { opened, events, moved };
        self.batches
            .send_timeout(batch, DISPATCH_DEADLINE)
            .await
            .map_err(|_| EngineError::GroupFailed { reason: "the API runtime takes no events".into() })
    }
}

impl Dispatcher {
    /// Hands events to streams until the engine ends. Streams without a last event then end by themselves; see `TokenStream`.
    pub(super) async fn run(mut self) {
        while let Some(batch) = self.batches.recv().await {
            self.streams.extend(batch.opened);
            for (id, event) in batch.events {
                self.hand_over(id, event);
            }
            for moving in batch.moved {
                if let Some(stream) = self.streams.remove(&moving.sequence.id) {
                    moving.arrive(stream);
                }
            }
        }
    }

    fn hand_over(&mut self, id: SeqId, event: TokenEvent) {
        let is_last = is_last(&event);
        if let Some(stream) = self.streams.get(&id) {
            // Full cannot be; closed means that the client is gone, which its stream has told the engine.
            let _gone = stream.try_send(event);
        }
        if is_last {
            self.streams.remove(&id);
        }
    }
}
