//! A small client of the OpenAI-compatible API, for the commands that send requests.
//!
//! Plain HTTP: keys and loopback, no TLS. Knows no command.
//!
//! **Invariant:** no call waits without a deadline; an answer that is no success becomes an error with the server's words.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Method, Request, Response, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

use super::frames::{Frame, FrameError, FrameReader};

/// Time for a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Time for an answer that needs no work.
const SHORT_DEADLINE: Duration = Duration::from_secs(10);
/// Longest silence on a stream; the server sends comments more often.
const SILENCE_MAX: Duration = Duration::from_secs(120);

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is none.
    #[error("{url} is not an address such as http://127.0.0.1:8000")]
    BadUrl {
        /// What was given.
        url: String,
    },
    /// Nobody answers there.
    #[error("no server answers at {url}")]
    Unreachable {
        /// The address.
        url: String,
        /// Why.
        #[source]
        source: hyper_util::client::legacy::Error,
    },
    /// The server refused or failed.
    #[error("{message}")]
    Refused {
        /// HTTP status; 200 for an error within a stream.
        status: u16,
        /// The server's words.
        message: String,
        /// When to try again, where the server says.
        retry_after: Option<Duration>,
    },
    /// The connection broke.
    #[error("the connection to the server broke")]
    Broken(#[source] hyper::Error),
    /// Nothing came in time.
    #[error("the server did not answer within {} s", .limit.as_secs())]
    Late {
        /// The limit.
        limit: Duration,
    },
    /// The answer cannot be read.
    #[error("the server's answer cannot be read: {reason}")]
    Unreadable {
        /// What is wrong with it.
        reason: String,
    },
}

impl ClientError {
    /// How long to wait before another try, where one is worth it: the queue is full.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { status: 429 | 503, retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// An answer of any status.
#[derive(Debug, Clone)]
pub struct RawAnswer {
    /// HTTP status.
    pub status: u16,
    /// The request's name.
    pub request_id: Option<String>,
    /// When to try again, where the server says.
    pub retry_after: Option<Duration>,
    /// The body.
    pub body: Value,
}

impl From<FrameError> for ClientError {
    fn from(error: FrameError) -> Self {
        Self::Unreadable { reason: error.to_string() }
    }
}

/// A client of one server. Clones share its connections.
#[derive(Debug, Clone)]
pub struct ApiClient {
    base: String,
    key: Option<HeaderValue>,
    client: Client<HttpConnector, Full<Bytes>>,
}

impl ApiClient {
    /// A client of the server at `base_url`, with or without `/v1` at its end.
    ///
    /// # Errors
    /// The address or the key cannot be written into a request.
    pub fn new(base_url: &str, api_key: Option<&str>) -> Result<Self, ClientError> {
        let bad = || ClientError::BadUrl { url: base_url.to_owned() };
        let given = base_url.strip_prefix("http://").unwrap_or(base_url).trim_end_matches('/');
        let given = given.strip_suffix("/v1").unwrap_or(given);
        let base = format!("http://{given}");
        let uri: Uri = base.parse().map_err(|_| bad())?;
        if given.contains("://") || uri.host().is_none_or(str::is_empty) {
            return Err(bad());
        }
        let key = api_key.map(|key| HeaderValue::from_str(&format!("Bearer {key}"))).transpose().map_err(|_| bad())?;
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_DEADLINE));
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Ok(Self { base, key, client })
    }

    /// Gets a JSON answer that needs no work.
    ///
    /// # Errors
    /// No server, no success, or no JSON.
    pub async fn get(&self, path: &str) -> Result<Value, ClientError> {
        let request = self.request(Method::GET, path, Bytes::new())?;
        within(SHORT_DEADLINE, self.whole(request)).await
    }

    /// Posts a JSON body and waits for the whole answer.
    ///
    /// # Errors
    /// No server, no success, no JSON, or not within `limit`.
    pub async fn post(&self, path: &str, body: &Value, limit: Duration) -> Result<Value, ClientError> {
        let request = self.request(Method::POST, path, body.to_string().into())?;
        within(limit, self.whole(request)).await
    }

    /// Posts a JSON body and gives the answer whatever its status.
    ///
    /// # Errors
    /// No server, or not within `limit`.
    pub async fn post_raw(&self, path: &str, body: &Value, limit: Duration) -> Result<RawAnswer, ClientError> {
        let request = self.request(Method::POST, path, body.to_string().into())?;
        within(limit, async {
            let unreachable = |source| ClientError::Unreachable { url: self.base.clone(), source };
            let response = self.client.request(request).await.map_err(unreachable)?;
            let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
            let retry_after = header(RETRY_AFTER.as_str()).and_then(|text| text.parse().ok()).map(Duration::from_secs);
            let request_id = header("x-request-id").map(str::to_owned);
            let status = response.status().as_u16();
            let bytes = response.into_body().collect().await.map_err(ClientError::Broken)?.to_bytes();
            let body = serde_json::from_slice(&bytes)
                .map_err(|error| ClientError::Unreadable { reason: error.to_string() })?;
            Ok(RawAnswer { status, request_id, retry_after, body })
        })
        .await
    }

    /// Posts a JSON body whose `stream` is true.
    ///
    /// # Errors
    /// No server, or no success.
    pub async fn stream(&self, path: &str, body: &Value) -> Result<EventStream, ClientError> {
        let request = self.request(Method::POST, path, body.to_string().into())?;
        let response = within(SILENCE_MAX, self.send(request)).await?;
        Ok(EventStream { body: response.into_body(), frames: FrameReader::default() })
    }

    fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>, ClientError> {
        let uri = format!("{}{path}", self.base);
        let mut request = Request::builder().method(method).uri(&uri).header(CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            request = request.header(AUTHORIZATION, key);
        }
        request.body(Full::new(body)).map_err(|_| ClientError::BadUrl { url: uri })
    }

    async fn whole(&self, request: Request<Full<Bytes>>) -> Result<Value, ClientError> {
        let response = self.send(request).await?;
        let bytes = response.into_body().collect().await.map_err(ClientError::Broken)?.to_bytes();
        serde_json::from_slice(&bytes).map_err(|error| ClientError::Unreadable { reason: error.to_string() })
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, ClientError> {
        let unreachable = |source| ClientError::Unreachable { url: self.base.clone(), source };
        let response = self.client.request(request).await.map_err(unreachable)?;
        if response.status().is_success() { Ok(response) } else { Err(refusal(response).await) }
    }
}

async fn within<T>(limit: Duration, call: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
    tokio::time::timeout(limit, call).await.unwrap_or(Err(ClientError::Late { limit }))
}

async fn refusal(response: Response<Incoming>) -> ClientError {
    let status = response.status();
    let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    let body = response.into_body().collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let object: Option<Value> = serde_json::from_slice(&body).ok();
    let message =
        object.as_ref().and_then(error_message).map_or_else(|| format!("the server answered {status}"), str::to_owned);
    ClientError::Refused { status: status.as_u16(), message, retry_after: seconds.map(Duration::from_secs) }
}

/// The words of an OpenAI error object.
fn error_message(body: &Value) -> Option<&str> {
    body.get("error")?.get("message")?.as_str()
}

/// The frames of a streamed answer. Dropping it aborts what still runs.
#[derive(Debug)]
pub struct EventStream {
    body: Incoming,
    frames: FrameReader,
}

impl EventStream {
    /// The next frame; `None` at the end.
    ///
    /// # Errors
    /// The server ends with an error, the connection breaks, or nothing comes for too long.
    pub async fn next(&mut self) -> Result<Option<Value>, ClientError> {
        loop {
            match self.frames.next_frame()? {
                Some(Frame::Done) => return Ok(None),
                Some(Frame::Data(value)) => {
                    return match error_message(&value) {
                        None => Ok(Some(value)),
                        Some(message) => {
                            Err(ClientError::Refused { status: 200, message: message.to_owned(), retry_after: None })
                        }
                    };
                }
                None => {}
            }
            if !within(SILENCE_MAX, self.receive()).await? {
                return Err(ClientError::Unreadable { reason: "the stream ended before [DONE]".into() });
            }
        }
    }

    /// Takes what comes next; false at the end of the body.
    async fn receive(&mut self) -> Result<bool, ClientError> {
        let Some(frame) = self.body.frame().await else { return Ok(false) };
        if let Ok(data) = frame.map_err(ClientError::Broken)?.into_data() {
            self.frames.push(&data);
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(url: &str, expected: Option<&str>) {
        assert_eq!(ApiClient::new(url, None).ok().map(|client| client.base).as_deref(), expected, "{url}");
    }

    #[test]
    fn addresses_are_read_as_people_write_them() {
        check("http://127.0.0.1:8000", Some("http://127.0.0.1:8000"));
        check("http://127.0.0.1:8000/v1/", Some("http://127.0.0.1:8000"));
        check("localhost:8000", Some("http://localhost:8000"));
        check("https://x", None);
        check("http://", None);
        check("", None);
    }
}
