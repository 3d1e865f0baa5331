//! What this machine is: its id, its name, its size.

use std::io::{self, Write};
use std::path::Path;

use phalanx_proto::NodeId;

use crate::config::Home;

/// Letters of a host's name that go into a node's id.
const HOST_CHARS_MAX: usize = 24;

/// The node's id: made once, kept in its home, readable (it begins with the machine's name).
///
/// # Errors
/// The home cannot be written.
pub fn id(home: &Home, hostname: &str) -> io::Result<NodeId> {
    let path = home.node_id();
    if let Some(known) = read_id(&path) {
        return Ok(known);
    }
    std::fs::create_dir_all(home.path())?;
    let host: String = hostname
        .split('.')
        .next()
        .unwrap_or_default()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .take(HOST_CHARS_MAX)
        .collect();
    let random = uuid::Uuid::new_v4().simple().to_string();
    let id = format!("{}-{}", if host.is_empty() { "node" } else { &host }, &random[..6]);
    // Written aside and linked, so that two processes that come at once end with one id.
    let mut draft = tempfile_beside(&path)?;
    writeln!(draft.file, "{id}")?;
    draft.file.sync_all()?;
    match std::fs::hard_link(&draft.path, &path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    read_id(&path).ok_or_else(|| io::Error::other(format!("{} holds no id", path.display())))
}

fn read_id(path: &Path) -> Option<NodeId> {
    let text = std::fs::read_to_string(path).ok()?;
    let id = text.trim();
    let fine = !id.is_empty() && id.len() <= 64 && id.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    fine.then(|| NodeId(id.into()))
}

struct Draft {
    path: std::path::PathBuf,
    file: std::fs::File,
}

impl Drop for Draft {
    fn drop(&mut self) {
        // What stays behind on a failure is an empty file of this process.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn tempfile_beside(path: &Path) -> io::Result<Draft> {
    let path = path.with_extension(std::process::id().to_string());
    let file = std::fs::File::create(&path)?;
    Ok(Draft { path, file })
}

/// The machine's name.
pub fn hostname() -> String {
    let read = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = read.trim();
    if name.is_empty() { "localhost".into() } else { name.into() }
}

/// Tells one start of one machine from all others; empty where the kernel does not say.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// CPUs that this process may use.
pub fn num_cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

/// Memory of the machine; 0 where the kernel does not say.
pub fn memory_bytes() -> u64 {
    let read = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = read.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
}

/// The processor's name.
pub fn cpu_name() -> String {
    let read = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = read.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split_once(':')).map_or_else(|| "CPU".into(), |(_, name)| name.trim().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_keeps_its_id_and_two_homes_differ() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = id(&Home::new(a.path()), "My.Host.example").unwrap();
        assert_eq!(first, id(&Home::new(a.path()), "renamed").unwrap());
        assert!(first.0.starts_with("my-"), "{first}");
        assert_ne!(first, id(&Home::new(b.path()), "my").unwrap());
        assert_eq!(std::fs::read_dir(a.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_machine_has_a_size() {
        assert!(num_cpus() >= 1 && memory_bytes() > 0 && !hostname().is_empty() && !cpu_name().is_empty());
    }
}
