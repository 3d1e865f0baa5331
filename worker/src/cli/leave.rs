//! `worker leave`: ends the agent of this home, and with it its ranks.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::agent::record;
use crate::config::{Config, Environment, Flags, defaults};

/// Time between two looks while `leave` waits.
const LEAVE_PAUSE: Duration = Duration::from_millis(20);

#[derive(Args)]
pub(super) struct LeaveArgs {
    /// Only if this is the node's id
    #[arg(long, value_name = "ID")]
    node: Option<String>,
    /// First let what runs here end, or go on elsewhere: no request is lost where another machine has room
    #[arg(long)]
    drain: bool,
}

/// Asks the agent to end, waits, and ends it where it does not.
pub(super) fn leave(args: &LeaveArgs, flags: Flags) -> anyhow::Result<()> {
    let config = Config::load(flags, Environment::read())?;
    let Some(agent) = record::running(&config.home).context("the home's record")? else {
        bail!("no worker of {} is running", config.home.path().display());
    };
    if args.node.as_ref().is_some_and(|wanted| *wanted != agent.node_id.0) {
        bail!("this home's node is {}; `worker leave` acts on its own home only (--home, PHALANX_HOME)", agent.node_id);
    }
    let mut ways =
        vec![(Signal::SIGTERM, defaults::AGENT_END_DEADLINE), (Signal::SIGKILL, defaults::RANK_END_DEADLINE)];
    if args.drain {
        ways.insert(0, (Signal::SIGUSR2, defaults::DRAIN_DEADLINE));
    }
    for (signal, patience) in ways {
        // The lock is held, so the record is of a living process. One that ends right now is what is wanted.
        let _ = kill(Pid::from_raw(agent.pid.cast_signed()), signal);
        let started = Instant::now();
        while started.elapsed() < patience {
            if record::running(&config.home)?.is_none_or(|now| now.pid != agent.pid) {
                eprintln!("{} has left {}", agent.node_id, agent.head);
                return Ok(());
            }
            std::thread::sleep(LEAVE_PAUSE);
        }
    }
    bail!("the agent (pid {}) does not end", agent.pid)
}
