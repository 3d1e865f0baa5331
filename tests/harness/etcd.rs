//! A real etcd of one member, on free ports, with a folder of its own.

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::wait_for;

/// A member that runs; it ends with the value.
pub struct Etcd {
    folder: TempDir,
    client: u16,
    peer: u16,
    process: Option<Child>,
}

impl Etcd {
    /// Starts a member with an empty folder.
    ///
    /// # Panics
    /// If there is no `etcd` on this machine, or it does not start.
    pub fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("phalanx-etcd-").tempdir().expect("a temporary folder");
        let ports = free_ports(2);
        let mut etcd = Self { folder, client: ports[0], peer: ports[1], process: None };
        etcd.start_again();
        etcd
    }

    /// What `--store` takes.
    pub fn store(&self) -> String {
        format!("etcd://127.0.0.1:{}", self.client)
    }

    /// Starts the member again, with what it had.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start_again(&mut self) {
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let (client, peer) = (url(self.client), url(self.peer));
        let log = std::fs::File::create(self.folder.path().join("etcd.log")).expect("a log file");
        let mut command = Command::new("etcd");
        command.arg("--data-dir").arg(self.folder.path().join("data")).args(["--name", "m"]);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("m={peer}")]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let started = command.spawn();
        self.process = Some(started.expect("etcd is there: `cargo xtask fetch`, or Debian's package etcd-server"));
        wait_for("etcd to listen", || TcpStream::connect(("127.0.0.1", self.client)).ok());
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // One that has ended already is what is wanted.
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// A signal to the member.
    ///
    /// # Panics
    /// If it does not run.
    pub fn signal(&self, signal: Signal) {
        let pid = self.process.as_ref().expect("etcd runs").id();
        kill(Pid::from_raw(pid.cast_signed()), signal).expect("etcd runs");
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(self.folder.path().join("etcd.log")).unwrap_or_default());
        }
        self.kill();
    }
}

/// Ports that are free now.
///
/// # Panics
/// If there are none.
pub fn free_ports(count: usize) -> Vec<u16> {
    let free = |_| TcpListener::bind("127.0.0.1:0").expect("a port");
    let listeners: Vec<TcpListener> = (0..count).map(free).collect();
    listeners.iter().map(|listener| listener.local_addr().expect("an address").port()).collect()
}
