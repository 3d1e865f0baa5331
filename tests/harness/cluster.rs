//! Processes of a cluster: a head, agents, ranks.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use phalanx_proto::{RankStatus, StatusSnapshot};
use serde_json::Value;
use tempfile::TempDir;

use crate::{Http, TinyDisk};

/// Longest wait for anything that should be quick.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a program for which the kernel was started at another time: the mount is seen in its namespace only.
const WITH_BOOT_ID: &str = r#"mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@""#;

/// One machine of a test: a `PHALANX_HOME` and the programs that use it.
pub struct Node {
    /// Goes before the home that it lies in.
    store: Option<TinyDisk>,
    home: TempDir,
    namespace: Option<String>,
    env: Vec<(&'static str, String)>,
    token: Option<String>,
}

/// What a command of ours did.
#[derive(Debug)]
pub struct Finished {
    /// Its exit code.
    pub code: i32,
    /// Data.
    pub stdout: String,
    /// Everything else.
    pub stderr: String,
    /// How long it took.
    pub elapsed: Duration,
}

impl Default for Node {
    fn default() -> Self {
        Self::new()
    }
}

impl Node {
    /// A node with an empty home.
    pub fn new() -> Self {
        Self {
            home: tempfile::Builder::new().prefix("phalanx-").tempdir().expect("a temporary folder"),
            store: None,
            namespace: None,
            env: Vec::new(),
            token: None,
        }
    }

    /// A variable that its programs get.
    #[must_use]
    pub fn with_env(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.env.push((name, value.into()));
        self
    }

    /// A node whose programs run in a network namespace, and take this machine for another one: they would use the head's Unix
    /// socket otherwise, which no cut cable reaches.
    ///
    /// # Panics
    /// If its home cannot be written.
    pub fn inside(namespace: &str) -> Self {
        let mut node = Self::new();
        fs::write(node.boot_id(), format!("{namespace}-of-{}\n", std::process::id())).expect("a file");
        node.namespace = Some(namespace.to_owned());
        node
    }

    /// Gives its programs a join token of a head's machine, as a user does for machines that are not the head's own.
    ///
    /// # Panics
    /// If that head makes none.
    #[must_use]
    pub fn with_token_of(mut self, head: &Self) -> Self {
        self.token = Some(head.make_token(&[]));
        self
    }

    /// Gives its head, before it is first started, the keys of another, as an operator does for a second head.
    ///
    /// # Panics
    /// If that head has none, or they cannot be copied.
    #[must_use]
    pub fn with_keys_of(self, head: &Self) -> Self {
        for file in ["trust/authority.json", "store/tokens.json"] {
            let copy = self.home().join(file);
            fs::create_dir_all(copy.parent().expect("a folder")).expect("a folder");
            fs::copy(head.home().join(file), copy).expect("its keys");
        }
        self
    }

    /// The same machine without one.
    #[must_use]
    pub fn without_token(mut self) -> Self {
        self.token = None;
        self
    }

    /// A token that the head of this home makes.
    ///
    /// # Panics
    /// If it makes none.
    pub fn make_token(&self, flags: &[&str]) -> String {
        let made = self.run("coordinator", &[&["token", "create", "--json"], flags].concat());
        assert_eq!(made.code, 0, "{made:?}");
        let line: Value = serde_json::from_str(made.stdout.trim()).expect("one object");
        line["token"].as_str().expect("a token").to_owned()
    }

    /// A node whose store is a disk of its own, of so many bytes; `None` where this machine lets nobody mount one.
    pub fn with_store(bytes: u64) -> Option<Self> {
        let mut node = Self::new();
        node.store = Some(TinyDisk::mount(&node.home.path().join("store"), bytes)?);
        Some(node)
    }

    /// The disk of its store, where that has one.
    pub fn store(&self) -> Option<&TinyDisk> {
        self.store.as_ref()
    }

    /// The process that its agent is, or was at last.
    pub fn agent_pid(&self) -> Option<u32> {
        let record = fs::read_to_string(self.home.path().join("run/agent.json")).ok()?;
        serde_json::from_str::<Value>(&record).ok()?["pid"].as_u64()?.try_into().ok()
    }

    fn boot_id(&self) -> PathBuf {
        self.home.path().join("boot-id")
    }

    /// Its `PHALANX_HOME`.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// A command of `program` (coordinator or worker) in this home.
    pub fn command<A: AsRef<OsStr>>(&self, program: &str, arguments: &[A]) -> Command {
        let mut command = match &self.namespace {
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace, "sh", "-c", WITH_BOOT_ID]).arg(self.boot_id());
                command.arg(binary(program));
                command
            }
            None => Command::new(binary(program)),
        };
        command.args(arguments).env("PHALANX_HOME", self.home.path()).stdin(Stdio::null());
        command.envs(self.env.iter().map(|(name, value)| (*name, value)));
        match &self.token {
            Some(token) => command.env("PHALANX_TOKEN", token),
            None => command.env_remove("PHALANX_TOKEN"),
        };
        command
    }

    /// Runs a command to its end.
    pub fn run<A: AsRef<OsStr>>(&self, program: &str, arguments: &[A]) -> Finished {
        finish(self.command(program, arguments))
    }

    /// Starts a command and leaves it running, its output in files of the home.
    pub fn spawn<A: AsRef<OsStr>>(&self, program: &str, arguments: &[A]) -> Child {
        let log = fs::File::create(self.home.path().join(format!("{program}-test.log"))).expect("a log file");
        let error = log.try_clone().expect("a log file");
        self.command(program, arguments).stdout(log).stderr(error).spawn().expect("the program starts")
    }

    /// What spawned programs and their children wrote so far.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        let mut folders = vec![self.home.path().to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "log") {
                    text.push_str(&format!("---- {}\n", path.display()));
                    text.push_str(&fs::read_to_string(&path).unwrap_or_default());
                }
            }
        }
        text
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.logs());
        }
        let _ = finish(self.command("coordinator", &["stop"]));
        let _ = finish(self.command("worker", &["leave"]));
    }
}

fn finish(mut command: Command) -> Finished {
    let started = Instant::now();
    let Output { status, stdout, stderr } = command.output().expect("the program starts");
    Finished {
        code: status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
        elapsed: started.elapsed(),
    }
}

/// One of the two programs.
fn binary(program: &str) -> PathBuf {
    crate::places::programs().join(program)
}

/// A head with its own agent.
pub struct Cluster {
    /// The head's machine.
    pub node: Node,
    /// Cluster address.
    pub address: String,
    /// The API.
    pub http: Http,
    /// Address of the dashboard.
    pub dashboard: String,
}

impl Cluster {
    /// Starts a head that offers `slots` CPU slots.
    pub fn start(slots: u32) -> Self {
        Self::start_with(slots, &[])
    }

    /// The same with further flags.
    pub fn start_with(slots: u32, flags: &[&str]) -> Self {
        Self::start_on(Node::new(), slots, flags)
    }

    /// The same on a node that was made before.
    pub fn start_on(node: Node, slots: u32, flags: &[&str]) -> Self {
        let slots = slots.to_string();
        let mut arguments = vec!["start", "--head", "--num-gpus", &slots, "--json"];
        for port in ["--port", "--http-port", "--dashboard-port"] {
            if !flags.contains(&port) {
                arguments.extend([port, "0"]);
            }
        }
        arguments.extend(flags);
        let started = node.run("coordinator", &arguments);
        assert_eq!(started.code, 0, "start failed: {}\n{}", started.stderr, node.logs());
        let line: Value = serde_json::from_str(started.stdout.trim()).expect("start --json prints one object");
        let field = |key: &str| line[key].as_str().unwrap_or_else(|| panic!("{key} in {line}")).to_owned();
        Self { http: Http::new(&field("http")), address: field("address"), dashboard: field("dashboard"), node }
    }

    /// Serves a model and waits until it is ready.
    pub fn serve(&self, model: &Path, name: &str, flags: &[&str]) -> Finished {
        let mut arguments: Vec<&str> = vec!["serve", model.to_str().expect("a path"), "--served-model-name", name];
        arguments.extend(flags);
        let served = self.node.run("coordinator", &arguments);
        assert_eq!(served.code, 0, "serve failed: {}\n{}", served.stderr, self.node.logs());
        served
    }

    /// What `status --json` prints.
    pub fn status(&self) -> StatusSnapshot {
        let status = self.node.run("coordinator", &["status", "--json"]);
        assert_eq!(status.code, 0, "status failed: {}", status.stderr);
        serde_json::from_str(&status.stdout).unwrap_or_else(|e| panic!("{e}: {}", status.stdout))
    }

    /// The ranks of one deployment, in rank order.
    pub fn ranks(&self, deployment: &str) -> Vec<RankStatus> {
        let mut ranks = self.status().ranks;
        ranks.retain(|rank| rank.deployment == deployment);
        ranks.sort_by_key(|rank| rank.rank);
        ranks
    }

    /// State of one deployment, or `absent`.
    pub fn deployment_state(&self, name: &str) -> String {
        let deployments = self.status().deployments;
        deployments.into_iter().find(|d| d.name == name).map_or_else(|| "absent".into(), |d| d.state)
    }
}

/// Waits until `check` gives something.
///
/// # Panics
/// When it does not within a minute.
pub fn wait_for<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Processes that a test looks after, by pid.
pub struct Processes;

impl Processes {
    /// True while a process is there and is not a zombie.
    pub fn alive(pid: u32) -> bool {
        let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let state = state.rsplit(')').next().and_then(|rest| rest.split_whitespace().next().map(str::to_owned));
        state.is_some_and(|state| state != "Z" && state != "X")
    }

    /// `kill -9`.
    pub fn kill(pid: u32) {
        Self::signal(pid, Signal::SIGKILL);
    }

    /// Sends a signal.
    pub fn signal(pid: u32, signal: Signal) {
        assert!(Self::try_signal(pid, signal), "process {pid} is there");
    }

    /// Sends a signal to a process that may have ended; true where it was there.
    pub fn try_signal(pid: u32, signal: Signal) -> bool {
        kill(Pid::from_raw(i32::try_from(pid).expect("a pid")), signal).is_ok()
    }

    /// Resident memory, bytes; 0 where it has ended.
    pub fn resident_bytes(pid: u32) -> u64 {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
        line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
    }

    /// Open files; 0 where it has ended.
    pub fn num_files(pid: u32) -> usize {
        fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
    }

    /// Waits until all are gone; returns how long it took.
    pub fn wait_gone(pids: &[u32]) -> Duration {
        let started = Instant::now();
        wait_for(&format!("{pids:?} to end"), || pids.iter().all(|pid| !Self::alive(*pid)).then_some(()));
        started.elapsed()
    }
}
