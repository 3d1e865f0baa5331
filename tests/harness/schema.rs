//! Reads JSON by a schema without a library: whole, or cut off anywhere.
//!
//! Knows `type`, `properties`, `required`, `additionalProperties: false`, `enum`, `minimum`, `maximum`, `minLength`, `maxLength`,
//! `items`, `minItems` and `maxItems`: the bounded schemas of the tests. Shares nothing with what enforces them.
//!
//! **Invariant:** what is called a prefix can be continued so that it meets the schema.

use serde_json::Value;

/// How a text meets its schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// It does.
    Whole,
    /// It would, if it went on.
    Prefix,
}

enum Stop {
    /// The text ends here.
    End,
    Wrong(String),
}

type Step = Result<(), Stop>;

struct Reader<'a> {
    rest: &'a str,
}

/// Reads a text by a schema.
///
/// # Errors
/// Where the text leaves the schema.
pub fn fit(schema: &Value, text: &str) -> Result<Fit, String> {
    let mut reader = Reader { rest: text };
    match reader.value(schema) {
        Ok(()) if reader.rest.trim().is_empty() => Ok(Fit::Whole),
        Ok(()) => Err(format!("{:?} follows", reader.rest)),
        Err(Stop::End) => Ok(Fit::Prefix),
        Err(Stop::Wrong(reason)) => Err(format!("{reason}, before {:?} of {text:?}", reader.rest)),
    }
}

fn wrong<T>(reason: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Wrong(reason.into()))
}

fn bound(schema: &Value, name: &str, default: i64) -> i64 {
    schema[name].as_i64().unwrap_or(default)
}

impl Reader<'_> {
    /// The next character behind white space.
    fn peek(&mut self) -> Result<char, Stop> {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\n', '\r']);
        self.rest.chars().next().ok_or(Stop::End)
    }

    fn next(&mut self) -> Result<char, Stop> {
        let c = self.rest.chars().next().ok_or(Stop::End)?;
        self.rest = &self.rest[c.len_utf8()..];
        Ok(c)
    }

    fn expect(&mut self, expected: char) -> Step {
        if self.peek()? != expected {
            return wrong(format!("no {expected}"));
        }
        self.next().map(|_| ())
    }

    fn value(&mut self, schema: &Value) -> Step {
        self.peek()?;
        if let Some(choices) = schema["enum"].as_array() {
            return self.choice(choices);
        }
        match schema["type"].as_str() {
            Some("object") => self.object(schema),
            Some("array") => self.array(schema),
            Some("string") => self.string(schema),
            Some("integer") => self.integer(schema),
            Some("boolean") => self.choice(&[true.into(), false.into()]),
            other => wrong(format!("the schema has type {other:?}")),
        }
    }

    fn choice(&mut self, choices: &[Value]) -> Step {
        let words: Vec<String> = choices.iter().map(Value::to_string).collect();
        if let Some(word) = words.iter().find(|word| self.rest.starts_with(*word)) {
            self.rest = &self.rest[word.len()..];
            return Ok(());
        }
        if words.iter().any(|word| word.starts_with(self.rest)) { Err(Stop::End) } else { wrong("no choice") }
    }

    fn object(&mut self, schema: &Value) -> Step {
        self.expect('{')?;
        let properties = schema["properties"].as_object().cloned().unwrap_or_default();
        let mut left: Vec<&str> = properties.keys().map(String::as_str).collect();
        let is_required = |key: &str| schema["required"].as_array().is_some_and(|all| all.iter().any(|it| it == key));
        if self.peek()? != '}' {
            loop {
                let Some(at) = self.key(&left)? else { return Err(Stop::End) };
                let key = left.remove(at);
                self.expect(':')?;
                self.value(&properties[key])?;
                if self.peek()? != ',' {
                    break;
                }
                if left.is_empty() {
                    return wrong("no member is left");
                }
                self.expect(',')?;
            }
        }
        self.expect('}')?;
        match left.into_iter().find(|key| is_required(key)) {
            Some(key) => wrong(format!("{key} is missing")),
            None => Ok(()),
        }
    }

    /// Which of the keys comes; none where the text ends within it.
    fn key(&mut self, left: &[&str]) -> Result<Option<usize>, Stop> {
        self.peek()?;
        let quoted: Vec<String> = left.iter().map(|key| Value::from(*key).to_string()).collect();
        if let Some(at) = quoted.iter().position(|key| self.rest.starts_with(key)) {
            self.rest = &self.rest[quoted[at].len()..];
            return Ok(Some(at));
        }
        if quoted.iter().any(|key| key.starts_with(self.rest)) { Ok(None) } else { wrong(format!("none of {left:?}")) }
    }

    fn array(&mut self, schema: &Value) -> Step {
        let (min, max) = (bound(schema, "minItems", 0), bound(schema, "maxItems", i64::MAX));
        let mut count = 0;
        self.expect('[')?;
        if self.peek()? != ']' {
            loop {
                count += 1;
                if count > max {
                    return wrong("too many items");
                }
                self.value(&schema["items"])?;
                if self.peek()? != ',' {
                    break;
                }
                if count == max {
                    return wrong("a comma behind the last item");
                }
                self.expect(',')?;
            }
        }
        self.expect(']')?;
        if count < min { wrong("too few items") } else { Ok(()) }
    }

    fn string(&mut self, schema: &Value) -> Step {
        self.expect('"')?;
        let mut length = 0;
        loop {
            match self.next()? {
                '"' => break,
                '\\' => self.escape()?,
                c if (c as u32) < 0x20 => return wrong("a raw control character"),
                _ => {}
            }
            length += 1;
            if length > bound(schema, "maxLength", i64::MAX) {
                return wrong("too long");
            }
        }
        if length < bound(schema, "minLength", 0) { wrong("too short") } else { Ok(()) }
    }

    /// What follows a backslash. A pair of surrogates is one character.
    fn escape(&mut self) -> Step {
        match self.next()? {
            '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' => Ok(()),
            'u' => match self.hex()? {
                0xd800..0xdc00 => {
                    for expected in ['\\', 'u'] {
                        if self.next()? != expected {
                            return wrong("half a surrogate pair");
                        }
                    }
                    if (0xdc00..0xe000).contains(&self.hex()?) { Ok(()) } else { wrong("half a surrogate pair") }
                }
                0xdc00..0xe000 => wrong("the second half of a surrogate pair"),
                _ => Ok(()),
            },
            c => wrong(format!("the escape {c:?}")),
        }
    }

    fn hex(&mut self) -> Result<u32, Stop> {
        let mut code = 0;
        for _ in 0..4 {
            let Some(digit) = self.next()?.to_digit(16) else { return wrong("no hexadecimal digit") };
            code = code * 16 + digit;
        }
        Ok(code)
    }

    fn integer(&mut self, schema: &Value) -> Step {
        let (min, max) = (bound(schema, "minimum", -999), bound(schema, "maximum", 999));
        let end = self.rest.find(|c: char| c != '-' && !c.is_ascii_digit()).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        let minus_zero = (min..=max).contains(&0).then(|| "-0".to_owned());
        let mut all = (min..=max).map(|number| number.to_string()).chain(minus_zero);
        if rest.is_empty() {
            // Also where it may be complete: a number shows its end by what follows.
            return if all.any(|number| number.starts_with(word)) { Err(Stop::End) } else { wrong("no such number") };
        }
        if all.any(|number| number == word) { Ok(()) } else { wrong(format!("{word:?} is no such number")) }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Option<Fit>) {
        let schema = json!({"type": "object", "required": ["a"], "additionalProperties": false, "properties": {
            "a": {"type": "string", "minLength": 1, "maxLength": 2},
            "n": {"type": "integer", "minimum": 1, "maximum": 14},
            "l": {"type": "array", "items": {"enum": ["x", "yy"]}, "maxItems": 2},
        }});
        assert_eq!(fit(&schema, text).ok(), expected, "{text:?} {:?}", fit(&schema, text));
    }

    #[test]
    fn whole_texts_prefixes_and_others_are_told_apart() {
        check(r#"{"a": "\u00e9\n", "n": 14, "l": ["x", "yy"]}"#, Some(Fit::Whole));
        check(r#" {"a":"😀"} "#, Some(Fit::Whole));
        for text in ["", "{", r#"{"a"#, r#"{"a": "x"#, r#"{"a": "\u00"#, r#"{"n": 1"#, r#"{"l": ["y"#, r#"{"l": [],"#] {
            check(text, Some(Fit::Prefix));
        }
        for text in [
            r#"{"b"#,
            "{}",
            r#"{"a": ""}"#,
            r#"{"a": "xyz"#,
            r#"{"n": 15"#,
            r#"{"n": 0"#,
            r#"{"n": -"#,
            r#"{"l": ["z"#,
            r#"{"l": ["x","x","#,
            r#"{"a": "x"} x"#,
            r#"{"a": "x", "a"#,
            r#"{"a": "\ud800x"#,
            "[",
        ] {
            check(text, None);
        }
    }
}
