//! Tables for people: names left, numbers right.

use super::stats::Distribution;

/// Rows under a title.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<(String, String)>,
}

impl Table {
    /// Adds a row with a number.
    pub fn number(&mut self, name: &str, value: f64) -> &mut Self {
        self.rows.push((name.to_owned(), shown(value)));
        self
    }

    /// Adds a row with a count.
    pub fn count(&mut self, name: &str, value: u64) -> &mut Self {
        self.rows.push((name.to_owned(), value.to_string()));
        self
    }

    /// Adds the rows of a distribution, where it has samples.
    pub fn distribution(&mut self, name: &str, unit: &str, of: &Distribution) -> &mut Self {
        if of.count == 0 {
            return self;
        }
        for (part, value) in [("mean", of.mean), ("p50", of.p50), ("p90", of.p90), ("p99", of.p99)] {
            self.number(&format!("{name} {part}, {unit}"), value);
        }
        self
    }

    /// The table as text.
    pub fn render(&self, title: &str) -> String {
        let names = self.rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or_default();
        let values = self.rows.iter().map(|(_, value)| value.len()).max().unwrap_or_default();
        let mut out = format!("{title}\n{}\n", "-".repeat((names + 2 + values).max(title.chars().count())));
        for (name, value) in &self.rows {
            out.push_str(&format!("{name:<names$}  {value:>values$}\n"));
        }
        out
    }
}

/// Three digits that matter, no more than two behind the point.
fn shown(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_left_and_numbers_right() {
        let mut table = Table::default();
        table.count("requests", 100).number("output tokens/s", 1234.5);
        table.distribution("TTFT", "ms", &Distribution::new(vec![1.0])).distribution(
            "ITL",
            "ms",
            &Distribution::default(),
        );
        assert_eq!(
            table.render("serve"),
            "serve\n---------------------\nrequests          100\noutput tokens/s  1234\nTTFT mean, ms    1.00\n\
             TTFT p50, ms     1.00\nTTFT p90, ms     1.00\nTTFT p99, ms     1.00\n"
        );
    }
}
