//! The messages of OTLP that carry spans, by the numbers of `opentelemetry/proto/trace/v1`.

#[cfg(test)]
pub(crate) mod collector;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost::{Message, Oneof};

/// `SPAN_KIND_SERVER`.
const KIND_SERVER: i32 = 2;
/// `STATUS_CODE_ERROR`.
const STATUS_ERROR: i32 = 2;
/// Who the spans come from.
const SERVICE: &str = "phalanx";

/// `ExportTraceServiceRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct ExportRequest {
    #[prost(message, repeated, tag = "1")]
    resource_spans: Vec<ResourceSpans>,
}

/// `ExportTraceServiceResponse`, whose content changes nothing.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct ExportResponse {}

#[derive(Clone, PartialEq, Message)]
struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct ScopeSpans {
    #[prost(message, optional, tag = "1")]
    scope: Option<Scope>,
    #[prost(message, repeated, tag = "2")]
    spans: Vec<Span>,
}

#[derive(Clone, PartialEq, Message)]
struct Scope {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    version: String,
}

/// One span.
#[derive(Clone, PartialEq, Message)]
pub struct Span {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    span_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    #[prost(int32, tag = "6")]
    kind: i32,
    #[prost(fixed64, tag = "7")]
    start_time_unix_nano: u64,
    #[prost(fixed64, tag = "8")]
    end_time_unix_nano: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
    #[prost(message, optional, tag = "15")]
    status: Option<Status>,
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(string, tag = "2")]
    message: String,
    #[prost(int32, tag = "3")]
    code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct AnyValue {
    #[prost(oneof = "Attribute", tags = "1, 3, 4")]
    value: Option<Attribute>,
}

/// The value of an attribute.
#[derive(Clone, PartialEq, Oneof)]
pub enum Attribute {
    /// A text.
    #[prost(string, tag = "1")]
    Text(String),
    /// A whole number.
    #[prost(int64, tag = "3")]
    Integer(i64),
    /// A number.
    #[prost(double, tag = "4")]
    Number(f64),
}

impl From<&str> for Attribute {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<u64> for Attribute {
    fn from(number: u64) -> Self {
        Self::Integer(number.try_into().unwrap_or(i64::MAX))
    }
}

impl From<f32> for Attribute {
    fn from(number: f32) -> Self {
        Self::Number(number.into())
    }
}

impl From<Duration> for Attribute {
    fn from(time: Duration) -> Self {
        Self::Number(time.as_secs_f64())
    }
}

impl Span {
    /// A span that ends now.
    pub fn ending_now(name: &str, elapsed: Duration) -> Self {
        let end = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Self {
            name: name.to_owned(),
            kind: KIND_SERVER,
            start_time_unix_nano: nanos(end.saturating_sub(elapsed)),
            end_time_unix_nano: nanos(end),
            ..Self::default()
        }
    }

    /// Adds an attribute.
    pub fn with(mut self, key: &str, value: impl Into<Attribute>) -> Self {
        let value = Some(AnyValue { value: Some(value.into()) });
        self.attributes.push(KeyValue { key: key.to_owned(), value });
        self
    }

    /// Says that what it tells of went wrong.
    pub fn failed(mut self, message: &str) -> Self {
        self.status = Some(Status { message: message.to_owned(), code: STATUS_ERROR });
        self
    }

    /// Gives it its names.
    pub(super) fn placed(mut self, trace: [u8; 16], span: [u8; 8], parent: Option<[u8; 8]>) -> Self {
        self.trace_id = trace.to_vec();
        self.span_id = span.to_vec();
        self.parent_span_id = parent.map(Vec::from).unwrap_or_default();
        self
    }
}

impl ExportRequest {
    /// The message for spans of this process.
    pub fn new(spans: Vec<Span>) -> Self {
        let attribute = |key: &str, value: &str| {
            let value = Some(AnyValue { value: Some(value.into()) });
            KeyValue { key: key.into(), value }
        };
        let version = phalanx_proto::VERSION;
        let resource =
            Resource { attributes: vec![attribute("service.name", SERVICE), attribute("service.version", version)] };
        let scope = Scope { name: SERVICE.into(), version: version.into() };
        let scope_spans = vec![ScopeSpans { scope: Some(scope), spans }];
        Self { resource_spans: vec![ResourceSpans { resource: Some(resource), scope_spans }] }
    }
}
