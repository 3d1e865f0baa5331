//! The record of the head that runs in a home: who it is and where it listens, for the command line.
//!
//! **Invariant:** the record belongs to the process that holds the lock; a record whose process has gone says nothing.
//! A process is known by its id and its start time, so a reused id is never taken for it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use phalanx_trust::files::{private_dir, write_private};
use serde::{Deserialize, Serialize};

use crate::config::Home;

/// A head that was killed may hold its lock for so long: its last thread ends after the process is gone.
const DYING: Duration = Duration::from_secs(3);
/// Time between two looks at it.
const DYING_LOOK: Duration = Duration::from_millis(10);

/// A process of this machine that cannot be mistaken for a later one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its id.
    pub pid: u32,
    /// When it started, in the kernel's ticks since boot.
    pub started: u64,
}

impl ProcessId {
    /// The process with this id, if there is one.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?;
        let started = fields.nth(18)?.parse().ok()?;
        (state != "Z" && state != "X").then_some(Self { pid, started })
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

/// What a running head says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadRecord {
    /// The head.
    pub process: ProcessId,
    /// Cluster address, as other machines should use it.
    pub address: String,
    /// Cluster address for this machine itself.
    pub local_address: String,
    /// OpenAI-compatible HTTP.
    pub http: String,
    /// Dashboard.
    pub dashboard: String,
    /// Its Unix socket, where it has one.
    pub socket: Option<PathBuf>,
    /// Where its logs are.
    pub log_dir: PathBuf,
    /// Present while it stands by: the cluster address of the head that leads, empty where none does.
    #[serde(default)]
    pub stands_by: Option<String>,
    /// Its keys and certificates.
    pub trust_dir: PathBuf,
    /// Plain text between machines.
    pub insecure: bool,
}

/// Proof that no other head runs in a home; let go when dropped, or when the process ends in whatever way.
#[derive(Debug)]
pub struct HomeLock {
    _lock: Flock<File>,
    record: PathBuf,
}

/// Why a home cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// Another head runs there.
    #[error("a head runs in {home} already{}", at(.running))]
    Running {
        /// The home.
        home: PathBuf,
        /// What it says of itself, where it has got so far.
        running: Option<Box<HeadRecord>>,
    },
    /// The folder cannot be written.
    #[error("cannot use {path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

fn at(running: &Option<Box<HeadRecord>>) -> String {
    running.as_ref().map(|head| format!(": pid {} at {}", head.process.pid, head.address)).unwrap_or_default()
}

impl HomeLock {
    /// Takes a home for a head.
    ///
    /// # Errors
    /// Another head runs there, or the folder cannot be written.
    pub fn take(home: &Home) -> Result<Self, HomeError> {
        let dir = home.run_dir();
        private_dir(&dir).map_err(|source| HomeError::Io { path: dir.clone(), source })?;
        let path = dir.join("head.lock");
        let opened = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let mut file = opened.map_err(|source| HomeError::Io { path: path.clone(), source })?;
        let started = Instant::now();
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Self { _lock: lock, record: home.head_record() }),
                Err((file, nix::errno::Errno::EWOULDBLOCK)) => file,
                Err((_, error)) => return Err(HomeError::Io { path, source: error.into() }),
            };
            let running = running_head(home).map(Box::new);
            if running.is_some() || started.elapsed() >= DYING {
                return Err(HomeError::Running { home: home.path().to_owned(), running });
            }
            std::thread::sleep(DYING_LOOK);
        }
    }

    /// Writes the record, whole or not at all.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn write(&self, record: &HeadRecord) -> Result<(), HomeError> {
        let text = serde_json::to_vec(record).map_err(io::Error::other);
        let written = text.and_then(|text| write_private(&self.record, &text));
        written.map_err(|source| HomeError::Io { path: self.record.clone(), source })
    }
}

impl Drop for HomeLock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.record);
    }
}

/// The head that runs in a home, if one does.
pub fn running_head(home: &Home) -> Option<HeadRecord> {
    let text = fs::read_to_string(home.head_record()).ok()?;
    let record: HeadRecord = serde_json::from_str(&text).ok()?;
    record.process.is_alive().then_some(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_has_one_head_and_its_record_goes_with_it() {
        let dir = tempfile::tempdir().expect("a folder");
        let home = Home::new(dir.path().to_owned());
        let lock = HomeLock::take(&home).expect("free");
        let process = ProcessId::of(std::process::id()).expect("this process");
        let record = HeadRecord {
            process,
            address: "127.0.0.1:8001".into(),
            local_address: "127.0.0.1:8001".into(),
            http: "127.0.0.1:8000".into(),
            dashboard: "127.0.0.1:8265".into(),
            socket: None,
            log_dir: home.log_dir(),
            stands_by: None,
            trust_dir: home.trust_dir(),
            insecure: false,
        };
        lock.write(&record).expect("writes");
        assert_eq!(running_head(&home), Some(record.clone()));
        let error = HomeLock::take(&home).expect_err("taken").to_string();
        assert!(error.contains(&format!("pid {} at 127.0.0.1:8001", process.pid)), "{error}");
        drop(lock);
        assert_eq!(running_head(&home), None);
        HomeLock::take(&home).expect("free again");
    }

    #[test]
    fn a_reused_id_is_another_process() {
        let this = ProcessId::of(std::process::id()).expect("this process");
        assert!(this.is_alive());
        assert!(!ProcessId { started: this.started + 1, ..this }.is_alive());
    }
}
