//! The engines of one model as one: a request goes where its prompt's beginning was computed before, or to the replica with the
//! least work.
//!
//! **Invariant:** a request is submitted to at most one engine; a replica that cannot take it does not refuse it for the
//! others.

mod affinity;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use affinity::Affinity;
use tokio::time::Instant;

use super::{EngineError, EngineHandle, EngineLimits, EngineSnapshot, GenerateRequest, Reservation, TokenStream};

/// Requests that the replica which knows a prompt may have more than the least busy one.
const AFFINITY_SLACK: u32 = 4;

/// At least one engine, all of the same limits. Cheap to clone.
#[derive(Clone)]
pub struct Replicas {
    first: EngineHandle,
    others: Vec<EngineHandle>,
    affinity: Arc<Mutex<Affinity>>,
}

impl Replicas {
    /// The engines of one model; `None` for none.
    pub fn new(engines: Vec<EngineHandle>) -> Option<Self> {
        let mut engines = engines.into_iter();
        Some(Self { first: engines.next()?, others: engines.collect(), affinity: Arc::default() })
    }

    fn engines(&self) -> impl Iterator<Item = &EngineHandle> {
        std::iter::once(&self.first).chain(&self.others)
    }

    /// Hands a request to the engine that has computed the longest part of its prompt before, unless another has clearly less to
    /// do; then to the one with the least work; to the next one where that cannot take it.
    ///
    /// # Errors
    /// As the first engine that was asked says, where all refuse.
    pub fn submit(&self, request: GenerateRequest) -> Result<TokenStream, EngineError> {
        if self.others.is_empty() {
            return self.first.submit(request);
        }
        let prefixes = affinity::prefixes(&request.prompt, self.limits().block_size);
        let (place, stream) = self.first_of(&prefixes, |engine| engine.submit(request.clone()))?;
        self.affinity.lock().unwrap_or_else(PoisonError::into_inner).note(&prefixes, place);
        Ok(stream)
    }

    /// Takes places for a request that runs as up to `count` sequences at once, all in the engine with the least work.
    ///
    /// # Errors
    /// As that engine says, where all refuse.
    pub fn reserve(&self, count: u32) -> Result<Reservation, EngineError> {
        self.first_of(&[], |engine| engine.reserve(count)).map(|(_, reservation)| reservation)
    }

    /// What the first engine that can says, and the engine's place.
    fn first_of<T>(
        &self,
        prefixes: &[u64],
        ask: impl Fn(&EngineHandle) -> Result<T, EngineError>,
    ) -> Result<(usize, T), EngineError> {
        let mut refusal = None;
        for place in self.order(prefixes) {
            let Some(engine) = self.engines().nth(place) else { continue };
            match ask(engine) {
                Ok(taken) => return Ok((place, taken)),
                Err(error) if is_own_trouble(&error) => refusal = refusal.or(Some(error)),
                Err(error) => return Err(error),
            }
        }
        Err(refusal.unwrap_or(EngineError::Stopping))
    }

    /// Engines by their places, in the order in which they are asked.
    fn order(&self, prefixes: &[u64]) -> Vec<usize> {
        // The snapshot is as old as the last step; what was accepted since is known too.
        let work = |engine: &EngineHandle, snapshot: &EngineSnapshot| {
            engine.num_accepted().max(snapshot.running.saturating_add(snapshot.waiting))
        };
        let mut places: Vec<(bool, u32, usize)> = (0..)
            .zip(self.engines())
            .map(|(place, engine)| {
                let snapshot = engine.snapshot();
                // One that waits for its group, or is about to, is asked last.
                (snapshot.recovering || snapshot.yielding, work(engine, &snapshot), place)
            })
            .collect();
        places.sort_unstable();
        let least = places.first().map_or(0, |(_, work, _)| *work);
        let knows = self.affinity.lock().unwrap_or_else(PoisonError::into_inner).find(prefixes);
        let near = |(late, work, place): &(bool, u32, usize)| {
            !late && Some(*place) == knows && *work <= least.saturating_add(AFFINITY_SLACK)
        };
        if let Some(index) = places.iter().position(near) {
            let first = places.remove(index);
            places.insert(0, first);
        }
        places.into_iter().map(|(_, _, place)| place).collect()
    }

    /// Why requests do not go on: every replica waits for its group, or one has work and has not ended a step for long.
    pub fn trouble(&self, now: Instant) -> Option<String> {
        let snapshots: Vec<EngineSnapshot> = self.engines().map(EngineHandle::snapshot).collect();
        if snapshots.iter().all(|engine| engine.recovering) {
            return Some("its ranks are started again".to_owned());
        }
        let stalled = |engine: &&EngineSnapshot| engine.stalled_for(now) > engine.stall_limit;
        let engine = snapshots.iter().find(stalled)?;
        Some(format!("no step has ended for {} s, and work waits", engine.stalled_for(now).as_secs()))
    }

    /// All of them now, summed up.
    pub fn snapshot(&self) -> EngineSnapshot {
        let mut sum = EngineSnapshot::default();
        for engine in self.engines() {
            let one = engine.snapshot();
            sum.running += one.running;
            sum.waiting += one.waiting;
            sum.num_blocks += one.num_blocks;
            sum.num_blocks_free += one.num_blocks_free;
            sum.num_blocks_cached += one.num_blocks_cached;
            sum.epoch = sum.epoch.max(one.epoch);
            sum.counters.steps += one.counters.steps;
            sum.counters.prompt_tokens += one.counters.prompt_tokens;
            sum.counters.cached_tokens += one.counters.cached_tokens;
            sum.counters.generated_tokens += one.counters.generated_tokens;
            sum.counters.preemptions += one.counters.preemptions;
            sum.counters.finished += one.counters.finished;
            sum.counters.replays += one.counters.replays;
            sum.stall_limit = sum.stall_limit.max(one.stall_limit);
        }
        sum
    }

    /// How many there are.
    #[expect(clippy::len_without_is_empty, reason = "there is always one")]
    pub fn len(&self) -> u32 {
        self.others.len() as u32 + 1
    }

    /// Requests that they have accepted and that have not ended.
    pub fn num_accepted(&self) -> u32 {
        self.engines().map(EngineHandle::num_accepted).sum()
    }

    /// What each accepts.
    pub fn limits(&self) -> &EngineLimits {
        self.first.limits()
    }
}

/// True where another replica may take what this one refuses.
fn is_own_trouble(error: &EngineError) -> bool {
    matches!(error, EngineError::QueueFull { .. } | EngineError::GroupFailed { .. } | EngineError::Stopping)
}

impl From<EngineHandle> for Replicas {
    fn from(engine: EngineHandle) -> Self {
        Self { first: engine, others: Vec::new(), affinity: Arc::default() }
    }
}

impl fmt::Debug for Replicas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.engines()).finish()
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::{SamplingParams, TokenId};
    use std::num::NonZeroU32;
    use tokio::sync::mpsc;

    use super::super::scripted;
    use super::*;

    fn limits() -> EngineLimits {
        EngineLimits {
            max_model_len: 64,
            max_num_seqs: 1,
            max_num_batched_tokens: 64,
            max_queue: 1,
            vocab_size: 100,
            features: phalanx_proto::SamplerFeatures::default(),
            ..EngineLimits::for_tests()
        }
    }

    fn request(token: u32) -> GenerateRequest {
        GenerateRequest {
            request_id: "r".into(),
            prompt: vec![TokenId(token)],
            sampling: SamplingParams::default(),
            max_tokens: NonZeroU32::MIN,
            stop_token_ids: Vec::new(),
            constraint: None,
            priority: 0,
            cache_salt: None,
        }
    }

    /// A replica with so many running sequences; says its number for each request that it gets.
    fn replica(number: u32, running: u32, heard: &mpsc::UnboundedSender<u32>) -> EngineHandle {
        let heard = heard.clone();
        let snapshot = EngineSnapshot { running, ..EngineSnapshot::default() };
        let script = move |_| heard.send(number).expect("the test listens");
        scripted::spawn(limits(), snapshot, script).0
    }

    #[tokio::test]
    async fn the_least_busy_replica_is_asked_first_and_a_full_one_is_passed_over() {
        let (heard, mut order) = mpsc::unbounded_channel();
        let replicas = Replicas::new(vec![replica(0, 3, &heard), replica(1, 1, &heard)]).expect("two");
        assert_eq!(replicas.snapshot().running, 4);
        let mut accepted = Vec::new();
        let refusal = loop {
            match replicas.submit(request(1)) {
                Ok(stream) => accepted.push(stream),
                Err(error) => break error,
            }
        };
        assert!(matches!(refusal, EngineError::QueueFull { .. }), "{refusal}");
        let mut asked = Vec::new();
        while asked.len() < accepted.len() {
            asked.push(order.recv().await.expect("a request"));
        }
        let half = accepted.len() / 2;
        assert_eq!(asked.iter().filter(|number| **number == 1).count(), half);
        assert_eq!(asked.len(), 2 * half);
    }

    #[tokio::test]
    async fn a_prompt_goes_where_its_beginning_is_known_unless_that_replica_is_busy() {
        let (heard, mut order) = mpsc::unbounded_channel();
        let limits = || EngineLimits { max_num_seqs: 8, max_queue: 8, ..limits() };
        let spawn = |number: u32, yielding| {
            let heard = heard.clone();
            let script = move |_| heard.send(number).expect("the test listens");
            let engine = scripted::spawn(limits(), EngineSnapshot::default(), script).0;
            if yielding {
                engine.yield_work();
            }
            engine
        };
        let prompt = |first: u32| GenerateRequest {
            prompt: (first..first + 40).map(TokenId).collect(),
            max_tokens: NonZeroU32::MIN,
            ..request(0)
        };
        let replicas = Replicas::new(vec![spawn(0, false), spawn(1, false)]).expect("two");
        let mut streams = Vec::new();
        let mut asked = Vec::new();
        for first in [0, 50, 50, 50, 50, 50, 0, 50, 50, 50] {
            streams.push(replicas.submit(prompt(first)).expect("room"));
            asked.push(order.recv().await.expect("a request"));
        }
        // With seven against two, one more would be too many.
        assert_eq!(asked, [0, 1, 1, 1, 1, 1, 0, 1, 1, 0]);
        let replicas = Replicas::new(vec![spawn(0, true), spawn(1, false)]).expect("two");
        streams.push(replicas.submit(prompt(0)).expect("room"));
        assert_eq!(order.recv().await, Some(1), "who is about to end is asked last");
    }

    #[tokio::test]
    async fn a_request_that_can_never_run_is_refused_once() {
        let (heard, _order) = mpsc::unbounded_channel();
        let replicas = Replicas::new(vec![replica(0, 0, &heard), replica(1, 0, &heard)]).expect("two");
        assert!(matches!(replicas.submit(request(100)), Err(EngineError::UnknownToken { .. })));
        assert!(Replicas::new(Vec::new()).is_none());
    }
}
