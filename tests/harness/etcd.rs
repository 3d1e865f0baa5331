//! A real etcd of one member, on free ports, with a folder of its own and little room.

use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{Http, wait_for};

/// Room for all keys and their history, bytes.
const ROOM_BYTES: u64 = 16 << 20;
/// What takes the room away, in base64 as etcd's gateway wants it: a key, and the size of one value.
const BALLAST: &str = "YmFsbGFzdA==";
const BALLAST_BYTES: usize = 1 << 20;

/// A member that runs; it ends with the value.
pub struct Etcd {
    host: String,
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
        Self::start_at("127.0.0.1")
    }

    /// The same at another address of this machine.
    ///
    /// # Panics
    /// If there is no `etcd` on this machine, or it does not start.
    pub fn start_at(host: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("phalanx-etcd-").tempdir().expect("a temporary folder");
        let ports = free_ports(2);
        let mut etcd = Self { host: host.to_owned(), folder, client: ports[0], peer: ports[1], process: None };
        etcd.start_again();
        etcd
    }

    /// What `--store` takes.
    pub fn store(&self) -> String {
        format!("etcd://{}:{}", self.host, self.client)
    }

    /// A way to it that can be cut.
    pub fn cable(&self) -> Cable {
        Cable::lay(self.client)
    }

    /// Starts the member again, with what it had.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start_again(&mut self) {
        let url = |port: u16| format!("http://{}:{port}", self.host);
        let (client, peer) = (url(self.client), url(self.peer));
        let log = std::fs::File::create(self.folder.path().join("etcd.log")).expect("a log file");
        let mut command = Command::new("etcd");
        command.arg("--data-dir").arg(self.folder.path().join("data")).args(["--name", "m"]);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--quota-backend-bytes", &ROOM_BYTES.to_string()]);
        command.args(["--initial-cluster", &format!("m={peer}")]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let started = command.spawn();
        self.process = Some(started.expect("etcd is there: `cargo xtask fetch`, or Debian's package etcd-server"));
        wait_for("etcd to listen", || TcpStream::connect((self.host.as_str(), self.client)).ok());
    }

    /// Takes all room: from now on etcd takes nothing that is new, and says so.
    ///
    /// # Panics
    /// If it has more room than it was given.
    pub fn fill(&self) {
        let value = "A".repeat(BALLAST_BYTES.next_multiple_of(4));
        let put = || self.gateway().post("/v3/kv/put", &json!({"key": BALLAST, "value": value})).status;
        let most = ROOM_BYTES / BALLAST_BYTES as u64 * 2;
        assert!((0..most).any(|_| put() != 200), "its room ends");
    }

    /// Gives the room back, as an operator does: what is old is dropped, and the alarm taken back.
    ///
    /// # Panics
    /// If etcd refuses.
    pub fn free(&self) {
        let ask = |path: &str, body: Value| self.gateway().ask(path, &body);
        let removed = ask("/v3/kv/deleterange", json!({"key": BALLAST}));
        ask("/v3/kv/compaction", json!({"revision": removed["header"]["revision"], "physical": true}));
        ask("/v3/maintenance/defragment", json!({}));
        for mut alarm in
            ask("/v3/maintenance/alarm", json!({"action": "GET"}))["alarms"].as_array().into_iter().flatten().cloned()
        {
            alarm["action"] = "DEACTIVATE".into();
            ask("/v3/maintenance/alarm", alarm);
        }
    }

    fn gateway(&self) -> Http {
        Http::new(&format!("http://{}:{}", self.host, self.client))
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

/// A way to a port of this machine that can be cut.
pub struct Cable {
    port: u16,
    /// Both ends of every connection; none once it is cut.
    ends: Arc<Mutex<Option<Vec<TcpStream>>>>,
}

impl Cable {
    fn lay(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let ends = Arc::new(Mutex::new(Some(Vec::new())));
        let kept = Arc::clone(&ends);
        // It ends with the test's process.
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let Ok(far) = TcpStream::connect(("127.0.0.1", target)) else { continue };
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(ends) = kept.as_mut() else { continue };
                let pairs = [(&near, &far), (&far, &near)];
                for (from, to) in pairs {
                    let (mut from, mut to) = (from.try_clone().expect("a socket"), to.try_clone().expect("a socket"));
                    // Its end is that of the connection.
                    thread::spawn(move || io::copy(&mut from, &mut to).and(to.shutdown(Shutdown::Write)));
                }
                ends.extend([near, far]);
            }
        });
        Self { port, ends }
    }

    /// What `--store` takes, over this way.
    pub fn store(&self) -> String {
        format!("etcd://127.0.0.1:{}", self.port)
    }

    /// Ends all connections, and those to come.
    pub fn cut(&self) {
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner).take();
        for end in ends.into_iter().flatten() {
            // One that has ended already is what is wanted.
            let _ = end.shutdown(Shutdown::Both);
        }
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
