//! Loops in an output: `repetition_detection` ends one whose last tokens say the same again and again.
//!
//! Knows tokens, no text. **Invariant:** what is looked at for each token is bounded by [`PATTERN_TOKENS_MAX`] patterns, each left at
//! its first token that differs.

use phalanx_proto::TokenId;

use super::error::ApiError;
use super::fields::Fields;

/// Longest pattern that may be looked for.
const PATTERN_TOKENS_MAX: i64 = 4096;
/// Fewest times that a pattern stands in a loop.
const COUNT_MIN: i64 = 2;

/// What counts as a loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RepetitionRule {
    pattern_min: usize,
    pattern_max: usize,
    count: usize,
}

impl RepetitionRule {
    /// Takes the field; none where nothing is looked for, as with a `max_pattern_size` of 0.
    ///
    /// # Errors
    /// A wrong type, a size or count out of range, or sizes that contradict each other.
    pub fn take(fields: &mut Fields) -> Result<Option<Self>, ApiError> {
        const PARAM: &str = "repetition_detection";
        let Some(mut given) = fields.object(PARAM, "repetition_detection.")? else { return Ok(None) };
        let mut size = |name| Ok::<_, ApiError>(given.integer(name, 0, PATTERN_TOKENS_MAX)?.unwrap_or(0) as usize);
        let (pattern_min, pattern_max) = (size("min_pattern_size")?, size("max_pattern_size")?);
        if pattern_min > pattern_max {
            let rule = "min_pattern_size must not be above max_pattern_size";
            return Err(ApiError::Conflict { param: "repetition_detection.min_pattern_size", rule });
        }
        if pattern_max == 0 {
            given.integer("min_count", 0, u32::MAX.into())?;
            return Ok(None);
        }
        let missing = || ApiError::Missing { param: "repetition_detection.min_count".into() };
        let count = given.integer("min_count", COUNT_MIN, u32::MAX.into())?.ok_or_else(missing)? as usize;
        Ok(Some(Self { pattern_min: pattern_min.max(1), pattern_max, count }))
    }

    /// True where the last tokens are one pattern, as often as it takes.
    fn is_loop(self, tokens: &[TokenId]) -> bool {
        (self.pattern_min..=self.pattern_max).take_while(|size| self.tail(*size) <= tokens.len()).any(|size| {
            let tail = &tokens[tokens.len() - self.tail(size)..];
            // Every token stands one pattern before itself; the newest is the likeliest to differ.
            (size..tail.len()).rev().all(|at| tail[at] == tail[at - size])
        })
    }

    /// Tokens of a loop of patterns of `size`.
    fn tail(self, size: usize) -> usize {
        size.saturating_mul(self.count)
    }
}

/// Looks for loops in one output.
#[derive(Debug, Clone)]
pub struct LoopDetector {
    rule: RepetitionRule,
    tokens: Vec<TokenId>,
}

impl LoopDetector {
    /// No tokens yet.
    pub fn new(rule: RepetitionRule) -> Self {
        Self { rule, tokens: Vec::new() }
    }

    /// Takes the next token in; true where it completes a loop.
    pub fn push(&mut self, token: TokenId) -> bool {
        self.tokens.push(token);
        self.rule.is_loop(&self.tokens)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn take(json: &str) -> Result<Option<RepetitionRule>, String> {
        let Value::Object(members) = serde_json::from_str(&format!(r#"{{"repetition_detection":{json}}}"#)).unwrap()
        else {
            panic!("not an object")
        };
        RepetitionRule::take(&mut Fields::new(members)).map_err(|error| error.to_string())
    }

    /// After how many tokens an output is a loop.
    #[track_caller]
    fn check(json: &str, tokens: &[u32], expected: Option<usize>) {
        let mut detector = LoopDetector::new(take(json).unwrap().expect("a rule"));
        let at = tokens.iter().position(|token| detector.push(TokenId(*token)));
        assert_eq!(at.map(|at| at + 1), expected, "{json} {tokens:?}");
    }

    #[test]
    fn loops_are_found_when_they_are_complete() {
        let any = r#"{"max_pattern_size":3,"min_count":3}"#;
        check(any, &[1, 2, 2, 2, 5], Some(4));
        check(any, &[9, 1, 2, 1, 2, 1, 2], Some(7));
        check(any, &[1, 2, 3, 1, 2, 3, 1, 2, 3], Some(9));
        check(any, &[1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4], None);
        check(any, &[1, 2, 1, 2, 1, 3], None);
        check(r#"{"min_pattern_size":2,"max_pattern_size":2,"min_count":2}"#, &[7, 7, 7, 7], Some(4));
    }

    #[test]
    fn rules_are_read_or_refused_by_name() {
        assert_eq!(take("{}"), Ok(None));
        assert_eq!(take(r#"{"max_pattern_size":0,"min_count":0}"#), Ok(None));
        let refused = |json: &str| take(json).unwrap_err();
        assert_eq!(refused(r#"{"max_pattern_size":2}"#), "repetition_detection.min_count is required");
        assert!(
            refused(r#"{"max_pattern_size":2,"min_count":1}"#).starts_with("repetition_detection.min_count must be")
        );
        assert!(refused(r#"{"max_pattern_size":-1}"#).starts_with("repetition_detection.max_pattern_size must be"));
        assert!(refused(r#"{"min_pattern_size":3,"max_pattern_size":2}"#).contains("min_pattern_size"));
        assert!(refused("7").starts_with("repetition_detection must be an object"));
    }
}
