//! The cluster's gRPC: agents and ranks dial in here, and the command line asks here.
//!
//! Owns sockets and streams; turns wire messages into domain values on the way in and back on the way out. Decides nothing:
//! every question goes to the cluster's task.
//!
//! **Invariant:** nobody is listened to before the gate has let them in.
//! **Invariant:** a stream that says nothing, or something else than hello, is refused within a deadline; what a peer can
//! get wrong is an answer to that peer only.

mod admin;
mod agents;
mod client;
mod heads;
mod ranks;
mod story;
#[cfg(test)]
pub(super) mod tests;
mod trust;

use std::future::Future;
use std::time::Duration;

use phalanx_proto::pb;
use phalanx_trust::{Stream, incoming};
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::Status;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::server::Router;

pub use client::{CallError, HeadAddress, HeadClient, LogText, NewToken};
pub use heads::{HeadsDesk, Lead};
pub use story::Story;

use super::{ClusterError, ClusterHandle, JoinError, StatusBoard};
use crate::config::defaults;
use crate::security::access::Gate;

/// Time for a peer's first message.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// The services over one cluster.
#[derive(Clone)]
pub struct ClusterServer {
    cluster: ClusterHandle,
    board: StatusBoard,
    gate: Gate,
    story: Story,
    heads: HeadsDesk,
}

impl ClusterServer {
    /// Serves this cluster to those whom the gate lets in, and answers who leads; its story is read there, too.
    pub fn new(cluster: ClusterHandle, board: StatusBoard, gate: Gate, heads: HeadsDesk, story: Story) -> Self {
        Self { cluster, board, gate, story, heads }
    }

    /// Serves machines until `end`.
    ///
    /// # Errors
    /// The socket broke.
    pub async fn serve_tcp(
        self,
        listener: TcpListener,
        end: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error> {
        let incoming = incoming(listener, self.gate.tls());
        self.router().serve_with_incoming_shutdown(incoming, end).await
    }

    /// Serves this machine until `end`.
    ///
    /// # Errors
    /// The socket broke.
    pub async fn serve_unix(
        self,
        listener: UnixListener,
        end: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error> {
        let incoming = UnixListenerStream::new(listener).map(|stream| stream.map(Stream::Unix));
        self.router().serve_with_incoming_shutdown(incoming, end).await
    }

    fn router(self) -> Router {
        let limit = defaults::MESSAGE_BYTES_MAX;
        let Self { cluster, board, gate, story, heads } = self;
        let heads = pb::heads_server::HeadsServer::new(heads::HeadsService { desk: heads, gate: gate.clone() });
        let agents = agents::AgentService { cluster: cluster.clone(), gate: gate.clone() };
        let agents = pb::agents_server::AgentsServer::new(agents);
        let ranks = ranks::RankService { cluster: cluster.clone(), gate: gate.clone() };
        let ranks = pb::rank_sessions_server::RankSessionsServer::new(ranks);
        let enrollment = trust::EnrollmentService { gate: gate.clone() };
        let enrollment = pb::enrollment_server::EnrollmentServer::new(enrollment);
        let tokens = pb::tokens_server::TokensServer::new(trust::TokenService { gate: gate.clone() });
        let admin_only = trust::AdminOnly(gate);
        let admin = pb::admin_server::AdminServer::new(admin::AdminService { cluster, board, story });
        tonic::transport::Server::builder()
            .initial_stream_window_size(defaults::STREAM_WINDOW_BYTES)
            .initial_connection_window_size(defaults::CONNECTION_WINDOW_BYTES)
            .http2_keepalive_interval(Some(defaults::KEEPALIVE))
            .http2_keepalive_timeout(Some(defaults::KEEPALIVE_TIMEOUT))
            .add_service(heads)
            .add_service(agents)
            .add_service(ranks.max_decoding_message_size(limit).max_encoding_message_size(limit))
            .add_service(enrollment)
            .add_service(InterceptedService::new(tokens, admin_only.clone()))
            .add_service(InterceptedService::new(admin, admin_only))
    }
}

impl From<ClusterError> for Status {
    fn from(error: ClusterError) -> Self {
        let text = error.to_string();
        match error {
            ClusterError::Join(JoinError::Version { .. }) => Self::failed_precondition(text),
            ClusterError::Join(JoinError::Duplicate { .. }) => Self::already_exists(text),
            ClusterError::Join(JoinError::Stopping) | ClusterError::Unavailable | ClusterError::Standby { .. } => {
                Self::unavailable(text)
            }
            ClusterError::UnknownRank { .. } => Self::permission_denied(text),
            ClusterError::UnknownDeployment { .. }
            | ClusterError::UnknownNode { .. }
            | ClusterError::UnknownGroup { .. } => Self::not_found(text),
            ClusterError::GroupInUse { .. } | ClusterError::CannotRestart { .. } => Self::failed_precondition(text),
            ClusterError::StillRunning { .. } => Self::deadline_exceeded(text),
            ClusterError::NotKept { .. } => Self::resource_exhausted(text),
        }
    }
}

/// The first message of a stream, within its deadline.
async fn first_message<T>(stream: &mut tonic::Streaming<T>) -> Result<T, Status> {
    let message = tokio::time::timeout(HELLO_DEADLINE, stream.message())
        .await
        .map_err(|_| Status::deadline_exceeded(format!("no hello within {} s", HELLO_DEADLINE.as_secs())))?;
    message?.ok_or_else(|| Status::invalid_argument("the stream ended before hello"))
}

fn refused(error: &phalanx_proto::WireError) -> Status {
    Status::invalid_argument(error.to_string())
}
