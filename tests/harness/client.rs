//! A small HTTP client: requests as a user sends them, streams read line by line.

use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(120);

/// One server.
#[derive(Clone)]
pub struct Http {
    base: String,
    agent: ureq::Agent,
}

/// A finished answer.
#[derive(Debug)]
pub struct Completion {
    /// HTTP status.
    pub status: u16,
    /// The body.
    pub body: Value,
}

/// How a stream ended.
#[derive(Debug, Clone, PartialEq)]
pub enum StreamEnd {
    /// With `[DONE]`, and no error before it.
    Done,
    /// With an error event.
    Error(Value),
    /// The connection closed in the middle.
    Cut,
}

/// An open stream of server-sent events.
pub struct Stream {
    lines: std::io::Lines<BufReader<ureq::BodyReader<'static>>>,
    /// Text of choice 0 so far.
    pub text: String,
    /// Token ids of choice 0 so far, where asked for.
    pub token_ids: Vec<u32>,
    /// When it was asked for.
    pub started: Instant,
    /// When the first text came.
    pub first: Option<Instant>,
    /// Longest time between two events, the first wait with them.
    pub longest_gap: Duration,
    error: Option<Value>,
    last: Instant,
}

impl Http {
    /// A client for a server; `address` is `http://host:port` or `host:port`.
    pub fn new(address: &str) -> Self {
        let config = ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).http_status_as_error(false).build();
        let base = if address.starts_with("http") { address.to_owned() } else { format!("http://{address}") };
        Self { base: base.trim_end_matches('/').to_owned(), agent: config.into() }
    }

    /// Where it is.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// `GET`.
    pub fn get(&self, path: &str) -> (u16, String) {
        let mut response = self.agent.get(format!("{}{path}", self.base)).call().expect("an answer");
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap_or_default())
    }

    /// `POST` of JSON.
    pub fn post(&self, path: &str, body: &Value) -> Completion {
        let mut response = self.agent.post(format!("{}{path}", self.base)).send_json(body).expect("an answer");
        let status = response.status().as_u16();
        let text = response.body_mut().with_config().limit(256 << 20).read_to_string().expect("a body");
        Completion { status, body: serde_json::from_str(&text).unwrap_or(Value::String(text)) }
    }

    /// `POST` of JSON that must succeed.
    pub fn ask(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.body
    }

    /// Opens a stream.
    pub fn stream(&self, path: &str, body: &Value) -> Stream {
        self.try_stream(path, body).expect("a stream")
    }

    /// The same, where the server may be away or may refuse.
    pub fn try_stream(&self, path: &str, body: &Value) -> Option<Stream> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let now = Instant::now();
        let response = self.agent.post(format!("{}{path}", self.base)).send_json(&body).ok()?;
        if response.status().as_u16() != 200 {
            return None;
        }
        Some(Stream {
            lines: BufReader::new(response.into_body().into_reader()).lines(),
            text: String::new(),
            token_ids: Vec::new(),
            started: now,
            first: None,
            longest_gap: Duration::ZERO,
            error: None,
            last: now,
        })
    }
}

impl Stream {
    /// Reads up to the next event; false when there is none any more.
    pub fn step(&mut self) -> Result<Value, StreamEnd> {
        loop {
            let Some(Ok(line)) = self.lines.next() else { return Err(StreamEnd::Cut) };
            let Some(data) = line.strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                return Err(self.error.clone().map_or(StreamEnd::Done, StreamEnd::Error));
            }
            let event: Value = serde_json::from_str(data).expect("an event is JSON");
            self.take(&event);
            return Ok(event);
        }
    }

    fn take(&mut self, event: &Value) {
        let now = Instant::now();
        self.longest_gap = self.longest_gap.max(now - self.last);
        self.last = now;
        if event.get("error").is_some() {
            self.error = Some(event.clone());
        }
        let choice = &event["choices"][0];
        let text = choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or_default();
        if !text.is_empty() {
            self.first.get_or_insert(now);
        }
        self.text.push_str(text);
        let ids = choice["token_ids"].as_array().into_iter().flatten();
        self.token_ids.extend(ids.filter_map(|id| id.as_u64()).map(|id| id as u32));
    }

    /// Reads to the end.
    pub fn finish(&mut self) -> StreamEnd {
        loop {
            if let Err(end) = self.step() {
                return end;
            }
        }
    }
}
