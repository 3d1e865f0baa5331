//! A rank's stream to the head: plans down, results up, nothing else.
//!
//! Owns the connection, and what came ahead of its plan: token masks, edits of logits, and parts of long prompts. Knows no model and no device.
//!
//! **Invariant:** a head that another one has followed ends no rank.
//! **Invariant:** the device thread sees messages in the order of the head, each whole and checked. Nothing is taken before the
//! hello, and nothing waits without a bound: a full queue ends the session.

use std::collections::HashMap;
use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::mpsc::TrySendError;

use phalanx_proto::pb::rank_sessions_client::RankSessionsClient;
use phalanx_proto::{
    EditStaging, Epoch, HeadMessage, LoadModel, MaskStaging, RankCapacity, RankEvent, RankHello, RankResumes, SeqId,
    Term, WireError, pb,
};
use phalanx_trust::{DialError, Identity, Trust};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tracing::{debug, info};

use crate::config::defaults;
use crate::device_thread::DeviceHandle;
use crate::head_note::{Heads, Led};

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

/// How a head is known, and what is shown to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeadTrust {
    /// Neither (`--insecure`).
    Plain,
    /// TLS, with the certificate that lies in this folder at the time of dialling: the agent renews it.
    Certificate(PathBuf),
}

/// Where a rank finds its head.
#[derive(Debug, Clone)]
pub struct HeadTarget {
    /// `host:port`.
    pub address: String,
    /// The Unix socket, where the head is on this machine.
    pub socket: Option<PathBuf>,
    /// How it is known.
    pub trust: HeadTrust,
}

impl HeadTarget {
    /// Connects, by the Unix socket where there is one, else over TCP.
    ///
    /// # Errors
    /// Neither answers within its deadline.
    pub async fn dial(&self) -> Result<Channel, SessionError> {
        if let Some(socket) = &self.socket {
            match dial_unix(socket).await {
                Ok(channel) => return Ok(channel),
                Err(error) => debug!(%error, "unix socket does not answer, trying tcp"),
            }
        }
        let trust = match &self.trust {
            HeadTrust::Plain => Trust::Plain,
            HeadTrust::Certificate(folder) => match Identity::read(folder) {
                Ok(Some(identity)) => Trust::Known(Box::new(identity)),
                Ok(None) => return Err(SessionError::Refused { message: "this node has no certificate".into() }),
                Err(error) => return Err(SessionError::Refused { message: error.to_string() }),
            },
        };
        dial_tcp(&self.address, &trust).await
    }
}

async fn dial_unix(socket: &Path) -> Result<Channel, SessionError> {
    let uri = format!("unix://{}", socket.display());
    let endpoint = endpoint(&uri).map_err(|error| unreachable(&uri, &error))?;
    endpoint.connect().await.map_err(|error| unreachable(&uri, &error))
}

/// Connects to the head at `host:port`, if it is the one that is trusted.
///
/// # Errors
/// Nobody answers within the deadline, or somebody else does.
pub async fn dial_tcp(address: &str, trust: &Trust) -> Result<Channel, SessionError> {
    // The connection is made first; the name only stands in each request.
    let endpoint = endpoint("http://head.phalanx").map_err(|error| unreachable(address, &error))?;
    let stream = phalanx_trust::dial(address, trust, defaults::CONNECT_DEADLINE).await;
    let stream = stream.map_err(|error| match error {
        DialError::Unreachable(reason) => SessionError::Unreachable { head: address.into(), reason },
        other => SessionError::Refused { message: other.to_string() },
    })?;
    phalanx_trust::channel(&endpoint, stream).await.map_err(|error| unreachable(address, &error))
}

fn unreachable(head: &str, error: &tonic::transport::Error) -> SessionError {
    let reason = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    SessionError::Unreachable { head: head.into(), reason }
}

fn endpoint(uri: &str) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(uri.to_owned())?
        .connect_timeout(defaults::CONNECT_DEADLINE)
        .initial_stream_window_size(defaults::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(defaults::CONNECTION_WINDOW_BYTES)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(defaults::KEEPALIVE)
        .keep_alive_timeout(defaults::KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// What outlives a lost head.
#[derive(Debug, Clone, Copy)]
pub struct Kept {
    /// What the next head is told.
    resumes: RankResumes,
    /// The limit of staged tokens, which the group's first head set.
    staged_tokens_max: usize,
}

/// A rank's open stream.
pub struct Session<'a> {
    device: &'a mut DeviceHandle,
    heads: Heads,
    led: Led,
    plans: tonic::Streaming<pb::HeadToRank>,
    results: mpsc::Sender<pb::RankMessage>,
    staging: Staging,
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
        Self { device, heads, led, plans, results, staging, own_ip, capacity: None, kept: None, is_stale: false }
    }

    /// The head that it serves.
    pub fn led(&self) -> &Led {
        &self.led
    }

    /// What the rank holds that another head can go on with; none before it was ready.
    pub fn kept(&self) -> Option<Kept> {
        Some(Kept { resumes: self.kept?, staged_tokens_max: self.staging.num_tokens_max })
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
                        if let Some(reason) = self.take(message)? {
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
        match &event {
            RankEvent::Output(_) if self.is_stale => return Ok(()),
            RankEvent::Capacity(capacity) => self.capacity = Some(*capacity),
            RankEvent::Ready { num_blocks } => {
                self.is_stale = false;
                let capacity = self.capacity.or(self.kept.map(|kept| kept.capacity));
                self.kept = capacity.map(|capacity| RankResumes { capacity, num_blocks: *num_blocks });
            }
            _ => {}
        }
        send(&self.results, event).await
    }

    /// Passes one message on; says why to end where it is the last one.
    fn take(&mut self, message: pb::HeadToRank) -> Result<Option<String>, SessionError> {
        let Some(message) = self.staging.admit(message)? else { return Ok(None) };
        let message = match message {
            HeadMessage::Load(load) => {
                self.staging.limit(&load);
                HeadMessage::Load(self.name_interface(load))
            }
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

/// The address from which this machine speaks to the head; `None` where that is this machine itself. Nothing is sent:
/// connecting a datagram socket only asks the routes.
fn own_ip(head: &str) -> Option<IpAddr> {
    let from = if head.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
    let socket = UdpSocket::bind(from).ok()?;
    socket.connect(head).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_loopback()).then_some(ip)
}

/// Prompt parts, masks and edits that wait for their plan.
#[derive(Debug, Default)]
struct Staging {
    parts: HashMap<SeqId, Vec<u32>>,
    masks: MaskStaging,
    edits: EditStaging,
    num_tokens: usize,
    num_tokens_max: usize,
}

impl Staging {
    /// What all sequences of a full batch may have staged.
    fn limit(&mut self, load: &LoadModel) {
        self.num_tokens_max = load.max_model_len as usize * load.max_num_seqs.max(1) as usize;
    }

    /// Keeps parts, completes plans, and converts what is whole.
    fn admit(&mut self, message: pb::HeadToRank) -> Result<Option<HeadMessage>, SessionError> {
        use pb::head_to_rank::Message as M;
        let missing = WireError::Missing { message: "HeadToRank", field: "message" };
        Ok(Some(match message.message.ok_or(missing)? {
            M::Stage(part) => {
                self.keep(part)?;
                return Ok(None);
            }
            M::Plan(mut plan) => {
                for new in &mut plan.new_sequences {
                    self.complete(new);
                }
                let mut plan = plan.try_into()?;
                self.masks.complete(&mut plan)?;
                self.edits.complete(&mut plan)?;
                HeadMessage::Plan(plan)
            }
            M::SampleInputs(inputs) => {
                self.masks.keep(inputs)?;
                return Ok(None);
            }
            M::StageEdits(part) => {
                self.edits.keep(part)?;
                return Ok(None);
            }
            M::Load(load) => HeadMessage::Load(load.try_into()?),
            M::Connect(connect) => HeadMessage::Connect(connect.addresses),
            M::InitKvCache(init) => HeadMessage::InitKvCache { num_blocks: init.num_blocks },
            M::BeginEpoch(begin) => {
                // What came for plans of the epoch before belongs to nobody any more.
                *self = Self { num_tokens_max: self.num_tokens_max, ..Self::default() };
                HeadMessage::BeginEpoch { term: Term(begin.term), epoch: Epoch(begin.epoch) }
            }
            M::Shutdown(shutdown) => HeadMessage::Shutdown(shutdown.reason),
        }))
    }

    fn keep(&mut self, part: pb::StagePart) -> Result<(), SessionError> {
        let num_tokens = self.num_tokens + part.tokens.len();
        if num_tokens > self.num_tokens_max {
            return Err(SessionError::Staging { num_tokens, num_tokens_max: self.num_tokens_max });
        }
        self.num_tokens = num_tokens;
        self.parts.entry(SeqId(part.seq_id)).or_default().extend(part.tokens);
        Ok(())
    }

    fn complete(&mut self, new: &mut pb::NewSequence) {
        if let Some(mut tokens) = self.parts.remove(&SeqId(new.seq_id)) {
            self.num_tokens -= tokens.len();
            tokens.append(&mut new.tokens);
            new.tokens = tokens;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(seq_id: u64, tokens: Vec<u32>) -> pb::HeadToRank {
        let part = pb::StagePart { seq_id, tokens };
        pb::HeadToRank { message: Some(pb::head_to_rank::Message::Stage(part)) }
    }

    fn plan(seq_id: u64, tokens: Vec<u32>, num_tokens: u32) -> pb::HeadToRank {
        let new = pb::NewSequence {
            seq_id,
            tokens,
            num_tokens,
            num_prompt_tokens: num_tokens,
            sampling: Some(pb::Sampling { top_p: 1.0, ..Default::default() }),
            ..Default::default()
        };
        let plan = pb::Plan { new_sequences: vec![new], ..Default::default() };
        pb::HeadToRank { message: Some(pb::head_to_rank::Message::Plan(plan)) }
    }

    #[test]
    fn staged_parts_come_before_the_tokens_of_their_plan() {
        let mut staging = Staging { num_tokens_max: 100, ..Staging::default() };
        for part in [stage(1, vec![1, 2]), stage(2, vec![9]), stage(1, vec![3])] {
            assert!(staging.admit(part).unwrap().is_none());
        }
        let Some(HeadMessage::Plan(plan)) = staging.admit(plan(1, vec![4, 5], 5)).unwrap() else { panic!() };
        let tokens: Vec<u32> = plan.new_sequences[0].tokens.iter().map(|token| token.0).collect();
        assert_eq!(tokens, [1, 2, 3, 4, 5]);
        assert_eq!((staging.parts.len(), staging.num_tokens), (1, 1));
    }

    #[test]
    fn an_epoch_begins_with_nothing_staged() {
        let mut staging = Staging { num_tokens_max: 4, ..Staging::default() };
        staging.admit(stage(1, vec![1, 2, 3])).unwrap();
        let begin = pb::BeginEpoch { term: 1, epoch: 2 };
        staging.admit(pb::HeadToRank { message: Some(pb::head_to_rank::Message::BeginEpoch(begin)) }).unwrap();
        assert_eq!((staging.parts.len(), staging.num_tokens, staging.num_tokens_max), (0, 0, 4));
        assert!(staging.admit(plan(1, vec![4], 1)).is_ok());
    }

    #[test]
    fn lying_heads_are_refused() {
        let mut staging = Staging { num_tokens_max: 4, ..Staging::default() };
        assert!(staging.admit(stage(1, vec![1, 2, 3])).unwrap().is_none());
        assert!(matches!(staging.admit(stage(2, vec![1, 2])), Err(SessionError::Staging { num_tokens: 5, .. })));
        assert!(matches!(staging.admit(plan(1, vec![4], 5)), Err(SessionError::Wire(_))));
        assert!(matches!(staging.admit(pb::HeadToRank { message: None }), Err(SessionError::Wire(_))));
    }

    #[test]
    fn the_way_to_a_head_on_this_machine_names_no_interface() {
        assert_eq!(own_ip("127.0.0.1:8001"), None);
        assert_eq!(own_ip("[::1]:8001"), None);
    }
}
