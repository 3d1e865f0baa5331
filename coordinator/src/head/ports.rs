//! Ports: bound before anything else starts; a taken one is named with its holder and the flag.
//!
//! **Invariant:** a holder is read from the kernel's own tables; where it cannot be known, nothing is guessed.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::path::{Path, PathBuf};

use socket2::{Domain, Protocol, Socket, Type};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// One port that the head listens on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortWish {
    /// What it is for, in words.
    pub purpose: &'static str,
    /// The flag that changes it.
    pub flag: &'static str,
    /// The flag that changes its host.
    pub host_flag: &'static str,
    /// Where to listen.
    pub host: String,
    /// 0 picks a free one.
    pub port: u16,
}

/// Why a port cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// Someone else listens there.
    #[error("port {port} ({purpose}) is taken{}; choose another with {flag} (0 picks a free one)", by(.holder))]
    Taken {
        /// The port.
        port: u16,
        /// What it is for.
        purpose: &'static str,
        /// Who holds it, where that can be known.
        holder: Option<Holder>,
        /// The flag.
        flag: &'static str,
    },
    /// The host is no address of this machine.
    #[error("cannot listen on {host} ({purpose}): {source}; choose another address with {flag}")]
    Host {
        /// What was given.
        host: String,
        /// What it is for.
        purpose: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
        /// The flag.
        flag: &'static str,
    },
}

fn by(holder: &Option<Holder>) -> String {
    holder.as_ref().map(|holder| format!(" by process {} ({})", holder.pid, holder.command)).unwrap_or_default()
}

/// A process that listens on a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its id.
    pub pid: u32,
    /// Its command line, shortened.
    pub command: String,
}

/// Listens on a port.
///
/// # Errors
/// The port is taken, or the host is not an address of this machine.
pub fn bind(wish: &PortWish) -> Result<TcpListener, PortError> {
    let PortWish { purpose, flag, host_flag, host, port } = wish;
    let host_error = |source| PortError::Host { host: host.clone(), purpose, source, flag: host_flag };
    let mut addresses = (host.as_str(), *port).to_socket_addrs().map_err(host_error)?;
    let unknown = || host_error(io::Error::new(io::ErrorKind::NotFound, "no such host"));
    let address = addresses.next().ok_or_else(unknown)?;
    listen(address).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => PortError::Taken { port: *port, purpose, holder: holder(*port), flag },
        _ => host_error(error),
    })
}

/// Ports that were picked freely, kept for the next head of a home: agents and clients that wait for it know no others.
#[derive(Debug)]
pub struct PickedPorts {
    path: PathBuf,
    known: BTreeMap<String, u16>,
}

impl PickedPorts {
    /// What the last head of a home has left, if it did not end in order.
    pub fn read(path: PathBuf) -> Self {
        let known = fs::read_to_string(&path).ok().and_then(|text| serde_json::from_str(&text).ok());
        Self { path, known: known.unwrap_or_default() }
    }

    /// Listens on a port; one that may be picked freely is the one of the last time where that is free still.
    ///
    /// # Errors
    /// As [`bind`].
    pub fn bind(&mut self, wish: &PortWish) -> Result<TcpListener, PortError> {
        let again = self.known.get(wish.purpose).filter(|_| wish.port == 0);
        let again = again.and_then(|&port| bind(&PortWish { port, ..wish.clone() }).ok());
        let listener = match again {
            Some(listener) => listener,
            None => bind(wish)?,
        };
        if let Ok(address) = listener.local_addr() {
            self.known.insert(wish.purpose.to_owned(), address.port());
        }
        Ok(listener)
    }

    /// Keeps them for the next head. Without it, that one picks others.
    pub fn write(&self) -> io::Result<()> {
        fs::write(&self.path, serde_json::to_vec(&self.known)?)
    }

    /// Forgets them: the head ends in order, and nobody waits for it.
    pub fn forget(&self) {
        // One that stays does no harm: its ports are tried, and others taken where they are in use.
        let _ = fs::remove_file(&self.path);
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Who listens on a port of this machine.
pub fn holder(port: u16) -> Option<Holder> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| fs::read_to_string(path).unwrap_or_default());
    let inodes: Vec<String> = tables.iter().flat_map(|table| listening_inodes(table, port)).collect();
    if inodes.is_empty() {
        return None;
    }
    let links: Vec<String> = inodes.into_iter().map(|inode| format!("socket:[{inode}]")).collect();
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| holds(*pid, &links)).map(|pid| Holder { pid, command: command(pid) }).next()
}

/// Inodes of sockets that listen on `port`, from the text of `/proc/net/tcp`.
fn listening_inodes(table: &str, port: u16) -> Vec<String> {
    const LISTEN: &str = "0A";
    let mut inodes = Vec::new();
    for line in table.lines().skip(1) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, local, _, state, _, _, _, _, _, inode, ..] = fields.as_slice() else { continue };
        let local_port = local.rsplit(':').next().and_then(|port| u16::from_str_radix(port, 16).ok());
        if *state == LISTEN && local_port == Some(port) {
            inodes.push((*inode).to_owned());
        }
    }
    inodes
}

fn holds(pid: u32, links: &[String]) -> bool {
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    files
        .flatten()
        .any(|file| fs::read_link(file.path()).is_ok_and(|link| links.iter().any(|wanted| link == Path::new(wanted))))
}

fn command(pid: u32) -> String {
    const CHARS_MAX: usize = 80;
    let raw = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = String::from_utf8_lossy(&raw).replace('\0', " ");
    let words = words.trim();
    if words.chars().count() <= CHARS_MAX {
        return words.to_owned();
    }
    format!("{}...", words.chars().take(CHARS_MAX).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(port: u16) -> PortWish {
        let host = "127.0.0.1".to_owned();
        PortWish { purpose: "HTTP", flag: "--http-port", host_flag: "--host", host, port }
    }

    #[test]
    fn a_taken_port_names_holder_and_flag() {
        let first = bind(&wish(0)).expect("a free port");
        let port = first.local_addr().expect("an address").port();
        let error = bind(&wish(port)).expect_err("taken");
        let PortError::Taken { holder: Some(holder), .. } = &error else { panic!("no holder in {error}") };
        assert_eq!(holder.pid, std::process::id());
        let text = error.to_string();
        assert!(text.contains(&format!("port {port} (HTTP) is taken by process {}", holder.pid)), "{text}");
        assert!(text.contains("--http-port"), "{text}");
    }

    #[test]
    fn a_port_that_was_picked_freely_is_picked_again() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("ports.json");
        let mut picked = PickedPorts::read(path.clone());
        let port = |listener: &TcpListener| listener.local_addr().expect("an address").port();
        let first = picked.bind(&wish(0)).expect("a free port");
        let number = port(&first);
        picked.write().expect("writes");
        let other = PickedPorts::read(path.clone()).bind(&wish(0)).expect("another, since that one is taken");
        assert_ne!(port(&other), number);
        drop(first);
        assert_eq!(port(&PickedPorts::read(path.clone()).bind(&wish(0)).expect("free")), number);
        picked.forget();
        assert!(PickedPorts::read(path).known.is_empty());
    }

    #[test]
    fn a_foreign_address_is_named() {
        let error = bind(&PortWish { host: "203.0.113.7".into(), ..wish(0) }).expect_err("not ours");
        assert!(error.to_string().contains("203.0.113.7") && error.to_string().contains("--host"), "{error}");
    }

    #[test]
    fn the_kernels_table_is_read() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
                     0: 0100007F:1F41 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4242 1\n\
                     1: 0100007F:1F41 0100007F:A001 01 00000000:00000000 00:00000000 00000000     0        0 4243 1\n\
                     2: broken";
        assert_eq!(listening_inodes(table, 8001), ["4242"]);
        assert!(listening_inodes(table, 8002).is_empty());
    }
}
