//! Calls as tags: `<function=NAME><parameter=KEY>VALUE</parameter></function>`.

use super::super::qwen3_coder::{self, FUNCTION_END, PARAMETER, PARAMETER_END};
use super::{State, ToolParser, is_name};

impl ToolParser {
    pub(super) fn xml_name(&mut self, c: char) {
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
        self.begin_call(name);
        self.output.arguments("{");
        self.state = State::XmlInside;
    }

    /// Between parameters: only a tag matters.
    pub(super) fn xml_inside(&mut self, c: char) {
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
                    self.output.arguments("}");
                    return self.call_ended();
                }
                held if PARAMETER.starts_with(held) || FUNCTION_END.starts_with(held) => return,
                _ => drop(self.held.remove(0)),
            }
        }
    }

    pub(super) fn xml_key(&mut self, c: char) {
        if c == '>' {
            let key = std::mem::take(&mut self.word).trim().to_owned();
            self.state = State::XmlValue { key };
        } else {
            self.word.push(c);
            self.state = State::XmlKey;
        }
    }

    pub(super) fn xml_value(&mut self, key: String, c: char) {
        self.word.push(c);
        // A model that forgets to close a parameter still closes the function.
        for (end, closes_call) in [(PARAMETER_END, false), (FUNCTION_END, true)] {
            let Some(value) = self.word.strip_suffix(end) else { continue };
            let value = qwen3_coder::to_json(self.tool(&self.function), &key, value);
            self.word.clear();
            self.output.member(&key, &value);
            if closes_call {
                self.output.arguments("}");
                return self.call_ended();
            }
            self.state = State::XmlInside;
            return;
        }
        self.state = State::XmlValue { key };
    }
}
