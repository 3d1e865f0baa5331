//! The head as a process of its own: what `coordinator start --head` launches.
//!
//! **Invariant:** it says one line on stdout, where it listens or why it cannot, and nothing after that.

use std::io::Write;

use clap::Args;
use nix::sys::stat::{Mode, umask};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::launch::{HeadFlags, end_on_signals, runtime};
use super::{CliError, Outcome, Surroundings};
use crate::head::{self, HeadOptions, HeadRecord};

/// Run the head in this process
#[derive(Debug, Clone, Args)]
pub struct HeadProcessFlags {
    #[command(flatten)]
    pub head: HeadFlags,
}

/// The line that tells how the start went.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartLine {
    /// It listens.
    Listening(HeadRecord),
    /// It ends.
    Failed {
        /// Exit code.
        exit: u8,
        /// Kind.
        code: String,
        /// What happened.
        message: String,
        /// What to do.
        hint: String,
    },
}

pub(super) fn run(surroundings: &Surroundings, flags: &HeadProcessFlags) -> Outcome {
    // What it writes is for its owner.
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
    // A session of its own: it stays when the terminal goes. It is no group leader, so this cannot fail but by a tracer's doing.
    if let Err(error) = nix::unistd::setsid() {
        warn!(%error, "head stays in the session of whoever started it");
    }
    let result = runtime()?.block_on(serve(surroundings, flags));
    if let Err(error) = &result {
        let CliError { exit, code, message, hint } = error.clone();
        say(&StartLine::Failed { exit, code, message, hint })?;
    }
    result
}

async fn serve(surroundings: &Surroundings, flags: &HeadProcessFlags) -> Outcome {
    let log = Some(surroundings.environment.home.head_log());
    let head = head::bind(HeadOptions { log, ..flags.head.options(surroundings) })?.start()?;
    end_on_signals(head.cluster.clone())?;
    say(&StartLine::Listening(head.record.clone()))?;
    head.ended().await;
    info!("head ended");
    Ok(())
}

fn say(line: &StartLine) -> Outcome {
    let text = serde_json::to_string(line).map_err(std::io::Error::other)?;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{text}")?;
    Ok(stdout.flush()?)
}
