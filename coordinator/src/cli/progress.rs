//! How a deployment's progress is shown: bars on a terminal, plain lines otherwise, nothing for scripts.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{HumanDuration, MultiProgress, ProgressBar, ProgressState, ProgressStyle};

/// A bar that counts what is done of `count`. How long the rest takes is said once the first is done.
pub(super) fn counting_bar(count: usize, what: &str) -> ProgressBar {
    let bar = ProgressBar::new(count as u64);
    let template = format!("[{{bar:30}}] {{pos}}/{{len}} {what}, {{msg}} {{elapsed}}{{left}}");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        let left = |state: &ProgressState, text: &mut dyn std::fmt::Write| {
            if state.pos() > 0 {
                // A bar that cannot be drawn is no loss.
                let _ = write!(text, " ({:#} left)", HumanDuration(state.eta()));
            }
        };
        bar.set_style(style.with_key("left", left).progress_chars("=> "));
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// Shows what happens until a deployment is ready.
pub(super) enum Progress {
    /// A bar for each rank.
    Bars {
        /// All of them.
        bars: MultiProgress,
        /// By rank.
        ranks: BTreeMap<u32, ProgressBar>,
    },
    /// A line for each phase of each rank.
    Lines {
        /// The last phase of each rank.
        phases: BTreeMap<u32, String>,
    },
    /// Nothing.
    Silent,
}

impl Progress {
    /// What fits stderr; nothing with `--json`.
    pub fn new(json: bool) -> Self {
        if json {
            Self::Silent
        } else if std::io::stderr().is_terminal() {
            Self::Bars { bars: MultiProgress::new(), ranks: BTreeMap::new() }
        } else {
            Self::Lines { phases: BTreeMap::new() }
        }
    }

    /// A line about the whole deployment.
    pub fn line(&mut self, text: &str) {
        match self {
            // Where a line cannot be drawn, the bars cannot either, and nothing is lost but the show.
            Self::Bars { bars, .. } => drop(bars.println(text)),
            Self::Lines { .. } => eprintln!("{text}"),
            Self::Silent => {}
        }
    }

    /// A rank's phase.
    pub fn rank(&mut self, rank: u32, phase: &str, fraction: Option<f32>, text: &str) {
        match self {
            Self::Bars { bars, ranks } => {
                let bar = ranks.entry(rank).or_insert_with(|| bars.add(new_bar()));
                if let Some(fraction) = fraction {
                    bar.set_position((f64::from(fraction) * 100.0) as u64);
                }
                bar.set_message(text.to_owned());
                if phase == "ready" {
                    bar.finish();
                }
            }
            Self::Lines { phases } => {
                if phases.insert(rank, phase.to_owned()).as_deref() != Some(phase) {
                    eprintln!("{text}");
                }
            }
            Self::Silent => {}
        }
    }

    /// The show is over.
    pub fn end(self) {
        if let Self::Bars { bars, ranks } = self {
            for bar in ranks.values() {
                bar.finish_and_clear();
            }
            // As above: only the show is lost.
            drop(bars.clear());
        }
    }
}

fn new_bar() -> ProgressBar {
    let bar = ProgressBar::new(100);
    if let Ok(style) = ProgressStyle::with_template("{spinner} [{bar:20}] {msg} {elapsed}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}
