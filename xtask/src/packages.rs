//! Debian packages that tests need, by name.

use std::process::{Command, Stdio};

use anyhow::Context;

use crate::process::check;

/// etcd, for the tests of two heads; installed where it is absent.
///
/// # Errors
/// It is not there, and apt-get does not bring it (only root can).
pub fn etcd() -> anyhow::Result<()> {
    let answers = || Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if answers().is_ok_and(|status| status.success()) {
        return Ok(());
    }
    let apt = || {
        let mut command = Command::new("apt-get");
        // The tests start their own: the package shall start none.
        command.env("DEBIAN_FRONTEND", "noninteractive").env("RUNLEVEL", "1");
        command
    };
    let help = "install the package etcd-server: the tests of two heads need the program `etcd`";
    let install = || {
        check(apt().args(["update", "-qq"]))?;
        check(apt().args(["install", "-y", "-qq", "--no-install-recommends", "etcd-server"]))
    };
    install().with_context(|| format!("there is no etcd, and apt-get does not bring it (only root can): {help}"))
}
