//! Compute threads of one rank.
//!
//! Owns the threads and how work is shared out among them; does not know what the work is. Threads are never pinned: on a
//! machine that is shared, a pinned thread waits for its core while another one idles.
//!
//! **Invariant:** `run` returns only after every thread that has seen its closure has left it.
//! **Invariant:** a thread that the system has not scheduled delays nobody: it joins late or not at all.

use std::{
    any::Any,
    cell::Cell,
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    ptr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle, Thread},
    time::{Duration, Instant},
};

use crate::KernelError;

/// A waiting thread burns its core for this long before it sleeps.
const SPIN_MAX: Duration = Duration::from_micros(20);
/// The caller looks again after this long, should a wake-up be late.
const CALLER_SLICE: Duration = Duration::from_millis(1);
/// An idle thread looks again after this long. Work wakes it at once.
const IDLE_SLICE: Duration = Duration::from_millis(50);

/// Bits of `Shared::gate`: `epoch << 32 | OPEN | threads inside`.
const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;

/// How threads wait for work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// Spin for a few microseconds, then sleep: for cores that nobody else needs.
    SpinThenSleep,
    /// Sleep at once: where ranks x threads + 1 exceed the CPUs that the process may use.
    Sleep,
}

/// Compute threads: `num_threads` counts the caller of `run`, which takes part.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// `run` may be called by one thread at a time, and not from inside itself.
    one_caller: PhantomData<Cell<()>>,
}

struct Shared {
    gate: AtomicU64,
    job: AtomicPtr<Job<'static>>,
    sleeping: Vec<AtomicBool>,
    caller: Mutex<Option<Thread>>,
    caller_sleeps: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    waiting: Waiting,
    stop: AtomicBool,
}

/// One call of `run`; lives on the caller's stack.
struct Job<'a> {
    part: &'a (dyn Fn(usize) + Sync),
    num_parts: usize,
    num_threads: usize,
    next: AtomicUsize,
}

impl Job<'_> {
    /// Takes parts until none is left: large runs of them first, so that taking costs little and the end comes evenly.
    fn work(&self) {
        let mut start = self.next.load(Ordering::Relaxed);
        while start < self.num_parts {
            let run = ((self.num_parts - start) / (2 * self.num_threads)).max(1);
            match self.next.compare_exchange_weak(start, start + run, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => {
                    (start..start + run).for_each(self.part);
                    start = self.next.load(Ordering::Relaxed);
                }
                Err(seen) => start = seen,
            }
        }
    }
}

impl Pool {
    /// Starts `num_threads - 1` threads beside the caller.
    ///
    /// # Errors
    /// The system refuses a thread: ask for fewer.
    pub fn new(num_threads: usize, waiting: Waiting) -> Result<Self, KernelError> {
        let num_workers = num_threads.saturating_sub(1);
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            job: AtomicPtr::new(ptr::null_mut()),
            sleeping: (0..num_workers).map(|_| AtomicBool::new(false)).collect(),
            caller: Mutex::new(None),
            caller_sleeps: AtomicBool::new(false),
            panic: Mutex::new(None),
            waiting,
            stop: AtomicBool::new(false),
        });
        let mut pool = Self { shared, workers: Vec::with_capacity(num_workers), one_caller: PhantomData };
        for index in 0..num_workers {
            let shared = Arc::clone(&pool.shared);
            let worker = thread::Builder::new()
                .name(format!("compute-{}", index + 1))
                .spawn(move || shared.serve(index))
                .map_err(|source| KernelError::Thread { index, source })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads that take part, the caller included.
    pub fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `part(0)` to `part(num_parts - 1)`, each once, in any order, on any of the threads, and waits for all.
    ///
    /// A panic in a part comes out of this call.
    pub fn run(&self, num_parts: usize, part: impl Fn(usize) + Sync) {
        if self.workers.is_empty() || num_parts < 2 {
            (0..num_parts).for_each(part);
            return;
        }
        let job = Job { part: &part, num_parts, num_threads: self.num_threads(), next: AtomicUsize::new(0) };
        let open = OpenGate::new(&self.shared, &job);
        self.wake(num_parts - 1);
        job.work();
        drop(open);
        let caught = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(caught) = caught {
            resume_unwind(caught);
        }
    }

    fn wake(&self, num_wanted: usize) {
        for (worker, sleeping) in self.workers.iter().zip(&self.shared.sleeping).take(num_wanted) {
            if sleeping.load(Ordering::SeqCst) && sleeping.swap(false, Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches every panic of a part, so it ends by itself.
            let _ = worker.join();
        }
    }
}

/// The time during which threads may enter a job; its end waits until they have left.
struct OpenGate<'a> {
    shared: &'a Shared,
}

impl<'a> OpenGate<'a> {
    fn new(shared: &'a Shared, job: &Job<'_>) -> Self {
        let job: *const Job<'_> = job;
        shared.job.store(job.cast_mut().cast(), Ordering::Relaxed);
        let epoch = (shared.gate.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        shared.gate.store(epoch << 32 | OPEN, Ordering::SeqCst);
        Self { shared }
    }
}

impl Drop for OpenGate<'_> {
    fn drop(&mut self) {
        self.shared.gate.fetch_and(!OPEN, Ordering::AcqRel);
        self.shared.wait_until_left();
        if thread::panicking() {
            // The caller's own panic is on its way out; a worker's must not come out of the next call.
            self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
    }
}

impl Shared {
    /// A compute thread's life.
    fn serve(&self, index: usize) {
        let mut seen = 0;
        while let Some(gate) = self.wait_for_work(index, seen) {
            seen = gate >> 32;
            if self.enter(gate) {
                // SAFETY: `enter` counted this thread in while the gate was open, and `OpenGate::drop` waits for the count
                // to fall before the job, which is on the caller's stack, goes away.
                let job = unsafe { &*self.job.load(Ordering::Relaxed) };
                if let Err(caught) = catch_unwind(AssertUnwindSafe(|| job.work())) {
                    *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(caught);
                }
                self.leave();
            }
        }
    }

    /// Waits for an open gate of another epoch than `seen`; `None` ends the thread.
    fn wait_for_work(&self, index: usize, seen: u64) -> Option<u64> {
        let is_new = |gate: u64| gate & OPEN != 0 && gate >> 32 != seen;
        if self.waiting == Waiting::SpinThenSleep
            && let Some(gate) = spin(|| Some(self.gate.load(Ordering::Acquire)).filter(|gate| is_new(*gate)))
        {
            return Some(gate);
        }
        let sleeping = self.sleeping.get(index)?;
        loop {
            sleeping.store(true, Ordering::SeqCst);
            let gate = self.gate.load(Ordering::SeqCst);
            let stop = self.stop.load(Ordering::SeqCst);
            if stop || is_new(gate) {
                sleeping.store(false, Ordering::SeqCst);
                return if stop { None } else { Some(gate) };
            }
            thread::park_timeout(IDLE_SLICE);
        }
    }

    /// Counts this thread in, if the gate is still open in the same epoch.
    fn enter(&self, mut gate: u64) -> bool {
        let epoch = gate >> 32;
        while gate & OPEN != 0 && gate >> 32 == epoch {
            match self.gate.compare_exchange_weak(gate, gate + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return true,
                Err(seen) => gate = seen,
            }
        }
        false
    }

    fn leave(&self) {
        let before = self.gate.fetch_sub(1, Ordering::SeqCst);
        if before & OPEN == 0
            && before & INSIDE == 1
            && self.caller_sleeps.load(Ordering::SeqCst)
            && let Some(caller) = self.caller.lock().unwrap_or_else(PoisonError::into_inner).as_ref()
        {
            caller.unpark();
        }
    }

    fn wait_until_left(&self) {
        let left = || (self.gate.load(Ordering::SeqCst) & INSIDE == 0).then_some(());
        if left().is_some() || (self.waiting == Waiting::SpinThenSleep && spin(left).is_some()) {
            return;
        }
        *self.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread::current());
        self.caller_sleeps.store(true, Ordering::SeqCst);
        while left().is_none() {
            thread::park_timeout(CALLER_SLICE);
        }
        self.caller_sleeps.store(false, Ordering::SeqCst);
    }
}

/// Looks until `look` has something or the time for spinning is over.
fn spin<T>(look: impl Fn() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        for _ in 0..8 {
            if let Some(found) = look() {
                return Some(found);
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN_MAX {
            return None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(num_threads: usize, waiting: Waiting, num_parts: usize) {
        let pool = Pool::new(num_threads, waiting).unwrap();
        assert_eq!(pool.num_threads(), num_threads);
        for round in 0..200 {
            let counts: Vec<AtomicUsize> = (0..num_parts).map(|_| AtomicUsize::new(0)).collect();
            pool.run(num_parts, |part| {
                counts[part].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "round {round}");
        }
    }

    #[test]
    fn every_part_runs_once() {
        for waiting in [Waiting::SpinThenSleep, Waiting::Sleep] {
            for num_threads in [1, 2, 3, 5] {
                for num_parts in [0, 1, 2, 3, 17, 100] {
                    check(num_threads, waiting, num_parts);
                }
            }
        }
    }

    #[test]
    fn pause_between_runs_wakes_sleepers() {
        let pool = Pool::new(3, Waiting::SpinThenSleep).unwrap();
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(1));
            let sum = AtomicUsize::new(0);
            pool.run(50, |part| {
                sum.fetch_add(part, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 1225);
        }
    }

    #[test]
    fn panic_of_a_part_comes_out_and_the_pool_lives_on() {
        let pool = Pool::new(2, Waiting::Sleep).unwrap();
        for bad in 0..20 {
            let result = catch_unwind(AssertUnwindSafe(|| pool.run(20, |part| assert_ne!(part, bad))));
            assert!(result.is_err());
        }
        let sum = AtomicUsize::new(0);
        pool.run(10, |part| {
            sum.fetch_add(part, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 45);
    }

    #[test]
    fn panics_of_several_threads_are_over_with_their_call() {
        let pool = Pool::new(3, Waiting::SpinThenSleep).unwrap();
        for _ in 0..50 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, |_| {
                    thread::sleep(Duration::from_micros(200));
                    panic!("every part fails");
                });
            }));
            assert!(result.is_err());
            pool.run(10, |_| {});
        }
    }
}
