//! `coordinator status`: what runs, and for everything that does not: why.

use std::io::Write;
use std::time::Duration;

use clap::Args;

use super::connection::{self, AddressFlag};
use super::launch::runtime;
use super::status_text::text;
use super::{Outcome, Surroundings};

/// Time between two looks of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Show nodes, devices, placement groups, deployments, ranks and queues
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  coordinator status\n  coordinator status --watch")]
pub struct StatusFlags {
    #[command(flatten)]
    address: AddressFlag,
    /// Print one JSON object (with --watch: one a second)
    #[arg(long)]
    pub json: bool,
    /// Refresh every second
    #[arg(long)]
    watch: bool,
}

pub(super) fn run(surroundings: &Surroundings, flags: &StatusFlags) -> Outcome {
    runtime()?.block_on(async {
        let client = connection::require(flags.address.address.as_deref(), surroundings).await?;
        loop {
            let snapshot = client.status().await?;
            let shown = if flags.json {
                serde_json::to_string(&snapshot).map_err(std::io::Error::other)?
            } else {
                text(&snapshot)
            };
            let clear = if flags.watch && !flags.json { "\x1b[2J\x1b[H" } else { "" };
            let mut stdout = std::io::stdout();
            // A reader that went away (`| head`) has what it wants.
            if writeln!(stdout, "{clear}{}", shown.trim_end()).and_then(|()| stdout.flush()).is_err() || !flags.watch {
                return Ok(());
            }
            tokio::time::sleep(WATCH_INTERVAL).await;
        }
    })
}
