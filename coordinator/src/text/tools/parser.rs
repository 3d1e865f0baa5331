//! The state machine that finds calls in a text, character by character.
//!
//! **Invariant:** text that may still become a call is held back, and comes out as text where it does not.

mod objects;
mod output;
mod python;
mod tags;

use self::output::Output;
use super::json_call::JsonCall;
use super::qwen3_coder::FUNCTION;
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
    state: State,
    /// What may become one of the texts that are waited for.
    held: String,
    /// The name, key or value that is being read.
    word: String,
    /// The function of the last call.
    function: String,
    /// The region since its last call, to be given back as text where nothing comes of it.
    raw: String,
    /// True once a call of this region is known.
    region_has_call: bool,
    /// True where the region has an opening text, so that names need not be known.
    is_marked: bool,
    num_open_lists: usize,
    output: Output,
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
            state: if format.leading.is_some() { State::Start } else { State::Text },
            held: String::new(),
            word: String::new(),
            function: String::new(),
            raw: String::new(),
            region_has_call: false,
            is_marked: false,
            num_open_lists: 0,
            output: Output::new(calls_max),
        }
    }

    /// Calls so far.
    pub fn num_calls(&self) -> usize {
        self.output.num_calls_out()
    }

    /// Takes the next piece of text; gives what it made certain.
    pub fn push(&mut self, piece: &str) -> Vec<ToolEvent> {
        for c in piece.chars() {
            self.char(c);
        }
        self.output.take()
    }

    /// The end of the text: what was held back.
    pub fn finish(&mut self) -> Vec<ToolEvent> {
        let held = std::mem::take(&mut self.held);
        // Behind a call, the beginning of another one that was cut off is no text that anybody should read.
        let is_cut_off = self.is_marked && self.output.num_calls() > 0;
        match std::mem::replace(&mut self.state, State::Text) {
            State::Between | State::Name | State::XmlName | State::PythonName if is_cut_off => {}
            State::Json(call) if is_cut_off && !call.is_named() => {}
            State::Start | State::Text => held.chars().for_each(|c| self.output.text(c)),
            State::Broken => self.output.arguments(&held),
            State::Between | State::Name | State::XmlName | State::PythonName if !self.region_has_call => {
                self.give_back(&held);
            }
            State::Json(call) if !call.is_named() => self.give_back(&held),
            _ => {}
        }
        if self.output.num_calls() == 0 {
            self.output.text_ends();
        }
        self.output.take()
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

    fn start(&mut self, c: char) {
        if c.is_whitespace() {
            self.output.space(c);
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
                self.output.text(first);
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
        raw.chars().chain(rest.chars()).for_each(|c| self.output.text(c));
    }

    /// The region ended without its closing text: what was skipped since its last call is text, and `c` may be anything.
    fn leave(&mut self, c: char) {
        self.give_back("");
        self.text(c);
    }

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

    /// True where a name may begin a call here.
    fn names_stand_alone(&self) -> bool {
        self.format.bare_names && !self.region_has_call && self.num_open_lists == 0
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

    fn begin_call(&mut self, name: String) {
        self.region_has_call = true;
        // From here on nothing is given back.
        self.raw.clear();
        self.function.clone_from(&name);
        self.output.call(name);
    }
}
