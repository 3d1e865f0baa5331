//! The cluster's gRPC: agents and ranks dial in here, and the command line asks here.
//!
//! Owns sockets and streams; turns wire messages into domain values on the way in and back on the way out. Decides nothing:
//! every question goes to the cluster's task.
//!
//! **Invariant:** a stream that says nothing, or something else than hello, is refused within a deadline; what a peer can
//! get wrong is an answer to that peer only.

mod admin;
mod agents;
mod client;
mod heads;
mod ranks;
#[cfg(test)]
pub(super) mod tests;

use std::future::Future;
use std::time::Duration;

use phalanx_proto::pb;
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::Status;
use tonic::transport::server::{Router, TcpIncoming};

pub use client::{CallError, HeadAddress, HeadClient};
pub use heads::{HeadsDesk, Lead};

use super::{ClusterError, ClusterHandle, JoinError, StatusBoard};
use crate::config::defaults;

/// Time for a peer's first message.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// The three services over one cluster.
#[derive(Clone)]
pub struct ClusterServer {
    cluster: ClusterHandle,
    board: StatusBoard,
    heads: Option<HeadsDesk>,
}

impl ClusterServer {
    /// Serves this cluster.
    pub fn new(cluster: ClusterHandle, board: StatusBoard) -> Self {
        Self { cluster, board, heads: None }
    }

    /// Answers who leads, too.
    pub fn with_heads(mut self, heads: HeadsDesk) -> Self {
        self.heads = Some(heads);
        self
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
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
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
        self.router().serve_with_incoming_shutdown(UnixListenerStream::new(listener), end).await
    }

    fn router(self) -> Router {
        let limit = defaults::MESSAGE_BYTES_MAX;
        let agents = pb::agents_server::AgentsServer::new(agents::AgentService { cluster: self.cluster.clone() });
        let ranks =
            pb::rank_sessions_server::RankSessionsServer::new(ranks::RankService { cluster: self.cluster.clone() });
        let admin =
            pb::admin_server::AdminServer::new(admin::AdminService { cluster: self.cluster, board: self.board });
        tonic::transport::Server::builder()
            .initial_stream_window_size(defaults::STREAM_WINDOW_BYTES)
            .initial_connection_window_size(defaults::CONNECTION_WINDOW_BYTES)
            .http2_keepalive_interval(Some(defaults::KEEPALIVE))
            .http2_keepalive_timeout(Some(defaults::KEEPALIVE_TIMEOUT))
            .add_optional_service(self.heads.map(pb::heads_server::HeadsServer::new))
            .add_service(agents)
            .add_service(ranks.max_decoding_message_size(limit).max_encoding_message_size(limit))
            .add_service(admin)
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
            ClusterError::UnknownDeployment { .. } | ClusterError::UnknownNode { .. } => Self::not_found(text),
            ClusterError::StillRunning { .. } => Self::deadline_exceeded(text),
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
