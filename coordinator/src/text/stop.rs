//! Stop strings in a stream of text.

/// Finds the first stop string, and holds back only text that may still become one.
#[derive(Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    include: bool,
    held: String,
}

/// What one piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopStep {
    /// Text that may be shown.
    pub text: String,
    /// The stop string that was found; nothing may be pushed afterwards.
    pub stopped: Option<String>,
}

impl StopMatcher {
    /// `include` keeps the stop string in the text. Empty stop strings must have been refused before.
    pub fn new(stops: Vec<String>, include: bool) -> Self {
        Self { stops, include, held: String::new() }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, piece: &str) -> StopStep {
        self.held.push_str(piece);
        let first =
            self.stops.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop))).min_by_key(|(at, _)| *at);
        if let Some((at, stop)) = first {
            let (stop, end) = (stop.clone(), if self.include { at + stop.len() } else { at });
            let text = self.held[..end].to_owned();
            self.held.clear();
            return StopStep { text, stopped: Some(stop) };
        }
        let keep = self.longest_possible_start();
        let tail = self.held.split_off(self.held.len() - keep);
        StopStep { text: std::mem::replace(&mut self.held, tail), stopped: None }
    }

    /// The end of the text: what was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of `held` that begin some stop string.
    fn longest_possible_start(&self) -> usize {
        let starts = |stop: &String| {
            let longest = stop.len().saturating_sub(1).min(self.held.len());
            (1..=longest)
                .rev()
                .find(|len| stop.is_char_boundary(*len) && self.held.ends_with(&stop[..*len]))
                .unwrap_or(0)
        };
        self.stops.iter().map(starts).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(stops: &[&str], include: bool, pieces: &[&str], text: &str, stopped: Option<&str>) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).to_owned()).collect(), include);
        let mut shown = String::new();
        let mut found = None;
        for piece in pieces {
            let step = matcher.push(piece);
            shown.push_str(&step.text);
            if step.stopped.is_some() {
                found = step.stopped;
                break;
            }
        }
        if found.is_none() {
            shown.push_str(&matcher.finish());
        }
        assert_eq!((shown.as_str(), found.as_deref()), (text, stopped));
    }

    #[test]
    fn stop_strings_are_found_across_pieces() {
        check(&["END"], false, &["ab", "E", "N", "D", "x"], "ab", Some("END"));
        check(&["END"], true, &["abE", "NDx"], "abEND", Some("END"));
        check(&["END"], false, &["abEN", "abE"], "abENabE", None);
        check(&["aab"], false, &["a", "a", "a", "b"], "a", Some("aab"));
        check(&["法国", "国家"], false, &["是法", "国家"], "是", Some("法国"));
        check(&["x", "wx"], false, &["vw", "x"], "v", Some("wx"));
        check(&[], false, &["a", "b"], "ab", None);
    }

    #[test]
    fn only_a_possible_stop_is_held_back() {
        let mut matcher = StopMatcher::new(vec!["\n\n".into()], false);
        assert_eq!(matcher.push("a\n").text, "a");
        assert_eq!(matcher.push("b").text, "\nb");
    }
}
