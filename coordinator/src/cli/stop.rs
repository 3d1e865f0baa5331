//! `coordinator stop`: the end of the cluster that the head of this home (or at `--address`) leads.
//!
//! **Invariant:** signals go only to the processes that this home's records name, never by name, and only while their
//! start times say that they are still the same.

use std::fs;
use std::time::{Duration, Instant};

use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::connection::{self, AddressFlag};
use super::launch::runtime;
use super::{CliError, Outcome, Surroundings};
use crate::cluster::membership::HeadClient;
use crate::config::{Home, defaults};
use crate::head::{HeadRecord, ProcessId, running_head};

/// Time for a process to end after SIGTERM; then comes SIGKILL.
const TERM_DEADLINE: Duration = Duration::from_secs(15);
/// Time for a killed process to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(5);

/// Drain and end deployments, agents and the head; returns when the processes have ended
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:\n  coordinator stop")]
pub struct StopFlags {
    #[command(flatten)]
    address: AddressFlag,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(surroundings: &Surroundings, flags: &StopFlags) -> Outcome {
    runtime()?.block_on(async {
        let home = &surroundings.environment.home;
        let named = flags.address.address.as_deref();
        let processes: Vec<ProcessId> = if named.is_some() { Vec::new() } else { own_processes(home) };
        let asked = match connection::find(named, surroundings).await {
            Ok(Some(client)) => {
                let waits_for = "requests that run may still end, then the processes do";
                connection::patiently((!flags.json).then_some(waits_for), ask(&client)).await
            }
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        match asked {
            Ok(()) => {}
            // The head of this home does not answer: its process can still be told.
            Err(error) if !processes.is_empty() => eprintln!("{}; its processes are ended by signal", error.message),
            Err(error) => return Err(error),
        }
        let ended = end_processes(&processes).await?;
        if flags.json {
            println!("{}", json!({"stopped": ended}));
        } else if named.is_none() && processes.is_empty() {
            eprintln!("no head runs in {}{}", home.path().display(), lone_agent(home));
        } else {
            eprintln!("stopped");
        }
        Ok(())
    })
}

/// An agent of this home that waits for another machine's head, or for one that is gone.
fn lone_agent(home: &Home) -> String {
    let Some(record) = agent_record(home) else { return String::new() };
    let runs = record["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).and_then(ProcessId::of);
    match (runs, record["head"].as_str()) {
        (Some(agent), Some(head)) => format!("; its agent (pid {}) belongs to {head}: worker leave ends it", agent.pid),
        _ => String::new(),
    }
}

fn agent_record(home: &Home) -> Option<serde_json::Value> {
    serde_json::from_str(&fs::read_to_string(home.agent_record()).ok()?).ok()
}

/// The head's word that everything has ended may be lost with the head: what counts is that the processes go.
async fn ask(client: &HeadClient) -> Outcome {
    use crate::cluster::membership::CallError;
    match client.stop().await {
        Ok(()) | Err(CallError::Lost { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The head of this home and the agent that it was started with.
fn own_processes(home: &Home) -> Vec<ProcessId> {
    let head = running_head(home);
    let record = agent_record(home).unwrap_or_default();
    let serves =
        |head: &HeadRecord| record["head"].as_str().is_some_and(|at| at == head.address || at == head.local_address);
    // One that was started with a head that is gone waits for it: it is this cluster's too.
    let is_ours = record["with_head"].as_bool() == Some(true) || head.as_ref().is_some_and(serves);
    let pid = record["pid"].as_u64().filter(|_| is_ours).and_then(|pid| u32::try_from(pid).ok());
    let agent = pid.and_then(ProcessId::of);
    head.map(|head| head.process).into_iter().chain(agent).collect()
}

/// Waits for processes; those that do not go by themselves are told by signals.
async fn end_processes(processes: &[ProcessId]) -> Result<Vec<u32>, CliError> {
    let grace = Duration::from_secs(3);
    for (signal, patience) in
        [(None, grace), (Some(Signal::SIGTERM), TERM_DEADLINE), (Some(Signal::SIGKILL), KILL_DEADLINE)]
    {
        for process in processes.iter().filter(|process| process.is_alive()) {
            if let (Some(signal), Ok(pid)) = (signal, i32::try_from(process.pid)) {
                // It may have ended since the look.
                let _ = kill(Pid::from_raw(pid), signal);
            }
        }
        if gone(processes, patience).await {
            return Ok(processes.iter().map(|process| process.pid).collect());
        }
    }
    let left: Vec<String> =
        processes.iter().filter(|process| process.is_alive()).map(|process| process.pid.to_string()).collect();
    Err(CliError::failed("still_running", format!("processes {} have not ended", left.join(", "))))
}

async fn gone(processes: &[ProcessId], patience: Duration) -> bool {
    let started = Instant::now();
    while processes.iter().any(|process| process.is_alive()) {
        if started.elapsed() > patience.min(defaults::STOP_DEADLINE) {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stubborn_process_is_ended_by_its_own_id() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep starts");
        let process = ProcessId::of(child.id()).expect("it runs");
        let ended = tokio::spawn(async move { end_processes(&[process]).await });
        let status = tokio::task::spawn_blocking(move || child.wait()).await.expect("joins").expect("waits");
        assert!(!status.success());
        assert_eq!(ended.await.expect("joins"), Ok(vec![process.pid]));
    }
}
