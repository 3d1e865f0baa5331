//! Calls as Python: `name(key=value, ...)`.

use super::super::literal;
use super::{State, ToolParser, is_name};

impl ToolParser {
    pub(super) fn python_name(&mut self, c: char) {
        if is_name(c) {
            self.raw.push(c);
            self.word.push(c);
            self.state = State::PythonName;
            return;
        }
        let name = std::mem::take(&mut self.word);
        if c != '(' || !self.accepts(&name) {
            return self.leave(c);
        }
        self.begin_call(name);
        self.output.arguments("{");
        self.state = State::PythonArguments { depth: 0, quote: None, escaped: false, num_arguments: 0 };
    }

    pub(super) fn python_arguments(
        &mut self,
        c: char,
        depth: u32,
        quote: Option<char>,
        escaped: bool,
        num_arguments: usize,
    ) {
        let ends_value = quote.is_none() && depth == 0 && matches!(c, ',' | ')');
        if ends_value {
            let word = std::mem::take(&mut self.word);
            let num_arguments = num_arguments + usize::from(self.python_value(&word, num_arguments));
            if c == ')' {
                self.output.arguments("}");
                return self.call_ended();
            }
            self.state = State::PythonArguments { depth, quote, escaped: false, num_arguments };
            return;
        }
        self.word.push(c);
        let (depth, next_quote) = match (quote, c) {
            _ if escaped => (depth, quote),
            (Some(open), c) if c == open => (depth, None),
            (None, '\'' | '"') => (depth, Some(c)),
            (None, '[' | '(' | '{') => (depth + 1, None),
            (None, ']' | ')' | '}') => (depth.saturating_sub(1), None),
            _ => (depth, quote),
        };
        let escaped = quote.is_some() && c == '\\' && !escaped;
        self.state = State::PythonArguments { depth, quote: next_quote, escaped, num_arguments };
    }

    /// One argument of a call; false where there is none.
    fn python_value(&mut self, word: &str, number: usize) -> bool {
        let word = word.trim();
        if word.is_empty() {
            return false;
        }
        let keyed = word.split_once('=').filter(|(key, _)| key.trim().chars().all(is_name));
        let (key, value) = match keyed {
            Some((key, value)) => (key.trim().to_owned(), value),
            None => (self.parameter_at(number), word),
        };
        let json = literal::to_json(value).unwrap_or_else(|| value.trim().into());
        self.output.member(&key, &json.to_string());
        true
    }

    /// The name of an argument that is told by its place.
    fn parameter_at(&self, number: usize) -> String {
        let properties = self.tool(&self.function).and_then(|tool| {
            let properties = tool.parameters.get("properties")?.as_object()?;
            properties.keys().nth(number).cloned()
        });
        properties.unwrap_or_else(|| format!("arg{number}"))
    }
}
