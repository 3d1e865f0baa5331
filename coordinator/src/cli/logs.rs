//! `coordinator logs`: what head, agents and ranks wrote, from whatever machine.

use std::io::Write;
use std::time::Duration;

use clap::Args;

use super::connection::{self, AddressFlag};
use super::launch::runtime;
use super::{Outcome, Surroundings};

/// Time between two looks of `--follow`.
const LOOK_INTERVAL: Duration = Duration::from_millis(300);

/// Show the log of the head, of a node's agent or of a rank
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  coordinator logs\n  coordinator logs chat/0/1 --follow\n  coordinator logs node-a --tail 50"
)]
pub struct LogsFlags {
    /// A rank (DEPLOYMENT/REPLICA/RANK, or as much of it as is enough), a node's id, or head
    #[arg(value_name = "RANK|NODE", default_value = "head")]
    target: String,
    /// Go on with what is written
    #[arg(long, short)]
    follow: bool,
    /// How many of the last lines
    #[arg(long, value_name = "N", default_value_t = 100)]
    tail: u32,
    #[command(flatten)]
    address: AddressFlag,
}

pub(super) fn run(surroundings: &Surroundings, flags: &LogsFlags) -> Outcome {
    runtime()?.block_on(async {
        let client = connection::require(flags.address.address.as_deref(), surroundings).await?;
        let mut offset = None;
        loop {
            let part = client.log(&flags.target, flags.tail, offset).await?;
            let is_empty = part.text.is_empty();
            let mut stdout = std::io::stdout();
            // A reader that went away (`| head`) has what it wants.
            if stdout.write_all(&part.text).and_then(|()| stdout.flush()).is_err() || !flags.follow {
                return Ok(());
            }
            offset = Some(part.next_offset);
            if is_empty {
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
        }
    })
}
