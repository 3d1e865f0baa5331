//! The head as a process of its own: what `coordinator start --head` launches.
//!
//! A head that led, and learns that another one does, starts its program anew in the same process, to stand by: nothing of what
//! it did goes on, and all its connections are closed.
//!
//! **Invariant:** it says one line on stdout, where it listens or why it cannot, and nothing after that.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::Command;

use clap::Args;
use nix::sys::stat::{Mode, umask};
use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};

use super::launch::{HeadFlags, end_on_signals, runtime};
use super::{CliError, Outcome, Surroundings};
use crate::head::{self, BoundHead, HeadOptions, HeadRecord, RunningHead, StandingHead, Stood};
use crate::store::etcd::{Deposed, EtcdPlace};

/// Run the head in this process
#[derive(Debug, Clone, Args)]
pub struct HeadProcessFlags {
    #[command(flatten)]
    pub head: HeadFlags,
    /// It has run before in this process: nobody waits for its line
    #[arg(long, hide = true)]
    again: bool,
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
    if !flags.again
        && let Err(error) = nix::unistd::setsid()
    {
        warn!(%error, "head stays in the session of whoever started it");
    }
    let result = runtime()?.block_on(serve(surroundings, flags));
    if let Err(error) = &result
        && !flags.again
    {
        let CliError { exit, code, message, hint } = error.clone();
        say(&StartLine::Failed { exit, code, message, hint })?;
    }
    result
}

async fn serve(surroundings: &Surroundings, flags: &HeadProcessFlags) -> Outcome {
    let log = Some(surroundings.environment.home.head_log());
    let bound = head::bind(HeadOptions { log, ..flags.head.options(surroundings) })?;
    let head = match &flags.head.store {
        Some(place) => match stand_by(surroundings, flags, place.clone(), bound).await? {
            Some(head) => head,
            None => return Ok(()),
        },
        None => {
            let head = bound.start()?;
            say(&StartLine::Listening(head.record.clone()))?;
            head
        }
    };
    end_on_signals(head.cluster.clone())?;
    head.ended().await;
    info!("head ended");
    Ok(())
}

/// Waits for the lead; none where the head was told to end before it had it.
async fn stand_by(
    surroundings: &Surroundings,
    flags: &HeadProcessFlags,
    place: EtcdPlace,
    bound: BoundHead,
) -> Result<Option<RunningHead>, CliError> {
    let deposed = start_again(surroundings, flags, bound.ports());
    let mut standing = bound.stand_by(place, deposed)?;
    end_on_signals(standing.cluster.clone())?;
    let leads_at_once = !flags.again && announce(&mut standing).await?;
    let Stood::Leads(head) = standing.stand().await? else {
        info!("head ended");
        return Ok(None);
    };
    if leads_at_once {
        say(&StartLine::Listening(head.record.clone()))?;
    }
    Ok(Some(*head))
}

/// Says that this head stands by; true where it leads instead, and says so when it listens.
async fn announce(standing: &mut StandingHead) -> Result<bool, CliError> {
    let seen = standing.first_look().await;
    if seen.leads {
        return Ok(true);
    }
    if seen.is_stranger {
        let hint = "Copy trust/authority.json, store/tokens.json and store/keys.json from that head's home to this one before its first start, or name another cluster: --store etcd://HOST:PORT/PREFIX";
        return Err(CliError::failed("other_authority", seen.trouble).with_hint(hint));
    }
    if seen.leader.is_none() && !seen.trouble.is_empty() {
        return Err(CliError::failed("store_unreachable", seen.trouble)
            .with_hint("Is etcd running there? --store etcd://HOST:PORT[,HOST:PORT]"));
    }
    say(&StartLine::Listening(standing.record(seen.leader.as_ref())))?;
    Ok(false)
}

/// Replaces this program by itself, on the same ports.
fn start_again(surroundings: &Surroundings, flags: &HeadProcessFlags, ports: [u16; 3]) -> Deposed {
    let [port, http_port, dashboard_port] = ports;
    let mut command = Command::new("/proc/self/exe");
    command.arg("head-process").arg("--again");
    command.args(HeadFlags { port, http_port, dashboard_port, ..flags.head.clone() }.words());
    command.arg(format!("--log-format={}", surroundings.global.log_format.as_str()));
    command.args(surroundings.global.log_level.as_ref().map(|level| format!("--log-level={level}")));
    command.args(surroundings.global.insecure.then_some("--insecure"));
    Box::new(move |why| {
        warn!(reason = why, "this head leads no more; it starts again, to stand by");
        let error = command.exec();
        error!(%error, "head cannot start again; it ends");
        std::process::exit(i32::from(CliError::FAILED));
    })
}

fn say(line: &StartLine) -> Outcome {
    let text = serde_json::to_string(line).map_err(std::io::Error::other)?;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{text}")?;
    Ok(stdout.flush()?)
}
