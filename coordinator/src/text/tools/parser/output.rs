//! What a parser has made certain: text and calls, in order.
//!
//! **Invariant:** white space comes out with the text that follows it, and calls beyond the limit do not come out.

use super::super::ToolEvent;

/// Collects what comes out.
#[derive(Debug)]
pub(super) struct Output {
    calls_max: usize,
    num_calls: usize,
    /// Members of the last call's arguments.
    num_members: usize,
    /// White space that counts only if text follows.
    space: String,
    events: Vec<ToolEvent>,
}

impl Output {
    /// Nothing yet; at most `calls_max` calls will come out.
    pub(super) fn new(calls_max: usize) -> Self {
        Self { calls_max, num_calls: 0, num_members: 0, space: String::new(), events: Vec::new() }
    }

    /// Calls that were found.
    pub(super) fn num_calls(&self) -> usize {
        self.num_calls
    }

    /// Calls that came out.
    pub(super) fn num_calls_out(&self) -> usize {
        self.num_calls.min(self.calls_max)
    }

    /// What has come out since the last time.
    pub(super) fn take(&mut self) -> Vec<ToolEvent> {
        std::mem::take(&mut self.events)
    }

    /// A call begins.
    pub(super) fn call(&mut self, name: String) {
        self.space.clear();
        self.num_members = 0;
        let index = self.num_calls;
        self.num_calls += 1;
        if index < self.calls_max {
            self.events.push(ToolEvent::Call { index, name });
        }
    }

    /// The last call has another member among its arguments.
    pub(super) fn member(&mut self, key: &str, value: &str) {
        let comma = if self.num_members > 0 { ", " } else { "" };
        self.num_members += 1;
        let key = serde_json::Value::from(key);
        self.arguments(&format!("{comma}{key}: {value}"));
    }

    /// The last call's arguments go on.
    pub(super) fn arguments(&mut self, piece: &str) {
        let last = self.num_calls.saturating_sub(1);
        if last >= self.calls_max || piece.is_empty() {
            return;
        }
        match self.events.last_mut() {
            Some(ToolEvent::Arguments { index, text }) if *index == last => text.push_str(piece),
            _ => self.events.push(ToolEvent::Arguments { index: last, text: piece.to_owned() }),
        }
    }

    /// A character of the text; white space waits for what follows.
    pub(super) fn text(&mut self, c: char) {
        self.space.push(c);
        if !c.is_whitespace() {
            self.text_ends();
        }
    }

    /// White space that may stand before a call.
    pub(super) fn space(&mut self, c: char) {
        self.space.push(c);
    }

    /// Nothing follows: white space comes out as well.
    pub(super) fn text_ends(&mut self) {
        let piece = std::mem::take(&mut self.space);
        match self.events.last_mut() {
            _ if piece.is_empty() => {}
            Some(ToolEvent::Text(text)) => text.push_str(&piece),
            _ => self.events.push(ToolEvent::Text(piece)),
        }
    }
}
