//! The `prompt` of a completion and the `input` of embeddings: text or token ids, one or many.

use phalanx_proto::TokenId;
use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, type_name};
use super::options::token_id;
use super::submission::{Accepted, with_text};

/// Most prompts in one request.
pub const NUM_PROMPTS_MAX: usize = 1024;

/// Prompts as they were sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompts {
    /// Text that the model's tokenizer reads.
    Texts(Vec<String>),
    /// Token ids.
    Ids(Vec<Vec<TokenId>>),
}

impl Default for Prompts {
    fn default() -> Self {
        Self::Ids(Vec::new())
    }
}

const EXPECTED: &str = "a string, a list of strings, a list of token ids or a list of such lists";

impl Prompts {
    /// Takes them from the field `name`.
    ///
    /// # Errors
    /// It is missing, empty, too many, or a mixture.
    pub fn take(fields: &mut Fields, name: &'static str) -> Result<Self, ApiError> {
        match fields.take(name) {
            None => Err(ApiError::Missing { param: name.into() }),
            Some(Value::String(text)) => Ok(Self::Texts(vec![text])),
            Some(Value::Array(items)) => Self::from_list(items, name),
            Some(other) => {
                Err(ApiError::WrongType { param: name.into(), expected: EXPECTED, found: type_name(&other) })
            }
        }
    }

    fn from_list(items: Vec<Value>, name: &'static str) -> Result<Self, ApiError> {
        let one_prompt_of_ids = matches!(items.first(), Some(Value::Number(_)));
        if items.is_empty() || (items.len() > NUM_PROMPTS_MAX && !one_prompt_of_ids) {
            let expected = format!("a list of 1 to {NUM_PROMPTS_MAX} {name}s");
            return Err(ApiError::OutOfRange { param: name.into(), value: items.len().to_string(), expected });
        }
        let param = |at: usize| format!("{name}[{at}]");
        match items.first() {
            Some(Value::Number(_)) => Ok(Self::Ids(vec![ids(&items, param)?])),
            Some(Value::Array(_)) => {
                let lists = items.iter().enumerate().map(|(at, item)| match item {
                    Value::Array(list) => ids(list, |inner| format!("{name}[{at}][{inner}]")),
                    other => Err(wrong(param(at), "a list of token ids", other)),
                });
                Ok(Self::Ids(lists.collect::<Result<_, _>>()?))
            }
            _ => {
                let texts = items.into_iter().enumerate().map(|(at, item)| match item {
                    Value::String(text) => Ok(text),
                    other => Err(wrong(param(at), "a string", &other)),
                });
                Ok(Self::Texts(texts.collect::<Result<_, _>>()?))
            }
        }
    }

    /// Makes token ids of text; ids stay as they are.
    ///
    /// # Errors
    /// Text for a model without a tokenizer, or text that the tokenizer refuses.
    pub async fn tokenize(
        self,
        accepted: &Accepted,
        name: &'static str,
        add_special: bool,
        num_bytes: usize,
    ) -> Result<Vec<Vec<TokenId>>, ApiError> {
        match self {
            Self::Ids(ids) => Ok(ids),
            Self::Texts(texts) => {
                let text = accepted.text(name)?;
                with_text(text, num_bytes, name, move |text| {
                    texts.iter().map(|prompt| text.encode(prompt, add_special)).collect()
                })
                .await
            }
        }
    }
}

fn wrong(param: String, expected: &'static str, value: &Value) -> ApiError {
    ApiError::WrongType { param, expected, found: type_name(value) }
}

fn ids(items: &[Value], param: impl Fn(usize) -> String) -> Result<Vec<TokenId>, ApiError> {
    items.iter().enumerate().map(|(at, item)| token_id(item, || param(at))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(prompt: &str, expected: &str) {
        let Value::Object(members) = serde_json::from_str(&format!(r#"{{"prompt":{prompt}}}"#)).unwrap() else {
            panic!("not an object")
        };
        let told = match Prompts::take(&mut Fields::new(members), "prompt") {
            Ok(Prompts::Texts(texts)) => format!("{texts:?}"),
            Ok(Prompts::Ids(lists)) => {
                let lists: Vec<Vec<u32>> = lists.iter().map(|list| list.iter().map(|id| id.0).collect()).collect();
                format!("{lists:?}")
            }
            Err(error) => error.to_string(),
        };
        assert_eq!(told, expected, "{prompt}");
    }

    #[test]
    fn prompts_come_in_four_forms() {
        check(r#""hi""#, r#"["hi"]"#);
        check(r#"["a","b"]"#, r#"["a", "b"]"#);
        check("[1,2]", "[[1, 2]]");
        check("[[1],[2,3]]", "[[1], [2, 3]]");
        check("null", "prompt is required");
        check("[]", "prompt must be a list of 1 to 1024 prompts; it is 0");
        check(
            "7",
            "prompt must be a string, a list of strings, a list of token ids or a list of such lists; it is a number",
        );
        check(r#"["a",1]"#, "prompt[1] must be a string; it is a number");
        check(r#"[1,"a"]"#, "prompt[1] must be a token id; it is a string");
        check("[1,-2]", "prompt[1] must be a token id; it is -2");
        check("[1.5]", "prompt[0] must be a token id; it is 1.5");
        check("[[1],2]", "prompt[1] must be a list of token ids; it is a number");
        check("[[1,4294967296]]", "prompt[0][1] must be a token id; it is 4294967296");
    }
}
