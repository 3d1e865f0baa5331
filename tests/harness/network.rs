//! Two hosts on one machine: network namespaces joined by a virtual cable.

use std::process::{Command, Stdio};

/// Two namespaces, `10.87.N.1` and `10.87.N.2`; they end with the value.
pub struct TwoHosts {
    names: [String; 2],
    subnet: u32,
}

fn ip(arguments: &[&str]) -> bool {
    let quiet = Command::new("ip").args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
    quiet.is_ok_and(|status| status.success())
}

impl TwoHosts {
    /// `None` where this machine lets nobody make namespaces.
    pub fn new() -> Option<Self> {
        let id = std::process::id();
        let subnet = id % 250;
        let hosts = Self { names: [format!("phx{id}a"), format!("phx{id}b")], subnet };
        for name in &hosts.names {
            if !ip(&["netns", "add", name]) || !ip(&["-n", name, "link", "set", "lo", "up"]) {
                return None;
            }
        }
        let [a, b] = &hosts.names;
        let cable = ip(&["link", "add", "phx0", "netns", a, "type", "veth", "peer", "name", "phx0", "netns", b]);
        let up = hosts.names.iter().enumerate().all(|(index, name)| {
            let address = format!("{}/24", hosts.address(index));
            ip(&["-n", name, "addr", "add", &address, "dev", "phx0"]) && ip(&["-n", name, "link", "set", "phx0", "up"])
        });
        (cable && up).then_some(hosts)
    }

    /// Namespace of host 0 or 1.
    pub fn name(&self, host: usize) -> &str {
        &self.names[host]
    }

    /// Address of host 0 or 1.
    pub fn address(&self, host: usize) -> String {
        format!("10.87.{}.{}", self.subnet, host + 1)
    }
}

impl Drop for TwoHosts {
    fn drop(&mut self) {
        for name in &self.names {
            ip(&["netns", "del", name]);
        }
    }
}
