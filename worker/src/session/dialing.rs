//! The way to the head: by its Unix socket where it is on this machine, else over TCP.
//!
//! **Invariant:** nobody is listened to who is not the head that is trusted.

use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};

use phalanx_trust::{DialError, Identity, Trust};
use tonic::transport::{Channel, Endpoint};
use tracing::debug;

use super::SessionError;
use crate::config::defaults;

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

/// The address from which this machine speaks to the head; `None` where that is this machine itself. Nothing is sent:
/// connecting a datagram socket only asks the routes.
pub(super) fn own_ip(head: &str) -> Option<IpAddr> {
    let from = if head.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
    let socket = UdpSocket::bind(from).ok()?;
    socket.connect(head).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_loopback()).then_some(ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_to_a_head_on_this_machine_names_no_interface() {
        assert_eq!(own_ip("127.0.0.1:8001"), None);
        assert_eq!(own_ip("[::1]:8001"), None);
    }
}
