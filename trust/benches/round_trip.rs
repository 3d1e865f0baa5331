//! What encryption costs a step: a message of a plan's size to and fro over loopback, in plain text, over TLS, and over a Unix
//! socket. Prints medians; `cargo bench -p phalanx-trust`.

#![expect(clippy::expect_used, reason = "a benchmark: what goes wrong ends it")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use phalanx_trust::{Authority, HeadTls, Stream, Trust, dial, incoming};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_stream::StreamExt;

const ROUNDS: usize = 20_000;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(async {
        for num_bytes in [64, 512, 8192] {
            let [plain, tls] = [false, true].map(|is_tls| tcp(is_tls, num_bytes));
            let (plain, tls, unix) = (plain.await, tls.await, unix(num_bytes).await);
            println!("{num_bytes:5} bytes to and fro: Unix {unix:.1} us, TCP {plain:.1} us, TLS {tls:.1} us");
        }
    });
}

/// Sends back what comes.
async fn echo(mut stream: Stream, num_bytes: usize) {
    let mut buffer = vec![0; num_bytes];
    while stream.read_exact(&mut buffer).await.is_ok() {
        stream.write_all(&buffer).await.expect("writes");
        stream.flush().await.expect("flushes");
    }
}

/// Median of a message to and fro, us.
async fn median(mut stream: Stream, num_bytes: usize) -> f64 {
    let mut buffer = vec![7; num_bytes];
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let started = Instant::now();
        stream.write_all(&buffer).await.expect("writes");
        stream.flush().await.expect("flushes");
        stream.read_exact(&mut buffer).await.expect("reads");
        times.push(started.elapsed());
    }
    times.sort_unstable();
    times[ROUNDS / 2].as_secs_f64() * 1e6
}

async fn tcp(is_tls: bool, num_bytes: usize) -> f64 {
    let folder = std::env::temp_dir().join(format!("phalanx-bench-{}", std::process::id()));
    let authority = Arc::new(Authority::open(&folder).expect("an authority"));
    let tls = is_tls.then(|| HeadTls::new(&authority).expect("a head's certificate"));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let mut connections = incoming(listener, tls);
    let server =
        tokio::spawn(async move { echo(connections.next().await.expect("one").expect("good"), num_bytes).await });
    let trust = if is_tls { Trust::Pinned(authority.pin()) } else { Trust::Plain };
    let time = median(dial(&address, &trust, Duration::from_secs(5)).await.expect("connects"), num_bytes).await;
    server.await.expect("ends");
    std::fs::remove_dir_all(folder).expect("removes");
    time
}

async fn unix(num_bytes: usize) -> f64 {
    let path = std::env::temp_dir().join(format!("phalanx-bench-{}.sock", std::process::id()));
    let listener = UnixListener::bind(&path).expect("a socket");
    let server = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.expect("one");
        echo(Stream::Unix(stream), num_bytes).await;
    });
    let time = median(Stream::Unix(UnixStream::connect(&path).await.expect("connects")), num_bytes).await;
    server.await.expect("ends");
    std::fs::remove_file(path).expect("removes");
    time
}
