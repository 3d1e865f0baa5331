//! Calls as JSON: an object that names its function, and arguments that follow a name.

use super::super::json_call::{CallPiece, Fed, JsonCall};
use super::{State, ToolParser, is_name};

impl ToolParser {
    pub(super) fn json(&mut self, mut call: Box<JsonCall>, c: char) {
        let mut pieces = Vec::new();
        let fed = call.feed(c, &mut pieces);
        for piece in pieces {
            match piece {
                CallPiece::Name(name) if self.accepts(&name) => self.begin_call(name),
                CallPiece::Name(_) => {
                    self.raw.push(c);
                    self.give_back("");
                    return;
                }
                CallPiece::Arguments(text) => self.output.arguments(&text),
            }
        }
        match fed {
            Fed::More => {
                self.raw.push(c);
                self.state = State::Json(call);
            }
            Fed::Done => self.call_ended(),
            Fed::Failed if call.is_named() => {
                self.state = State::Broken;
                self.broken(c);
            }
            Fed::Failed => self.leave(c),
        }
    }

    pub(super) fn name(&mut self, c: char) {
        self.raw.push(c);
        if c != '{' {
            let fits = is_name(c) || c.is_whitespace() || matches!(c, '[' | ']');
            if !fits {
                self.raw.pop();
                return self.leave(c);
            }
            self.word.push(c);
            self.state = State::Name;
            return;
        }
        let word = std::mem::take(&mut self.word);
        // `[CALL_ID]...` and `[ARGS]` stand between the name and its arguments.
        let name = word.split('[').next().unwrap_or_default().trim();
        if name.is_empty() {
            self.raw.pop();
            return self.leave(c);
        }
        self.begin_call(name.to_owned());
        self.object(c, 0, false, false);
    }

    pub(super) fn object(&mut self, c: char, depth: u32, in_string: bool, escaped: bool) {
        self.output.arguments(c.encode_utf8(&mut [0; 4]));
        let (depth, now_in_string) = match c {
            _ if escaped => (depth, in_string),
            '"' => (depth, !in_string),
            '{' | '[' if !in_string => (depth + 1, false),
            '}' | ']' if !in_string => (depth.saturating_sub(1), false),
            _ => (depth, in_string),
        };
        let escaped = in_string && c == '\\' && !escaped;
        if depth == 0 {
            return self.call_ended();
        }
        self.state = State::Object { depth, in_string: now_in_string, escaped };
    }

    pub(super) fn broken(&mut self, c: char) {
        self.state = State::Broken;
        self.held.push(c);
        while !self.held.is_empty() {
            if self.format.ends.contains(&self.held.as_str()) {
                self.held.clear();
                self.raw.clear();
                self.state = State::Text;
                return;
            } else if self.format.ends.iter().any(|end| end.starts_with(self.held.as_str())) {
                return;
            }
            let first = self.held.remove(0);
            self.output.arguments(first.encode_utf8(&mut [0; 4]));
        }
    }
}
