//! Prompts that may be cut: `truncate_prompt_tokens` and `truncation_side`.
//!
//! **Invariant:** what is cut fits the limit that it was cut to; nothing is cut that was not allowed to be.

use phalanx_proto::TokenId;

use super::error::ApiError;
use super::fields::{Fields, text_of};

/// How long prompts may be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Truncation {
    /// Most tokens that are kept; `None`: what the model's context holds.
    tokens_max: Option<u32>,
    /// Whether the first tokens stay, or the last ones.
    keeps_first: bool,
}

impl Truncation {
    /// Takes its fields; `None` where nothing may be cut.
    ///
    /// # Errors
    /// A field is outside its range.
    pub fn take(fields: &mut Fields) -> Result<Option<Self>, ApiError> {
        let side = text_of(fields, "truncation_side", &[("left", false), ("right", true)])?;
        let tokens = fields.integer("truncate_prompt_tokens", -1, u32::MAX.into())?;
        let Some(tokens) = tokens else { return Ok(None) };
        if tokens == 0 {
            let expected = "-1 or an integer of at least 1".into();
            return Err(ApiError::OutOfRange { param: "truncate_prompt_tokens".into(), value: "0".into(), expected });
        }
        Ok(Some(Self { tokens_max: u32::try_from(tokens).ok(), keeps_first: side.unwrap_or(false) }))
    }

    /// Cuts a prompt for a model that takes `room` tokens.
    ///
    /// # Errors
    /// The request asks for more than that.
    pub fn cut(self, prompt: &mut Vec<TokenId>, room: u32) -> Result<(), ApiError> {
        let kept = self.tokens_max.unwrap_or(room);
        if kept > room {
            let expected = format!("at most {room}, which the model's context leaves for it");
            let param = "truncate_prompt_tokens".into();
            return Err(ApiError::OutOfRange { param, value: kept.to_string(), expected });
        }
        let num_cut = prompt.len().saturating_sub(kept as usize);
        if self.keeps_first {
            prompt.truncate(kept as usize);
        } else {
            prompt.drain(..num_cut);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn check(body: &str, expected: &str) {
        let Value::Object(members) = serde_json::from_str(body).unwrap() else { panic!("not an object") };
        let cut = |truncation: Option<Truncation>| {
            let mut prompt: Vec<TokenId> = (1..=5).map(TokenId).collect();
            truncation.map_or(Ok(()), |truncation| truncation.cut(&mut prompt, 4))?;
            Ok(format!("{:?}", prompt.iter().map(|token| token.0).collect::<Vec<_>>()))
        };
        let told = Truncation::take(&mut Fields::new(members)).and_then(cut);
        assert_eq!(told.unwrap_or_else(|error: ApiError| error.to_string()), expected, "{body}");
    }

    #[test]
    fn prompts_are_cut_as_far_as_allowed() {
        check("{}", "[1, 2, 3, 4, 5]");
        check(r#"{"truncation_side":"right"}"#, "[1, 2, 3, 4, 5]");
        check(r#"{"truncate_prompt_tokens":-1}"#, "[2, 3, 4, 5]");
        check(r#"{"truncate_prompt_tokens":2}"#, "[4, 5]");
        check(r#"{"truncate_prompt_tokens":2,"truncation_side":"right"}"#, "[1, 2]");
        check(
            r#"{"truncate_prompt_tokens":0}"#,
            "truncate_prompt_tokens must be -1 or an integer of at least 1; it is 0",
        );
        check(r#"{"truncate_prompt_tokens":-2}"#, "truncate_prompt_tokens must be an integer of at least -1; it is -2");
        let expected = "truncate_prompt_tokens must be at most 4, which the model's context leaves for it; it is 5";
        check(r#"{"truncate_prompt_tokens":5}"#, expected);
        check(r#"{"truncation_side":"up"}"#, r#"truncation_side must be "left" or "right"; it is "up""#);
    }
}
