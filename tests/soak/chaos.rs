//! What goes wrong during a soak, one thing after the other, and how it is put right again.
//!
//! In its second half head and agents live on, so that what they hold can be seen to be level.
//!
//! **Invariant:** what was frozen, killed or cut is put right some seconds later; only ranks are left to the cluster.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use harness::{FarHost, Lasting, Node, Processes, Random, golden, wait_for};
use nix::sys::signal::Signal;

/// Longest pause between two faults, milliseconds.
const PAUSE_MAX_MS: u64 = 8_000;
/// Longest time until something is put right, milliseconds: often longer than a silent machine is waited for.
const REPAIR_MAX_MS: u64 = 8_000;

/// What is to be put right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Repair {
    /// A frozen agent goes on.
    Continue(u32),
    /// A machine whose agent died joins again.
    Join(usize),
    /// The cable carries packets.
    Connect,
}

/// Two machines, and their bad luck.
pub struct Chaos {
    /// The first machine, with the head.
    pub lasting: Lasting,
    /// The second one, behind a cable where this machine lets us make one.
    pub other: Node,
    far: Option<FarHost>,
    random: Random,
    repairs: Vec<(Instant, Repair)>,
    /// What was done, by name.
    pub counts: BTreeMap<&'static str, u64>,
}

impl Chaos {
    /// Starts the machines and a deployment `m` of two ranks.
    pub fn start(seed: u64) -> Self {
        let far = FarHost::new();
        if far.is_none() {
            println!("no network namespaces here: nothing is cut, and the second machine is on loopback");
        }
        let here = far.as_ref().map(FarHost::address_here);
        let flags: Vec<&str> = here.iter().flat_map(|address| ["--cluster-host", address.as_str()]).collect();
        let lasting = Lasting::start_on(Node::new(), 2, &flags);
        let other =
            far.as_ref().map_or_else(Node::new, |far| Node::inside(far.name()).with_token_of(&lasting.cluster.node));
        let flags = ["--tensor-parallel-size", "2", "--dtype", "float32"];
        let chaos = Self { lasting, other, far, random: Random(seed), repairs: Vec::new(), counts: BTreeMap::new() };
        assert!(chaos.join(1), "the second machine joins");
        chaos.lasting.cluster.serve(&golden("tiny-llama").folder, "m", &flags);
        chaos
    }

    /// Waits a while, putting right what is due, then does something bad; where `spares` says so, to no head and no agent's life.
    pub fn next_fault(&mut self, left: Duration, spares: bool) {
        let until = Instant::now() + Duration::from_millis(self.random.below(PAUSE_MAX_MS)).min(left);
        while Instant::now() < until {
            self.repair_due(Instant::now());
            sleep(Duration::from_millis(100).min(until.saturating_duration_since(Instant::now())));
        }
        match self.random.below(16) {
            0..=7 => self.hit_rank("ranks killed", Signal::SIGKILL),
            8..=9 => self.hit_rank("ranks frozen", Signal::SIGSTOP),
            10 => self.hit_rank("ranks that ended", Signal::SIGTERM),
            11 if !spares => self.kill_agent(),
            11 | 12 => self.freeze_agent(),
            14.. if !spares => self.restart_head(),
            _ => self.cut(),
        }
    }

    /// Puts everything right at once.
    pub fn repair_all(&mut self) {
        while !self.repairs.is_empty() {
            self.repair_due(Instant::now() + Duration::from_secs(3600));
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn hit_rank(&mut self, what: &'static str, signal: Signal) {
        let ranks = self.lasting.cluster.ranks("m");
        let rank = ranks.get(self.random.below(2) as usize).filter(|rank| rank.pid != 0 && Processes::alive(rank.pid));
        if rank.is_some_and(|rank| Processes::try_signal(rank.pid, signal)) {
            self.count(what);
        }
    }

    fn machine(&self, number: usize) -> &Node {
        if number == 0 { &self.lasting.cluster.node } else { &self.other }
    }

    /// One machine that nothing is wrong with; none while something is.
    fn agent(&mut self) -> Option<(usize, u32)> {
        let number = self.random.below(2) as usize;
        if !self.repairs.is_empty() {
            return None;
        }
        let pid = self.machine(number).agent_pid().filter(|pid| Processes::alive(*pid))?;
        Some((number, pid))
    }

    fn kill_agent(&mut self) {
        let Some((number, pid)) = self.agent() else { return };
        if Processes::try_signal(pid, Signal::SIGKILL) {
            self.count("agents killed");
            self.repair_later(Repair::Join(number));
        }
    }

    fn freeze_agent(&mut self) {
        let Some((_, pid)) = self.agent() else { return };
        if Processes::try_signal(pid, Signal::SIGSTOP) {
            self.count("agents frozen");
            self.repair_later(Repair::Continue(pid));
        }
    }

    fn cut(&mut self) {
        let Some(far) = self.far.as_ref().filter(|_| self.repairs.is_empty()) else { return };
        far.cut();
        self.count("cables cut");
        self.repair_later(Repair::Connect);
    }

    fn restart_head(&mut self) {
        // A head is started together with its machine's agent, which must be able to answer.
        self.repair_all();
        self.lasting.kill_head();
        sleep(Duration::from_millis(self.random.below(2_000)));
        self.lasting.start_head();
        self.count("heads killed");
    }

    fn repair_later(&mut self, repair: Repair) {
        let at = Instant::now() + Duration::from_millis(self.random.below(REPAIR_MAX_MS));
        self.repairs.push((at, repair));
    }

    fn repair_due(&mut self, now: Instant) {
        let (due, later): (Vec<_>, Vec<_>) = self.repairs.drain(..).partition(|(at, _)| *at <= now);
        self.repairs = later;
        for (_, repair) in due {
            let done = match repair {
                Repair::Continue(pid) => Processes::try_signal(pid, Signal::SIGCONT),
                Repair::Join(number) => self.join(number),
                Repair::Connect => {
                    self.far.iter().for_each(|far| far.connect(Duration::ZERO));
                    true
                }
            };
            assert!(done, "{repair:?} is possible");
        }
    }

    fn join(&self, number: usize) -> bool {
        let address = self.lasting.cluster.address.as_str();
        let joined = self.machine(number).run("worker", &["join", "--address", address, "--num-gpus", "2"]);
        if joined.code != 0 {
            println!("a machine does not join: {joined:?}");
            return false;
        }
        wait_for("the machine to have joined", || {
            let pid = self.machine(number).agent_pid()?;
            let nodes = self.lasting.cluster.status().nodes;
            nodes.iter().any(|known| known.state == "alive" && known.pid == pid).then_some(())
        });
        true
    }
}
