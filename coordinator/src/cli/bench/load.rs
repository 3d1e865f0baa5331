//! The requests of a benchmark: how long, what in them, when.
//!
//! **Invariant:** the same seed gives the same requests.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use crate::cli::CliError;

/// Lengths of one request, tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Of the prompt.
    pub input: u32,
    /// Of the answer.
    pub output: u32,
}

/// A file of lengths: two columns, or a list of pairs.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum LengthsFile {
    Columns {
        #[serde(alias = "input")]
        prompt: Vec<u32>,
        output: Vec<u32>,
    },
    Pairs(Vec<[u32; 2]>),
}

/// Reads `{"prompt": [...], "output": [...]}` or `[[input, output], ...]`.
///
/// # Errors
/// The file cannot be read, or is neither.
pub fn read_lengths(path: &Path) -> Result<Vec<Lengths>, CliError> {
    let bad = |reason: String| CliError::usage(format!("{}: {reason}", path.display()));
    let text = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
    let expected = |_| bad(r#"expected {"prompt": [...], "output": [...]} or [[input, output], ...]"#.into());
    parse_lengths(&text).map_err(expected)?.ok_or_else(|| bad("lengths must be 1 or more, and as many of both".into()))
}

fn parse_lengths(text: &[u8]) -> Result<Option<Vec<Lengths>>, serde_json::Error> {
    let pairs: Vec<Lengths> = match serde_json::from_slice(text)? {
        LengthsFile::Columns { prompt, output } if prompt.len() != output.len() => return Ok(None),
        LengthsFile::Columns { prompt, output } => {
            prompt.into_iter().zip(output).map(|(input, output)| Lengths { input, output }).collect()
        }
        LengthsFile::Pairs(pairs) => pairs.into_iter().map(|[input, output]| Lengths { input, output }).collect(),
    };
    let fine = !pairs.is_empty() && pairs.iter().all(|lengths| lengths.input > 0 && lengths.output > 0);
    Ok(fine.then_some(pairs))
}

/// Random numbers for prompts and arrivals. Source: Steele, Lea and Flood, SplitMix64, 2014.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Numbers of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// A prompt of random token ids.
    pub fn prompt(&mut self, num_tokens: u32, vocab_size: u32) -> Vec<u32> {
        (0..num_tokens).map(|_| (self.next() % u64::from(vocab_size.max(1))) as u32).collect()
    }

    /// When each of `count` requests is sent, from the start on: at once, or as a Poisson process of `rate` per second.
    pub fn arrivals(&mut self, count: usize, rate: Option<f64>) -> Vec<Duration> {
        let mut at = 0.0;
        let mut arrive = |rate: f64| {
            let this = at;
            at += -self.unit().ln() / rate;
            Duration::from_secs_f64(this)
        };
        (0..count).map(|_| rate.map_or(Duration::ZERO, &mut arrive)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Option<&[(u32, u32)]>) {
        let told = parse_lengths(text.as_bytes()).ok().flatten();
        let told: Option<Vec<_>> = told.map(|list| list.iter().map(|l| (l.input, l.output)).collect());
        assert_eq!(told.as_deref(), expected, "{text}");
    }

    #[test]
    fn lengths_come_in_columns_or_pairs() {
        check(r#"{"prompt":[1,2],"output":[3,4],"made_by":"x"}"#, Some(&[(1, 3), (2, 4)]));
        check(r#"{"input":[1],"output":[3]}"#, Some(&[(1, 3)]));
        check("[[1,3],[2,4]]", Some(&[(1, 3), (2, 4)]));
        check("[[1,0]]", None);
        check(r#"{"prompt":[1],"output":[]}"#, None);
        check("[]", None);
        check("7", None);
    }

    #[test]
    fn the_same_seed_gives_the_same_requests() {
        assert_eq!(Random::new(3).prompt(50, 100), Random::new(3).prompt(50, 100));
        assert_ne!(Random::new(3).prompt(50, 100), Random::new(4).prompt(50, 100));
        assert!(Random::new(3).prompt(1000, 7).iter().all(|token| *token < 7));
    }

    #[test]
    fn arrivals_come_at_their_rate() {
        let arrivals = Random::new(1).arrivals(10_001, Some(100.0));
        let last = arrivals.last().unwrap().as_secs_f64();
        assert!((95.0..105.0).contains(&last), "{last}");
        assert!(Random::new(1).arrivals(3, None).iter().all(Duration::is_zero));
    }
}
