//! A connection of the cluster, and what is known of its other end.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsStream;
use tonic::transport::server::Connected;
use webpki::EndEntityCert;

use crate::authority::NODE_URI;
use crate::to_hex;

/// What a node proved by its certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeCertificate {
    /// Its id.
    pub node_id: String,
    /// The certificate's number, in hexadecimal digits.
    pub serial: String,
}

/// The other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// A process of this machine and of this user, or of root.
    Local,
    /// A process of this machine and of another user.
    OtherUser,
    /// Anybody who reaches the port, in plain text.
    Plain(SocketAddr),
    /// TLS, with a certificate of this cluster where one was shown.
    Tls(SocketAddr, Option<NodeCertificate>),
}

/// A connection.
#[derive(Debug)]
pub enum Stream {
    /// Plain text.
    Tcp(TcpStream),
    /// TLS.
    Tls(Box<TlsStream<TcpStream>>),
    /// On this machine.
    Unix(UnixStream),
}

impl Connected for Stream {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        let unknown = || SocketAddr::from(([0, 0, 0, 0], 0));
        match self {
            Self::Tcp(tcp) => Peer::Plain(tcp.peer_addr().unwrap_or_else(|_| unknown())),
            Self::Tls(tls) => {
                let (tcp, session) = tls.get_ref();
                let shown = session.peer_certificates().and_then(|chain| chain.first());
                Peer::Tls(tcp.peer_addr().unwrap_or_else(|_| unknown()), shown.and_then(node_of))
            }
            Self::Unix(unix) => {
                let own = nix::unistd::geteuid().as_raw();
                let is_own = unix.peer_cred().is_ok_and(|other| other.uid() == own || other.uid() == 0);
                if is_own { Peer::Local } else { Peer::OtherUser }
            }
        }
    }
}

/// The node that a certificate names; TLS has checked the certificate.
fn node_of(certificate: &CertificateDer<'_>) -> Option<NodeCertificate> {
    let certificate = EndEntityCert::try_from(certificate).ok()?;
    let node_id = certificate.valid_uri_names().find_map(|uri| uri.strip_prefix(NODE_URI).map(str::to_owned))?;
    Some(NodeCertificate { node_id, serial: to_hex(certificate.serial()) })
}

/// Calls the same method of whichever stream it is.
macro_rules! either {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            Self::Tcp($stream) => $call,
            Self::Tls($stream) => $call,
            Self::Unix($stream) => $call,
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        either!(self, stream => Pin::new(stream).poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => Pin::new(stream).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
            Self::Unix(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}
