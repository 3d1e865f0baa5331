//! Clients that ask and compare, until they are told to stop.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use harness::{Http, Random, StreamEnd, Work};
use serde_json::{Value, json};

/// Streams at a time.
const NUM_CLIENTS: u64 = 16;
/// Longest pause of a client between two requests, milliseconds: the machine has other work too.
const PAUSE_MAX_MS: u64 = 3_000;
/// Different reasons that are counted.
const REASONS_MAX: usize = 50;
/// A request that has not ended by then hangs.
const HUNG_AFTER: Duration = Duration::from_secs(100);

/// What became of the requests.
#[derive(Default)]
pub struct Tally {
    /// All that were sent to a head that was there.
    pub sent: AtomicU64,
    /// The whole text, and the right one.
    pub right: AtomicU64,
    /// Any other text.
    pub wrong: AtomicU64,
    /// The beginning of the right text, then an error event.
    pub failed: AtomicU64,
    /// The beginning of the right text, then a closed connection.
    pub cut: AtomicU64,
    /// No end in time.
    pub hung: AtomicU64,
    /// Not taken: an answer that says to try again.
    pub refused: AtomicU64,
    /// The longest pause in a stream, milliseconds.
    pub pause_max_ms: AtomicU64,
    /// What error events said, and how often.
    pub reasons: Mutex<BTreeMap<String, u64>>,
}

impl Tally {
    fn count_reason(&self, event: &Value) {
        let said = event["error"]["message"].as_str().unwrap_or("an error without words");
        // Numbers differ from time to time; the reason is the same.
        let reason: String = said.chars().map(|letter| if letter.is_ascii_digit() { '#' } else { letter }).collect();
        let mut reasons = self.reasons.lock().expect("nobody panics with it");
        if reasons.len() < REASONS_MAX || reasons.contains_key(&reason) {
            *reasons.entry(reason).or_default() += 1;
        }
    }
}

/// What clients are to do.
#[derive(Default)]
struct Orders {
    stop: AtomicBool,
    rest: AtomicBool,
    /// Clients that have nothing under way.
    num_resting: AtomicUsize,
}

/// The clients.
pub struct Load {
    tally: Arc<Tally>,
    orders: Arc<Orders>,
    clients: RefCell<Vec<JoinHandle<()>>>,
}

impl Load {
    /// Asks each request alone, then lets the clients begin.
    pub fn start(http: &Http) -> Self {
        let work = Work::ask_alone(http, 32, 300, 120);
        let (tally, orders) = (Arc::new(Tally::default()), Arc::new(Orders::default()));
        let client = |number| {
            let (http, work, tally, orders) = (http.clone(), work.clone(), Arc::clone(&tally), Arc::clone(&orders));
            spawn(move || ask_on(&http, &work, &tally, &orders, number))
        };
        let clients = RefCell::new((0..NUM_CLIENTS).map(client).collect());
        Self { tally, orders, clients }
    }

    /// What became of the requests so far.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Lets every client end what it has under way and begin nothing; false if one does not end in time.
    pub fn rest(&self) -> bool {
        self.orders.rest.store(true, Ordering::Relaxed);
        let ends = Instant::now() + 2 * HUNG_AFTER;
        let num_clients = self.clients.borrow().len();
        while self.orders.num_resting.load(Ordering::Relaxed) < num_clients {
            if Instant::now() >= ends {
                return false;
            }
            sleep(Duration::from_millis(50));
        }
        true
    }

    /// Lets them go on.
    pub fn go_on(&self) {
        self.orders.rest.store(false, Ordering::Relaxed);
    }

    /// Lets the clients end; gives how many did not.
    pub fn stop(&self) -> usize {
        self.orders.stop.store(true, Ordering::Relaxed);
        let ends = Instant::now() + 2 * HUNG_AFTER;
        let clients = std::mem::take(&mut *self.clients.borrow_mut());
        let hangs = |client: &JoinHandle<()>| {
            while !client.is_finished() && Instant::now() < ends {
                sleep(Duration::from_millis(50));
            }
            !client.is_finished()
        };
        clients.iter().filter(|client| hangs(client)).count()
    }
}

/// One client: asks, reads to the end, compares.
fn ask_on(http: &Http, work: &Work, tally: &Tally, orders: &Orders, number: u64) {
    let mut random = Random(1000 + number);
    let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
    while !orders.stop.load(Ordering::Relaxed) {
        if orders.rest.load(Ordering::Relaxed) {
            orders.num_resting.fetch_add(1, Ordering::Relaxed);
            while orders.rest.load(Ordering::Relaxed) && !orders.stop.load(Ordering::Relaxed) {
                sleep(Duration::from_millis(50));
            }
            orders.num_resting.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        sleep(Duration::from_millis(random.below(PAUSE_MAX_MS)));
        let index = random.below(work.bodies.len() as u64) as usize;
        let asked = Instant::now();
        let Some(mut stream) = http.try_stream("/v1/completions", &work.bodies[index]) else {
            // The head is being started again.
            count(if asked.elapsed() >= HUNG_AFTER { &tally.hung } else { &tally.refused });
            continue;
        };
        count(&tally.sent);
        let end = stream.finish();
        tally.pause_max_ms.fetch_max(stream.longest_gap.as_millis() as u64, Ordering::Relaxed);
        let expected = work.expected[index].as_array().expect("token ids");
        let got = &stream.token_ids;
        let is_prefix = got.len() <= expected.len() && json!(got) == json!(expected[..got.len()]);
        count(match end {
            _ if !is_prefix => &tally.wrong,
            _ if asked.elapsed() >= HUNG_AFTER => &tally.hung,
            StreamEnd::Done if got.len() == expected.len() => &tally.right,
            StreamEnd::Done => &tally.wrong,
            StreamEnd::Cut => &tally.cut,
            StreamEnd::Error(event) => {
                tally.count_reason(&event);
                &tally.failed
            }
        });
    }
}
