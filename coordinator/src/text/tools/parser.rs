//! The state machine that finds calls in a text, character by character.
//!
//! **Invariant:** text that may still become a call is held back, and comes out as text where it does not.

use super::json_call::{CallPiece, Fed, JsonCall};
use super::literal;
use super::qwen3_coder::{self, FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END};
use super::{Body, Tool, ToolEvent, ToolFormat, Tools};

/// Where the machine stands.
#[derive(Debug)]
enum State {
    /// Nothing but white space so far.
    Start,
    Text,
    /// Inside an opened region, before, between or behind its calls.
    Between,
    Json(Box<JsonCall>),
    /// `name[ARGS]`, before the arguments.
    Name,
    /// Arguments that stand alone.
    Object {
        depth: u32,
        in_string: bool,
        escaped: bool,
    },
    /// A call whose object broke after its name: what follows is kept as arguments up to the end of the region.
    Broken,
    XmlName,
    XmlInside,
    XmlKey,
    XmlValue {
        key: String,
    },
    PythonName,
    PythonArguments {
        depth: u32,
        quote: Option<char>,
        escaped: bool,
        num_arguments: usize,
    },
}

/// Finds the calls of one answer.
#[derive(Debug)]
pub struct ToolParser {
    format: &'static ToolFormat,
    tools: Tools,
    calls_max: usize,
    state: State,
    /// What may become one of the texts that are waited for.
    held: String,
    /// The name, key or value that is being read.
    word: String,
    /// The function of the last call.
    function: String,
    /// The region since its last call, to be given back as text where nothing comes of it.
    raw: String,
    /// White space that counts only if text follows.
    space: String,
    /// True once a call of this region is known.
    region_has_call: bool,
    /// True where the region has an opening text, so that names need not be known.
    is_marked: bool,
    num_open_lists: usize,
    num_calls: usize,
    num_members: usize,
    events: Vec<ToolEvent>,
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | ':' | '/')
}

impl ToolParser {
    /// A parser of a format; at most `calls_max` calls come out, what follows them is dropped.
    pub fn new(format: &'static ToolFormat, tools: Tools, calls_max: usize) -> Self {
        Self {
            format,
            tools,
            calls_max,
            state: if format.leading.is_some() { State::Start } else { State::Text },
            held: String::new(),
            word: String::new(),
            function: String::new(),
            raw: String::new(),
            space: String::new(),
            region_has_call: false,
            is_marked: false,
            num_open_lists: 0,
            num_calls: 0,
            num_members: 0,
            events: Vec::new(),
        }
    }

    /// Calls so far.
    pub fn num_calls(&self) -> usize {
        self.num_calls.min(self.calls_max)
    }

    /// Takes the next piece of text; gives what it made certain.
    pub fn push(&mut self, piece: &str) -> Vec<ToolEvent> {
        for c in piece.chars() {
            self.char(c);
        }
        std::mem::take(&mut self.events)
    }

    /// The end of the text: what was held back.
    pub fn finish(&mut self) -> Vec<ToolEvent> {
        let held = std::mem::take(&mut self.held);
        // Behind a call, the beginning of another one that was cut off is no text that anybody should read.
        let is_cut_off = self.is_marked && self.num_calls > 0;
        match std::mem::replace(&mut self.state, State::Text) {
            State::Between | State::Name | State::XmlName | State::PythonName if is_cut_off => {}
            State::Json(call) if is_cut_off && !call.is_named() => {}
            State::Start | State::Text => held.chars().for_each(|c| self.emit_text(c)),
            State::Broken => self.emit_arguments(&held),
            State::Between | State::Name | State::XmlName | State::PythonName if !self.region_has_call => {
                self.give_back(&held);
            }
            State::Json(call) if !call.is_named() => self.give_back(&held),
            _ => {}
        }
        if self.num_calls == 0 {
            let space = std::mem::take(&mut self.space);
            self.push_text(&space);
        }
        std::mem::take(&mut self.events)
    }

    fn char(&mut self, c: char) {
        match std::mem::replace(&mut self.state, State::Text) {
            State::Start => self.start(c),
            State::Text => self.text(c),
            State::Between => self.between(c),
            State::Json(call) => self.json(call, c),
            State::Name => self.name(c),
            State::Object { depth, in_string, escaped } => self.object(c, depth, in_string, escaped),
            State::Broken => self.broken(c),
            State::XmlName => self.xml_name(c),
            State::XmlInside => self.xml_inside(c),
            State::XmlKey => self.xml_key(c),
            State::XmlValue { key } => self.xml_value(key, c),
            State::PythonName => self.python_name(c),
            State::PythonArguments { depth, quote, escaped, num_arguments } => {
                self.python_arguments(c, depth, quote, escaped, num_arguments);
            }
        }
    }

    // ---- outside of calls ----

    fn start(&mut self, c: char) {
        if c.is_whitespace() {
            self.space.push(c);
            self.state = State::Start;
        } else if Some(c) == self.format.leading {
            self.open(false);
            self.between_one(c);
        } else {
            self.text(c);
        }
    }

    fn text(&mut self, c: char) {
        self.state = State::Text;
        self.held.push(c);
        while !self.held.is_empty() && matches!(self.state, State::Text) {
            if let Some(start) = self.format.starts.iter().find(|start| **start == self.held) {
                let start: &'static str = start;
                self.held.clear();
                self.open(true);
                self.raw.push_str(start);
                if start == FUNCTION {
                    self.state = State::XmlName;
                }
            } else if self.format.starts.iter().any(|start| start.starts_with(self.held.as_str())) {
                return;
            } else {
                let first = self.held.remove(0);
                self.emit_text(first);
            }
        }
    }

    fn open(&mut self, is_marked: bool) {
        self.raw.clear();
        self.word.clear();
        self.region_has_call = false;
        self.is_marked = is_marked;
        self.num_open_lists = 0;
        self.state = State::Between;
    }

    /// The region is no call: it comes out as text.
    fn give_back(&mut self, rest: &str) {
        let raw = std::mem::take(&mut self.raw);
        self.state = State::Text;
        raw.chars().chain(rest.chars()).for_each(|c| self.emit_text(c));
    }

    /// The region ended without its closing text: what was skipped since its last call is text, and `c` may be anything.
    fn leave(&mut self, c: char) {
        self.give_back("");
        self.text(c);
    }

    // ---- inside a region ----

    /// Waits for an opening or closing text, or takes what separates calls.
    fn between(&mut self, c: char) {
        self.state = State::Between;
        self.held.push(c);
        while !self.held.is_empty() && matches!(self.state, State::Between) {
            let marks = || self.format.starts.iter().chain(self.format.ends);
            if let Some(mark) = marks().find(|mark| **mark == self.held).copied() {
                self.held.clear();
                self.mark(mark);
            } else if marks().any(|mark| mark.starts_with(self.held.as_str())) {
                return;
            } else {
                let held = std::mem::take(&mut self.held);
                let mut chars = held.chars();
                if let Some(first) = chars.next() {
                    self.between_one(first);
                }
                // What follows may begin a mark itself.
                for c in chars {
                    self.char(c);
                }
                return;
            }
        }
    }

    fn mark(&mut self, mark: &'static str) {
        if self.format.starts.contains(&mark) {
            if self.region_has_call || mark != FUNCTION {
                self.raw.clear();
            }
            self.raw.push_str(mark);
            self.is_marked = true;
            self.region_has_call = false;
            self.state = if mark == FUNCTION { State::XmlName } else { State::Between };
        } else if self.region_has_call {
            self.raw.clear();
            self.state = State::Text;
        } else {
            self.give_back(mark);
        }
    }

    /// A character between calls that begins no mark.
    fn between_one(&mut self, c: char) {
        self.state = State::Between;
        match (self.format.body, c) {
            (_, c) if c.is_whitespace() => self.raw.push(c),
            (Body::Json, '{') => self.json(Box::new(JsonCall::new()), c),
            (Body::Json | Body::Python, '[') if !self.region_has_call && self.num_open_lists == 0 => {
                self.raw.push(c);
                self.num_open_lists = 1;
            }
            (Body::Json | Body::Python, ']') if self.num_open_lists > 0 && self.region_has_call => {
                self.raw.clear();
                self.num_open_lists = 0;
            }
            (Body::Json | Body::Python, ',' | ';') if self.region_has_call => self.raw.push(c),
            (Body::Json, c) if self.names_stand_alone() && is_name(c) => self.name(c),
            (Body::Python, c) if self.num_open_lists > 0 && is_name(c) => self.python_name(c),
            (_, c) => self.leave(c),
        }
    }

    /// The later form of Mistral.
    fn names_stand_alone(&self) -> bool {
        self.format == &super::mistral::FORMAT && !self.region_has_call && self.num_open_lists == 0
    }

    /// True where a name makes a call: with an opening text any name does, without one only that of a tool.
    fn accepts(&self, name: &str) -> bool {
        !name.is_empty() && (self.is_marked || self.tool(name).is_some())
    }

    fn tool(&self, name: &str) -> Option<&Tool> {
        self.tools.iter().find(|tool| tool.name == name)
    }

    fn call_ended(&mut self) {
        self.raw.clear();
        self.state = State::Between;
    }

    // ---- calls as JSON ----

    fn json(&mut self, mut call: Box<JsonCall>, c: char) {
        let mut pieces = Vec::new();
        let fed = call.feed(c, &mut pieces);
        for piece in pieces {
            match piece {
                CallPiece::Name(name) if self.accepts(&name) => self.emit_call(name),
                CallPiece::Name(_) => {
                    self.raw.push(c);
                    self.give_back("");
                    return;
                }
                CallPiece::Arguments(text) => self.emit_arguments(&text),
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

    fn name(&mut self, c: char) {
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
        self.emit_call(name.to_owned());
        self.object(c, 0, false, false);
    }

    fn object(&mut self, c: char, depth: u32, in_string: bool, escaped: bool) {
        self.emit_arguments(c.encode_utf8(&mut [0; 4]));
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

    fn broken(&mut self, c: char) {
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
            self.emit_arguments(first.encode_utf8(&mut [0; 4]));
        }
    }

    // ---- calls as tags ----

    fn xml_name(&mut self, c: char) {
        if c != '>' {
            self.raw.push(c);
            if !is_name(c) && !c.is_whitespace() {
                self.raw.pop();
                return self.leave(c);
            }
            self.word.push(c);
            self.state = State::XmlName;
            return;
        }
        let name = std::mem::take(&mut self.word).trim().to_owned();
        if name.is_empty() {
            return self.leave(c);
        }
        self.emit_call(name);
        self.emit_arguments("{");
        self.num_members = 0;
        self.state = State::XmlInside;
    }

    /// Between parameters: only a tag matters.
    fn xml_inside(&mut self, c: char) {
        self.state = State::XmlInside;
        self.held.push(c);
        loop {
            match self.held.as_str() {
                "" => return,
                PARAMETER => {
                    self.held.clear();
                    self.word.clear();
                    self.state = State::XmlKey;
                    return;
                }
                FUNCTION_END => {
                    self.held.clear();
                    self.emit_arguments("}");
                    return self.call_ended();
                }
                held if PARAMETER.starts_with(held) || FUNCTION_END.starts_with(held) => return,
                _ => drop(self.held.remove(0)),
            }
        }
    }

    fn xml_key(&mut self, c: char) {
        if c == '>' {
            let key = std::mem::take(&mut self.word).trim().to_owned();
            self.state = State::XmlValue { key };
        } else {
            self.word.push(c);
            self.state = State::XmlKey;
        }
    }

    fn xml_value(&mut self, key: String, c: char) {
        self.word.push(c);
        // A model that forgets to close a parameter still closes the function.
        for (end, closes_call) in [(PARAMETER_END, false), (FUNCTION_END, true)] {
            let Some(value) = self.word.strip_suffix(end) else { continue };
            let value = qwen3_coder::to_json(self.tool(&self.function), &key, value);
            self.word.clear();
            self.emit_member(&key, &value);
            if closes_call {
                self.emit_arguments("}");
                return self.call_ended();
            }
            self.state = State::XmlInside;
            return;
        }
        self.state = State::XmlValue { key };
    }

    // ---- calls as Python ----

    fn python_name(&mut self, c: char) {
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
        self.emit_call(name);
        self.emit_arguments("{");
        self.num_members = 0;
        self.state = State::PythonArguments { depth: 0, quote: None, escaped: false, num_arguments: 0 };
    }

    fn python_arguments(&mut self, c: char, depth: u32, quote: Option<char>, escaped: bool, num_arguments: usize) {
        let ends_value = quote.is_none() && depth == 0 && matches!(c, ',' | ')');
        if ends_value {
            let word = std::mem::take(&mut self.word);
            let num_arguments = num_arguments + usize::from(self.python_value(&word, num_arguments));
            if c == ')' {
                self.emit_arguments("}");
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
        self.emit_member(&key, &json.to_string());
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

    // ---- what comes out ----

    fn emit_call(&mut self, name: String) {
        self.space.clear();
        self.region_has_call = true;
        let index = self.num_calls;
        self.num_calls += 1;
        // From here on nothing is given back.
        self.raw.clear();
        self.function.clone_from(&name);
        if index < self.calls_max {
            self.events.push(ToolEvent::Call { index, name });
        }
    }

    fn emit_member(&mut self, key: &str, value: &str) {
        let comma = if self.num_members > 0 { ", " } else { "" };
        self.num_members += 1;
        let key = serde_json::Value::from(key);
        self.emit_arguments(&format!("{comma}{key}: {value}"));
    }

    fn emit_arguments(&mut self, piece: &str) {
        let last = self.num_calls.saturating_sub(1);
        if last >= self.calls_max || piece.is_empty() {
            return;
        }
        match self.events.last_mut() {
            Some(ToolEvent::Arguments { index, text }) if *index == last => text.push_str(piece),
            _ => self.events.push(ToolEvent::Arguments { index: last, text: piece.to_owned() }),
        }
    }

    fn emit_text(&mut self, c: char) {
        self.space.push(c);
        if !c.is_whitespace() {
            let text = std::mem::take(&mut self.space);
            self.push_text(&text);
        }
    }

    fn push_text(&mut self, piece: &str) {
        match self.events.last_mut() {
            _ if piece.is_empty() => {}
            Some(ToolEvent::Text(text)) => text.push_str(piece),
            _ => self.events.push(ToolEvent::Text(piece.to_owned())),
        }
    }
}
