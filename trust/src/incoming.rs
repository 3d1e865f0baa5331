//! The head's side of TLS: connections come in, strangers are told so.
//!
//! **Invariant:** a handshake has a deadline and their number a limit, so a peer that says nothing holds nobody up.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tracing::{debug, warn};

use crate::{Authority, CERTIFICATE_LIFETIME, Stream, TrustError};

/// Time for a peer to finish its handshake.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// Handshakes at one time; the next connections wait in the system's queue.
const HANDSHAKES_MAX: usize = 64;
/// Time for one who speaks plain text to read why it is refused.
const FAREWELL: Duration = Duration::from_secs(1);
/// Rest after the system gave no connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Time between two lines about strangers.
const WARN_INTERVAL: Duration = Duration::from_secs(1);
/// The first byte of TLS.
const TLS_HANDSHAKE: u8 = 0x16;
const PLAIN_WORDS: &str = "this is the cluster port of a Phalanx head and speaks TLS: join with `worker join --token`, ask with `coordinator`";

/// What a head shows: a certificate that is made again when half of its time is over.
#[derive(Debug)]
struct HeadCertificate {
    authority: Arc<Authority>,
    current: Mutex<(Arc<CertifiedKey>, Instant)>,
}

impl ResolvesServerCert for HeadCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.1.elapsed() > CERTIFICATE_LIFETIME / 2 {
            match self.authority.certify_head(CERTIFICATE_LIFETIME) {
                Ok(fresh) => *current = (fresh, Instant::now()),
                Err(error) => warn!(%error, "the head keeps its old certificate"),
            }
        }
        Some(Arc::clone(&current.0))
    }
}

/// A head's end of TLS.
#[derive(Clone)]
pub struct HeadTls(TlsAcceptor);

impl HeadTls {
    /// Takes whoever comes; nodes may show certificates of this authority, others are turned away.
    ///
    /// # Errors
    /// No certificate can be made.
    pub fn new(authority: &Arc<Authority>) -> Result<Self, TrustError> {
        let current = Mutex::new((authority.certify_head(CERTIFICATE_LIFETIME)?, Instant::now()));
        let certificate = HeadCertificate { authority: Arc::clone(authority), current };
        let mut roots = RootCertStore::empty();
        roots.add(authority.certificate().clone())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let nodes = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
        let nodes = nodes.allow_unauthenticated().build().map_err(|error| rustls::Error::General(error.to_string()))?;
        let builder =
            ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
        let mut config = builder.with_client_cert_verifier(nodes).with_cert_resolver(Arc::new(certificate));
        config.alpn_protocols = vec![b"h2".to_vec()];
        // Nodes dial seldom: a certificate is looked at each time.
        config.send_tls13_tickets = 0;
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    async fn accept(&self, mut tcp: TcpStream) -> io::Result<Stream> {
        let mut first = [0u8; 1];
        if tcp.peek(&mut first).await? == 1 && first[0] != TLS_HANDSHAKE {
            tell_plain(&mut tcp, first[0]).await?;
            return Err(io::Error::other("it speaks plain text"));
        }
        Ok(Stream::Tls(Box::new(self.0.accept(tcp).await?.into())))
    }
}

/// Says in the stranger's own language what it is talking to.
async fn tell_plain(tcp: &mut TcpStream, first: u8) -> io::Result<()> {
    // `PRI` begins HTTP/2, `POST`, `PUT` and `PATCH` are seldom a first word here.
    let mut answer = Vec::new();
    if first == b'P' {
        // Empty settings, then a goodbye: the protocol's code for connections that are not secure enough.
        answer.extend_from_slice(&[0, 0, 0, 4, 0, 0, 0, 0, 0]);
        answer.extend_from_slice(&[0, 0, 8 + PLAIN_WORDS.len() as u8, 7, 0, 0, 0, 0, 0]);
        answer.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0xc]);
        answer.extend_from_slice(PLAIN_WORDS.as_bytes());
    } else {
        let num_bytes = PLAIN_WORDS.len() + 1;
        let head = format!("HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: {num_bytes}\r\n");
        answer.extend_from_slice(format!("{head}Connection: close\r\n\r\n{PLAIN_WORDS}\n").as_bytes());
    }
    tcp.write_all(&answer).await?;
    tcp.shutdown().await?;
    // To close with something unread would take the words back from one who has not read them yet.
    let mut rest = [0u8; 1024];
    let until_it_goes = async {
        while tcp.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    };
    tokio::time::timeout(FAREWELL, until_it_goes).await.unwrap_or(Ok(()))
}

/// Connections as they come: over TLS where there is `tls`, else in plain text. Ends when nobody takes them any more.
pub fn incoming(listener: TcpListener, tls: Option<HeadTls>) -> ReceiverStream<io::Result<Stream>> {
    let (ready, streams) = mpsc::channel(HANDSHAKES_MAX);
    tokio::spawn(accept(listener, tls, ready));
    ReceiverStream::new(streams)
}

async fn accept(listener: TcpListener, tls: Option<HeadTls>, ready: mpsc::Sender<io::Result<Stream>>) {
    let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let strangers = Arc::new(Strangers::default());
    loop {
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            next = next => next,
            () = ready.closed() => return,
        };
        let (tcp, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // A peer that went away again, or no descriptor left for now.
                debug!(%error, "no connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (tls, ready, strangers) = (tls.clone(), ready.clone(), Arc::clone(&strangers));
        tokio::spawn(async move {
            let _place = place;
            if let Some(stream) = greet(tcp, address, tls, &strangers).await {
                let _ = ready.send(Ok(stream)).await;
            }
        });
    }
}

async fn greet(tcp: TcpStream, address: SocketAddr, tls: Option<HeadTls>, strangers: &Strangers) -> Option<Stream> {
    if let Err(error) = tcp.set_nodelay(true) {
        debug!(%address, %error, "a connection keeps its delay");
    }
    let Some(tls) = tls else { return Some(Stream::Tcp(tcp)) };
    match tokio::time::timeout(HANDSHAKE_DEADLINE, tls.accept(tcp)).await {
        Ok(Ok(stream)) => return Some(stream),
        // Somebody looked whether the port is open.
        Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => debug!(%address, "said nothing"),
        Ok(Err(error)) => strangers.refused(address, &error.to_string()),
        Err(_) => strangers.refused(address, "no handshake in time"),
    }
    None
}

/// Counts strangers, so that they cannot fill the log.
#[derive(Default)]
struct Strangers(Mutex<(u64, Option<Instant>)>);

impl Strangers {
    fn refused(&self, address: SocketAddr, reason: &str) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.0 += 1;
        if seen.1.is_none_or(|last| last.elapsed() >= WARN_INTERVAL) {
            warn!(%address, reason, num_refused = seen.0, "refused a connection to the cluster port");
            seen.1 = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio_stream::StreamExt;
    use tonic::transport::server::Connected;

    use super::*;
    use crate::{DialError, Enrollment, Identity, Peer, Pin, Trust, dial};

    const PATIENCE: Duration = Duration::from_secs(5);

    fn authority() -> Arc<Authority> {
        Arc::new(Authority::open(tempfile::tempdir().expect("a folder").path()).expect("made"))
    }

    /// An identity that `signer` gave, and that looks for the head of `head`.
    fn identity(signer: &Authority, head: &Authority, lifetime: Duration) -> Trust {
        let enrollment = Enrollment::new().expect("a key");
        let issued = signer.certify_node("node-1", &enrollment.public_key(), lifetime).expect("signs");
        let authority = head.certificate().to_vec();
        let identity: Identity = enrollment.finish("node-1", issued.certificate, authority, issued.not_after);
        Trust::Known(Box::new(identity))
    }

    /// What the head sees of somebody who comes so, and what he sees of the head.
    async fn meet(head: &Arc<Authority>, trust: &Trust) -> (Option<Peer>, Result<Stream, DialError>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let mut streams = incoming(listener, Some(HeadTls::new(head).expect("a certificate")));
        let dialled = dial(&address, trust, PATIENCE).await;
        let seen = tokio::time::timeout(Duration::from_millis(300), streams.next()).await;
        let seen = seen.ok().flatten().and_then(Result::ok);
        (seen.map(|stream| stream.connect_info()), dialled)
    }

    #[tokio::test]
    async fn both_sides_know_each_other_or_part() {
        let (head, other) = (authority(), authority());
        let (seen, dialled) = meet(&head, &Trust::Pinned(head.pin())).await;
        assert!(matches!(seen, Some(Peer::Tls(_, None))) && dialled.is_ok(), "{seen:?} {dialled:?}");
        let (seen, dialled) = meet(&head, &identity(&head, &head, PATIENCE)).await;
        let Some(Peer::Tls(_, Some(node))) = seen else { panic!("{seen:?}") };
        assert!(node.node_id == "node-1" && node.serial.len() == 32 && dialled.is_ok(), "{node:?}");
        let (seen, dialled) = meet(&head, &Trust::Pinned(Pin::of(b"another"))).await;
        assert!(seen.is_none() && matches!(dialled, Err(DialError::WrongHead(_))), "{seen:?} {dialled:?}");
        let (seen, _) = meet(&head, &identity(&other, &head, PATIENCE)).await;
        assert_eq!(seen, None, "a certificate of another cluster");
        let expired = identity(&head, &head, Duration::ZERO);
        tokio::time::sleep(Duration::from_millis(1100)).await;
        let (seen, dialled) = meet(&head, &expired).await;
        assert_eq!(seen, None, "a certificate that has ended");
        let read = dialled.expect("TLS 1.3 tells later").read_u8().await.expect_err("an alert").to_string();
        assert!(read.contains("CertificateExpired"), "{read}");
    }

    #[tokio::test]
    async fn a_node_cannot_play_the_head() {
        let head = authority();
        let Trust::Known(node) = identity(&head, &head, PATIENCE) else { panic!() };
        let key = crate::authority::signing_key(node.key()).expect("a key");
        let chain = vec![node.chain().remove(0), head.certificate().clone()];
        let certificate = Arc::new(CertifiedKey::new(chain, key));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13]);
        let builder = builder.expect("a version").with_no_client_auth();
        let config = builder.with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certificate)));
        let tls = HeadTls(TlsAcceptor::from(Arc::new(config)));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let _streams = incoming(listener, Some(tls));
        let dialled = dial(&address, &Trust::Pinned(head.pin()), PATIENCE).await;
        assert!(matches!(dialled, Err(DialError::WrongHead(_))), "{dialled:?}");
    }
}
