//! The sockets of a head, served: the cluster's, HTTP, the dashboard's.
//!
//! **Invariant:** every server ends when the head does.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;

use tokio::net::UnixListener;
use tokio::sync::watch;
use tracing::{error, info, warn};

use super::HeadError;
use crate::cluster::membership::ClusterServer;
use crate::config::Home;

/// Serves the cluster to machines, and to this one over a Unix socket where there is one.
pub(super) fn cluster_servers(
    server: &ClusterServer,
    tcp: TcpListener,
    unix: Option<UnixListener>,
    ended: &watch::Receiver<bool>,
) -> Result<Vec<tokio::task::JoinHandle<()>>, HeadError> {
    let purpose = "the cluster";
    let tcp = tokio::net::TcpListener::from_std(tcp).map_err(|source| HeadError::Socket { purpose, source })?;
    let mut servers = Vec::new();
    let (tcp_server, end) = (server.clone(), until(ended.clone()));
    servers.push(tokio::spawn(async move { log_end(purpose, tcp_server.serve_tcp(tcp, end).await) }));
    if let Some(unix) = unix {
        let (server, end) = (server.clone(), until(ended.clone()));
        servers.push(tokio::spawn(async move { log_end("this machine", server.serve_unix(unix, end).await) }));
    }
    Ok(servers)
}

/// Serves HTTP until the head ends.
pub(super) fn http_server(
    purpose: &'static str,
    listener: TcpListener,
    router: axum::Router,
    ended: watch::Receiver<bool>,
) -> Result<tokio::task::JoinHandle<()>, HeadError> {
    use axum::serve::ListenerExt;
    let listener =
        tokio::net::TcpListener::from_std(listener).map_err(|source| HeadError::Socket { purpose, source })?;
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            warn!(%error, "a connection keeps its delay");
        }
    });
    let serve = axum::serve(listener, router).with_graceful_shutdown(until(ended));
    Ok(tokio::spawn(async move { log_end(purpose, serve.await) }))
}

/// Resolves when the head ends.
pub(super) async fn until(mut ended: watch::Receiver<bool>) {
    let _ = ended.wait_for(|ended| *ended).await;
}

fn log_end<E: std::fmt::Display>(purpose: &'static str, result: Result<(), E>) {
    if let Err(error) = result {
        error!(purpose, %error, "server ended");
    }
}

/// The socket for this machine; where its path is too long, agents and ranks use TCP.
pub(super) fn unix_socket(home: &Home) -> Option<(PathBuf, UnixListener)> {
    let path = home.head_socket();
    let _ = fs::remove_file(&path);
    match UnixListener::bind(&path) {
        Ok(listener) => Some((path, listener)),
        Err(error) => {
            info!(path = %path.display(), %error, "no Unix socket: ranks of this machine use TCP");
            None
        }
    }
}
