//! How tokens are handed over: `stream_interval`, `detokenize` and `cache_salt`.
//!
//! Owns their ranges and what they contradict. Knows no answer and no engine.

use std::num::NonZeroU32;

use super::error::ApiError;
use super::fields::Fields;

/// Longest salt.
const SALT_CHARS_MAX: usize = 128;
/// What a salt cannot hold.
const SALT_FORBIDDEN: [char; 4] = ['@', '/', '\\', '\0'];

/// The fields of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// Tokens of a streamed chunk, but for the first and the last.
    pub stream_interval: Option<NonZeroU32>,
    /// Outputs are told as text; else as token ids alone.
    pub detokenize: bool,
    /// The prefix cache is shared only with requests of the same salt.
    pub cache_salt: Option<String>,
}

impl Delivery {
    /// Takes the fields.
    ///
    /// # Errors
    /// A wrong type, or a value out of range.
    pub fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let interval = fields.integer("stream_interval", 1, u32::MAX.into())?;
        Ok(Self {
            stream_interval: interval.and_then(|tokens| NonZeroU32::new(tokens as u32)),
            detokenize: fields.flag("detokenize", true)?,
            cache_salt: take_salt(fields)?,
        })
    }
}

fn take_salt(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let Some(salt) = fields.text("cache_salt")? else { return Ok(None) };
    let num_chars = salt.chars().count();
    let refused =
        |value: String, expected: String| Err(ApiError::OutOfRange { param: "cache_salt".into(), value, expected });
    if num_chars == 0 || num_chars > SALT_CHARS_MAX {
        return refused(format!("{num_chars} characters long"), format!("1 to {SALT_CHARS_MAX} characters long"));
    }
    match salt.chars().find(|c| SALT_FORBIDDEN.contains(c)) {
        Some(found) => refused(format!("one with {found:?}"), "a text without @, /, \\ and NUL".into()),
        None => Ok(Some(salt)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[track_caller]
    fn check(body: &Value, expected: Result<(Option<u32>, bool, Option<&str>), &str>) {
        let told = Delivery::take(&mut Fields::new(body.as_object().unwrap().clone()));
        let told = told.map_err(|error| error.to_string());
        let told = told
            .as_ref()
            .map(|told| (told.stream_interval.map(NonZeroU32::get), told.detokenize, told.cache_salt.as_deref()));
        assert_eq!(told.map_err(String::as_str), expected, "{body}");
    }

    #[test]
    fn fields_are_read_or_refused_by_name() {
        check(&json!({}), Ok((None, true, None)));
        let all = json!({"stream_interval": 4, "detokenize": false, "cache_salt": "team 7"});
        check(&all, Ok((Some(4), false, Some("team 7"))));
        check(&json!({"stream_interval": 0}), Err("stream_interval must be an integer of at least 1; it is 0"));
        check(&json!({"detokenize": 1}), Err("detokenize must be a boolean; it is a number"));
        let long = "cache_salt must be 1 to 128 characters long; it is 129 characters long";
        check(&json!({"cache_salt": "x".repeat(129)}), Err(long));
        check(&json!({"cache_salt": ""}), Err("cache_salt must be 1 to 128 characters long; it is 0 characters long"));
        for (salt, shown) in [("a@b", "'@'"), ("a/b", "'/'"), ("a\\b", "'\\\\'"), ("a\0", "'\\0'")] {
            let expected = format!("cache_salt must be a text without @, /, \\ and NUL; it is one with {shown}");
            check(&json!({"cache_salt": salt}), Err(&expected));
        }
    }
}
