//! Simulations by seed: a story for each, as many as are asked for, and the seeds of those that go wrong.
//!
//! Knows nothing of what is played. `cargo xtask simulate` asks for many.
//!
//! **Invariant:** a story has no source of chance but its seed's [`Random`].

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Seeds that a thread takes at a time.
const BATCH: u64 = 64;
/// Seeds that went wrong, until no more are played.
const WRONG_MAX: usize = 10;
/// Time between two words about how far it is.
const WORD_INTERVAL: Duration = Duration::from_secs(30);

/// A small generator: the whole story is in its seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound.max(1)
    }

    pub(crate) fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// How often it was asked, as a number: two stories that differ anywhere differ here soon.
    pub(crate) fn trace(&self) -> u64 {
        self.0
    }
}

/// Plays these seeds, on this thread.
pub(crate) fn play_kept(seeds: &[u64], play: impl Fn(u64)) {
    for seed in seeds {
        println!("seed {seed}");
        play(*seed);
    }
}

/// As many stories as `PHALANX_SIMULATION_SEEDS` says, from `PHALANX_SIMULATION_FIRST` on, on `PHALANX_SIMULATION_THREADS` threads.
///
/// # Panics
/// In the end, if any went wrong; their seeds are named.
pub(crate) fn play_range(what: &str, num_seeds: u64, play: impl Fn(u64) + Sync) {
    #[expect(clippy::disallowed_methods, reason = "a test that is made longer by hand")]
    let said = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let first = said("PHALANX_SIMULATION_FIRST").unwrap_or(0);
    let count = said("PHALANX_SIMULATION_SEEDS").unwrap_or(num_seeds);
    let num_threads = said("PHALANX_SIMULATION_THREADS").unwrap_or(2).max(1);
    let (next, wrong) = (AtomicU64::new(first), Mutex::new(Vec::new()));
    let (started, last) = (Instant::now(), first + count);
    let stop = || wrong.lock().is_ok_and(|wrong: std::sync::MutexGuard<'_, Vec<u64>>| wrong.len() >= WRONG_MAX);
    let play_batches = |speaks: bool| {
        let mut word_at = started + WORD_INTERVAL;
        while !stop() {
            let begin = next.fetch_add(BATCH, Ordering::Relaxed);
            if begin >= last {
                return;
            }
            for seed in begin..(begin + BATCH).min(last) {
                if catch_unwind(AssertUnwindSafe(|| play(seed))).is_err() {
                    eprintln!("{what}: this was seed {seed}");
                    wrong.lock().expect("nobody panics with it").push(seed);
                }
            }
            if speaks && Instant::now() >= word_at {
                word_at = Instant::now() + WORD_INTERVAL;
                let below = begin.saturating_sub((num_threads - 1) * BATCH).max(first);
                eprintln!("{what}: all below {below} are played after {:.0} s", started.elapsed().as_secs_f64());
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..num_threads {
            scope.spawn(|| play_batches(false));
        }
        play_batches(true);
    });
    let (seconds, wrong) = (started.elapsed().as_secs_f64(), wrong.into_inner().expect("nobody panics with it"));
    let rate = count as f64 / seconds;
    println!("{what}: {count} seeds from {first} on in {seconds:.1} s on {num_threads} threads, {rate:.0} a second");
    assert!(wrong.is_empty(), "{what}: these seeds went wrong: {wrong:?}");
}
