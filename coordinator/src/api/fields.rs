//! The members of a request body, taken one by one.
//!
//! Knows JSON types and ranges, not what a field means.
//!
//! **Invariant:** a member that nobody took is named by [`Fields::into_ignored`]; none is dropped in silence.

use serde_json::{Map, Value};

use super::error::ApiError;

/// The members that have not been taken yet. `null` counts as absent.
#[derive(Debug)]
pub struct Fields {
    members: Map<String, Value>,
    prefix: &'static str,
}

/// A range of numbers with its words.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Least value.
    pub min: f64,
    /// True where `min` itself is outside.
    pub above_min: bool,
    /// Greatest value.
    pub max: f64,
    /// How the range is told.
    pub words: &'static str,
}

/// The JSON type of a value, for messages.
pub fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

impl Fields {
    /// Wraps the members of a body.
    pub fn new(members: Map<String, Value>) -> Self {
        Self { members, prefix: "" }
    }

    /// Takes a member; `null` is absent.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.members.shift_remove(name).filter(|value| !value.is_null())
    }

    /// The name of a field as messages tell it.
    fn param(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn wrong(&self, name: &str, expected: &'static str, value: &Value) -> ApiError {
        ApiError::WrongType { param: self.param(name), expected, found: type_name(value) }
    }

    /// A string.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(name, "a string", &other)),
        }
    }

    /// A boolean.
    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong(name, "a boolean", &other)),
        }
    }

    /// A boolean with a default.
    pub fn flag(&mut self, name: &str, default: bool) -> Result<bool, ApiError> {
        Ok(self.boolean(name)?.unwrap_or(default))
    }

    /// An integer within `min..=max`. `1.0` counts as 1.
    pub fn integer(&mut self, name: &str, min: i64, max: i64) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let Value::Number(number) = &value else { return Err(self.wrong(name, "an integer", &value)) };
        match whole(number) {
            Some(whole) if (min..=max).contains(&whole) => Ok(Some(whole)),
            Some(_) => Err(self.out_of_range(name, &value, between(min, max))),
            None if number.is_u64() => Err(self.out_of_range(name, &value, between(min, max))),
            None => Err(self.out_of_range(name, &value, "an integer".into())),
        }
    }

    /// A finite number within bounds.
    pub fn number(&mut self, name: &str, bounds: Bounds) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let Some(number) = value.as_f64() else { return Err(self.wrong(name, "a number", &value)) };
        let low = if bounds.above_min { number > bounds.min } else { number >= bounds.min };
        if low && number <= bounds.max {
            // There is one zero.
            return Ok(Some(number as f32 + 0.0));
        }
        Err(self.out_of_range(name, &value, bounds.words.into()))
    }

    /// An object, as fields of its own; `prefix` (with its dot) names it in messages.
    pub fn object(&mut self, name: &str, prefix: &'static str) -> Result<Option<Fields>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(members)) => Ok(Some(Fields { members, prefix })),
            Some(other) => Err(self.wrong(name, "an object", &other)),
        }
    }

    /// A list.
    pub fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(self.wrong(name, "a list", &other)),
        }
    }

    /// Refuses a field of a feature that does not exist, unless its value changes nothing.
    pub fn neutral(&mut self, field: &Neutral) -> Result<(), ApiError> {
        match self.take(field.name) {
            None => Ok(()),
            Some(value) if (field.changes_nothing)(&value) => Ok(()),
            Some(_) => Err(ApiError::Unsupported { param: self.param(field.name), feature: field.feature }),
        }
    }

    /// What nobody took, for another parser.
    pub fn into_members(self) -> Map<String, Value> {
        self.members
    }

    /// The names of what nobody took.
    pub fn into_ignored(self) -> Vec<String> {
        self.members.into_iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name).collect()
    }

    fn out_of_range(&self, name: &str, value: &Value, expected: String) -> ApiError {
        ApiError::OutOfRange { param: self.param(name), value: value.to_string(), expected }
    }
}

/// A string that is one of some words, as what the word stands for.
///
/// # Errors
/// It is no string, or another one.
pub fn text_of<T: Copy>(fields: &mut Fields, name: &str, words: &[(&str, T)]) -> Result<Option<T>, ApiError> {
    let Some(text) = fields.text(name)? else { return Ok(None) };
    if let Some((_, meaning)) = words.iter().find(|(word, _)| *word == text) {
        return Ok(Some(*meaning));
    }
    let expected = words.iter().map(|(word, _)| format!("\"{word}\"")).collect::<Vec<_>>().join(" or ");
    let shown: String = text.chars().take(40).collect();
    Err(ApiError::OutOfRange { param: fields.param(name), value: format!("{shown:?}"), expected })
}

/// A field of a feature that does not exist here: accepted only where it changes nothing.
pub struct Neutral {
    /// The field.
    pub name: &'static str,
    /// What it would do.
    pub feature: &'static str,
    /// Whether a value changes nothing.
    pub changes_nothing: fn(&Value) -> bool,
}

fn whole(number: &serde_json::Number) -> Option<i64> {
    number.as_i64().or_else(|| {
        let float = number.as_f64()?;
        (float.fract() == 0.0 && float.abs() < 9e15).then_some(float as i64)
    })
}

fn between(min: i64, max: i64) -> String {
    match (min, max) {
        (i64::MIN, i64::MAX) => "a 64-bit integer".into(),
        (_, max) if max >= i64::from(u32::MAX) => format!("an integer of at least {min}"),
        _ => format!("an integer between {min} and {max}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        let Value::Object(members) = serde_json::from_str(json).unwrap() else { panic!("not an object") };
        Fields::new(members)
    }

    /// Reads `x` as an integer in 1 to 9, a number in (0, 1] and a boolean; each answer or its message.
    fn check(json: &str, expected: [&str; 3]) {
        let unit = Bounds { min: 0.0, above_min: true, max: 1.0, words: "above 0 and at most 1" };
        let told = [
            fields(json).integer("x", 1, 9).map(|v| format!("{v:?}")),
            fields(json).number("x", unit).map(|v| format!("{v:?}")),
            fields(json).boolean("x").map(|v| format!("{v:?}")),
        ];
        let told = told.map(|answer| answer.unwrap_or_else(|error| error.to_string()));
        assert_eq!(told, expected.map(String::from), "{json}");
    }

    #[test]
    fn values_are_read_or_refused_by_name() {
        check("{}", ["None", "None", "None"]);
        check(r#"{"x":null}"#, ["None", "None", "None"]);
        check(r#"{"x":1}"#, ["Some(1)", "Some(1.0)", "x must be a boolean; it is a number"]);
        check(r#"{"x":1.0}"#, ["Some(1)", "Some(1.0)", "x must be a boolean; it is a number"]);
        check(r#"{"x":0.5}"#, ["x must be an integer; it is 0.5", "Some(0.5)", "x must be a boolean; it is a number"]);
        check(
            r#"{"x":0}"#,
            [
                "x must be an integer between 1 and 9; it is 0",
                "x must be above 0 and at most 1; it is 0",
                "x must be a boolean; it is a number",
            ],
        );
        let signed = Bounds { min: -1.0, above_min: false, max: 1.0, words: "between -1 and 1" };
        let zero = fields(r#"{"x":-0.0}"#).number("x", signed).unwrap().unwrap();
        assert!(zero.is_sign_positive());
        check(
            r#"{"x":"1"}"#,
            [
                "x must be an integer; it is a string",
                "x must be a number; it is a string",
                "x must be a boolean; it is a string",
            ],
        );
        check(
            r#"{"x":true}"#,
            ["x must be an integer; it is a boolean", "x must be a number; it is a boolean", "Some(true)"],
        );
    }

    #[test]
    fn untaken_members_are_named() {
        let mut fields = fields(r#"{"a":1,"b":null,"c":"x","d":[]}"#);
        fields.take("a");
        let mut ignored = fields.into_ignored();
        ignored.sort();
        assert_eq!(ignored, ["c", "d"]);
    }

    #[test]
    fn nested_fields_carry_their_prefix() {
        let mut outer = fields(r#"{"stream_options":{"include_usage":1}}"#);
        let mut inner = outer.object("stream_options", "stream_options.").unwrap().unwrap();
        assert_eq!(
            inner.boolean("include_usage").unwrap_err().to_string(),
            "stream_options.include_usage must be a boolean; it is a number"
        );
    }
}
