//! Spans of requests for a collector that speaks OTLP: `--otlp-traces-endpoint`.
//!
//! Owns the way from a request that has ended to the collector. Knows no request: whoever counts one says what its span holds.
//! What crosses is written by hand in `otlp.rs`: five messages of a protocol that does not change, in place of three dependencies.
//!
//! **Invariant:** no request waits for a collector. A queue that is full drops spans, and says so once.

mod otlp;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::http::{HeaderMap, Uri, uri};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tonic::transport::{Channel, Endpoint};

pub use otlp::Span;
#[cfg(test)]
pub(crate) use otlp::{Attribute, collector, collector::Seen};

/// Spans that wait to be sent.
const QUEUE_MAX: usize = 4096;
/// Spans of one message.
const BATCH_MAX: usize = 512;
/// Longest wait for further spans of a message.
const BATCH_WAIT: Duration = Duration::from_millis(500);
/// Longest time for a collector to take a message.
const EXPORT_DEADLINE: Duration = Duration::from_secs(5);
/// Where a collector takes traces.
const METHOD: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";

/// Where a collector listens: `http://host:port`, by gRPC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceEndpoint(Uri);

impl FromStr for TraceEndpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let with_scheme = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let uri: Uri = with_scheme.parse().map_err(|error| format!("{text:?} is no address: {error}"))?;
        if uri.scheme() != Some(&uri::Scheme::HTTP) {
            return Err(format!(
                "{text:?}: only http:// is spoken to a collector; let one on this machine pass spans on"
            ));
        }
        if !matches!(uri.path(), "" | "/") {
            return Err(format!(
                "{text:?}: spans are sent by gRPC, to an address without a path (port 4317 by custom)"
            ));
        }
        Ok(Self(uri))
    }
}

impl fmt::Display for TraceEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The span that a request came from: the header `traceparent` of W3C Trace Context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    trace: [u8; 16],
    span: [u8; 8],
    is_sampled: bool,
}

impl TraceParent {
    /// Of a request, where it has a readable one.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        Self::parse(headers.get("traceparent")?.to_str().ok()?.trim())
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let [version, trace, span, flags] = [parts.next()?, parts.next()?, parts.next()?, parts.next()?];
        let [version] = bytes(version)?;
        let [flags] = bytes(flags)?;
        // Later versions may add parts; ff is none.
        if version == 0xff || (version == 0 && parts.next().is_some()) {
            return None;
        }
        let (trace, span) = (bytes(trace)?, bytes(span)?);
        let is_valid = trace != [0; 16] && span != [0; 8];
        is_valid.then_some(Self { trace, span, is_sampled: flags & 1 == 1 })
    }
}

/// So many bytes in lower-case hexadecimal digits.
fn bytes<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    let mut bytes = [0; N];
    if pairs.len() != N {
        return None;
    }
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(bytes)
}

/// Takes spans for a collector. Cheap to clone.
#[derive(Debug, Clone)]
pub struct TraceSink {
    spans: mpsc::Sender<Span>,
    dropped: Arc<AtomicU64>,
}

impl TraceSink {
    /// A sink, and what sends from it until `ended` says so; to be spawned.
    pub fn new(endpoint: &TraceEndpoint, ended: watch::Receiver<bool>) -> (Self, impl Future<Output = ()> + use<>) {
        let (spans, queue) = mpsc::channel(QUEUE_MAX);
        let sink = Self { spans, dropped: Arc::default() };
        (sink, export(endpoint.clone(), queue, ended))
    }

    /// The place of a request's span: none where its parent is not sampled.
    pub fn place(&self, parent: Option<TraceParent>) -> Option<SpanPlace> {
        if parent.is_some_and(|parent| !parent.is_sampled) {
            return None;
        }
        let random = || uuid::Uuid::new_v4().into_bytes();
        let [a, b, c, d, .., e, f, g, h] = random();
        Some(SpanPlace {
            trace: parent.map_or_else(random, |parent| parent.trace),
            parent: parent.map(|parent| parent.span),
            span: [a, b, c, d, e, f, g, h],
            sink: self.clone(),
        })
    }
}

/// Where a span belongs.
#[derive(Debug, Clone)]
pub struct SpanPlace {
    trace: [u8; 16],
    parent: Option<[u8; 8]>,
    span: [u8; 8],
    sink: TraceSink,
}

impl SpanPlace {
    /// Hands the span over.
    pub fn send(&self, span: Span) {
        let span = span.placed(self.trace, self.span, self.parent);
        if self.sink.spans.try_send(span).is_err() && self.sink.dropped.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!(queue = QUEUE_MAX, "spans come faster than the collector takes them: some are dropped");
        }
    }
}

/// Sends what comes, several spans in a message; at the end what is left.
async fn export(endpoint: TraceEndpoint, mut queue: mpsc::Receiver<Span>, mut ended: watch::Receiver<bool>) {
    let channel = Endpoint::from(endpoint.0.clone()).connect_timeout(EXPORT_DEADLINE).connect_lazy();
    let mut fails = false;
    let mut goes_on = true;
    while goes_on {
        let mut batch = Vec::new();
        tokio::select! {
            span = queue.recv() => match span {
                Some(span) => batch.push(span),
                None => return,
            },
            _ = ended.wait_for(|ended| *ended) => {
                queue.close();
                goes_on = false;
            }
        }
        let full_at = Instant::now() + BATCH_WAIT;
        while batch.len() < BATCH_MAX
            && let Ok(Some(span)) = timeout_at(full_at, queue.recv()).await
        {
            batch.push(span);
        }
        if batch.is_empty() {
            continue;
        }
        let num_spans = batch.len();
        let sent = timeout(EXPORT_DEADLINE, send(channel.clone(), batch)).await;
        let failed = match sent {
            Ok(Ok(())) => None,
            Ok(Err(status)) => Some(status.to_string()),
            Err(_) => Some(format!("no answer within {EXPORT_DEADLINE:?}")),
        };
        match (&failed, fails) {
            (Some(reason), false) => tracing::warn!(%endpoint, reason, num_spans, "the collector takes no spans"),
            (None, true) => tracing::info!(%endpoint, "the collector takes spans again"),
            _ => {}
        }
        fails = failed.is_some();
    }
}

async fn send(channel: Channel, spans: Vec<Span>) -> Result<(), tonic::Status> {
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    let codec = tonic_prost::ProstCodec::<otlp::ExportRequest, otlp::ExportResponse>::default();
    let request = tonic::Request::new(otlp::ExportRequest::new(spans));
    client.unary(request, uri::PathAndQuery::from_static(METHOD), codec).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Option<(u8, bool)>) {
        let told = TraceParent::parse(text).map(|parent| (parent.trace[15] ^ parent.span[7], parent.is_sampled));
        assert_eq!(told, expected, "{text}");
    }

    #[test]
    fn parents_are_read_as_w3c_has_them() {
        check("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", Some((0x9c ^ 0x31, true)));
        check("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00", Some((0x9c ^ 0x31, false)));
        check("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03-more", Some((0x9c ^ 0x31, true)));
        check("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more", None);
        check("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None);
        check("00-00000000000000000000000000000000-b7ad6b7169203331-01", None);
        check("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", None);
        check("00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01", None);
        check("00-0af7-b7ad6b7169203331-01", None);
        check("", None);
    }

    #[test]
    fn addresses_are_read_or_refused() {
        let told = |text: &str| text.parse::<TraceEndpoint>().map(|endpoint| endpoint.to_string());
        assert_eq!(told("http://localhost:4317").as_deref(), Ok("http://localhost:4317/"));
        assert_eq!(told("collector:4317").as_deref(), Ok("http://collector:4317/"));
        assert!(told("https://collector:4317").is_err_and(|reason| reason.contains("only http://")));
        assert!(told("http://collector:4318/v1/traces").is_err_and(|reason| reason.contains("gRPC")));
        assert!(told("http://").is_err());
    }
}
