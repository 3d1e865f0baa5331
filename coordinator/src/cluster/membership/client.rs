//! The command line's side: a head at an address, asked with deadlines.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use phalanx_proto::{EventRecord, PlacementGroupStatus, StatusSnapshot, pb};
use phalanx_trust::{DialError, Token, Trust, channel, dial, speaks_tls};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

use super::super::{DeployEvent, DeployFailure, DeploymentSpec, GroupSpec};
use super::admin::{failure_from_wire, from_wire};
use crate::config::defaults;
use crate::security::tokens::{AccessList, TokenWish};

/// Where a head listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeadAddress {
    /// `HOST:PORT`, in plain text.
    Tcp(String),
    /// `HOST:PORT`, the head that the token names.
    Tls {
        /// `HOST:PORT`.
        address: String,
        /// What is shown to it.
        token: Box<Token>,
    },
    /// A Unix socket of this machine.
    Socket(PathBuf),
}

impl fmt::Display for HeadAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) | Self::Tls { address, .. } => f.write_str(address),
            Self::Socket(path) => path.display().fmt(f),
        }
    }
}

/// Why a head did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody answers.
    #[error("no head answers at {address}: {reason}")]
    Unreachable {
        /// Where it was looked for.
        address: HeadAddress,
        /// What the system said.
        reason: String,
    },
    /// What answers is not the head that was meant.
    #[error("{address}: {reason}")]
    Distrusted {
        /// Where it was looked for.
        address: HeadAddress,
        /// What was seen.
        reason: String,
    },
    /// It refuses.
    #[error("{0}")]
    Refused(String),
    /// It answers something that this version does not understand.
    #[error("the head's answer cannot be read ({0}): are both programs of the same version?")]
    Unreadable(String),
    /// It ended, or the connection did, before the answer.
    #[error("the head at {address} went away: {reason}")]
    Lost {
        /// Where it was.
        address: HeadAddress,
        /// What the system said.
        reason: String,
    },
}

/// A token that was just made.
#[derive(Debug, Clone)]
pub struct NewToken {
    /// Its name in lists.
    pub id: String,
    /// What is shown to the head.
    pub text: String,
    /// When it ends, seconds since 1970.
    pub expires: Option<u64>,
}

/// Shows a token with each call.
#[derive(Clone)]
pub(super) struct Bearer(Option<MetadataValue<Ascii>>);

impl Bearer {
    fn of(address: &HeadAddress) -> Self {
        let HeadAddress::Tls { token, .. } = address else { return Self(None) };
        let value = MetadataValue::try_from(format!("Bearer {}", token.reveal())).ok();
        Self(value.map(|mut value| {
            value.set_sensitive(true);
            value
        }))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

type Shown = InterceptedService<Channel, Bearer>;

/// A connection to a head.
#[derive(Debug, Clone)]
pub struct HeadClient {
    admin: pb::admin_client::AdminClient<Shown>,
    tokens: pb::tokens_client::TokensClient<Shown>,
    address: HeadAddress,
}

impl HeadClient {
    /// Connects.
    ///
    /// # Errors
    /// Nobody listens there, or not in time.
    pub async fn connect(address: HeadAddress) -> Result<Self, CallError> {
        let unreachable = |reason| CallError::Unreachable { address: address.clone(), reason };
        let uri = match &address {
            // The connection is made below; the name only stands in each request.
            HeadAddress::Tcp(_) | HeadAddress::Tls { .. } => "http://head.phalanx".to_owned(),
            HeadAddress::Socket(path) => format!("unix://{}", path.display()),
        };
        let endpoint = Endpoint::from_shared(uri).map_err(|error| unreachable(error.to_string()))?;
        let endpoint = endpoint
            .connect_timeout(defaults::CALL_CONNECT_DEADLINE)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(defaults::KEEPALIVE)
            .keep_alive_timeout(defaults::KEEPALIVE_TIMEOUT);
        let channel = tokio::time::timeout(defaults::CALL_CONNECT_DEADLINE, open(&address, &endpoint))
            .await
            .map_err(|_| unreachable(format!("no answer in {} s", defaults::CALL_CONNECT_DEADLINE.as_secs())))??;
        let limit = defaults::MESSAGE_BYTES_MAX;
        let shown = InterceptedService::new(channel, Bearer::of(&address));
        let admin = pb::admin_client::AdminClient::new(shown.clone()).max_decoding_message_size(limit);
        Ok(Self { admin, tokens: pb::tokens_client::TokensClient::new(shown), address })
    }

    /// Where the head is.
    pub fn address(&self) -> &HeadAddress {
        &self.address
    }

    /// The cluster as it is now.
    ///
    /// # Errors
    /// The head does not answer in time.
    pub async fn status(&self) -> Result<StatusSnapshot, CallError> {
        let mut admin = self.admin.clone();
        let call = admin.status(pb::StatusRequest {});
        let reply = self.in_time(defaults::CALL_DEADLINE, call).await?;
        read_json(&reply.snapshot_json)
    }

    /// Asks for a deployment; the events end with `Ready` or `Failed`.
    ///
    /// # Errors
    /// The head does not answer in time.
    pub async fn deploy(&self, spec: &DeploymentSpec) -> Result<DeployEvents, CallError> {
        let spec_json = serde_json::to_string(spec).map_err(|error| CallError::Unreadable(error.to_string()))?;
        let mut admin = self.admin.clone();
        let call = admin.deploy(pb::DeployRequest { spec_json });
        let events = self.in_time(defaults::CALL_DEADLINE + super::super::admission::DEADLINE, call).await?;
        Ok(DeployEvents { events, address: self.address.clone() })
    }

    /// Removes a deployment; returns when its slots are free.
    ///
    /// # Errors
    /// There is none of this name, or it did not end in time.
    pub async fn undeploy(&self, name: &str) -> Result<(), CallError> {
        let mut admin = self.admin.clone();
        let call = admin.undeploy(pb::UndeployRequest { name: name.to_owned() });
        self.in_time(defaults::STOP_DEADLINE, call).await.map(drop)
    }

    /// Starts a deployment again, replica by replica; returns when all serve.
    ///
    /// # Errors
    /// There is none of this name, or it does not serve.
    pub async fn restart(&self, name: &str) -> Result<(), CallError> {
        let mut admin = self.admin.clone();
        let call = admin.restart(pb::RestartRequest { name: name.to_owned() });
        self.in_time(defaults::RESTART_DEADLINE + defaults::CALL_DEADLINE, call).await.map(drop)
    }

    /// What happened; with `follow`, what happens.
    ///
    /// # Errors
    /// The head does not answer in time.
    pub async fn events(&self, deployment: Option<&str>, follow: bool) -> Result<EventStream, CallError> {
        let deployment = deployment.unwrap_or_default().to_owned();
        let mut admin = self.admin.clone();
        let call = admin.events(pb::EventsRequest { deployment, after: 0, follow });
        let events = self.in_time(defaults::CALL_DEADLINE, call).await?;
        Ok(EventStream { events, address: self.address.clone() })
    }

    /// A part of a log: the last lines, or what stands behind an offset.
    ///
    /// # Errors
    /// There is no such log, or its node does not answer.
    pub async fn log(&self, target: &str, tail_lines: u32, offset: Option<u64>) -> Result<LogText, CallError> {
        let mut admin = self.admin.clone();
        let tail_lines = Some(tail_lines);
        let call = admin.logs(pb::LogsRequest { target: target.to_owned(), tail_lines, offset });
        let pb::LogsReply { text, next_offset, name } = self.in_time(2 * defaults::CALL_DEADLINE, call).await?;
        Ok(LogText { text: text.into(), next_offset, name })
    }

    /// Reserves bundles by name.
    ///
    /// # Errors
    /// The head does not answer in time; the inner error: it refuses, with the arithmetic.
    pub async fn create_group(
        &self,
        spec: &GroupSpec,
    ) -> Result<Result<PlacementGroupStatus, DeployFailure>, CallError> {
        let spec_json = serde_json::to_string(spec).map_err(|error| CallError::Unreadable(error.to_string()))?;
        let mut admin = self.admin.clone();
        let call = admin.create_placement_group(pb::CreatePlacementGroupRequest { spec_json });
        let reply = self.in_time(defaults::CALL_DEADLINE, call).await?;
        match reply.refused {
            Some(refused) => {
                let failure = failure_from_wire(refused).map_err(|error| CallError::Unreadable(error.to_string()))?;
                Ok(Err(failure))
            }
            None => Ok(Ok(read_json(&reply.group_json)?)),
        }
    }

    /// A group as it is when it is created, or when the time has passed.
    ///
    /// # Errors
    /// There is none of this name, or the head does not answer.
    pub async fn wait_group(&self, name: &str, timeout: Duration) -> Result<PlacementGroupStatus, CallError> {
        let timeout = timeout.min(defaults::WAIT_MAX);
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let mut admin = self.admin.clone();
        let call = admin.wait_placement_group(pb::WaitPlacementGroupRequest { name: name.to_owned(), timeout_ms });
        read_json(&self.in_time(timeout + defaults::CALL_DEADLINE, call).await?.group_json)
    }

    /// Gives the bundles of a group back; with `force`, what runs in them ends first.
    ///
    /// # Errors
    /// There is none of this name, something runs in it, or its end takes too long.
    pub async fn remove_group(&self, name: &str, force: bool) -> Result<(), CallError> {
        let mut admin = self.admin.clone();
        let call = admin.remove_placement_group(pb::RemovePlacementGroupRequest { name: name.to_owned(), force });
        self.in_time(defaults::STOP_DEADLINE, call).await.map(drop)
    }

    /// Ends the cluster; returns when agents and ranks have ended.
    ///
    /// # Errors
    /// The head does not answer in time.
    pub async fn stop(&self) -> Result<(), CallError> {
        let mut admin = self.admin.clone();
        let call = admin.stop(pb::StopRequest {});
        self.in_time(defaults::STOP_DEADLINE, call).await.map(drop)
    }

    /// A new token: its id, its text, and when it ends.
    ///
    /// # Errors
    /// The head does not answer in time, or has no tokens (`--insecure`).
    pub async fn create_token(&self, wish: &TokenWish) -> Result<NewToken, CallError> {
        let scopes = wish.scopes.iter().map(|scope| scope.as_str().to_owned()).collect();
        let request =
            pb::CreateTokenRequest { scopes, ttl_s: wish.ttl.map(|ttl| ttl.as_secs()), note: wish.note.clone() };
        let mut tokens = self.tokens.clone();
        let reply = self.in_time(defaults::CALL_DEADLINE, tokens.create_token(request)).await?;
        Ok(NewToken { id: reply.id, text: reply.token, expires: reply.expires })
    }

    /// All tokens and nodes.
    ///
    /// # Errors
    /// The head does not answer in time, or has no tokens (`--insecure`).
    pub async fn tokens(&self) -> Result<AccessList, CallError> {
        let mut tokens = self.tokens.clone();
        let reply = self.in_time(defaults::CALL_DEADLINE, tokens.list_tokens(pb::ListTokensRequest {})).await?;
        serde_json::from_str(&reply.list_json).map_err(|error| CallError::Unreadable(error.to_string()))
    }

    /// Takes a token back.
    ///
    /// # Errors
    /// There is none that is valid.
    pub async fn revoke_token(&self, id: &str) -> Result<(), CallError> {
        let mut tokens = self.tokens.clone();
        let call = tokens.revoke_token(pb::RevokeTokenRequest { id: id.to_owned() });
        self.in_time(defaults::CALL_DEADLINE, call).await.map(drop)
    }

    /// Sends a node away for good; gives the token that it came with, where that still opens the cluster.
    ///
    /// # Errors
    /// No such node has a certificate.
    pub async fn revoke_node(&self, node: &str) -> Result<Option<String>, CallError> {
        let mut tokens = self.tokens.clone();
        let call = tokens.revoke_node(pb::RevokeNodeRequest { node_id: node.to_owned() });
        let token = self.in_time(defaults::CALL_DEADLINE, call).await?.token_id;
        Ok(Some(token).filter(|token| !token.is_empty()))
    }

    async fn in_time<T>(
        &self,
        deadline: Duration,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, CallError> {
        let late = || CallError::Lost {
            address: self.address.clone(),
            reason: format!("no answer within {} s", deadline.as_secs()),
        };
        let reply = tokio::time::timeout(deadline, call).await.map_err(|_| late())?;
        match reply {
            Ok(reply) => Ok(reply.into_inner()),
            Err(status) => Err(self.explain(&status).await),
        }
    }

    async fn explain(&self, status: &Status) -> CallError {
        // A head that speaks TLS closes on plain text: whether its farewell was read first is a matter of luck.
        if let HeadAddress::Tcp(host) = &self.address
            && is_of_the_connection(status.code())
            && speaks_tls(host, defaults::CALL_CONNECT_DEADLINE).await
        {
            let reason = "it speaks TLS: leave --insecure away, and give --token".to_owned();
            return CallError::Distrusted { address: self.address.clone(), reason };
        }
        explain(&self.address, status)
    }
}

fn read_json<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, CallError> {
    serde_json::from_str(text).map_err(|error| CallError::Unreadable(error.to_string()))
}

/// What a head says of a deployment that was asked for.
pub struct DeployEvents {
    events: Streaming<pb::DeployEvent>,
    address: HeadAddress,
}

impl DeployEvents {
    /// The next event; waits as long as the deployment takes (the head keeps its deadlines).
    ///
    /// # Errors
    /// The head went away, or speaks another version.
    pub async fn next(&mut self) -> Result<DeployEvent, CallError> {
        let event = self.events.message().await.map_err(|status| explain(&self.address, &status))?;
        let ended = || CallError::Lost { address: self.address.clone(), reason: "the stream ended".to_owned() };
        from_wire(event.ok_or_else(ended)?).map_err(|error| CallError::Unreadable(error.to_string()))
    }
}

/// A channel over a connection to the head that is meant.
async fn open(address: &HeadAddress, endpoint: &Endpoint) -> Result<Channel, CallError> {
    let unreachable = |reason| CallError::Unreachable { address: address.clone(), reason };
    let (host, trust) = match address {
        HeadAddress::Socket(_) => return endpoint.connect().await.map_err(|error| unreachable(root_cause(&error))),
        HeadAddress::Tcp(host) => (host, Trust::Plain),
        HeadAddress::Tls { address, token } => (address, Trust::Pinned(token.pin())),
    };
    let stream = dial(host, &trust, defaults::CALL_CONNECT_DEADLINE).await.map_err(|error| match error {
        DialError::Unreachable(_) | DialError::NoTls => unreachable(error.to_string()),
        other => CallError::Distrusted { address: address.clone(), reason: other.to_string() },
    })?;
    channel(endpoint, stream).await.map_err(|error| unreachable(root_cause(&error)))
}

/// Events of a head.
pub struct EventStream {
    events: Streaming<pb::EventsReply>,
    address: HeadAddress,
}

impl EventStream {
    /// The next event; none at the end.
    ///
    /// # Errors
    /// The head went away, or speaks another version.
    pub async fn next(&mut self) -> Result<Option<EventRecord>, CallError> {
        let event = self.events.message().await.map_err(|status| explain(&self.address, &status))?;
        event.map(|event| read_json(&event.event_json)).transpose()
    }
}

/// Part of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogText {
    /// What was written.
    pub text: Vec<u8>,
    /// Where the next part begins.
    pub next_offset: u64,
    /// What it is, in words.
    pub name: String,
}

/// Whether a call failed below the head's own words. `PermissionDenied`: HTTP/2 asks for more security.
fn is_of_the_connection(code: Code) -> bool {
    matches!(code, Code::PermissionDenied | Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal)
}

fn explain(address: &HeadAddress, status: &Status) -> CallError {
    match status.code() {
        Code::Unavailable | Code::Unknown | Code::Cancelled => {
            CallError::Lost { address: address.clone(), reason: status.message().to_owned() }
        }
        // A server of another kind listens there.
        Code::Internal if status.message().starts_with("protocol error") => {
            let reason = format!("what listens there is not a head ({})", status.message());
            CallError::Unreachable { address: address.clone(), reason }
        }
        _ => CallError::Refused(status.message().to_owned()),
    }
}

/// The innermost cause: what the system said.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
