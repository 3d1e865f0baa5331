//! A rank's stream to the head: plans down, results up, nothing else.
//!
//! Owns the connection, what came ahead of its plan (`staging`), and the plans that are not finished (`held`), which the next head may
//! ask for. Knows no model and no device.
//!
//! **Invariant:** a head that another one has followed ends no rank.
//! **Invariant:** the device thread sees messages in the order of the head, each whole and checked. Nothing is taken before the
//! hello, and nothing waits without a bound: a full queue ends the session.

mod dialing;
mod held;
mod staging;

use std::net::IpAddr;
use std::sync::mpsc::TrySendError;

use phalanx_proto::pb::rank_sessions_client::RankSessionsClient;
use phalanx_proto::{HeadMessage, LoadModel, RankCapacity, RankEvent, RankHello, RankResumes, WireError, pb};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic::transport::Channel;
use tracing::{debug, info};

use crate::config::defaults;
use crate::device_thread::DeviceHandle;
use crate::head_note::{Heads, Led};
use dialing::own_ip;
pub use dialing::{HeadTarget, HeadTrust, dial_tcp};
use held::HeldPlans;
use staging::Staging;

/// Why a session ended before the head said so.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The head cannot be reached.
    #[error("the head at {head} cannot be reached: {reason}")]
    Unreachable {
        /// Where it was sought.
        head: String,
        /// What was seen.
        reason: String,
    },
    /// The head does not want this rank.
    #[error("the head refuses this rank: {message}")]
    Refused {
        /// Its words.
        message: String,
    },
    /// The stream ended or broke.
    #[error("the head is gone: {reason}")]
    HeadGone {
        /// How it was seen.
        reason: String,
    },
    /// The head sent something that cannot be taken.
    #[error("from the head: {0}")]
    Wire(#[from] WireError),
    /// More plans than were agreed.
    #[error("the head sent more than the device thread's queue holds")]
    Overrun,
    /// More staged tokens than the group's limits allow.
    #[error("{num_tokens} tokens are staged; at most {num_tokens_max} may be")]
    Staging {
        /// Tokens with the part that came.
        num_tokens: usize,
        /// The limit.
        num_tokens_max: usize,
    },
    /// The device thread ended.
    #[error("the device thread has ended")]
    DeviceEnded,
}

/// What outlives a lost head.
#[derive(Debug)]
pub struct Kept {
    /// What the next head is told.
    resumes: RankResumes,
    /// The limit of staged tokens, which the group's first head set.
    staged_tokens_max: usize,
    /// Plans that are not finished.
    held: HeldPlans,
}

/// A rank's open stream.
pub struct Session<'a> {
    device: &'a mut DeviceHandle,
    heads: Heads,
    led: Led,
    plans: tonic::Streaming<pb::HeadToRank>,
    results: mpsc::Sender<pb::RankMessage>,
    staging: Staging,
    held: HeldPlans,
    /// Where this machine is seen by the head's: the way to the other nodes, as far as the rank can know it.
    own_ip: Option<IpAddr>,
    /// What the device thread has said that outlives this stream.
    capacity: Option<RankCapacity>,
    kept: Option<RankResumes>,
    /// Answers to plans of an earlier head are on their way; they end with the first `Ready`.
    is_stale: bool,
}

impl<'a> Session<'a> {
    /// Dials the head and says hello.
    ///
    /// # Errors
    /// The head does not answer after some attempts, or refuses this rank.
    pub async fn open(heads: &Heads, hello: RankHello, device: &'a mut DeviceHandle) -> Result<Self, SessionError> {
        let led = heads.now();
        let mut pause = defaults::RETRY_PAUSE_MIN;
        let mut attempt = 1;
        let channel = loop {
            match led.target.dial().await {
                Ok(channel) => break channel,
                Err(error) if attempt == defaults::RANK_CONNECT_ATTEMPTS => return Err(error),
                Err(error) => debug!(%error, attempt, "head does not answer"),
            }
            tokio::time::sleep(pause).await;
            (pause, attempt) = (pause * 2, attempt + 1);
        };
        let (plans, results) = greet(channel, hello).await?;
        Ok(Self::new(heads, led, device, plans, results))
    }

    /// Dials until a head is there again, the same or another, that takes this rank with what it has kept.
    ///
    /// # Errors
    /// No head came until `ends`, one refuses this rank, or the device thread has ended meanwhile.
    pub async fn resume(
        heads: &Heads,
        hello: &RankHello,
        device: &'a mut DeviceHandle,
        kept: Kept,
        ends: Instant,
    ) -> Result<Self, SessionError> {
        let hello = RankHello { resumes: Some(kept.resumes), ..hello.clone() };
        let mut held = kept.held;
        held.cut();
        loop {
            let led = heads.now();
            let greeted = async {
                tokio::select! {
                    greeted = async { greet(led.target.dial().await?, hello.clone()).await } => greeted,
                    () = heads.superseded(&led) => Err(gone("another head leads")),
                }
            };
            match tokio::time::timeout_at(ends, greeted).await.map_err(|_| gone("it did not come back"))? {
                Ok((plans, results)) => {
                    let mut session = Self::new(heads, led, device, plans, results);
                    session.staging.num_tokens_max = kept.staged_tokens_max;
                    session.held = held;
                    (session.kept, session.is_stale) = (Some(kept.resumes), true);
                    return Ok(session);
                }
                Err(refused @ SessionError::Refused { .. }) => return Err(refused),
                Err(error) => debug!(%error, "head does not answer"),
            }
            if device.events.is_closed() {
                return Err(SessionError::DeviceEnded);
            }
            tokio::time::sleep(defaults::RETRY_PAUSE_MIN).await;
        }
    }

    fn new(
        heads: &Heads,
        led: Led,
        device: &'a mut DeviceHandle,
        plans: tonic::Streaming<pb::HeadToRank>,
        results: mpsc::Sender<pb::RankMessage>,
    ) -> Self {
        info!(head = %led.target.address, "session open");
        let (staging, own_ip, heads) = (Staging::default(), own_ip(&led.target.address), heads.clone());
        let held = HeldPlans::default();
        Self { device, heads, led, plans, results, staging, held, own_ip, capacity: None, kept: None, is_stale: false }
    }

    /// The head that it serves.
    pub fn led(&self) -> &Led {
        &self.led
    }

    /// What the rank holds that another head can go on with; none before it was ready.
    pub fn into_kept(self) -> Option<Kept> {
        let resumes = RankResumes { last_plan: self.held.last(), ..self.kept? };
        Some(Kept { resumes, staged_tokens_max: self.staging.num_tokens_max, held: self.held })
    }

    /// Hands plans to the device thread as they come, and results to the head as they are ready. Neither waits for the other.
    ///
    /// # Errors
    /// The head is gone or sends what cannot be taken, or the device thread has ended; the process should end too.
    pub async fn run(&mut self) -> Result<String, SessionError> {
        loop {
            tokio::select! {
                message = self.plans.message() => match message {
                    Ok(Some(message)) => {
                        if let Some(reason) = self.take(message).await? {
                            return Ok(reason);
                        }
                    }
                    Ok(None) => return Err(gone("it closed the stream")),
                    Err(status) => return Err(gone(status.message())),
                },
                event = self.device.events.recv() => match event {
                    Some(event) => self.pass(event).await?,
                    None => return Err(self.flush().await),
                },
            }
        }
    }

    /// Passes on what the device thread says.
    async fn pass(&mut self, event: RankEvent) -> Result<(), SessionError> {
        if let RankEvent::Output(output) = &event {
            self.held.finish(output);
        }
        match &event {
            RankEvent::Output(_) if self.is_stale => return Ok(()),
            RankEvent::Capacity(capacity) => self.capacity = Some(*capacity),
            RankEvent::Ready { num_blocks } => {
                self.is_stale = false;
                self.held.rest();
                let capacity = self.capacity.or(self.kept.map(|kept| kept.capacity));
                self.kept = capacity.map(|capacity| RankResumes { capacity, num_blocks: *num_blocks, last_plan: None });
            }
            _ => {}
        }
        send(&self.results, event).await
    }

    /// Passes one message on; says why to end where it is the last one.
    async fn take(&mut self, message: pb::HeadToRank) -> Result<Option<String>, SessionError> {
        self.held.keep(&message);
        let Some(message) = self.staging.admit(message)? else { return Ok(None) };
        let message = match message {
            HeadMessage::Load(load) => {
                self.staging.limit(&load);
                HeadMessage::Load(self.name_interface(load))
            }
            HeadMessage::RecallPlans => return self.give_back().await.map(|()| None),
            // What was asked of this rank is another head's business now.
            HeadMessage::Shutdown(_) if self.heads.is_superseded(&self.led) => return Err(gone("another head leads")),
            HeadMessage::Shutdown(reason) => {
                // The thread ends with its channel, whether or not this message finds room.
                let _ = self.device.commands.try_send(HeadMessage::Shutdown(reason.clone()));
                return Ok(Some(reason));
            }
            other => other,
        };
        self.device.commands.try_send(message).map(|()| None).map_err(|error| match error {
            TrySendError::Full(_) => SessionError::Overrun,
            TrySendError::Disconnected(_) => SessionError::DeviceEnded,
        })
    }

    /// Gives the plans that are not finished to a head that did not send them.
    async fn give_back(&mut self) -> Result<(), SessionError> {
        let messages = self.held.messages();
        let mut num_left = messages.len() as u32;
        if num_left == 0 {
            return send(&self.results, RankEvent::Recalled(pb::RecalledPart::default())).await;
        }
        for message in messages {
            num_left -= 1;
            let part = pb::RecalledPart { message: Some(message), num_left };
            send(&self.results, RankEvent::Recalled(part)).await?;
        }
        Ok(())
    }

    /// Collectives between nodes go the way of the session, unless the head says otherwise.
    fn name_interface(&self, mut load: LoadModel) -> LoadModel {
        if let Some(ip) = self.own_ip
            && load.collective_interface.is_empty()
        {
            load.collective_interface = ip.to_string();
        }
        load
    }

    /// Lets the last words of the device thread reach the head: it closes the stream when it has read them.
    async fn flush(&mut self) -> SessionError {
        // The stream up ends with its last sender.
        let (closed, _outbox) = mpsc::channel(1);
        drop(std::mem::replace(&mut self.results, closed));
        let drained = async { while matches!(self.plans.message().await, Ok(Some(_))) {} };
        if tokio::time::timeout(defaults::FLUSH_DEADLINE, drained).await.is_err() {
            debug!("head kept the stream open");
        }
        SessionError::DeviceEnded
    }
}

/// Says hello on an open connection. A head that cannot answer now may be asked again, one that refuses may not.
async fn greet(
    channel: Channel,
    hello: RankHello,
) -> Result<(tonic::Streaming<pb::HeadToRank>, mpsc::Sender<pb::RankMessage>), SessionError> {
    let (results, outbox) = mpsc::channel(defaults::OUTBOX);
    send(&results, RankEvent::Hello(hello)).await?;
    let mut client = RankSessionsClient::new(channel);
    let reply = client.session(ReceiverStream::new(outbox));
    let reply = tokio::time::timeout(defaults::WELCOME_DEADLINE, reply).await;
    let reply = reply.map_err(|_| gone("it did not answer the hello"))?;
    let plans = reply.map_err(|status| match status.code() {
        Code::FailedPrecondition | Code::InvalidArgument | Code::PermissionDenied | Code::Unauthenticated => {
            SessionError::Refused { message: status.message().into() }
        }
        _ => gone(status.message()),
    })?;
    Ok((plans.into_inner(), results))
}

async fn send(results: &mpsc::Sender<pb::RankMessage>, event: RankEvent) -> Result<(), SessionError> {
    let sent = results.send_timeout(event.into(), defaults::SEND_DEADLINE).await;
    sent.map_err(|_| gone("it takes no messages"))
}

fn gone(reason: &str) -> SessionError {
    SessionError::HeadGone { reason: reason.into() }
}
