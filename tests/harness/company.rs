//! Streams that run while something happens to their cluster, and the text that each must have in the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};

use crate::{Http, StreamEnd};

/// A small generator, so that a failing run can be repeated.
pub struct Random(pub u64);

impl Random {
    /// The next number below a bound.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Requests, greedy and sampled in turn, some with penalties, with the answers that they get alone.
#[derive(Clone)]
pub struct Work {
    /// What is sent, as streams.
    pub bodies: Vec<Value>,
    /// Token ids of each.
    pub expected: Vec<Value>,
}

impl Work {
    /// Makes requests to model `m` and asks each alone.
    pub fn ask_alone(http: &Http, num_requests: usize, prompt_max: u64, max_tokens: u32) -> Self {
        let mut random = Random(11);
        let body = |index: usize| {
            let length = 1 + prompt_max / 2 + random.below(prompt_max / 2);
            let prompt: Vec<u64> = (0..length).map(|_| random.below(500)).collect();
            let temperature = if index.is_multiple_of(2) { 0.0 } else { 0.9 };
            let mut body = json!({"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": temperature,
                "seed": index, "ignore_eos": true, "return_token_ids": true});
            if index % 4 > 1 {
                // What ranks keep of such a sequence must be there again after a failure.
                body["frequency_penalty"] = 0.5.into();
                body["repetition_penalty"] = 1.2.into();
            }
            body
        };
        let bodies: Vec<Value> = (0..num_requests).map(body).collect();
        let alone = |body| http.ask("/v1/completions", body)["choices"][0]["token_ids"].clone();
        let expected = bodies.iter().map(alone).collect();
        Self { bodies, expected }
    }

    /// Starts all of them together.
    pub fn start(&self, http: &Http) -> Company {
        let num_tokens = Arc::new(AtomicUsize::new(0));
        let read = |body: &Value| {
            let (http, body, num_tokens) = (http.clone(), body.clone(), Arc::clone(&num_tokens));
            std::thread::spawn(move || {
                // A head that ends before the first token has not even answered.
                let Some(mut stream) = http.try_stream("/v1/completions", &body) else {
                    return (StreamEnd::Cut, Vec::new(), Duration::ZERO);
                };
                let end = loop {
                    let before = stream.token_ids.len();
                    match stream.step() {
                        Ok(_) => drop(num_tokens.fetch_add(stream.token_ids.len() - before, Ordering::Relaxed)),
                        Err(end) => break end,
                    }
                };
                (end, stream.token_ids, stream.longest_gap)
            })
        };
        Company { streams: self.bodies.iter().map(read).collect(), expected: self.expected.clone(), num_tokens }
    }
}

/// Running streams.
pub struct Company {
    streams: Vec<JoinHandle<(StreamEnd, Vec<u32>, Duration)>>,
    expected: Vec<Value>,
    num_tokens: Arc<AtomicUsize>,
}

impl Company {
    /// How many streams there are.
    pub fn num_streams(&self) -> usize {
        self.streams.len()
    }

    /// Tokens that have come so far, of all streams together.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens.load(Ordering::Relaxed)
    }

    /// Whether a stream has not ended.
    pub fn is_running(&self) -> bool {
        self.streams.iter().any(|stream| !stream.is_finished())
    }

    /// Every stream ends as it should, with the right text. Gives the longest pause of any.
    ///
    /// # Panics
    /// If one does not.
    pub fn check(self) -> Duration {
        let ends = self.streams.into_iter().map(|stream| stream.join().expect("a stream"));
        let mut longest = Duration::ZERO;
        for ((end, token_ids, gap), expected) in ends.zip(self.expected) {
            assert_eq!(end, StreamEnd::Done);
            assert_eq!(json!(token_ids), expected, "the text is that of a run without the failure");
            longest = longest.max(gap);
        }
        longest
    }

    /// Waits for the ends, whatever they are.
    ///
    /// # Panics
    /// If a stream has text that is not the beginning of the right one.
    pub fn ends(self) -> Vec<StreamEnd> {
        let ends = self.streams.into_iter().map(|stream| stream.join().expect("a stream"));
        let check = |((end, token_ids, _), expected): ((StreamEnd, Vec<u32>, Duration), Value)| {
            let expected = expected.as_array().expect("token ids").clone();
            assert_eq!(json!(token_ids), json!(expected[..token_ids.len()]), "what came is right");
            end
        };
        ends.zip(self.expected).map(check).collect()
    }
}
