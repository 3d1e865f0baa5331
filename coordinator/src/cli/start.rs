//! `coordinator start --head`: the head and this machine's agent, as two processes in sessions of their own.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Child;

use clap::Args;
use phalanx_trust::files::write_private;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::launch::{DeviceFlags, HeadFlags, abandon_head, local_address, runtime, start_agent, start_head};
use super::token::{TOKEN_TTL, join_line};
use super::{CliError, Outcome, Surroundings};
use crate::cluster::membership::HeadClient;
use crate::head::{HeadRecord, HomeError, running_head};
use crate::security::tokens::{TokenScope, TokenWish};

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
    /// Write a join token to this file, for machines that are given it by a mount or a secret; the one before is revoked
    #[arg(long, value_name = "FILE")]
    join_token_file: Option<PathBuf>,
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
    let client = HeadClient::connect(local_address(record)).await?;
    let leads = record.stands_by.is_none();
    let token = if leads { join_token(&client, record).await? } else { None };
    if let Some(file) = flags.join_token_file.as_deref().filter(|_| leads && !record.insecure) {
        write_join_token(&client, file).await?;
    }
    if flags.json {
        let line = json!({
            "address": record.address,
            "http": record.http,
            "dashboard": record.dashboard,
            "pid": record.process.pid,
            "agent_pid": agent,
            "log_dir": record.log_dir,
            "stands_by": record.stands_by,
            "token": token,
            "insecure": record.insecure,
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
    let snapshot = client.status().await?;
    let offers = snapshot.nodes.iter().find(|node| node.pid == agent);
    let offers = offers.map(|node| format!("{} offers {} slots: {}", node.id, node.slots, node.device));
    println!("head      {} (pid {})", record.address, record.process.pid);
    println!("agent     pid {agent}; {}", offers.unwrap_or_default());
    println!("API       {}/v1", record.http);
    println!("dashboard {}", record.dashboard);
    println!("logs      {}", record.log_dir.display());
    println!();
    println!("{}", joining(record, token.as_deref()));
    println!("Serve a model:       coordinator serve MODEL --tensor-parallel-size N");
    println!("See what runs:       coordinator status");
    println!("End it all:          coordinator stop");
    Ok(())
}

fn is_loopback(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
    host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()) || host == "localhost"
}

/// A token for other machines, where any can come.
async fn join_token(client: &HeadClient, record: &HeadRecord) -> Result<Option<String>, CliError> {
    if record.insecure || is_loopback(&record.address) {
        return Ok(None);
    }
    let note = "start".to_owned();
    let wish = TokenWish { scopes: vec![TokenScope::Join], ttl: Some(TOKEN_TTL), note };
    Ok(Some(client.create_token(&wish).await?.text))
}

/// Leaves a token that does not end by itself in a file of mode 0600.
async fn write_join_token(client: &HeadClient, file: &Path) -> Outcome {
    let note = format!("file {}", file.display());
    let before = client.tokens().await?.tokens;
    let token =
        client.create_token(&TokenWish { scopes: vec![TokenScope::Join], ttl: None, note: note.clone() }).await?;
    write_private(file, token.text.as_bytes())
        .map_err(|error| CliError::failed("io", format!("cannot write {}: {error}", file.display())))?;
    for old in before.iter().filter(|old| old.note == note && old.state() == "valid") {
        client.revoke_token(&old.id).await?;
    }
    Ok(())
}

/// How other machines join, or why they cannot.
fn joining(record: &HeadRecord, token: Option<&str>) -> String {
    let HeadRecord { address, .. } = record;
    if record.insecure {
        let plain = "INSECURE:            plain text between machines; whoever reaches the port joins and commands";
        format!("{plain}\nOther machines:      worker join --address {address} --insecure")
    } else if is_loopback(address) {
        "Other machines:      cannot join, this head listens on loopback only; --cluster-host 0.0.0.0 opens it"
            .to_owned()
    } else {
        let join = join_line(address, token.unwrap_or_default());
        format!(
            "Other machines:      {join}\n                     (good for 24 h; coordinator token create makes more)"
        )
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
        let record = |address: &str, insecure| HeadRecord {
            process: crate::head::ProcessId { pid: 1, started: 1 },
            address: address.into(),
            local_address: address.into(),
            http: String::new(),
            dashboard: String::new(),
            socket: None,
            log_dir: "/l".into(),
            stands_by: None,
            trust_dir: "/t".into(),
            insecure,
        };
        assert!(joining(&record("127.0.0.1:8001", false), None).contains("--cluster-host 0.0.0.0"));
        assert!(joining(&record("[::1]:8001", false), None).contains("--cluster-host"));
        let open = joining(&record("gpu-1:8001", false), Some("phxt"));
        assert!(open.contains("worker join --address gpu-1:8001 --token phxt"), "{open}");
        assert!(joining(&record("gpu-1:8001", true), None).contains("INSECURE"));
    }
}
