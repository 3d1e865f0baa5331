//! Where other homes of the same user find the home of a head that listens on loopback only.
//!
//! One small file for each such head, in a folder that only the user can write; it holds the path of the head's home and no
//! secret. Who can read that home could take the token from there by hand.
//!
//! **Invariant:** a folder that others could have written is not looked at.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use crate::files::{private_dir, write_private};

fn folder() -> PathBuf {
    PathBuf::from(format!("/tmp/phalanx-{}", geteuid().as_raw()))
}

/// Loopback is another one in each network namespace.
fn file(port: u16) -> Option<PathBuf> {
    let namespace = fs::read_link("/proc/self/ns/net").ok()?;
    let digits: String = namespace.to_string_lossy().chars().filter(char::is_ascii_digit).collect();
    Some(folder().join(format!("head-{digits}-{port}")))
}

fn is_ours(folder: &Path) -> bool {
    let own = geteuid().as_raw();
    fs::symlink_metadata(folder)
        .is_ok_and(|found| found.is_dir() && found.uid() == own && found.permissions().mode() & 0o022 == 0)
}

/// Says where the home of the head on this loopback port is.
///
/// # Errors
/// The folder cannot be used; other homes then need a token.
pub fn announce(port: u16, home: &Path) -> io::Result<()> {
    let file = file(port).ok_or(io::ErrorKind::NotFound)?;
    let folder = folder();
    if !folder.exists() {
        private_dir(&folder)?;
    }
    if !is_ours(&folder) {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("{} is not ours", folder.display())));
    }
    write_private(&file, home.to_string_lossy().as_bytes())
}

/// Takes that back.
pub fn forget(port: u16, home: &Path) {
    if find(port).is_some_and(|found| found == home)
        && let Some(file) = file(port)
    {
        let _ = fs::remove_file(file);
    }
}

/// The home of the head on this loopback port, where it has said so.
pub fn find(port: u16) -> Option<PathBuf> {
    let text = fs::read_to_string(file(port).filter(|_| is_ours(&folder()))?).ok()?;
    Some(PathBuf::from(text)).filter(|home| home.is_absolute())
}

/// The same for `host:port`, where the host is this machine's loopback.
pub fn of_address(address: &str) -> Option<PathBuf> {
    let (host, port) = address.rsplit_once(':')?;
    let host = host.trim_matches(['[', ']']);
    let is_loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    is_loopback.then(|| port.parse().ok()).flatten().and_then(find)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_found_until_it_is_forgotten() {
        // A port of no head.
        let (port, home, other) = (1, Path::new("/homes/a"), Path::new("/homes/b"));
        announce(port, home).expect("writes");
        assert_eq!(find(port).as_deref(), Some(home));
        forget(port, other);
        assert_eq!(find(port).as_deref(), Some(home));
        forget(port, home);
        assert_eq!(find(port), None);
    }
}
