//! One rank process: how it is started, watched and ended.
//!
//! **Invariant:** a rank dies with its agent. It holds the reading end of a pipe whose writing end only the agent holds, and it
//! asks the kernel to kill it when the thread that started it ends, which is why one thread starts them all.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{self, BufRead, BufReader, PipeReader, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use phalanx_proto::{DesiredRank, DeviceKind, NodeId, RankKey};
use phalanx_trust::variables;
use tracing::warn;

use super::devices::DeviceSlot;
use super::launch::RankLaunch;
use super::log_reader;
use super::supervisor::Order;
use crate::collective;
use crate::config::defaults;
use crate::logging::BoundedLog;

/// Where NCCL looks for the interface of its sockets.
const NCCL_INTERFACE: &str = "NCCL_SOCKET_IFNAME";
/// Longest wait for the end of a dead rank's log.
const LOG_END_DEADLINE: Duration = Duration::from_millis(200);

/// What every rank of this agent is started with.
#[derive(Debug, Clone)]
pub struct Launcher {
    /// The program, usually this one.
    pub program: PathBuf,
    /// What comes before the rank's name.
    pub args: Vec<String>,
    /// The node.
    pub node_id: NodeId,
    /// Where it is noted which head leads.
    pub head_note: PathBuf,
    /// Folder of this node's certificate; absent: plain text (`--insecure`).
    pub trust_dir: Option<PathBuf>,
    /// Names of variables that hold secrets of others: ranks do not get them.
    pub secrets: Vec<String>,
    /// Where logs go.
    pub log_dir: PathBuf,
    /// What the slots are.
    pub device: DeviceKind,
    /// The slots.
    pub slots: Vec<DeviceSlot>,
    /// Threads of a rank where the head says nothing.
    pub num_threads: u32,
    /// Variables of every rank, unless the head says otherwise.
    pub env: Vec<(&'static str, String)>,
    /// Folder that keeps device code which was compiled here.
    pub kernel_cache_dir: PathBuf,
    /// The toolkit that the user has named.
    pub cuda_home: Option<PathBuf>,
}

/// What the head said about itself, for the ranks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HeadFacts {
    /// `host:port`.
    pub address: String,
    /// Its Unix socket, where it is on this machine.
    pub socket: Option<String>,
    /// How long ranks outlive it.
    pub grace: Duration,
}

/// A running rank.
pub struct RankChild {
    child: Child,
    pid: u32,
    /// Ends the rank when it is dropped.
    pipe: Option<ChildStdin>,
    log: Arc<RankLog>,
    /// It was alive when it was told to end.
    was_told: bool,
}

impl Launcher {
    /// Starts a rank; `orders` is told when it has ended.
    pub fn launch(
        &self,
        rank: &DesiredRank,
        head: &HeadFacts,
        orders: &mpsc::SyncSender<Order>,
    ) -> io::Result<RankChild> {
        let key = &rank.key;
        let Some(slot) = self.slots.get(rank.device_slot as usize) else {
            let text = format!("slot {} of {}", rank.device_slot, self.slots.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        };
        if let Some((name, why)) = rank.env.keys().find_map(|name| Some((name, variables::refusal(name)?))) {
            let text = format!("the head may not set {name:?} here: {why}");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        let mut launch = serde_json::to_vec(&self.describe(rank, slot, head))?;
        launch.push(b'\n');
        let (reader, writer) = io::pipe()?;
        let log = RankLog::open(&self.log_dir, key)?;
        let mut command = Command::new(&self.program);
        for name in &self.secrets {
            command.env_remove(name);
        }
        let mut child = command
            .args(&self.args)
            .arg(format!("{}.{}.{}", key.deployment, key.replica, key.rank))
            .envs(self.env.iter().map(|(name, value)| (*name, value)))
            .envs(for_this_machine(&rank.env))
            .envs(slot.env.iter().map(|(name, value)| (*name, value)))
            .stdin(Stdio::piped())
            .stdout(writer.try_clone()?)
            .stderr(writer)
            .spawn()?;
        let pid = child.id();
        let mut pipe = child.stdin.take();
        if let Some(pipe) = &mut pipe {
            // A process that ended already is reported by its watcher. The line fits the pipe, so this does not wait.
            let _ = pipe.write_all(&launch);
        }
        let child = RankChild { child, pid, pipe, log, was_told: false };
        child.log.clone().follow(reader)?;
        watch(key.clone(), pid, orders.clone())?;
        Ok(child)
    }

    fn describe(&self, rank: &DesiredRank, slot: &DeviceSlot, head: &HeadFacts) -> RankLaunch {
        RankLaunch {
            agent_pid: std::process::id(),
            key: rank.key.clone(),
            node_id: self.node_id.clone(),
            head: head.address.clone(),
            head_socket: head.socket.clone(),
            head_note: self.head_note.clone(),
            trust_dir: self.trust_dir.clone(),
            launch_token: rank.launch_token.clone(),
            device: self.device,
            device_name: slot.name.clone(),
            num_threads: rank.num_threads.unwrap_or(self.num_threads),
            kernel_cache_dir: self.kernel_cache_dir.clone(),
            cuda_home: self.cuda_home.clone(),
            head_grace_ms: head.grace.as_millis() as u64,
        }
    }
}

/// NCCL knows interfaces by their names only: an address becomes the name of the interface that has it here.
fn for_this_machine(env: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut env = env.clone();
    if let Some(ip) = env.get(NCCL_INTERFACE).and_then(|value| value.parse::<IpAddr>().ok()) {
        match collective::name_of(ip) {
            // Without the sign, every name that begins like it would do.
            Some(name) => env.insert(NCCL_INTERFACE.into(), format!("={name}")),
            None => {
                warn!(%ip, "no interface of this machine has this address; NCCL chooses one");
                env.remove(NCCL_INTERFACE)
            }
        };
    }
    env
}

/// Waits for a process to end without taking its exit status: its id stays ours until `RankChild::reap`.
fn watch(key: RankKey, pid: u32, orders: mpsc::SyncSender<Order>) -> io::Result<()> {
    let wait = move || {
        let id = || Id::Pid(Pid::from_raw(pid.cast_signed()));
        while waitid(id(), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(nix::errno::Errno::EINTR) {}
        // An agent that is ending does not listen any more.
        let _ = orders.send(Order::Exited(key));
    };
    std::thread::Builder::new().name("watch".into()).spawn(wait).map(|_| ())
}

impl RankChild {
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Asks the rank to end: by a signal, and by the end of its pipe.
    pub fn terminate(&mut self) {
        self.signal(Signal::SIGTERM);
        self.pipe = None;
    }

    /// Ends it.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
    }

    /// Whether it was alive when it was told to end.
    pub fn was_told(&self) -> bool {
        self.was_told
    }

    fn signal(&mut self, signal: Signal) {
        // Not reaped yet, so the id is still this process's, be it alive or ended.
        let pid = Pid::from_raw(self.pid.cast_signed());
        let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
        if !self.was_told && !matches!(waitid(Id::Pid(pid), look), Ok(WaitStatus::StillAlive)) {
            // Whatever ended it was no doing of ours.
            return;
        }
        self.was_told = true;
        let _ = kill(pid, signal);
    }

    /// Takes the status of a rank that has ended, and the end of its log.
    pub fn reap(mut self) -> (io::Result<ExitStatus>, String) {
        let status = self.child.wait();
        (status, self.log.last_lines(LOG_END_DEADLINE))
    }
}

impl Drop for RankChild {
    fn drop(&mut self) {
        // Where `reap` came first, the status is known and nothing is left to do.
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill();
            let _ = self.child.wait();
        }
    }
}

/// A rank's output: a bounded file, and its last lines in memory.
struct RankLog {
    path: PathBuf,
    tail: Mutex<Tail>,
}

#[derive(Default)]
struct Tail {
    lines: VecDeque<String>,
    ended: bool,
}

impl RankLog {
    fn open(dir: &Path, key: &RankKey) -> io::Result<Arc<Self>> {
        fs::create_dir_all(dir)?;
        forget_old_logs(dir, defaults::RANK_LOGS_MAX);
        let path = log_reader::rank_log(dir, &key.deployment, key.replica, key.rank);
        Ok(Arc::new(Self { path, tail: Mutex::default() }))
    }

    /// Copies what the rank writes until it ends.
    fn follow(self: Arc<Self>, reader: PipeReader) -> io::Result<()> {
        let mut file = BoundedLog::open(&self.path, defaults::LOG_BYTES_MAX)?;
        let copy = move || {
            let mut reader = BufReader::new(reader);
            let mut line = Vec::new();
            while matches!(read_line(&mut reader, &mut line), Ok(true)) {
                if let Err(error) = file.write_all(&line) {
                    warn!(path = %self.path.display(), %error, "rank log lost a line");
                }
                self.note(&line);
            }
            self.tail.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
        };
        std::thread::Builder::new().name("rank-log".into()).spawn(copy).map(|_| ())
    }

    fn note(&self, line: &[u8]) {
        let text = String::from_utf8_lossy(line);
        let text: String = text.trim_end().chars().take(defaults::LAST_LINE_BYTES_MAX).collect();
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        if tail.lines.len() == defaults::LAST_LINES {
            tail.lines.pop_front();
        }
        tail.lines.push_back(text);
    }

    fn last_lines(&self, deadline: Duration) -> String {
        let started = Instant::now();
        loop {
            let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
            if tail.ended || started.elapsed() >= deadline {
                return tail.lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n");
            }
            drop(tail);
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Reads a line, cut where it is longer than a log may be. False at the end.
fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    let mut limited = io::Read::take(reader, defaults::LOG_BYTES_MAX / 2);
    Ok(limited.read_until(b'\n', line)? > 0)
}

/// Removes the oldest logs of ranks where there are too many.
fn forget_old_logs(dir: &Path, num_max: usize) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let mut logs: Vec<(SystemTime, PathBuf)> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("rank-"))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    logs.sort();
    let num_old = logs.len().saturating_sub(num_max);
    for (_, path) in &logs[..num_old] {
        // One that cannot be removed now is tried again with the next rank.
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_becomes_the_name_of_its_interface() {
        let named = |value: &str| {
            let env = BTreeMap::from([(NCCL_INTERFACE.to_owned(), value.to_owned()), ("A".into(), "127.0.0.1".into())]);
            let env = for_this_machine(&env);
            assert_eq!(env["A"], "127.0.0.1");
            env.get(NCCL_INTERFACE).cloned()
        };
        assert_eq!(named("127.0.0.1").as_deref(), Some("=lo"));
        assert_eq!(named("=eth7").as_deref(), Some("=eth7"));
        assert_eq!(named("192.0.2.1"), None);
    }
}
