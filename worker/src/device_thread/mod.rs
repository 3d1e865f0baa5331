//! The one thread that owns the device.
//!
//! Owns backend, communicator, model and KV cache from the head's first message to the last, and drives the rank's start-up.
//! Knows nothing of streams: commands come in through one bounded channel, events leave through another.
//!
//! **Invariant:** the last event of a rank that gives up is its `Failure`, with the phase that it was in; every wait for the
//! head during start-up, and for room among the events, has a deadline.

mod channel;
mod start;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use phalanx_proto::{HeadMessage, Incarnation, NodeId, Rank, RankEvent, RankFailure};
use tokio::sync::mpsc;
use tracing::error;

use crate::backend::DeviceKind;
use crate::error::WorkerError;
use channel::Head;

/// Commands that may wait: more than the plans in flight, and the end.
const COMMANDS_MAX: usize = 64;
/// Events that may wait for the session.
const EVENTS_MAX: usize = 256;

/// What a device thread must know before the head's first message.
#[derive(Debug, Clone)]
pub struct RankSetup {
    /// Place in the group.
    pub rank: Rank,
    /// The set of processes that this one belongs to; plans of another are refused.
    pub incarnation: Incarnation,
    /// The node that this process runs on.
    pub node_id: NodeId,
    /// The device.
    pub device: DeviceKind,
    /// Threads that compute, 0 for this rank's share of the node's CPUs.
    pub num_threads: usize,
    /// How long this rank waits for a head that is gone: a step that waits for a rank which that head did not reach waits longer.
    pub head_grace: Duration,
}

/// The two ends of a device thread. Dropping `commands` ends it after the step that runs.
#[derive(Debug)]
pub struct DeviceHandle {
    /// What the head says, in order. A full one means that the head sent more plans than it said it would.
    pub commands: SyncSender<HeadMessage>,
    /// What the rank answers; closed when the thread has ended.
    pub events: mpsc::Receiver<RankEvent>,
}

/// Starts the device thread.
///
/// # Errors
/// The system gives no thread.
pub fn spawn(setup: RankSetup) -> Result<DeviceHandle, WorkerError> {
    let (commands, inbox) = sync_channel(COMMANDS_MAX);
    let (outbox, events) = mpsc::channel(EVENTS_MAX);
    let span = tracing::Span::current();
    let body = move || span.in_scope(|| run(&setup, Head::new(inbox, outbox)));
    std::thread::Builder::new().name("device".into()).spawn(body).map_err(WorkerError::Thread)?;
    Ok(DeviceHandle { commands, events })
}

/// The thread's life. Whatever ends it early is told to the head.
fn run(setup: &RankSetup, mut head: Head) {
    let outcome = catch_unwind(AssertUnwindSafe(|| start::serve(setup, &mut head)))
        .unwrap_or_else(|panic| Err(WorkerError::Panicked { message: panic_message(panic.as_ref()) }));
    let Err(error) = outcome else { return };
    if matches!(error, WorkerError::SessionGone { .. }) {
        // Its side says why; here nothing is wrong.
        return;
    }
    error!(phase = %head.phase(), code = error.code(), %error, "rank gives up");
    let failure = RankFailure { phase: head.phase(), code: error.code().into(), message: error.to_string() };
    // Where the session is gone too, nobody is left to tell.
    let _ = head.send(RankEvent::Failure(failure));
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}
