//! The `worker` binary: `join` (node agent), `leave`, and `rank` (one device, one shard; started by the agent).

use std::ffi::OsString;
use std::io::Write;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, setsid};
use phalanx_kernels::cuda;
use phalanx_proto::{AgentHello, NodeId, VERSION};
use phalanx_worker::agent::background::{self, Started};
use phalanx_worker::agent::credentials::{Credentials, TrustWish};
use phalanx_worker::agent::devices::{Devices, Machine};
use phalanx_worker::agent::doctor::{self, Doctor};
use phalanx_worker::agent::log_reader;
use phalanx_worker::agent::process::Launcher;
use phalanx_worker::agent::record::{self, AgentLock, AgentRecord, Claim};
use phalanx_worker::agent::{Agent, AgentSetup, End, Report, node, supervisor};
use phalanx_worker::backend::{self, presence};
use phalanx_worker::config::{Config, ConfigError, DeviceChoice, Environment, Flags, LogFormat, defaults};
use phalanx_worker::logging::{self, BoundedLog, LogTarget};
use phalanx_worker::{rank, reduce_bench};

/// Wrong usage, as for clap's own errors.
const EXIT_USAGE: u8 = 2;
/// Time between two looks while `leave` waits.
const LEAVE_PAUSE: Duration = Duration::from_millis(20);

#[derive(Parser)]
#[command(
    name = "worker",
    version,
    about = "Adds this machine's devices to a Phalanx cluster",
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    command: Subcommands,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Args)]
struct CommonArgs {
    /// Folder of this node's files [default: PHALANX_HOME, else the user's state folder]
    #[arg(long, global = true, value_name = "DIR")]
    home: Option<PathBuf>,
    /// JSON file with the same settings as the flags [default: worker.json in the home]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// error, warn, info, debug, trace, or a list of target=level
    #[arg(long, global = true, value_name = "LEVEL")]
    log_level: Option<String>,
    /// text or json
    #[arg(long, global = true, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
}

#[derive(Subcommand)]
enum Subcommands {
    /// Adds this machine's devices to a cluster; waits for a head that is not there yet
    #[command(after_help = "Example:\n  worker join --address 10.0.0.5:8001 --num-gpus 2 --token phxt-...")]
    Join(JoinArgs),
    /// Takes this machine out of its cluster: its ranks end, then its agent
    #[command(after_help = "Example:\n  worker leave\n  worker leave --drain")]
    Leave(LeaveArgs),
    /// Tries what a rank needs of a CUDA device, one line for each thing; fails if one fails
    #[command(hide = true)]
    CudaCheck {
        /// Ordinal among the visible devices
        #[arg(long, value_name = "N", default_value_t = 0)]
        device: u32,
        /// Leave out what compiles device code that this program holds already
        #[arg(long)]
        quick: bool,
    },
    /// Says whether this machine can serve, and what to do where it cannot; fails where something does
    #[command(after_help = "Example:\n  worker doctor\n  worker doctor --json")]
    Doctor(DoctorArgs),
    /// Times sums over this machine's devices; `coordinator bench allreduce` shows them
    #[command(hide = true)]
    ReduceBench(ReduceBenchArgs),
    /// One process of those sums; started by the two above
    #[command(hide = true)]
    ReduceBenchRank,
    /// One rank; started by the agent
    #[command(hide = true)]
    Rank {
        /// For people who look at the list of processes.
        name: Option<String>,
    },
}

#[derive(Args)]
struct JoinArgs {
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
    json: bool,
    /// End with the head instead of waiting for its return
    #[arg(long, hide = true)]
    with_head: bool,
    /// This is the process in the background
    #[arg(long, hide = true)]
    detached: bool,
}

#[derive(Args)]
struct DoctorArgs {
    /// Print one object in place of lines
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ReduceBenchArgs {
    /// Devices that exchange [default: all GPUs, or two processes on the CPU]
    #[arg(long, value_name = "N")]
    world: Option<NonZeroU32>,
    /// auto, cuda or cpu
    #[arg(long, value_name = "KIND")]
    device: Option<DeviceChoice>,
}

#[derive(Args)]
struct LeaveArgs {
    /// Only if this is the node's id
    #[arg(long, value_name = "ID")]
    node: Option<String>,
    /// First let what runs here end, or go on elsewhere: no request is lost where another machine has room
    #[arg(long)]
    drain: bool,
}

fn main() -> ExitCode {
    let Cli { command, common } = Cli::parse();
    let flags = Flags {
        home: common.home,
        config: common.config,
        log_level: common.log_level,
        log_format: common.log_format,
        ..Flags::default()
    };
    let (result, as_json) = match command {
        Subcommands::Join(args) => (join(&args, flags), args.json),
        Subcommands::Leave(args) => (leave(&args, flags), false),
        Subcommands::CudaCheck { device, quick } => (cuda_check(device, quick, flags), false),
        Subcommands::Doctor(args) => (doctor(&args, flags), false),
        Subcommands::ReduceBench(args) => (reduce_bench(&args, flags), false),
        Subcommands::ReduceBenchRank => (reduce_bench_rank(), false),
        Subcommands::Rank { .. } => end_rank(run_rank(flags)),
    };
    let Err(error) = result else { return ExitCode::SUCCESS };
    let is_usage = error.chain().any(|cause| cause.is::<ConfigError>());
    if as_json {
        let code = if is_usage { "usage" } else { "failed" };
        eprintln!("{}", serde_json::json!({"error": {"code": code, "message": format!("{error:#}"), "hint": ""}}));
    } else {
        eprintln!("error: {error:#}");
    }
    ExitCode::from(if is_usage { EXIT_USAGE } else { 1 })
}

// ---- join ----

fn parse_label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text} is not KEY=VALUE")),
    }
}

fn join(args: &JoinArgs, flags: Flags) -> anyhow::Result<()> {
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

fn offer(config: &Config) -> anyhow::Result<Devices> {
    let machine = Machine {
        count: &|kind| presence::count(kind, defaults::PROBE_DEADLINE),
        serves: &presence::serves,
        cpu_name: node::cpu_name(),
        cuda_visible: config.cuda_visible.clone(),
        hip_visible: config.hip_visible.clone(),
    };
    Ok(machine.offer(config.device, config.num_gpus)?)
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

// ---- leave ----

fn leave(args: &LeaveArgs, flags: Flags) -> anyhow::Result<()> {
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

// ---- cuda-check ----

fn cuda_check(device: u32, quick: bool, flags: Flags) -> anyhow::Result<()> {
    let config = Config::load(flags, Environment::read())?;
    if let Some(home) = &config.cuda_home {
        cuda::search_also(cuda::toolkit_folders(home));
    }
    let mut settings = cuda::ModuleSettings::new(config.home.kernel_cache_dir(), config.cuda_home.as_deref());
    if quick && cuda::has_images() {
        // Without a folder for it, nothing is compiled for the sake of the check.
        settings.cache_dir = None;
    }
    let mut num_failed = 0;
    cuda::self_check(device, &settings, |line| {
        match &line.outcome {
            Ok(found) => println!("ok    {}: {found}", line.name),
            Err(reason) => println!("FAIL  {}: {reason}", line.name),
        }
        num_failed += usize::from(line.outcome.is_err());
    });
    if num_failed > 0 {
        bail!("{num_failed} checks failed");
    }
    Ok(())
}

// ---- doctor, reduce-bench ----

fn doctor(args: &DoctorArgs, flags: Flags) -> anyhow::Result<()> {
    let config = Config::load(flags, Environment::read())?;
    let doctor = Doctor { config, program: std::env::current_exe().context("this program's path")? };
    let mut checks = Vec::new();
    doctor.examine(|check| {
        if !args.json {
            println!("{}", check.line());
        }
        checks.push(check);
    });
    if args.json {
        println!("{}", doctor::object(&checks));
    } else {
        println!("{}", doctor::summary(&checks));
    }
    let num_failed = checks.iter().filter(|check| check.state == doctor::State::Fail).count();
    if num_failed > 0 { bail!("{num_failed} checks failed") } else { Ok(()) }
}

fn reduce_bench(args: &ReduceBenchArgs, flags: Flags) -> anyhow::Result<()> {
    let config = Config::load(Flags { device: args.device, ..flags }, Environment::read())?;
    let devices = offer(&config)?;
    let (setup, names) = reduce_bench::Setup::of_this_machine(&config, &devices, args.world)?;
    let measured = setup.run(|timing| {
        let blocks = if timing.blocks > 0 { format!(" ({})", timing.blocks) } else { String::new() };
        let mark = if timing.right { "" } else { "  WRONG SUMS" };
        eprintln!("{}{blocks} {} bytes: {:.1} us{mark}", timing.way, timing.bytes, timing.us);
    })?;
    let object = serde_json::json!({
        "device": setup.device,
        "devices": names,
        "world_size": setup.slots.len(),
        "notes": devices.note.into_iter().chain(measured.notes).collect::<Vec<_>>(),
        "timings": measured.timings,
    });
    println!("{object}");
    if measured.timings.iter().all(|timing| timing.right) { Ok(()) } else { bail!("some sums are wrong") }
}

fn reduce_bench_rank() -> anyhow::Result<()> {
    let launch = rank::bind_to_parent(|launch: &reduce_bench::BenchLaunch| launch.parent_pid)?;
    reduce_bench::child::run(&launch)?;
    Ok(())
}

// ---- rank ----

fn run_rank(flags: Flags) -> anyhow::Result<()> {
    let launch = rank::bind_to_agent()?;
    let config = Config::load(flags, Environment::read())?;
    start_logging(&config, LogTarget::stderr())?;
    rank::run(launch)?;
    Ok(())
}

/// Says what went wrong and is gone, whatever the device is at.
fn end_rank(ended: anyhow::Result<()>) -> ! {
    if let Err(error) = &ended {
        eprintln!("error: {error:#}");
    }
    backend::end_process(u8::from(ended.is_err()))
}

fn start_logging(config: &Config, target: LogTarget) -> anyhow::Result<()> {
    let expected = "error, warn, info, debug, trace, or a list of target=level";
    let refused = |_| ConfigError::Value { key: "--log-level", value: config.log_level.clone(), expected };
    Ok(logging::start(&config.log_level, config.log_format, target).map_err(refused)?)
}
