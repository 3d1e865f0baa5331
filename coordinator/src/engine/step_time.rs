//! How long steps take: sizes prefill chunks, and says when a step is late.
//!
//! Knows numbers of tokens and microseconds; no sequences, and no clock of its own.
//!
//! **Invariant:** no measurement, however strange, makes a chunk empty or a deadline shorter than its minimum.

use std::time::Duration;

/// Weight of a new measurement in a moving mean.
const MEAN_WEIGHT: f64 = 0.2;
/// A measurement counts at most this many times the mean: the first step of a size is slow on every device.
const OUTLIER_FACTOR: f64 = 4.0;
/// Tokens of a first chunk, before anything is known.
const FIRST_CHUNK_TOKENS: u32 = 256;
/// No chunk is smaller: below, reading the weights costs more than the tokens.
const CHUNK_TOKENS_MIN: u32 = 16;
/// Where nothing decodes nobody waits for the next token, and a step may take this many budgets; so where few decode.
const BUDGETS_MAX: u32 = 8;
/// A step of a class is late after this many times the slowest recent one.
const DEADLINE_FACTOR: u32 = 20;
/// A group stands still after this many times its slowest recent step.
const STALL_FACTOR: u32 = 10;
/// A class that has not been seen yet gets this many times the shortest deadline.
const FIRST_DEADLINE_FACTOR: u32 = 6;
/// The moving maximum forgets this share with each step.
const MAXIMUM_DECAY: f64 = 0.99;
/// How much more the waiting weigh than those that decode: where one in so many waits, a step takes two budgets.
const WAITING_WEIGHT: u32 = 16;
/// Classes of steps: powers of two of their number of tokens.
const NUM_CLASSES: usize = 33;

/// Moving estimates of what a step costs: a part for the decode rows, by class, and a part for each prefill token.
#[derive(Debug, Clone)]
pub struct StepTime {
    decode_us: [Option<f64>; NUM_CLASSES],
    prefill_token_us: Option<f64>,
}

impl Default for StepTime {
    fn default() -> Self {
        Self { decode_us: [None; NUM_CLASSES], prefill_token_us: None }
    }
}

/// The power of two below which `count` is.
fn class(count: u32) -> usize {
    (u32::BITS - count.leading_zeros()) as usize
}

fn blend(mean: &mut Option<f64>, value: f64) {
    *mean = Some(match *mean {
        None => value,
        Some(mean) => mean + MEAN_WEIGHT * (value.min(mean * OUTLIER_FACTOR) - mean),
    });
}

impl StepTime {
    /// A step of `num_decode` decode rows and `num_prefill` prefill tokens took `elapsed_us`.
    pub fn observe(&mut self, num_decode: u32, num_prefill: u32, elapsed_us: u64) {
        let elapsed = (elapsed_us as f64).max(1.0);
        if num_prefill == 0 {
            if num_decode > 0 {
                blend(&mut self.decode_us[class(num_decode)], elapsed);
            }
            return;
        }
        // Where prompts are the smaller part, or short, an error in what the step takes without them would be charged to few
        // tokens, and the chunks that follow would be smaller still.
        if num_prefill >= num_decode.max(CHUNK_TOKENS_MIN) {
            let fixed = self.decode_us(num_decode).min(elapsed * 0.9);
            blend(&mut self.prefill_token_us, (elapsed - fixed) / f64::from(num_prefill));
        }
    }

    /// What `num_decode` rows take without prompts, in us: as measured in their class, or else in the nearest one.
    fn decode_us(&self, num_decode: u32) -> f64 {
        let own = class(num_decode).max(1);
        let below = self.decode_us[..=own].iter().rev().find_map(|mean| *mean);
        below.or_else(|| self.decode_us[own..].iter().find_map(|mean| *mean)).unwrap_or(0.0)
    }

    /// Prefill tokens that fit in a step beside `num_decode` decode rows so that it takes about `budget`.
    ///
    /// Where decode rows alone take most of the budget, a chunk may double the step: prefill must go on. Where `num_behind`
    /// sequences wait for their first token, the step grows with their share of those that decode, fully where one waits for
    /// two that decode: a batch that is complete early ends early, and large chunks are cheaper by the token.
    pub fn num_prefill_tokens(&self, num_decode: u32, num_behind: u32, budget: Duration) -> u32 {
        let Some(token_us) = self.prefill_token_us else { return FIRST_CHUNK_TOKENS };
        let crowd = num_behind.saturating_mul(WAITING_WEIGHT).checked_div(num_decode);
        let budget = budget * crowd.map_or(BUDGETS_MAX, |more| more.saturating_add(1).min(BUDGETS_MAX));
        let fixed = self.decode_us(num_decode);
        let left = (budget.as_micros() as f64 - fixed).max(fixed);
        ((left / token_us) as u32).max(CHUNK_TOKENS_MIN)
    }
}

/// Deadlines of steps, by class.
#[derive(Debug, Clone)]
pub struct StepDeadlines {
    min: Duration,
    slowest_us: [f64; NUM_CLASSES],
}

impl StepDeadlines {
    /// `min` is the shortest deadline.
    pub fn new(min: Duration) -> Self {
        Self { min, slowest_us: [0.0; NUM_CLASSES] }
    }

    /// How long a step of `num_tokens` may take.
    pub fn deadline(&self, num_tokens: u32) -> Duration {
        let slowest = self.slowest_us[class(num_tokens)];
        if slowest == 0.0 {
            return self.min * FIRST_DEADLINE_FACTOR;
        }
        self.min.max(Duration::from_micros(slowest as u64) * DEADLINE_FACTOR)
    }

    /// How long no step may end, with work there, until the group is called stalled: sooner than any step is given up.
    pub fn stall(&self) -> Duration {
        let slowest = self.slowest_us.iter().copied().fold(0.0, f64::max);
        if slowest == 0.0 {
            return self.min * FIRST_DEADLINE_FACTOR;
        }
        self.min.max(Duration::from_micros(slowest as u64) * STALL_FACTOR)
    }

    /// A step of `num_tokens` took `elapsed`.
    pub fn observe(&mut self, num_tokens: u32, elapsed: Duration) {
        let slowest = &mut self.slowest_us[class(num_tokens)];
        *slowest = (*slowest * MAXIMUM_DECAY).max(elapsed.as_micros() as f64).max(1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Duration = Duration::from_millis(10);

    #[test]
    fn a_prompt_of_one_token_says_nothing_about_long_ones() {
        let mut time = StepTime::default();
        time.observe(0, 1, 5_000);
        assert_eq!(time.num_prefill_tokens(0, 1, BUDGET), FIRST_CHUNK_TOKENS);
        time.observe(0, 100, 6_000);
        assert!(time.num_prefill_tokens(0, 1, BUDGET) > 1_000, "60 us a token, not 5 ms");
    }

    #[test]
    fn chunks_follow_the_measured_cost() {
        let mut time = StepTime::default();
        assert_eq!(time.num_prefill_tokens(0, 1, BUDGET), FIRST_CHUNK_TOKENS);
        for _ in 0..50 {
            time.observe(4, 0, 2_000);
            time.observe(4, 100, 6_000);
        }
        let chunk = time.num_prefill_tokens(4, 0, BUDGET);
        assert!((190..=210).contains(&chunk), "8 ms at 40 us a token, not {chunk}");
        assert!(time.num_prefill_tokens(0, 1, BUDGET) > 1_500);
        let few = time.num_prefill_tokens(16, 2, BUDGET);
        assert!((670..=730).contains(&few), "28 ms at 40 us a token, not {few}");
        assert_eq!(time.num_prefill_tokens(4, 400, BUDGET), time.num_prefill_tokens(0, 0, BUDGET));
    }

    #[test]
    fn a_slow_decode_does_not_starve_prefill() {
        let mut time = StepTime::default();
        for _ in 0..50 {
            time.observe(8, 0, 30_000);
            time.observe(8, 64, 62_000);
        }
        let chunk = time.num_prefill_tokens(8, 0, BUDGET);
        assert!((55..=65).contains(&chunk), "30 ms at 500 us a token, not {chunk}");
    }

    #[test]
    fn a_batch_that_grew_does_not_shrink_its_chunks() {
        // Alone, two rows took 4 ms; 256 rows take 9.5 ms and are never seen without prompts.
        let mut time = StepTime::default();
        time.observe(2, 0, 4_000);
        time.observe(0, 2_000, 50_000);
        for _ in 0..200 {
            let chunk = time.num_prefill_tokens(250, 1, BUDGET);
            assert!(chunk >= 170, "4 ms at 23 us a token, not {chunk}");
            time.observe(250, chunk, 9_500 + u64::from(chunk) * 24);
        }
    }

    #[test]
    fn strange_measurements_are_harmless() {
        let mut time = StepTime::default();
        time.observe(0, CHUNK_TOKENS_MIN, u64::MAX);
        time.observe(0, 0, 0);
        assert_eq!(time.num_prefill_tokens(1, 0, BUDGET), CHUNK_TOKENS_MIN);
        time.observe(0, u32::MAX, 0);
        assert!(time.num_prefill_tokens(1, 0, BUDGET) >= CHUNK_TOKENS_MIN);
    }

    #[test]
    fn deadlines_follow_the_slowest_of_their_class() {
        let mut deadlines = StepDeadlines::new(Duration::from_secs(5));
        assert_eq!(deadlines.deadline(1), Duration::from_secs(30));
        assert_eq!(deadlines.stall(), Duration::from_secs(30));
        deadlines.observe(1, Duration::from_millis(10));
        assert_eq!(deadlines.stall(), Duration::from_secs(5));
        assert_eq!(deadlines.deadline(1), Duration::from_secs(5));
        deadlines.observe(500, Duration::from_secs(1));
        assert_eq!(deadlines.deadline(511), Duration::from_secs(20));
        assert_eq!(deadlines.stall(), Duration::from_secs(10));
        assert_eq!(deadlines.deadline(512), Duration::from_secs(30));
    }
}
