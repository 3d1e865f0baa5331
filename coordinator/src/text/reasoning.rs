//! Thoughts before an answer: `<think> ... </think>` in a model's text.
//!
//! **Invariant:** as with calls, what comes out depends on the text alone, never on how it was cut.

const START: &str = "<think>";
const END: &str = "</think>";

/// What a piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Split {
    /// More of the thoughts.
    pub thoughts: String,
    /// More of the answer.
    pub answer: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space so far.
    Start,
    Thoughts,
    /// Behind the thoughts: white space is no part of the answer yet.
    Gap,
    Answer,
}

/// Parts the thoughts of one output from its answer.
#[derive(Debug)]
pub struct ThoughtParser {
    state: State,
    held: String,
    /// White space that counts only if something follows.
    space: String,
    has_thoughts: bool,
}

impl ThoughtParser {
    /// `inside`: the prompt has opened the thoughts already.
    pub fn new(inside: bool) -> Self {
        let state = if inside { State::Thoughts } else { State::Start };
        Self { state, held: String::new(), space: String::new(), has_thoughts: false }
    }

    /// True where a rendered prompt ends inside of thoughts.
    pub fn is_opened_by(prompt: &str) -> bool {
        prompt.trim_end().ends_with(START)
    }

    /// True where a chat template is that of a model that thinks.
    pub fn is_used_by(template: &str) -> bool {
        template.contains(END) || template.contains(START)
    }

    /// The texts that open and close thoughts.
    pub fn marks() -> (&'static str, &'static str) {
        (START, END)
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, piece: &str) -> Split {
        let mut split = Split::default();
        for c in piece.chars() {
            self.char(c, &mut split);
        }
        split
    }

    /// The end of the text: what was held back.
    pub fn finish(&mut self) -> Split {
        let mut split = Split::default();
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Thoughts => held.chars().for_each(|c| self.think(c, &mut split)),
            State::Start | State::Answer => {
                split.answer = std::mem::take(&mut self.space);
                split.answer.push_str(&held);
            }
            State::Gap => {}
        }
        split
    }

    fn char(&mut self, c: char, split: &mut Split) {
        match self.state {
            State::Answer => split.answer.push(c),
            State::Gap if c.is_whitespace() => {}
            State::Gap => {
                self.state = State::Answer;
                split.answer.push(c);
            }
            State::Start => self.start(c, split),
            State::Thoughts => {
                self.held.push(c);
                while !self.held.is_empty() {
                    if self.held == END {
                        self.held.clear();
                        self.space.clear();
                        self.state = State::Gap;
                    } else if END.starts_with(self.held.as_str()) {
                        return;
                    } else {
                        let first = self.held.remove(0);
                        self.think(first, split);
                    }
                }
            }
        }
    }

    fn start(&mut self, c: char, split: &mut Split) {
        if self.held.is_empty() && c.is_whitespace() {
            self.space.push(c);
            return;
        }
        self.held.push(c);
        if self.held == START {
            self.held.clear();
            self.space.clear();
            self.state = State::Thoughts;
        } else if !START.starts_with(self.held.as_str()) {
            self.state = State::Answer;
            split.answer.push_str(&std::mem::take(&mut self.space));
            split.answer.push_str(&std::mem::take(&mut self.held));
        }
    }

    /// White space around the thoughts is no part of them.
    fn think(&mut self, c: char, split: &mut Split) {
        self.space.push(c);
        if c.is_whitespace() {
            return;
        }
        let text = std::mem::take(&mut self.space);
        split.thoughts.push_str(if self.has_thoughts { &text } else { text.trim_start() });
        self.has_thoughts = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fold(inside: bool, pieces: &[&str]) -> (String, String) {
        let mut parser = ThoughtParser::new(inside);
        let (mut thoughts, mut answer) = (String::new(), String::new());
        let mut splits: Vec<Split> = pieces.iter().map(|piece| parser.push(piece)).collect();
        splits.push(parser.finish());
        for split in splits {
            thoughts.push_str(&split.thoughts);
            answer.push_str(&split.answer);
        }
        (thoughts, answer)
    }

    #[track_caller]
    fn check(inside: bool, text: &str, thoughts: &str, answer: &str) {
        let expected = (thoughts.to_owned(), answer.to_owned());
        for (at, _) in text.char_indices() {
            assert_eq!(fold(inside, &[&text[..at], &text[at..]]), expected, "{text:?} cut at {at}");
        }
        let chars: Vec<String> = text.chars().map(String::from).collect();
        assert_eq!(fold(inside, &chars.iter().map(String::as_str).collect::<Vec<_>>()), expected, "{text:?}");
        assert_eq!(fold(inside, &[text]), expected, "{text:?}");
    }

    #[test]
    fn thoughts_are_parted_from_the_answer() {
        check(false, "<think>\nhm, 1 < 2\n</think>\n\nIt is 2. ", "hm, 1 < 2", "It is 2. ");
        check(true, "hm </thin \n</think>ok", "hm </thin", "ok");
        check(true, "still </thi", "still </thi", "");
        check(false, "no thoughts\n", "", "no thoughts\n");
        check(false, " <thin", "", " <thin");
        check(false, "a <think>b</think>", "", "a <think>b</think>");
        check(false, "<think></think>x", "", "x");
    }
}
