//! What stands before the devices, under load: HTTP, JSON, template, tokenizer, admission, the engine's thread, server-sent
//! events. The rank behind it answers every plan at once.
//!
//! `cargo bench -p phalanx-coordinator --bench front 2>/dev/null` measures with clients of its own, at a fixed rate: a request
//! that could not be sent in time counts from when it was due. `... --bench front -- serve 60` serves for so many seconds, for
//! `wrk` or `oha`. Measures, never asserts.

mod dummy;

use std::error::Error;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::serve::ListenerExt;
use phalanx_coordinator::api::{ApiState, ServedModels, router};
use phalanx_coordinator::logging::{self, LogFormat};
use phalanx_proto::StatusSnapshot;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Requests per second.
const RATE: u32 = 2_000;
/// Connections, each with one request at a time.
const NUM_CONNECTIONS: u32 = 64;
/// One measurement.
const RUN: Duration = Duration::from_secs(5);
/// Before the first measurement.
const WARM_UP: Duration = Duration::from_secs(2);
/// Measurements of each kind; the machine may be shared, so all are shown.
const NUM_RUNS: u32 = 3;

const KINDS: [(&str, &str, &str); 3] = [
    (
        "chat, whole",
        "/v1/chat/completions",
        r#"{"model":"dummy","messages":[{"role":"user","content":"How are you?"}],"max_tokens":8}"#,
    ),
    (
        "chat, streamed",
        "/v1/chat/completions",
        r#"{"model":"dummy","messages":[{"role":"user","content":"How are you?"}],"max_tokens":8,"stream":true}"#,
    ),
    (
        "completion, whole",
        "/v1/completions",
        r#"{"model":"dummy","prompt":"Once upon a time","max_tokens":8,"temperature":0}"#,
    ),
];

fn main() -> Result<(), Box<dyn Error>> {
    logging::install("info", LogFormat::Text)?;
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let server = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("head").build()?;
    let address = server.block_on(serve())?;
    if words.first().is_some_and(|word| word == "serve") {
        let seconds = words.get(1).map_or(Ok(60), |word| word.parse())?;
        println!("http://{address} serves `dummy` for {seconds} s");
        std::thread::sleep(Duration::from_secs(seconds));
        return Ok(());
    }
    let clients = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    for (name, path, body) in KINDS {
        clients.block_on(load(address, path, body, WARM_UP))?;
        for _ in 0..NUM_RUNS {
            let (before, started) = (processor_time(), Instant::now());
            let mut times = clients.block_on(load(address, path, body, RUN))?;
            let (rate, used) = (times.len() as f64 / started.elapsed().as_secs_f64(), processor_time() - before);
            let share = used / started.elapsed().as_secs_f64();
            times.sort_unstable();
            let at = |share: f64| times.get((times.len() as f64 * share) as usize).copied().unwrap_or_default();
            println!(
                "{name}: {rate:.0} requests/s, p50 {:?}, p99 {:?}, p99.9 {:?}, largest {:?}; {share:.2} processors",
                at(0.5),
                at(0.99),
                at(0.999),
                times.last().copied().unwrap_or_default()
            );
        }
    }
    Ok(())
}

/// Serves the tiny model within the current runtime, as a head does.
async fn serve() -> Result<SocketAddr, Box<dyn Error>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/tiny-llama");
    let models = ServedModels::default();
    models.insert(dummy::served(&folder, dummy::limits(256, 1024)).await?);
    let router = router(ApiState::new(models, Arc::new(StatusSnapshot::default)));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(address)
}

/// Sends at the fixed rate for a while; gives how long each request took from when it was due.
async fn load(
    address: SocketAddr,
    path: &'static str,
    body: &'static str,
    length: Duration,
) -> Result<Vec<Duration>, std::io::Error> {
    let start = Instant::now() + Duration::from_millis(20);
    let tasks: Vec<_> = (0..NUM_CONNECTIONS)
        .map(|number| tokio::spawn(client(address, path, body, (start, start + length), number)))
        .collect();
    let mut all = Vec::new();
    for task in tasks {
        all.extend(task.await??);
    }
    Ok(all)
}

/// One client: a request whenever it is its turn, between two instants.
async fn client(
    address: SocketAddr,
    path: &'static str,
    body: &'static str,
    (start, end): (Instant, Instant),
    number: u32,
) -> Result<Vec<Duration>, std::io::Error> {
    let interval = Duration::from_secs(1) / RATE;
    let mut connection = Connection::open(address, path, body).await?;
    let mut times = Vec::new();
    let mut due = start + interval * number;
    while due < end {
        tokio::time::sleep_until(due.into()).await;
        connection.ask().await?;
        times.push(due.elapsed());
        due += interval * NUM_CONNECTIONS;
    }
    Ok(times)
}

/// One kept-alive connection.
struct Connection {
    stream: TcpStream,
    request: String,
    received: Vec<u8>,
}

impl Connection {
    async fn open(address: SocketAddr, path: &str, body: &str) -> Result<Self, std::io::Error> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let length = body.len();
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        Ok(Self { stream, request, received: Vec::with_capacity(16 * 1024) })
    }

    /// One request and its whole answer.
    async fn ask(&mut self) -> Result<(), std::io::Error> {
        self.stream.write_all(self.request.as_bytes()).await?;
        self.received.clear();
        while !self.is_whole() {
            if self.stream.read_buf(&mut self.received).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
        if self.received.starts_with(b"HTTP/1.1 200") {
            return Ok(());
        }
        Err(std::io::Error::other(String::from_utf8_lossy(&self.received).into_owned()))
    }

    /// True where the answer has come to its end, by its length or by its last chunk.
    fn is_whole(&self) -> bool {
        let Some(head) = self.received.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { return false };
        let head_text = String::from_utf8_lossy(&self.received[..head]).to_ascii_lowercase();
        match head_text.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok()) {
            Some(length) => self.received.len() >= head + 4 + length,
            None => self.received.ends_with(b"0\r\n\r\n"),
        }
    }
}

/// Processor time of this process so far, clients included, in seconds.
fn processor_time() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}
