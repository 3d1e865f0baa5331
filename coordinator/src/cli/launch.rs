//! Starting processes: the head, and this machine's agent beside it.
//!
//! **Invariant:** what was started is known by its pid; a start that fails leaves nothing behind.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use phalanx_trust::files::private_dir;
use serde::Deserialize;
use tokio::signal::unix::{SignalKind, signal};

use super::head_process::StartLine;
use super::{CliError, Outcome, Surroundings};
use crate::api::AllowedOrigins;
use crate::cluster::ClusterHandle;
use crate::cluster::membership::HeadClient;
use crate::config::{Home, defaults, parse_duration};
use crate::head::{HeadOptions, HeadRecord, PortWish, ProcessId};
use crate::security::tokens::home_token;
use crate::store::etcd::EtcdPlace;
use crate::traces::TraceEndpoint;

/// Which devices a machine offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum DeviceChoice {
    /// GPUs if there are any, else CPU
    #[default]
    Auto,
    /// NVIDIA GPUs
    Cuda,
    /// AMD GPUs
    Rocm,
    /// CPU slots
    Cpu,
}

impl DeviceChoice {
    /// The word of the flag.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cuda => "cuda",
            Self::Rocm => "rocm",
            Self::Cpu => "cpu",
        }
    }
}

/// Where a head listens.
#[derive(Debug, Clone, Args)]
pub struct HeadFlags {
    /// Port of the cluster (gRPC); 0 picks a free one
    #[arg(long, default_value_t = defaults::CLUSTER_PORT)]
    pub port: u16,
    /// Host of the cluster's port; 0.0.0.0 lets machines join
    #[arg(long, default_value = defaults::HOST)]
    pub cluster_host: String,
    /// Where other machines reach this one, if not at --cluster-host
    #[arg(long, value_name = "HOST[:PORT]")]
    pub advertise_address: Option<String>,
    /// Port of the OpenAI-compatible API; 0 picks a free one
    #[arg(long, default_value_t = defaults::HTTP_PORT)]
    pub http_port: u16,
    /// Host of the OpenAI-compatible API
    #[arg(long, default_value = defaults::HOST)]
    pub host: String,
    /// Port of the dashboard; 0 picks a free one
    #[arg(long, default_value_t = defaults::DASHBOARD_PORT)]
    pub dashboard_port: u16,
    /// Host of the dashboard
    #[arg(long, default_value = defaults::HOST)]
    pub dashboard_host: String,
    /// How long agents and ranks wait for a head that is gone, with their weights
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = parse_duration)]
    pub head_grace: Duration,
    /// How long a node's certificate is valid; its agent renews it in time
    #[arg(long, value_name = "DURATION", default_value = "720h", value_parser = parse_duration, hide = true)]
    pub certificate_lifetime: Duration,
    /// Web pages that may use the API: origins with commas between them, or * for all [default: none]
    #[arg(long, value_name = "ORIGINS")]
    pub allowed_origins: Option<AllowedOrigins>,
    /// Collector that spans of requests are sent to, by OTLP over gRPC: http://host:4317 [default: none]
    #[arg(long, value_name = "URL")]
    pub otlp_traces_endpoint: Option<TraceEndpoint>,
    /// Silence after which a machine counts as dead and its ranks are started elsewhere, at least 1s
    #[arg(long, value_name = "DURATION", default_value = "4500ms", value_parser = parse_node_timeout)]
    pub node_timeout: Duration,
    /// Where the cluster's state is, for two heads: the second stands by [default: in this PHALANX_HOME, for one head]
    #[arg(long, value_name = "etcd://HOST:PORT[,HOST:PORT]")]
    pub store: Option<EtcdPlace>,
}

fn parse_node_timeout(text: &str) -> Result<Duration, String> {
    let timeout = parse_duration(text)?;
    let least = defaults::NODE_TIMEOUT_MIN;
    if timeout < least { Err(format!("{text} is below {least:?}")) } else { Ok(timeout) }
}

impl HeadFlags {
    /// The head's options in these surroundings.
    pub fn options(&self, surroundings: &Surroundings) -> HeadOptions {
        let wish = |purpose, flag, host_flag, host: &str, port| PortWish {
            purpose,
            flag,
            host_flag,
            host: host.to_owned(),
            port,
        };
        let http = wish("HTTP", "--http-port", "--host", &self.host, self.http_port);
        let dashboard = (&self.dashboard_host, self.dashboard_port);
        HeadOptions {
            home: surroundings.environment.home.clone(),
            cluster: wish("the cluster", "--port", "--cluster-host", &self.cluster_host, self.port),
            http,
            dashboard: wish("the dashboard", "--dashboard-port", "--dashboard-host", dashboard.0, dashboard.1),
            advertise_address: self.advertise_address.clone(),
            head_grace: self.head_grace,
            node_timeout: self.node_timeout,
            log: None,
            api_keys: Vec::new(),
            insecure: surroundings.global.insecure,
            certificate_lifetime: self.certificate_lifetime,
            allowed_origins: self.allowed_origins.clone().unwrap_or_default(),
            traces: self.otlp_traces_endpoint.clone(),
        }
    }

    /// The same flags for another process.
    pub(super) fn words(&self) -> Vec<String> {
        let mut words = vec![
            format!("--port={}", self.port),
            format!("--cluster-host={}", self.cluster_host),
            format!("--http-port={}", self.http_port),
            format!("--host={}", self.host),
            format!("--dashboard-port={}", self.dashboard_port),
            format!("--dashboard-host={}", self.dashboard_host),
            format!("--head-grace={}ms", self.head_grace.as_millis()),
            format!("--certificate-lifetime={}ms", self.certificate_lifetime.as_millis()),
            format!("--node-timeout={}ms", self.node_timeout.as_millis()),
        ];
        words.extend(self.allowed_origins.as_ref().map(|origins| format!("--allowed-origins={origins}")));
        words.extend(self.otlp_traces_endpoint.as_ref().map(|url| format!("--otlp-traces-endpoint={url}")));
        words.extend(self.advertise_address.as_ref().map(|address| format!("--advertise-address={address}")));
        words.extend(self.store.as_ref().map(|place| format!("--store={place}")));
        words
    }
}

/// What this machine's agent offers.
#[derive(Debug, Clone, Args)]
pub struct DeviceFlags {
    /// Device slots to offer [default: all GPUs, or one CPU slot]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub num_gpus: Option<u32>,
    /// Which devices to offer
    #[arg(long, value_enum, default_value_t)]
    pub device: DeviceChoice,
    /// Label of this machine, for placement groups that ask for it; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_pair)]
    pub labels: Vec<(String, String)>,
}

/// Reads `KEY=VALUE`.
///
/// # Errors
/// It is none.
pub fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text} is not KEY=VALUE")),
    }
}

/// A runtime for a head or a command.
///
/// # Errors
/// The system gives no threads.
pub fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("head").build()?)
}

/// Stops the cluster on SIGINT or SIGTERM; a second one ends the process at once.
///
/// # Errors
/// Signals cannot be received.
pub fn end_on_signals(cluster: ClusterHandle) -> Outcome {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::spawn(async move {
        let mut asked = false;
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if std::mem::replace(&mut asked, true) {
                std::process::exit(i32::from(CliError::FAILED));
            }
            let cluster = cluster.clone();
            // The answer is that `RunningHead::ended` resolves.
            tokio::spawn(async move { cluster.stop().await });
        }
    });
    Ok(())
}

/// Starts the head as a process of its own; returns when it listens.
///
/// # Errors
/// It cannot listen, or not in time.
pub fn start_head(surroundings: &Surroundings, flags: &HeadFlags) -> Result<(Child, HeadRecord), CliError> {
    let log_dir = surroundings.environment.home.log_dir();
    let log_path = surroundings.environment.home.head_log();
    let opened =
        private_dir(&log_dir).and_then(|()| OpenOptions::new().create(true).append(true).mode(0o600).open(&log_path));
    let log = opened.map_err(|error| {
        CliError::failed("io", format!("cannot write {}: {error}", log_path.display()))
            .with_hint("PHALANX_HOME names another folder")
    })?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("head-process").args(flags.words());
    command.arg(format!("--log-format={}", surroundings.global.log_format.as_str()));
    command.args(surroundings.global.log_level.as_ref().map(|level| format!("--log-level={level}")));
    command.args(surroundings.global.insecure.then_some("--insecure"));
    command.env("PHALANX_HOME", surroundings.environment.home.path()).env_remove("PHALANX_TOKEN");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn()?;
    match first_line(&mut child) {
        Some(StartLine::Listening(record)) => Ok((child, record)),
        Some(StartLine::Failed { exit, code, message, hint }) => {
            let _ = child.wait();
            Err(CliError { exit, code, message, hint })
        }
        None => {
            let _ = child.kill();
            let _ = child.wait();
            let message = format!("the head did not listen; its log is {}", log_path.display());
            Err(CliError::failed("start_failed", message))
        }
    }
}

fn first_line(child: &mut Child) -> Option<StartLine> {
    let output = child.stdout.take()?;
    let (sender, receiver) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(output).read_line(&mut line);
        let _ = sender.send(read.ok().and_then(|_| serde_json::from_str(&line).ok()));
    });
    receiver.recv_timeout(defaults::HEAD_START_DEADLINE).ok().flatten()
}

/// What `worker join --json` says.
#[derive(Debug, Deserialize)]
struct JoinLine {
    pid: u32,
}

/// Starts this machine's agent; returns its pid when the head has taken it in.
///
/// # Errors
/// It refuses (no such devices), or it does not join in time.
pub async fn start_agent(
    surroundings: &Surroundings,
    record: &HeadRecord,
    flags: &DeviceFlags,
) -> Result<u32, CliError> {
    if let Some(pid) = waiting_agent(&surroundings.environment.home, record) {
        eprintln!("this machine's agent (pid {pid}) has waited for its head, with what runs on it");
        if record.stands_by.is_none() {
            wait_for_agent(record, pid).await?;
        }
        return Ok(pid);
    }
    let program = worker_program()?;
    let mut command = tokio::process::Command::new(&program);
    command.args([
        "join",
        "--with-head",
        "--json",
        "--address",
        &record.local_address,
        "--device",
        flags.device.as_str(),
    ]);
    command.args(flags.num_gpus.map(|num| format!("--num-gpus={num}")));
    command.args(flags.labels.iter().map(|(key, value)| format!("--label={key}={value}")));
    command.arg(format!("--log-format={}", surroundings.global.log_format.as_str()));
    command.args(surroundings.global.log_level.as_ref().map(|level| format!("--log-level={level}")));
    command.args(record.insecure.then_some("--insecure"));
    command.env("PHALANX_HOME", surroundings.environment.home.path());
    // The home's own token counts here.
    command.env_remove("PHALANX_ADDRESS").env_remove("PHALANX_TOKEN");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let run = tokio::time::timeout(defaults::AGENT_JOIN_DEADLINE, command.output());
    let seconds = defaults::AGENT_JOIN_DEADLINE.as_secs();
    let late = |_| CliError::failed("agent_failed", format!("this machine's agent did not start within {seconds} s"));
    let output = run
        .await
        .map_err(late)?
        .map_err(|error| CliError::failed("agent_failed", format!("cannot start {}: {error}", program.display())))?;
    let words = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(agent_refused(output.status.code(), &words));
    }
    eprint!("{words}");
    let line: Option<JoinLine> = serde_json::from_slice(&output.stdout).ok();
    let pid = line
        .map(|line| line.pid)
        .ok_or_else(|| CliError::failed("agent_failed", format!("{} is of another version", program.display())))?;
    if record.stands_by.is_some() {
        // It joins the head that leads, which need not be there yet.
        return Ok(pid);
    }
    if let Err(error) = wait_for_agent(record, pid).await {
        let mut leave = tokio::process::Command::new(&program);
        leave.arg("leave").env("PHALANX_HOME", surroundings.environment.home.path());
        leave.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // What it says matters to nobody: an agent whose head is gone ends by itself, only later.
        let _ = tokio::time::timeout(defaults::CALL_DEADLINE, leave.status()).await;
        return Err(error);
    }
    Ok(pid)
}

/// The agent of this home that an earlier head at the same address was started with, while it waits.
fn waiting_agent(home: &Home, record: &HeadRecord) -> Option<u32> {
    let known: AgentRecord = serde_json::from_str(&fs::read_to_string(home.agent_record()).ok()?).ok()?;
    let waits = known.head == record.local_address && ProcessId::of(known.pid).is_some();
    waits.then_some(known.pid)
}

/// What an agent says of itself in its home.
#[derive(Debug, Deserialize)]
struct AgentRecord {
    pid: u32,
    head: String,
}

/// The agent's own words, without its marks of an error.
fn agent_refused(code: Option<i32>, words: &str) -> CliError {
    let said: Option<serde_json::Value> = words.lines().rev().find_map(|line| serde_json::from_str(line).ok());
    let field = |name: &str| said.as_ref().and_then(|said| said["error"][name].as_str()).unwrap_or_default().to_owned();
    let exit = code.and_then(|code| u8::try_from(code).ok()).unwrap_or(CliError::FAILED);
    let message = match field("message") {
        message if !message.is_empty() => message,
        _ => words.trim().trim_start_matches("error: ").to_owned(),
    };
    let message = if message.is_empty() { "this machine's agent did not start".to_owned() } else { message };
    CliError { exit, code: "agent_failed".to_owned(), message, hint: field("hint") }
}

async fn wait_for_agent(record: &HeadRecord, pid: u32) -> Outcome {
    let client = HeadClient::connect(local_address(record)).await?;
    let started = Instant::now();
    while started.elapsed() < defaults::AGENT_JOIN_DEADLINE {
        let snapshot = client.status().await?;
        if snapshot.nodes.iter().any(|node| node.pid == pid && node.state == "alive") {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let seconds = defaults::AGENT_JOIN_DEADLINE.as_secs();
    let log_dir = record.log_dir.display();
    Err(CliError::failed(
        "agent_failed",
        format!("this machine's agent (pid {pid}) did not join within {seconds} s; see {log_dir}"),
    ))
}

/// The nearest way to a head of this machine.
pub fn local_address(record: &HeadRecord) -> crate::cluster::membership::HeadAddress {
    use crate::cluster::membership::HeadAddress;
    let address = || record.local_address.clone();
    match (&record.socket, home_token(&record.trust_dir)) {
        (Some(socket), _) => HeadAddress::Socket(socket.clone()),
        (None, Some(token)) if !record.insecure => HeadAddress::Tls { address: address(), token: Box::new(token) },
        _ => HeadAddress::Tcp(address()),
    }
}

/// The `worker` program beside this one.
///
/// # Errors
/// It is not there.
pub fn worker_program() -> Result<PathBuf, CliError> {
    let this = std::env::current_exe()?;
    let beside = this.with_file_name("worker");
    if beside.is_file() {
        return Ok(beside);
    }
    let message = format!("the worker program is not beside {}", this.display());
    Err(CliError::failed("agent_failed", message).with_hint("Install both programs in one folder"))
}

/// Ends a head that was just started and is of no use.
pub async fn abandon_head(mut child: Child, record: &HeadRecord) {
    if let Ok(client) = HeadClient::connect(local_address(record)).await {
        let _ = client.stop().await;
    }
    let started = Instant::now();
    while started.elapsed() < defaults::CALL_DEADLINE && matches!(child.try_wait(), Ok(None)) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Of use only where it did not end by itself.
    let _ = child.kill();
    let _ = child.wait();
}
