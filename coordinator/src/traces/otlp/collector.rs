//! A collector within this process, for tests: it speaks the real protocol on a real socket.

use std::collections::BTreeMap;

use axum::extract::Request;
use axum::routing;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;
use tonic_prost::ProstCodec;

use super::super::{METHOD, TraceEndpoint};
use super::{Attribute, ExportRequest, ExportResponse, Span};

/// A span as it arrived.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) service: Attribute,
    pub(crate) name: String,
    pub(crate) trace: Vec<u8>,
    pub(crate) span: Vec<u8>,
    pub(crate) parent: Vec<u8>,
    pub(crate) nanos: u64,
    pub(crate) attributes: BTreeMap<String, Attribute>,
    pub(crate) failure: Option<String>,
}

impl Seen {
    fn new(service: &Attribute, span: Span) -> Self {
        let attributes = span.attributes.into_iter();
        Self {
            service: service.clone(),
            name: span.name,
            trace: span.trace_id,
            span: span.span_id,
            parent: span.parent_span_id,
            nanos: span.end_time_unix_nano - span.start_time_unix_nano,
            attributes: attributes.map(|pair| (pair.key, pair.value.unwrap().value.unwrap())).collect(),
            failure: span.status.map(|status| status.message),
        }
    }
}

/// Listens on a port of its own until the test ends.
pub(crate) async fn start() -> (TraceEndpoint, mpsc::Receiver<Seen>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    let (seen, spans) = mpsc::channel(64);
    let take = move |request: tonic::Request<ExportRequest>| {
        let seen = seen.clone();
        async move {
            for resource in request.into_inner().resource_spans {
                let service = resource.resource.unwrap().attributes[0].value.clone().unwrap().value.unwrap();
                for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                    seen.send(Seen::new(&service, span)).await.unwrap();
                }
            }
            Ok::<_, tonic::Status>(tonic::Response::new(ExportResponse {}))
        }
    };
    let export = move |request: Request| {
        let take = tower::service_fn(take.clone());
        async move {
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<ExportResponse, ExportRequest>::default());
            grpc.unary(take, request).await
        }
    };
    let router = axum::Router::new().route(METHOD, routing::post(export));
    let server = tonic::transport::Server::builder().add_routes(router.into());
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (endpoint, spans)
}
