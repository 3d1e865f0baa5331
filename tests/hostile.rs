//! What clients can do to each other: grammars that explode, prompts without end, crowds that leave. Each is refused or goes,
//! and the streams of others do not notice.

#![expect(clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "helpers of tests are test code too")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use harness::{Cluster, Processes, golden, smollm2, wait_for};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
/// Streams that are watched.
const NUM_WATCHED: usize = 2;
/// Requests of the crowd.
const NUM_CROWD: usize = 1_000;
/// Clients of the crowd at a time.
const NUM_CLIENTS: usize = 20;
/// How long the streams are watched before anything happens.
const CONTROL: Duration = Duration::from_secs(8);
/// Longest silence of a connection.
const SILENCE_MAX: Duration = Duration::from_secs(120);

/// A connection that may be dropped at any moment.
struct Connection(BufReader<TcpStream>);

impl Connection {
    /// Sends the head of a request and the first `sent` bytes of its body.
    fn send(cluster: &Cluster, path: &str, body: &str, sent: usize) -> Self {
        let address = cluster.http.base().trim_start_matches("http://");
        let mut stream = TcpStream::connect(address).expect("the server listens");
        stream.set_read_timeout(Some(SILENCE_MAX)).expect("a socket");
        stream.set_nodelay(true).expect("a socket");
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\nconnection: close\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        // A server that has refused the head may not read the rest.
        let _refused = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body.as_bytes()[..sent]));
        Self(BufReader::new(stream))
    }

    /// The status of the answer.
    fn status(&mut self) -> u16 {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("an answer");
        line.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("no status in {line:?}"))
    }

    /// Status and the rest of the answer.
    fn finish(mut self) -> (u16, String) {
        let status = self.status();
        let mut rest = String::new();
        self.0.read_to_string(&mut rest).expect("the rest of the answer");
        (status, rest)
    }
}

fn post(cluster: &Cluster, path: &str, body: &Value) -> (u16, String) {
    let body = body.to_string();
    Connection::send(cluster, path, &body, body.len()).finish()
}

/// The times between the tokens of streams that run one after the other until `stop`, longest last.
fn watch(cluster: &Cluster, stop: &AtomicBool) -> Vec<Duration> {
    let body = json!({"model": "m", "prompt": [5, 6, 7], "max_tokens": 400, "temperature": 0, "ignore_eos": true});
    let one = || {
        let mut gaps = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let mut stream = cluster.http.stream(COMPLETIONS, &body);
            stream.step().expect("a first token");
            let mut last = Instant::now();
            while !stop.load(Ordering::Relaxed) && stream.step().is_ok() {
                let now = Instant::now();
                gaps.push(now - last);
                last = now;
            }
        }
        gaps
    };
    let mut gaps: Vec<Duration> = thread::scope(|scope| {
        let watched: Vec<_> = (0..NUM_WATCHED).map(|_| scope.spawn(one)).collect();
        watched.into_iter().flat_map(|stream| stream.join().expect("a watched stream")).collect()
    });
    gaps.sort_unstable();
    gaps
}

/// Watches streams while `work` goes on.
fn watched_during(cluster: &Cluster, work: impl FnOnce()) -> Vec<Duration> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let gaps = scope.spawn(|| watch(cluster, &stop));
        // The streams are running when the work begins, and end whatever becomes of it.
        thread::sleep(Duration::from_millis(500));
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        stop.store(true, Ordering::Relaxed);
        let gaps = gaps.join().expect("the watched streams");
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        gaps
    })
}

/// The gap that one in a thousand exceeds.
fn p999(gaps: &[Duration]) -> Duration {
    gaps[gaps.len() - 1 - gaps.len() / 1000]
}

/// Well-behaved neighbours, as many as fit beside the watched streams: what everybody has to live with.
fn neighbours(cluster: &Cluster, until: Instant) {
    thread::scope(|scope| {
        for client in 0..NUM_WATCHED {
            scope.spawn(move || {
                while Instant::now() < until {
                    let prompt: Vec<usize> = (0..40).map(|at| 20 + (client * 40 + at) % 300).collect();
                    let body = json!({"model": "m", "prompt": prompt, "max_tokens": 8, "ignore_eos": true});
                    assert_eq!(post(cluster, COMPLETIONS, &body).0, 200);
                }
            });
        }
    });
}

/// A schema of so many levels.
fn nested(levels: usize) -> Value {
    (1..levels).fold(json!({"type": "object"}), |inner, _| json!({"properties": {"a": inner}}))
}

fn check_grammars(cluster: &Cluster) {
    let chat = |name: &str, value: Value| {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4});
        body[name] = value;
        body
    };
    let schema = |schema: Value| {
        let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
        chat("response_format", format)
    };
    let wide: Value = (0..20_000).map(|at| (format!("p{at}"), json!({"type": "string"}))).collect();
    let hostile = [
        ("malformed regex", chat("guided_regex", json!("(["))),
        ("regex bomb", chat("guided_regex", json!("((((a{1,200}){1,200}){1,200}){1,200}){1,200}b"))),
        ("regex of alternatives", chat("guided_regex", json!("(.*a.*b.*|.*b.*a.*){40}[^x]{900}.*(a|b|ab)*.{500}"))),
        ("long regex", chat("guided_regex", json!("a".repeat(9_000)))),
        ("malformed grammar", chat("guided_grammar", json!("start: \"a\" | ( undefined"))),
        ("endless grammar", chat("guided_grammar", json!("start: start"))),
        ("65 levels", schema(nested(65))),
        ("unknown type", schema(json!({"type": "nothing"}))),
        ("impossible", schema(json!({"type": "integer", "minimum": 5, "maximum": 4}))),
        ("20,000 members", schema(json!({"type": "object", "properties": wide}))),
        ("endless reference", schema(json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}))),
    ];
    thread::scope(|scope| {
        for (name, body) in hostile {
            scope.spawn(move || {
                for _ in 0..3 {
                    let (status, answer) = post(cluster, CHAT, &body);
                    // One that compiles after all is harmless; one that finds no place is told to come again.
                    let harmless = matches!(status, 200 | 503) && name.starts_with("regex");
                    assert!(status == 400 || harmless, "{name}: {status} {answer}");
                }
            });
        }
    });
}

/// Bodies with prompts of these lengths, made before anything is measured: making them takes processors too.
struct LongBodies {
    huge: String,
    long: String,
    too_long: String,
    left: String,
}

impl LongBodies {
    fn new() -> Self {
        let of = |num_bytes: usize| {
            let text = "Words without end, 没有尽头. ";
            json!({"model": "m", "prompt": text.repeat(num_bytes / text.len()), "max_tokens": 4}).to_string()
        };
        Self { huge: of(10 << 20), long: of(200 << 10), too_long: of(40 << 20), left: of(1 << 20) }
    }
}

fn check_prompts(cluster: &Cluster, bodies: &LongBodies) {
    let ask = |body: &str| Connection::send(cluster, COMPLETIONS, body, body.len()).finish();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (status, answer) = ask(&bodies.huge);
            assert!(status == 400 && answer.contains("context_length_exceeded"), "{status} {answer}");
        });
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(ask(&bodies.long).0, 400));
        }
        scope.spawn(|| {
            // Refused by its length alone: no byte of it is sent.
            let started = Instant::now();
            assert_eq!(Connection::send(cluster, COMPLETIONS, &bodies.too_long, 0).status(), 413);
            assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        });
        // A client that leaves while its prompt is looked at.
        for _ in 0..4 {
            scope.spawn(|| drop(Connection::send(cluster, COMPLETIONS, &bodies.left, bodies.left.len())));
        }
    });
}

/// A thousand requests, of whose clients every second one is gone before its answer: at once, in the middle of its body, or
/// after the first bytes of the stream.
fn crowd(cluster: &Cluster) {
    let (next, answered) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let one = |number: usize| {
        let leaves = number % 2 == 1;
        // Who leaves would have stayed long.
        let max_tokens = if leaves { 500 } else { 2 };
        let body = json!({"model": "m", "prompt": [9 + number % 400], "max_tokens": max_tokens, "stream": leaves,
            "ignore_eos": true})
        .to_string();
        let sent = if number % 6 == 1 { body.len() / 2 } else { body.len() };
        let mut connection = Connection::send(cluster, COMPLETIONS, &body, sent);
        if !leaves {
            let (status, answer) = connection.finish();
            assert!(matches!(status, 200 | 503), "{status} {answer}");
            answered.fetch_add(usize::from(status == 200), Ordering::Relaxed);
        } else if number % 6 == 3 {
            let _gone_soon = connection.status();
        }
    };
    thread::scope(|scope| {
        for _ in 0..NUM_CLIENTS {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= NUM_CROWD {
                        return;
                    }
                    one(number);
                }
            });
        }
    });
    let answered = answered.into_inner();
    println!("of {} clients that stayed {answered} were answered", NUM_CROWD / 2);
    assert!(answered > NUM_CROWD / 4, "{answered}");
}

/// A number of `/metrics`.
fn metric(cluster: &Cluster, name: &str) -> f64 {
    let (_, text) = cluster.http.get("/metrics");
    let line =
        text.lines().find(|line| line.starts_with(&format!("{name}{{")) || line.starts_with(&format!("{name} ")));
    let line = line.unwrap_or_else(|| panic!("no {name} in {text}"));
    line.rsplit(' ').next().and_then(|word| word.parse().ok()).expect("a number")
}

#[test]
fn hostile_clients_hurt_nobody_else() {
    let cluster = Cluster::start(2);
    // Two slots share the processors: one thread computes.
    let folder = smollm2().map_or_else(|| golden("tiny-llama").folder, |model| model.folder);
    let seats = (2 * NUM_WATCHED).to_string();
    cluster.serve(&folder, "m", &["--max-model-len", "1024", "--max-num-seqs", &seats]);
    let pids = || (cluster.status().head.pid, cluster.ranks("m")[0].pid);
    let before = pids();
    let control = watched_during(&cluster, || neighbours(&cluster, Instant::now() + CONTROL));
    let limit = 2 * control[control.len() - 1];
    println!("control: {} gaps, p99.9 {:?}, largest {:?}", control.len(), p999(&control), control[control.len() - 1]);
    let bodies = LongBodies::new();
    let attacks: [(&str, &dyn Fn()); 3] = [
        ("grammars", &|| check_grammars(&cluster)),
        ("prompts", &|| check_prompts(&cluster, &bodies)),
        ("crowd", &|| crowd(&cluster)),
    ];
    for (name, attack) in attacks {
        let started = Instant::now();
        let gaps = watched_during(&cluster, attack);
        let (elapsed, largest) = (started.elapsed(), gaps[gaps.len() - 1]);
        println!("{name}: {} gaps in {elapsed:.1?}, p99.9 {:?}, largest {largest:?}", gaps.len(), p999(&gaps));
        assert!(largest < limit, "{name}: largest gap {largest:?}, limit {limit:?}");
    }
    wait_for("all blocks to be free", || {
        let free = metric(&cluster, "phalanx_kv_blocks_free");
        (free == metric(&cluster, "phalanx_kv_blocks")).then_some(())
    });
    assert_eq!(pids(), before, "no process was started anew");
    assert!(Processes::alive(before.0) && Processes::alive(before.1));
}
