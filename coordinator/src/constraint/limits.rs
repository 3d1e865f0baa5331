//! What a client's grammar may cost, and the checks that come before any of it is compiled.

use std::time::Duration;

use serde_json::Value;

use super::Grammar;

/// Longest grammar, schema or regular expression.
pub(super) const GRAMMAR_BYTES_MAX: usize = 256 * 1024;
/// Longest grammar in Lark's notation: its parser recurses over rules.
pub(super) const LARK_BYTES_MAX: usize = 64 * 1024;
/// Longest regular expression.
pub(super) const REGEX_BYTES_MAX: usize = 8 * 1024;
/// Deepest nesting of objects and lists of a schema, or of brackets of a grammar.
pub(super) const NESTING_MAX: usize = 64;
/// Most strings to choose from.
pub(super) const NUM_CHOICES_MAX: usize = 4096;
/// Longest time from asking for a grammar to its first mask.
pub(super) const COMPILE_DEADLINE: Duration = Duration::from_secs(10);
/// Grammars that are compiled at once.
pub(super) const COMPILES_MAX: usize = 2;
/// Stack of a thread that compiles: parsers of nested text recurse.
pub(super) const COMPILE_STACK_BYTES: usize = 64 << 20;
/// Compiled grammars that are kept for the next request with the same one.
pub(super) const CACHED_MAX: usize = 32;
/// Longest reason that is told.
const REASON_BYTES_MAX: usize = 400;

/// Why a grammar cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// It is longer than what is looked at.
    #[error("the {what} is longer than {limit} {unit}")]
    TooLarge {
        /// Schema, grammar, ...
        what: &'static str,
        /// The limit.
        limit: usize,
        /// Bytes, strings, ...
        unit: &'static str,
    },
    /// It is nested too deeply.
    #[error("the {what} is nested more than {NESTING_MAX} levels deep")]
    TooDeep {
        /// Schema, grammar, ...
        what: &'static str,
    },
    /// It does not compile, or allows nothing.
    #[error("the {what} cannot be used: {reason}")]
    Invalid {
        /// Schema, grammar, ...
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// It takes too long.
    #[error("the {what} could not be compiled within {} s", COMPILE_DEADLINE.as_secs())]
    TooSlow {
        /// Schema, grammar, ...
        what: &'static str,
    },
    /// Other grammars are being compiled.
    #[error("too many grammars are being compiled; try again")]
    Busy,
}

impl GrammarError {
    pub(super) fn invalid(what: &'static str, reason: impl std::fmt::Display) -> Self {
        let mut reason = reason.to_string();
        let end = reason.floor_char_boundary(REASON_BYTES_MAX);
        reason.truncate(reason.find("\n<").unwrap_or(end).min(end));
        Self::Invalid { what, reason: reason.trim().to_owned() }
    }
}

impl Grammar {
    /// Checks size and nesting.
    ///
    /// # Errors
    /// One of them is above its limit, or there is nothing to hold an output to.
    pub fn check(&self) -> Result<(), GrammarError> {
        let what = self.what();
        let too_large = |limit, unit| GrammarError::TooLarge { what, limit, unit };
        match self {
            Self::JsonObject => Ok(()),
            Self::JsonSchema(schema) => {
                if !fits(schema, NESTING_MAX) {
                    return Err(GrammarError::TooDeep { what });
                }
                let fits = schema.to_string().len() <= GRAMMAR_BYTES_MAX;
                if fits { Ok(()) } else { Err(too_large(GRAMMAR_BYTES_MAX, "bytes")) }
            }
            Self::Regex(text) => check_text(text, what, REGEX_BYTES_MAX),
            Self::Lark(text) => check_text(text, what, LARK_BYTES_MAX),
            Self::Choice(choices) => {
                if choices.len() > NUM_CHOICES_MAX {
                    return Err(too_large(NUM_CHOICES_MAX, "strings"));
                }
                if choices.iter().map(String::len).sum::<usize>() > LARK_BYTES_MAX {
                    return Err(too_large(LARK_BYTES_MAX, "bytes"));
                }
                let usable = !choices.is_empty() && choices.iter().all(|choice| !choice.is_empty());
                if usable { Ok(()) } else { Err(GrammarError::invalid(what, "a choice is empty")) }
            }
        }
    }
}

fn check_text(text: &str, what: &'static str, limit: usize) -> Result<(), GrammarError> {
    if text.len() > limit {
        return Err(GrammarError::TooLarge { what, limit, unit: "bytes" });
    }
    if text.trim().is_empty() || text.contains('\0') {
        return Err(GrammarError::invalid(what, "it is empty, or holds a NUL"));
    }
    if bracket_depth(text) > NESTING_MAX {
        return Err(GrammarError::TooDeep { what });
    }
    Ok(())
}

/// True where no object or list stands deeper than `levels`. Never goes deeper itself.
pub(super) fn fits(value: &Value, levels: usize) -> bool {
    match value {
        Value::Array(items) => levels > 0 && items.iter().all(|item| fits(item, levels - 1)),
        Value::Object(members) => levels > 0 && members.values().all(|member| fits(member, levels - 1)),
        _ => true,
    }
}

/// Most brackets that are open at once, wherever they stand: a little too many is better than a stack that ends.
fn bracket_depth(text: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let mut escaped = false;
    for c in text.chars() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '(' | '[' | '{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn nested(levels: usize) -> Value {
        (1..levels).fold(json!({}), |inner, _| json!({"items": inner}))
    }

    #[test]
    fn limits_are_checked_before_anything_is_compiled() {
        assert_eq!(Grammar::JsonSchema(nested(64)).check(), Ok(()));
        assert!(matches!(Grammar::JsonSchema(nested(65)).check(), Err(GrammarError::TooDeep { .. })));
        assert_eq!(Grammar::Regex("(".repeat(64)).check(), Ok(()));
        assert!(matches!(Grammar::Regex("(".repeat(65)).check(), Err(GrammarError::TooDeep { .. })));
        assert_eq!(Grammar::Regex(r"\(".repeat(65)).check(), Ok(()));
        assert!(matches!(Grammar::Regex("a".repeat(9000)).check(), Err(GrammarError::TooLarge { .. })));
        assert!(matches!(Grammar::Lark(" ".into()).check(), Err(GrammarError::Invalid { .. })));
        assert!(matches!(Grammar::Choice(vec![]).check(), Err(GrammarError::Invalid { .. })));
        assert!(matches!(Grammar::Choice(vec!["a".into(); 5000]).check(), Err(GrammarError::TooLarge { .. })));
        let long = json!({"enum": ["x".repeat(300_000)]});
        assert!(matches!(Grammar::JsonSchema(long).check(), Err(GrammarError::TooLarge { .. })));
    }
}
