//! `coordinator start --head`: the head and this machine's agent, as two processes in sessions of their own.

use std::net::IpAddr;
use std::process::Child;

use clap::Args;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::launch::{DeviceFlags, HeadFlags, abandon_head, local_address, runtime, start_agent, start_head};
use super::{CliError, Outcome, Surroundings};
use crate::cluster::membership::HeadClient;
use crate::head::{HeadRecord, HomeError, running_head};

/// Start the head and this machine's agent
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Examples:\n  coordinator start --head --num-gpus 2\n  coordinator start --head --cluster-host \
                        0.0.0.0 --block\n  coordinator start --head --store etcd://etcd-1:2379 --cluster-host 0.0.0.0\n\nExample:\n  coordinator start --head"
)]
pub struct StartFlags {
    /// Start a head here (machines without a head join one: worker join)
    #[arg(long, required = true)]
    head: bool,
    #[command(flatten)]
    device: DeviceFlags,
    #[command(flatten)]
    flags: HeadFlags,
    /// Stay in the foreground
    #[arg(long)]
    block: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub(super) fn run(surroundings: &Surroundings, flags: &StartFlags) -> Outcome {
    let home = &surroundings.environment.home;
    if let Some(running) = running_head(home) {
        let error = HomeError::Running { home: home.path().to_owned(), running: Some(Box::new(running)) };
        return Err(crate::head::HeadError::from(error).into());
    }
    let (child, record) = start_head(surroundings, &flags.flags)?;
    runtime()?.block_on(async {
        let agent = match start_agent(surroundings, &record, &flags.device).await {
            Ok(agent) => agent,
            Err(error) => {
                abandon_head(child, &record).await;
                return Err(error);
            }
        };
        announce(&record, agent, flags).await?;
        if flags.block { stay(child, &record).await } else { Ok(()) }
    })
}

async fn announce(record: &HeadRecord, agent: u32, flags: &StartFlags) -> Outcome {
    if flags.json {
        let line = json!({
            "address": record.address,
            "http": record.http,
            "dashboard": record.dashboard,
            "pid": record.process.pid,
            "agent_pid": agent,
            "log_dir": record.log_dir,
            "stands_by": record.stands_by,
        });
        println!("{line}");
        return Ok(());
    }
    if let Some(leader) = &record.stands_by {
        let leader = if leader.is_empty() { "no head leads yet".to_owned() } else { format!("{leader} leads") };
        println!("head      {} (pid {}) stands by; {leader}", record.address, record.process.pid);
        println!("agent     pid {agent}; joins the head that leads");
        println!("logs      {}", record.log_dir.display());
        return Ok(());
    }
    let snapshot = HeadClient::connect(local_address(record)).await?.status().await?;
    let offers = snapshot.nodes.iter().find(|node| node.pid == agent);
    let offers = offers.map(|node| format!("{} offers {} slots: {}", node.id, node.slots, node.device));
    println!("head      {} (pid {})", record.address, record.process.pid);
    println!("agent     pid {agent}; {}", offers.unwrap_or_default());
    println!("API       {}/v1", record.http);
    println!("dashboard {}", record.dashboard);
    println!("logs      {}", record.log_dir.display());
    println!();
    println!("{}", joining(&record.address));
    println!("Serve a model:       coordinator serve MODEL --tensor-parallel-size N");
    println!("See what runs:       coordinator status");
    println!("End it all:          coordinator stop");
    Ok(())
}

/// How other machines join, or why they cannot.
fn joining(address: &str) -> String {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
    if host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()) || host == "localhost" {
        "Other machines:      cannot join, this head listens on loopback only; --cluster-host 0.0.0.0 opens it"
            .to_owned()
    } else {
        format!("Other machines:      worker join --address {address}")
    }
}

/// Stays until the head ends or a signal comes, then ends everything.
async fn stay(mut child: Child, record: &HeadRecord) -> Outcome {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let waiting = tokio::task::spawn_blocking(move || child.wait());
    tokio::pin!(waiting);
    let stopping = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        match HeadClient::connect(local_address(record)).await {
            Ok(client) => client.stop().await,
            Err(error) => Err(error),
        }
    };
    let asked = tokio::select! {
        status = &mut waiting => return ended(status, record, false),
        result = stopping => result,
    };
    if let Err(error) = asked {
        let pid = record.process.pid;
        return Err(CliError::from(error).with_hint(format!("The head (pid {pid}) may still run: coordinator stop")));
    }
    ended(waiting.await, record, true)
}

fn ended(
    status: Result<std::io::Result<std::process::ExitStatus>, tokio::task::JoinError>,
    record: &HeadRecord,
    asked: bool,
) -> Outcome {
    let status = status.map_err(std::io::Error::other)??;
    if status.success() || asked {
        return Ok(());
    }
    let (pid, logs) = (record.process.pid, record.log_dir.display());
    Err(CliError::failed("head_ended", format!("the head (pid {pid}) ended with {status}; see {logs}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_says_which_flag_opens_it() {
        assert!(joining("127.0.0.1:8001").contains("--cluster-host 0.0.0.0"));
        assert!(joining("[::1]:8001").contains("--cluster-host"));
        assert!(joining("gpu-1:8001").ends_with("worker join --address gpu-1:8001"));
    }
}
