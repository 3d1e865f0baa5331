//! Dialling a head.
//!
//! **Invariant:** without `Trust::Plain`, which a person asked for by `--insecure`, nothing is sent to a head that is not the
//! pinned one.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::ServerName;
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, CertificateError, ClientConfig, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use crate::authority::{HEAD_NAME, signing_key};
use crate::pinned::PinnedHead;
use crate::{Identity, Pin, Stream, TrustError};

/// How a head is known, and what is shown to it.
#[derive(Debug, Clone)]
pub enum Trust {
    /// Neither: plain text (`--insecure`).
    Plain,
    /// TLS with the head of this authority; nothing is shown yet.
    Pinned(Pin),
    /// TLS with the head that gave this identity, which is shown.
    Known(Box<Identity>),
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Nobody answers.
    #[error("{0}")]
    Unreachable(String),
    /// What answers does not speak TLS.
    #[error(
        "what listens there does not speak TLS: is it a head, and was it started with --insecure? Then this side needs --insecure too"
    )]
    NoTls,
    /// It is another head than the pinned one, or somebody in between.
    #[error("it is not the head that the token names ({0}): another cluster, or somebody in between")]
    WrongHead(String),
    /// The clocks differ too much.
    #[error("the head's certificate is {0} by this machine's clock: are the clocks of both machines right?")]
    Clock(&'static str),
    /// The head refuses what was shown.
    #[error("the head refuses this machine's certificate ({0})")]
    Refused(String),
    /// Our own files are of no use.
    #[error(transparent)]
    Own(#[from] TrustError),
}

impl DialError {
    /// Whether asking again cannot help.
    pub fn is_final(&self) -> bool {
        !matches!(self, Self::Unreachable(_))
    }
}

/// Shows a node's certificate.
#[derive(Debug)]
struct Shown(Arc<CertifiedKey>);

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn client_config(pin: Pin, identity: Option<&Identity>) -> Result<ClientConfig, TrustError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(PinnedHead::new(pin, &provider));
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let shown = CertifiedKey::new(identity.chain(), signing_key(identity.key())?);
            builder.with_client_cert_resolver(Arc::new(Shown(Arc::new(shown))))
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Connects to `host:port`, within `patience`.
///
/// # Errors
/// Nobody answers, or it is not the head that is looked for.
pub async fn dial(address: &str, trust: &Trust, patience: Duration) -> Result<Stream, DialError> {
    let late = |_| DialError::Unreachable(format!("no answer within {} s", patience.as_secs()));
    tokio::time::timeout(patience, connect(address, trust)).await.map_err(late)?
}

/// Whether what listens at `host:port` speaks TLS, as far as it can be told within `patience`.
pub async fn speaks_tls(address: &str, patience: Duration) -> bool {
    // Nobody has this pin: whoever shows a certificate at all is told apart by that.
    let stranger = Trust::Pinned(Pin::of(&[]));
    !matches!(dial(address, &stranger, patience).await, Err(DialError::NoTls | DialError::Unreachable(_)))
}

async fn connect(address: &str, trust: &Trust) -> Result<Stream, DialError> {
    let unreachable = |error: io::Error| DialError::Unreachable(error.to_string());
    let tcp = TcpStream::connect(address).await.map_err(unreachable)?;
    tcp.set_nodelay(true).map_err(unreachable)?;
    let config = match trust {
        Trust::Plain => return Ok(Stream::Tcp(tcp)),
        Trust::Pinned(pin) => client_config(*pin, None)?,
        Trust::Known(identity) => client_config(identity.pin(), Some(identity))?,
    };
    let name = ServerName::try_from(HEAD_NAME).map_err(|error| DialError::Unreachable(error.to_string()))?;
    let tls = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.map_err(|error| refusal(&error))?;
    Ok(Stream::Tls(Box::new(tls.into())))
}

fn refusal(error: &io::Error) -> DialError {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::InvalidMessage(_) | rustls::Error::InappropriateMessage { .. }) => DialError::NoTls,
        Some(rustls::Error::InvalidCertificate(CertificateError::Expired)) => DialError::Clock("of the past"),
        Some(rustls::Error::InvalidCertificate(CertificateError::NotValidYet)) => DialError::Clock("of the future"),
        Some(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {
            DialError::WrongHead("its certificate is of another authority".to_owned())
        }
        Some(rustls::Error::InvalidCertificate(other)) => DialError::WrongHead(format!("its certificate: {other}")),
        Some(rustls::Error::AlertReceived(alert)) if is_about_certificate(*alert) => {
            DialError::Refused(format!("{alert:?}"))
        }
        _ => DialError::Unreachable(error.to_string()),
    }
}

fn is_about_certificate(alert: AlertDescription) -> bool {
    use AlertDescription as A;
    matches!(alert, A::BadCertificate | A::CertificateExpired | A::CertificateUnknown | A::UnknownCA | A::AccessDenied)
}

/// Speaks HTTP/2 over a connection that was dialled; the channel ends with it.
///
/// # Errors
/// The other end is no HTTP/2 server.
pub async fn channel(endpoint: &Endpoint, stream: Stream) -> Result<Channel, tonic::transport::Error> {
    let mut stream = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_| {
        let stream = stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionAborted));
        async move { stream }
    });
    endpoint.connect_with_connector(connector).await
}
