//! A cluster whose head can be started again where it was.

use std::time::{Duration, Instant};

use phalanx_proto::StatusSnapshot;

use crate::{Cluster, Node, Processes, free_ports, wait_for};

/// A cluster on ports that it keeps.
pub struct Lasting {
    /// The cluster.
    pub cluster: Cluster,
    /// The flags of its ports, and what else it was started with.
    pub ports: Vec<String>,
    num_slots: String,
}

impl Lasting {
    /// Starts a head that offers `slots` CPU slots.
    ///
    /// # Panics
    /// If there are no ports.
    pub fn start(slots: u32) -> Self {
        Self::start_on(Node::new(), slots, &[])
    }

    /// The same on a node that was readied for it, with further flags.
    ///
    /// # Panics
    /// If there are no ports.
    pub fn start_on(node: Node, slots: u32, more: &[&str]) -> Self {
        let flags = ["--port", "--http-port", "--dashboard-port"];
        let numbers = free_ports(flags.len()).into_iter().map(|port| port.to_string());
        let ports: Vec<String> = flags.into_iter().zip(numbers).flat_map(|(flag, port)| [flag.into(), port]).collect();
        let ports: Vec<String> = ports.into_iter().chain(more.iter().map(|&word| word.to_owned())).collect();
        let words: Vec<&str> = ports.iter().map(String::as_str).collect();
        Self { cluster: Cluster::start_on(node, slots, &words), num_slots: slots.to_string(), ports }
    }

    /// `kill -9` of the head.
    pub fn kill_head(&self) {
        let pid = self.cluster.status().head.pid;
        Processes::kill(pid);
        Processes::wait_gone(&[pid]);
    }

    /// Starts the head again.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start_head(&self) {
        let mut arguments = vec!["start", "--head", "--num-gpus", &self.num_slots, "--json"];
        arguments.extend(self.ports.iter().map(String::as_str));
        let again = self.cluster.node.run("coordinator", &arguments);
        assert_eq!(again.code, 0, "{again:?}");
    }

    /// Starts the head again; gives the time until deployment `m` is ready.
    pub fn restart_head(&self) -> Duration {
        let started = Instant::now();
        self.start_head();
        wait_for("the deployment to be ready", || (self.cluster.deployment_state("m") == "ready").then_some(()));
        started.elapsed()
    }

    /// Process ids of all ranks and agents.
    pub fn pids(&self) -> Vec<u32> {
        Self::pids_in(&self.cluster.status())
    }

    /// The same of a moment before.
    pub fn pids_in(status: &StatusSnapshot) -> Vec<u32> {
        status.ranks.iter().map(|rank| rank.pid).chain(status.nodes.iter().map(|node| node.pid)).collect()
    }
}
