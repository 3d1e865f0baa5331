//! What became of cells: a line for each, and a table in the end.

use std::fmt;
use std::time::Duration;

use super::{Cell, words};

/// What was measured in a cell, by name; seconds.
pub type Figures = Vec<(&'static str, Duration)>;

/// How a cell went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// As the table says.
    Right,
    /// This machine gives no right to do that: no namespaces, no mounts.
    LeftOut,
    /// Not as the table says, or not in time.
    Wrong,
}

/// One cell that was played.
#[derive(Debug, Clone)]
pub struct Played {
    /// The cell.
    pub cell: Cell,
    /// How it went.
    pub verdict: Verdict,
    /// What was measured.
    pub figures: Figures,
    /// How long it took, with its scene where that was set for it.
    pub took: Duration,
}

impl fmt::Display for Played {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Right => "as expected",
            Verdict::LeftOut => "left out",
            Verdict::Wrong => "WRONG",
        };
        let figures: Vec<String> =
            self.figures.iter().map(|(name, time)| format!("{name} {:.2} s", time.as_secs_f64())).collect();
        let (name, expected, took) = (self.cell.name(), words(self.cell.expected), self.took.as_secs_f64());
        write!(f, "{name:<30} {expected:<15} {verdict:<12} {took:>6.1} s  {}", figures.join(", "))
    }
}

/// All that were played so far.
#[derive(Debug, Default)]
pub struct Report {
    /// In the order of their play.
    pub cells: Vec<Played>,
}

impl Report {
    /// How many went so.
    pub fn count(&self, verdict: Verdict) -> usize {
        self.cells.iter().filter(|played| played.verdict == verdict).count()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nfault matrix:")?;
        for played in &self.cells {
            writeln!(f, "  {played}")?;
        }
        let [right, left_out, wrong] =
            [Verdict::Right, Verdict::LeftOut, Verdict::Wrong].map(|verdict| self.count(verdict));
        write!(f, "{right} cells as expected, {left_out} left out, {wrong} wrong")
    }
}
