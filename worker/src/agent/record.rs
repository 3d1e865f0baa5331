//! The running agent of a home: a lock that it holds while it lives, and a record of how to find it.
//!
//! **Invariant:** one home has at most one agent. A record counts only while the lock is held: process ids are used again,
//! locks are not.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::{Flock, FlockArg};
use phalanx_proto::NodeId;
use phalanx_trust::files::write_private;
use serde::{Deserialize, Serialize};

use crate::config::Home;

/// What an agent says of itself to other programs of its home.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentRecord {
    /// Its process id.
    pub pid: u32,
    /// Its node.
    pub node_id: NodeId,
    /// The head that it serves.
    pub head: String,
    /// Whether it was started together with its head.
    #[serde(default)]
    pub with_head: bool,
}

/// Proof that this process is the home's agent.
pub struct AgentLock {
    // Read by nobody: it is held.
    _lock: Flock<File>,
    record: std::path::PathBuf,
}

/// Who has the home.
pub enum Claim {
    /// This process, from now on.
    Ours(AgentLock),
    /// Another agent; its record, where it has written it.
    Taken(Option<AgentRecord>),
}

/// Makes this process the agent of a home.
///
/// # Errors
/// The home cannot be written.
pub fn claim(home: &Home, record: &AgentRecord) -> io::Result<Claim> {
    std::fs::create_dir_all(home.run_dir())?;
    let Some(mut lock) = try_lock(home)? else { return Ok(Claim::Taken(read(home))) };
    // The id also stands in the lock itself, for people.
    lock.set_len(0)?;
    lock.rewind()?;
    writeln!(lock, "{}", record.pid)?;
    let path = home.agent_record();
    write_private(&path, &serde_json::to_vec(record)?)?;
    Ok(Claim::Ours(AgentLock { _lock: lock, record: path }))
}

/// The agent that runs in a home now.
///
/// # Errors
/// The home cannot be read.
pub fn running(home: &Home) -> io::Result<Option<AgentRecord>> {
    if !home.agent_lock().exists() {
        return Ok(None);
    }
    // The lock is given back at once where it was free.
    Ok(if try_lock(home)?.is_some() { None } else { read(home) })
}

fn try_lock(home: &Home) -> io::Result<Option<Flock<File>>> {
    let file =
        OpenOptions::new().create(true).read(true).write(true).truncate(false).mode(0o600).open(home.agent_lock())?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error.into()),
    }
}

fn read(home: &Home) -> Option<AgentRecord> {
    let mut text = String::new();
    File::open(home.agent_record()).ok()?.take(64 * 1024).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

impl Drop for AgentLock {
    fn drop(&mut self) {
        // A record without its lock counts for nothing, so one that stays does no harm.
        let _ = std::fs::remove_file(&self.record);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_has_one_agent_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::new(dir.path());
        let record = AgentRecord { pid: 7, node_id: NodeId("n".into()), head: "h:1".into(), with_head: false };
        assert_eq!(running(&home).unwrap(), None);
        let Claim::Ours(lock) = claim(&home, &record).unwrap() else { panic!() };
        assert_eq!(running(&home).unwrap(), Some(record.clone()));
        assert!(matches!(claim(&home, &record).unwrap(), Claim::Taken(Some(other)) if other == record));
        drop(lock);
        assert_eq!(running(&home).unwrap(), None);
        assert!(matches!(claim(&home, &record).unwrap(), Claim::Ours(_)));
    }
}
