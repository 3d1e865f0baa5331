//! Python's literals as JSON: what stands behind `key=` in a call.

use serde_json::{Map, Number, Value};

/// Deepest nesting of a literal.
const NESTING_MAX: usize = 64;

/// Reads one literal; `None` where the text is none. JSON's own words are read too.
pub(super) fn to_json(text: &str) -> Option<Value> {
    let mut reader = Reader { rest: text.trim() };
    let value = reader.value(NESTING_MAX)?;
    reader.rest.trim().is_empty().then_some(value)
}

struct Reader<'a> {
    rest: &'a str,
}

impl Reader<'_> {
    fn peek(&mut self) -> Option<char> {
        self.rest = self.rest.trim_start();
        self.rest.chars().next()
    }

    fn skip(&mut self, c: char) -> bool {
        let found = self.peek() == Some(c);
        if found {
            self.rest = &self.rest[c.len_utf8()..];
        }
        found
    }

    fn value(&mut self, levels: usize) -> Option<Value> {
        let levels = levels.checked_sub(1)?;
        match self.peek()? {
            '\'' | '"' => self.string().map(Value::String),
            '[' => self.list('[', ']', levels),
            '(' => self.list('(', ')', levels),
            '{' => self.object(levels),
            _ => self.word(),
        }
    }

    fn list(&mut self, open: char, close: char, levels: usize) -> Option<Value> {
        self.skip(open);
        let mut items = Vec::new();
        while !self.skip(close) {
            items.push(self.value(levels)?);
            if !self.skip(',') && self.peek() != Some(close) {
                return None;
            }
        }
        Some(Value::Array(items))
    }

    fn object(&mut self, levels: usize) -> Option<Value> {
        self.skip('{');
        let mut members = Map::new();
        while !self.skip('}') {
            let key = match self.value(levels)? {
                Value::String(key) => key,
                other => other.to_string(),
            };
            if !self.skip(':') {
                return None;
            }
            members.insert(key, self.value(levels)?);
            if !self.skip(',') && self.peek() != Some('}') {
                return None;
            }
        }
        Some(Value::Object(members))
    }

    fn string(&mut self) -> Option<String> {
        let quote = self.peek()?;
        let mut out = String::new();
        let mut chars = self.rest[quote.len_utf8()..].char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                c if c == quote => {
                    self.rest = &self.rest[quote.len_utf8() + at + c.len_utf8()..];
                    return Some(out);
                }
                '\\' => out.push(escape(&mut chars)?),
                c => out.push(c),
            }
        }
        None
    }

    fn word(&mut self) -> Option<Value> {
        let end = self.rest.find(|c: char| ",]})(:".contains(c) || c.is_whitespace()).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        match word {
            "True" | "true" => Some(Value::Bool(true)),
            "False" | "false" => Some(Value::Bool(false)),
            "None" | "null" => Some(Value::Null),
            // JSON's reader makes a float of it, which is no integer to many clients.
            "-0" => Some(Value::from(0)),
            number => {
                let number = number.strip_prefix('+').unwrap_or(number).replace('_', "");
                number.parse().map(Value::Number).ok().or_else(|| {
                    let float = number.parse::<f64>().ok().filter(|float| float.is_finite());
                    Number::from_f64(float?).map(Value::Number)
                })
            }
        }
    }
}

fn escape(chars: &mut std::str::CharIndices<'_>) -> Option<char> {
    Some(match chars.next()?.1 {
        'x' => return hex(chars, 2),
        'u' => return hex(chars, 4),
        'U' => return hex(chars, 8),
        'n' => '\n',
        't' => '\t',
        'r' => '\r',
        'b' => '\u{8}',
        'f' => '\u{c}',
        '0' => '\0',
        other => other,
    })
}

fn hex(chars: &mut std::str::CharIndices<'_>, digits: usize) -> Option<char> {
    let text: String = chars.by_ref().take(digits).map(|(_, c)| c).collect();
    char::from_u32(u32::from_str_radix(&text, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: &str) {
        let told = to_json(text).map_or_else(|| "none".into(), |value| value.to_string());
        assert_eq!(told, expected, "{text}");
    }

    #[test]
    fn pythons_literals_become_json() {
        check("'San Francisco'", r#""San Francisco""#);
        check(r#""it's""#, r#""it's""#);
        check(r"'a\'b\n\u00e9'", r#""a'b\né""#);
        check("True", "true");
        check("null", "null");
        check("-1.5e3", "-1500.0");
        check("1_000", "1000");
        check("-0", "0");
        check(".5", "0.5");
        check("[1, 'a', (2,), {}]", r#"[1,"a",[2],{}]"#);
        check("{'a': {'b': [None, False]}, 3: 1}", r#"{"a":{"b":[null,false]},"3":1}"#);
    }

    #[test]
    fn what_is_no_literal_is_refused() {
        for text in ["", "f(1)", "[1", "'a", "{1}", "a b", "1 2", &"[".repeat(100)] {
            check(text, "none");
        }
    }
}
