//! What a request holds its output to: `response_format`, `structured_outputs` and the older `guided_*`.
//!
//! **Invariant:** a request names at most one grammar; a bad one is refused with the field that holds it.

use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, type_name};
use super::submission::Accepted;
use crate::constraint::{Grammar, Thoughts};
use crate::engine::Constraint;

/// A grammar, and the field that named it.
#[derive(Debug, Clone, PartialEq)]
pub struct Structure {
    /// For messages.
    pub param: &'static str,
    /// What the output is held to.
    pub grammar: Grammar,
}

/// Takes all fields that name a grammar.
///
/// # Errors
/// More than one grammar, a wrong type, or a grammar whose size or nesting is above the limits.
pub fn take(fields: &mut Fields) -> Result<Option<Structure>, ApiError> {
    let mut found = Vec::new();
    found.extend(take_response_format(fields)?);
    found.extend(take_structured_outputs(fields)?);
    for (field, kind) in [
        ("guided_json", Kind::Json),
        ("guided_regex", Kind::Regex),
        ("guided_choice", Kind::Choice),
        ("guided_grammar", Kind::Lark),
    ] {
        if let Some(value) = fields.take(field) {
            found.extend(kind.read(field, value)?);
        }
    }
    // Names of engines that other servers choose among: there is one here.
    fields.text("guided_decoding_backend")?;
    if found.len() > 1 {
        let rule = "an output can be held to one grammar only";
        return Err(ApiError::Conflict { param: found[1].param, rule });
    }
    let found = found.pop();
    if let Some(structure) = &found {
        let refused = |source| ApiError::Grammar { param: structure.param.into(), source };
        structure.grammar.check().map_err(refused)?;
    }
    Ok(found)
}

/// How a value names a grammar.
#[derive(Clone, Copy)]
enum Kind {
    Json,
    JsonObject,
    Regex,
    Choice,
    Lark,
}

impl Kind {
    fn read(self, param: &'static str, value: Value) -> Result<Option<Structure>, ApiError> {
        let wrong =
            |expected, value: &Value| ApiError::WrongType { param: param.into(), expected, found: type_name(value) };
        let grammar = match (self, value) {
            (Self::Json, Value::String(text)) => {
                let schema = serde_json::from_str(&text).map_err(|_| wrong("a schema", &Value::String(text)))?;
                Grammar::JsonSchema(schema)
            }
            (Self::Json, schema @ (Value::Object(_) | Value::Bool(_))) => Grammar::JsonSchema(schema),
            (Self::Json, other) => return Err(wrong("a schema", &other)),
            (Self::JsonObject, Value::Bool(on)) if !on => return Ok(None),
            (Self::JsonObject, Value::Bool(_)) => Grammar::JsonObject,
            (Self::JsonObject, other) => return Err(wrong("a boolean", &other)),
            (Self::Regex, Value::String(text)) => Grammar::Regex(text),
            (Self::Lark, Value::String(text)) => Grammar::Lark(text),
            (Self::Regex | Self::Lark, other) => return Err(wrong("a string", &other)),
            (Self::Choice, Value::Array(items)) if items.is_empty() => return Ok(None),
            (Self::Choice, Value::Array(items)) => {
                let text = |item: Value| match item {
                    Value::String(text) => Ok(text),
                    other => Err(wrong("a list of strings", &other)),
                };
                Grammar::Choice(items.into_iter().map(text).collect::<Result<_, _>>()?)
            }
            (Self::Choice, other) => return Err(wrong("a list of strings", &other)),
        };
        Ok(Some(Structure { param, grammar }))
    }
}

fn take_response_format(fields: &mut Fields) -> Result<Option<Structure>, ApiError> {
    const PARAM: &str = "response_format";
    let Some(mut format) = fields.object(PARAM, "response_format.")? else { return Ok(None) };
    let kind = format.text("type")?.ok_or_else(|| ApiError::Missing { param: "response_format.type".into() })?;
    match kind.as_str() {
        "text" => Ok(None),
        "json_object" => Ok(Some(Structure { param: PARAM, grammar: Grammar::JsonObject })),
        "json_schema" => {
            let missing = || ApiError::Missing { param: "response_format.json_schema.schema".into() };
            let mut inner = format.object("json_schema", "response_format.json_schema.")?.ok_or_else(missing)?;
            let schema = inner.take("schema").ok_or_else(missing)?;
            Kind::Json.read("response_format.json_schema.schema", schema)
        }
        "structural_tag" => {
            Err(ApiError::Unsupported { param: "response_format.type".into(), feature: "a structural tag" })
        }
        _ => Err(ApiError::OutOfRange {
            param: "response_format.type".into(),
            value: kind,
            expected: "one of text, json_object and json_schema".into(),
        }),
    }
}

fn take_structured_outputs(fields: &mut Fields) -> Result<Option<Structure>, ApiError> {
    let Some(mut outputs) = fields.object("structured_outputs", "structured_outputs.")? else { return Ok(None) };
    let mut found = Vec::new();
    for (member, param, kind) in [
        ("json", "structured_outputs.json", Kind::Json),
        ("regex", "structured_outputs.regex", Kind::Regex),
        ("choice", "structured_outputs.choice", Kind::Choice),
        ("grammar", "structured_outputs.grammar", Kind::Lark),
        ("json_object", "structured_outputs.json_object", Kind::JsonObject),
    ] {
        if let Some(value) = outputs.take(member) {
            found.extend(kind.read(param, value)?);
        }
    }
    if let Some(other) = outputs.into_ignored().first() {
        let param = format!("structured_outputs.{other}");
        return Err(ApiError::Unsupported { param, feature: "this option of structured output" });
    }
    if found.len() > 1 {
        let rule = "structured_outputs takes one of json, regex, choice, grammar and json_object";
        return Err(ApiError::Conflict { param: "structured_outputs", rule });
    }
    Ok(found.pop())
}

/// Compiles the grammar of a request; `thoughts` come before it where the model thinks.
///
/// # Errors
/// The model has no tokenizer, or the grammar does not compile within its limits.
pub async fn compile(
    structure: Option<&Structure>,
    accepted: &Accepted,
    thoughts: Option<Thoughts>,
) -> Result<Option<Constraint>, ApiError> {
    let Some(Structure { param, grammar }) = structure else { return Ok(None) };
    if !accepted.model.engine.limits().features.masks {
        let feature = "an output that is held to a grammar on this device";
        return Err(ApiError::Unsupported { param: (*param).into(), feature });
    }
    let missing = || ApiError::NoTokenizer { param, model: accepted.model.name.clone() };
    let grammars = accepted.model.grammars.as_ref().ok_or_else(missing)?;
    let compiled = grammars.compile(grammar.clone(), thoughts).await;
    compiled.map(Some).map_err(|source| ApiError::Grammar { param: (*param).into(), source })
}
