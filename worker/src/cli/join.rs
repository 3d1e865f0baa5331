//! `worker join`: the node agent, in this process or in one of the background.

use std::ffi::OsString;
use std::io::Write;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, bail};
use clap::Args;
use nix::sys::stat::{Mode, umask};
use nix::unistd::setsid;
use phalanx_proto::{AgentHello, NodeId, VERSION};

use super::{offer, start_logging};
use crate::agent::background::{self, Started};
use crate::agent::credentials::{Credentials, TrustWish};
use crate::agent::devices::Devices;
use crate::agent::log_reader;
use crate::agent::process::Launcher;
use crate::agent::record::{self, AgentLock, AgentRecord, Claim};
use crate::agent::{Agent, AgentSetup, End, Report, node, supervisor};
use crate::config::{Config, DeviceChoice, Environment, Flags, defaults};
use crate::logging::{BoundedLog, LogTarget};

#[derive(Args)]
pub(super) struct JoinArgs {
    /// Where the head is [default: PHALANX_ADDRESS]
    #[arg(long, value_name = "HOST:PORT")]
    address: Option<String>,
    /// Device slots to offer [default: all GPUs, or one CPU slot]
    #[arg(long, value_name = "N")]
    num_gpus: Option<NonZeroU32>,
    /// auto, cuda, rocm or cpu
    #[arg(long, value_name = "KIND")]
    device: Option<DeviceChoice>,
    /// Address under which other machines reach this one [default: where the head sees it come from]
    #[arg(long, value_name = "IP")]
    advertise_address: Option<String>,
    /// Token that the head has made for this cluster [default: PHALANX_TOKEN, else what lies in this home]
    #[arg(long, value_name = "TOKEN")]
    token: Option<String>,
    /// File that holds the token, or soon will [default: PHALANX_TOKEN_FILE]
    #[arg(long, value_name = "FILE", conflicts_with = "token")]
    token_file: Option<PathBuf>,
    /// Plain text and no token: for a head that was started with --insecure
    #[arg(long)]
    insecure: bool,
    /// Label of this machine, for placement groups that ask for it; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
    labels: Vec<(String, String)>,
    /// Stay in the foreground
    #[arg(long)]
    block: bool,
    /// Print one object on one line when the start is over
    #[arg(long)]
    pub(super) json: bool,
    /// End with the head instead of waiting for its return
    #[arg(long, hide = true)]
    with_head: bool,
    /// This is the process in the background
    #[arg(long, hide = true)]
    detached: bool,
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text} is not KEY=VALUE")),
    }
}

/// Joins, or stays until this machine has left.
pub(super) fn join(args: &JoinArgs, flags: Flags) -> anyhow::Result<()> {
    let flags = Flags {
        address: args.address.clone(),
        num_gpus: args.num_gpus,
        device: args.device,
        advertise_address: args.advertise_address.clone(),
        token: args.token.clone(),
        token_file: args.token_file.clone(),
        insecure: args.insecure,
        labels: args.labels.iter().cloned().collect(),
        ..flags
    };
    let config = Config::load(flags, Environment::read())?;
    config.head()?;
    // What it writes is for its owner.
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
    if config.trust == TrustWish::Insecure {
        say(args, "INSECURE: plain text to the head; whoever is on the way reads and changes what goes by");
    }
    if args.block || args.detached { run_agent(args, &config) } else { join_in_background(args, &config) }
}

/// Runs the agent in this process.
fn run_agent(args: &JoinArgs, config: &Config) -> anyhow::Result<()> {
    if args.detached {
        setsid().context("leaving the terminal's session")?;
        std::env::set_current_dir("/").context("leaving the folder")?;
    }
    let head = config.head()?.clone();
    let hostname = node::hostname();
    let node_id = node::id(&config.home, &hostname).context("the node's id")?;
    let _lock = claim(config, &node_id, args.with_head)?;
    std::fs::create_dir_all(config.home.log_dir())?;
    let log = BoundedLog::open(&config.home.log_dir().join(log_reader::AGENT_LOG), defaults::LOG_BYTES_MAX)?;
    start_logging(config, LogTarget::file(log, !args.detached))?;
    let devices = offer(config)?;
    if let Some(note) = &devices.note {
        say(args, note);
    }
    let hello = describe(config, node_id.clone(), hostname, &devices);
    let launcher = Launcher {
        program: std::env::current_exe().context("this program's path")?,
        args: vec![
            "rank".into(),
            format!("--log-format={}", config.log_format.as_str()),
            format!("--log-level={}", config.log_level),
        ],
        node_id: node_id.clone(),
        head_note: config.home.head_note(),
        trust_dir: (config.trust != TrustWish::Insecure).then(|| config.home.trust_dir()),
        secrets: config.secrets.clone(),
        log_dir: config.home.log_dir(),
        device: devices.kind,
        num_threads: (node::num_cpus() / devices.slots.len() as u32).max(1),
        slots: devices.slots,
        env: config.nccl_defaults(),
        kernel_cache_dir: config.home.kernel_cache_dir(),
        cuda_home: config.cuda_home.clone(),
    };
    let supervisor = supervisor::spawn(launcher)?;
    let credentials =
        Credentials { home: config.home.clone(), head, node_id: node_id.clone(), wish: config.trust.clone() };
    let log_dir = config.home.log_dir();
    let head_note = config.home.head_note();
    let setup = AgentSetup { credentials, head_note, hello, with_head: args.with_head, log_dir, supervisor };
    let mut reporter = Reporter { args, config, node_id, num_waits: 0, has_printed: false };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let end = runtime.block_on(async { Agent::new(setup, |report: &Report| reporter.take(report))?.run().await })?;
    match end {
        End::Signal => tracing::info!("left"),
        End::ByHead(reason) | End::HeadGone(reason) => tracing::info!(reason, "left"),
    }
    Ok(())
}

fn claim(config: &Config, node_id: &NodeId, with_head: bool) -> anyhow::Result<AgentLock> {
    let head = config.head()?.as_str().into();
    let ours = AgentRecord { pid: std::process::id(), node_id: node_id.clone(), head, with_head };
    match record::claim(&config.home, &ours).context("the home's record")? {
        Claim::Ours(lock) => Ok(lock),
        Claim::Taken(Some(other)) => bail!(
            "this machine has joined {} already (pid {}, home {}): run `worker leave` first, or give this one another PHALANX_HOME",
            other.head,
            other.pid,
            config.home.path().display()
        ),
        Claim::Taken(None) => bail!("another worker of {} is starting or ending", config.home.path().display()),
    }
}

fn describe(config: &Config, node_id: NodeId, hostname: String, devices: &Devices) -> AgentHello {
    AgentHello {
        node_id,
        version: VERSION.into(),
        address: config.advertise_address.clone().unwrap_or_default(),
        hostname,
        device_kind: devices.kind,
        num_slots: devices.slots.len() as u32,
        num_cpus: node::num_cpus(),
        memory_bytes: node::memory_bytes(),
        pid: std::process::id(),
        device_names: devices.slots.iter().map(|slot| slot.name.clone()).collect(),
        labels: config.labels.clone(),
    }
}

/// Tells whoever started the agent how it goes.
struct Reporter<'a> {
    args: &'a JoinArgs,
    config: &'a Config,
    node_id: NodeId,
    num_waits: u32,
    has_printed: bool,
}

impl Reporter<'_> {
    fn take(&mut self, report: &Report) {
        if self.args.detached {
            // The process in the foreground reads this, as long as it is there.
            let _ = writeln!(std::io::stdout(), "{}", background::line(report));
        }
        let head = self.config.address.as_ref().map_or("", |head| head.as_str());
        match report {
            Report::Joined => {
                self.num_waits = 0;
                if !self.args.detached && !self.has_printed {
                    self.has_printed = true;
                    print_joined(self.args, self.config, std::process::id(), &self.node_id);
                }
            }
            Report::Waiting { reason } => {
                self.num_waits += 1;
                // Pauses between attempts grow, so lines get rarer; each power of two is enough afterwards.
                if self.num_waits.is_power_of_two() {
                    tracing::warn!(head, reason, attempt = self.num_waits, "the head does not answer; trying on");
                }
            }
        }
    }
}

/// Starts the agent in the background and says how that went.
fn join_in_background(args: &JoinArgs, config: &Config) -> anyhow::Result<()> {
    // What can be seen to fail here fails here, in the foreground.
    let devices = offer(config)?;
    if let Some(note) = &devices.note {
        say(args, note);
    }
    let node_id = node::id(&config.home, &node::hostname()).context("the node's id")?;
    let mut command = Command::new(std::env::current_exe().context("this program's path")?);
    command.args(without_token(std::env::args_os().skip(1))).arg("--detached");
    // Arguments are seen by every user of the machine, the environment by this one.
    command.envs(args.token.iter().map(|token| ("PHALANX_TOKEN", token)));
    let (pid, started) = background::start(command, &config.home, defaults::JOIN_REPORT_DEADLINE)?;
    match started {
        Started::Joined => {}
        Started::Waiting(reason) => eprintln!(
            "the head at {} does not answer yet ({reason}); this worker keeps trying in the background, log in {}",
            config.head()?.as_str(),
            config.home.log_dir().display()
        ),
        Started::Failed { words, .. } => bail!("{}", words.trim_start_matches("error: ")),
    }
    print_joined(args, config, pid, &node_id);
    Ok(())
}

/// The same arguments without `--token TOKEN`.
fn without_token(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut kept = Vec::new();
    let mut skips_value = false;
    for arg in args {
        let text = arg.to_string_lossy();
        if std::mem::take(&mut skips_value) || text.starts_with("--token=") {
            continue;
        }
        skips_value = text == "--token";
        if !skips_value {
            kept.push(arg);
        }
    }
    kept
}

fn print_joined(args: &JoinArgs, config: &Config, pid: u32, node_id: &NodeId) {
    let head = config.address.as_ref().map_or("", |head| head.as_str());
    let log_dir = config.home.log_dir();
    if args.json {
        let object = serde_json::json!({"address": head, "pid": pid, "node": node_id, "log_dir": log_dir});
        println!("{object}");
    } else if args.block {
        eprintln!("joined {head} as {node_id}; Ctrl-C leaves");
    } else {
        println!(
            "worker {node_id} (pid {pid}) serves {head}; `worker leave` takes it out, logs are in {}",
            log_dir.display()
        );
    }
}

/// One line for a person; the process in the background stays silent, the one in the foreground said it.
fn say(args: &JoinArgs, line: &str) {
    if !args.detached {
        eprintln!("{line}");
    }
}
