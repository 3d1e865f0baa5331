//! One call written as a JSON object, read character by character.
//!
//! **Invariant:** the arguments come out as they were written, nested braces, escapes and all.

/// What became known by a character.
pub(super) enum CallPiece {
    /// The function's name, once.
    Name(String),
    /// More of the arguments, after the name.
    Arguments(String),
}

/// Where the reader stands after a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fed {
    /// Within the object.
    More,
    /// The object is closed.
    Done,
    /// It is no such object.
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Member {
    Name,
    Arguments,
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    KeyOrEnd,
    Key,
    Colon,
    Value,
    /// A string that is read whole.
    Text,
    /// Objects, lists, and strings that are skipped.
    Nested {
        depth: u32,
        in_string: bool,
    },
    /// A number or a word.
    Scalar,
    CommaOrEnd,
}

/// The reader of one call.
#[derive(Debug)]
pub(super) struct JsonCall {
    state: State,
    member: Member,
    /// The key or value that is read whole.
    word: String,
    escaped: bool,
    name: Option<String>,
    /// Arguments that came before the name.
    early: String,
    has_arguments: bool,
}

impl JsonCall {
    pub(super) fn new() -> Self {
        Self {
            state: State::Open,
            member: Member::Other,
            word: String::new(),
            escaped: false,
            name: None,
            early: String::new(),
            has_arguments: false,
        }
    }

    /// True once the name is known.
    pub(super) fn is_named(&self) -> bool {
        self.name.is_some()
    }

    /// Takes the next character.
    pub(super) fn feed(&mut self, c: char, out: &mut Vec<CallPiece>) -> Fed {
        match self.state {
            State::Open => self.expect(c, '{', State::KeyOrEnd),
            State::KeyOrEnd => match c {
                '"' => self.enter(State::Key),
                '}' => self.close(out),
                ',' => Fed::More,
                c if c.is_whitespace() => Fed::More,
                _ => Fed::Failed,
            },
            State::Key => self.key(c),
            State::Colon => self.expect(c, ':', State::Value),
            State::Value => self.value(c, out),
            State::Text => self.text(c, out),
            State::Nested { depth, in_string } => self.nested(c, depth, in_string, out),
            State::Scalar => self.scalar(c, out),
            State::CommaOrEnd => match c {
                ',' => self.enter(State::KeyOrEnd),
                '}' => self.close(out),
                c if c.is_whitespace() => Fed::More,
                _ => Fed::Failed,
            },
        }
    }

    fn enter(&mut self, state: State) -> Fed {
        self.word.clear();
        self.escaped = false;
        self.state = state;
        Fed::More
    }

    fn expect(&mut self, c: char, expected: char, next: State) -> Fed {
        match c {
            c if c == expected => self.enter(next),
            c if c.is_whitespace() => Fed::More,
            _ => Fed::Failed,
        }
    }

    /// Reads a string up to its end; gives it decoded.
    fn string(&mut self, c: char) -> Option<Option<String>> {
        if c == '"' && !self.escaped {
            let quoted = format!("\"{}\"", self.word);
            return Some(serde_json::from_str(&quoted).ok());
        }
        self.escaped = c == '\\' && !self.escaped;
        self.word.push(c);
        None
    }

    fn key(&mut self, c: char) -> Fed {
        let Some(key) = self.string(c) else { return Fed::More };
        self.member = match key.as_deref() {
            Some("name") if self.name.is_none() => Member::Name,
            Some("arguments" | "parameters") if !self.has_arguments => Member::Arguments,
            Some(_) => Member::Other,
            None => return Fed::Failed,
        };
        self.enter(State::Colon)
    }

    fn value(&mut self, c: char, out: &mut Vec<CallPiece>) -> Fed {
        match (c, self.member) {
            (c, _) if c.is_whitespace() => Fed::More,
            ('"', _) => self.enter(State::Text),
            (_, Member::Name) => Fed::Failed,
            ('{' | '[', member) => {
                if member == Member::Arguments {
                    self.arguments(c.into(), out);
                }
                self.enter(State::Nested { depth: 1, in_string: false })
            }
            (c, _) if c.is_ascii_alphanumeric() || c == '-' => {
                self.enter(State::Scalar);
                self.word.push(c);
                Fed::More
            }
            _ => Fed::Failed,
        }
    }

    fn text(&mut self, c: char, out: &mut Vec<CallPiece>) -> Fed {
        let Some(text) = self.string(c) else { return Fed::More };
        let Some(text) = text else { return Fed::Failed };
        match self.member {
            Member::Name => self.named(text, out),
            // Arguments as text hold JSON themselves.
            Member::Arguments => self.arguments(text, out),
            Member::Other => {}
        }
        self.enter(State::CommaOrEnd)
    }

    fn nested(&mut self, c: char, depth: u32, in_string: bool, out: &mut Vec<CallPiece>) -> Fed {
        if self.member == Member::Arguments {
            self.arguments(c.into(), out);
        }
        let (depth, in_string) = match c {
            _ if self.escaped => (depth, in_string),
            '"' => (depth, !in_string),
            '{' | '[' if !in_string => (depth + 1, false),
            '}' | ']' if !in_string => (depth - 1, false),
            _ => (depth, in_string),
        };
        self.escaped = in_string && c == '\\' && !self.escaped;
        if depth == 0 {
            return self.enter(State::CommaOrEnd);
        }
        self.state = State::Nested { depth, in_string };
        Fed::More
    }

    fn scalar(&mut self, c: char, out: &mut Vec<CallPiece>) -> Fed {
        if c != ',' && c != '}' && !c.is_whitespace() {
            self.word.push(c);
            return Fed::More;
        }
        if self.member == Member::Arguments && self.word != "null" {
            let word = std::mem::take(&mut self.word);
            self.arguments(word, out);
        }
        self.enter(State::CommaOrEnd);
        self.feed(c, out)
    }

    fn named(&mut self, name: String, out: &mut Vec<CallPiece>) {
        out.push(CallPiece::Name(name.clone()));
        self.name = Some(name);
        let early = std::mem::take(&mut self.early);
        if !early.is_empty() {
            out.push(CallPiece::Arguments(early));
        }
    }

    fn arguments(&mut self, text: String, out: &mut Vec<CallPiece>) {
        self.has_arguments = true;
        if self.name.is_some() {
            out.push(CallPiece::Arguments(text));
        } else {
            self.early.push_str(&text);
        }
    }

    fn close(&mut self, out: &mut Vec<CallPiece>) -> Fed {
        if self.name.is_none() {
            return Fed::Failed;
        }
        if !self.has_arguments {
            self.arguments("{}".into(), out);
        }
        Fed::Done
    }
}
