//! The one thread that starts and ends ranks.
//!
//! Owns the rank processes of this node. Knows no head and no stream: desired state comes in, what is observed goes out.
//!
//! **Invariant:** a key is started at most once while it is desired; what ends is started again only under a new incarnation.
//! A slot never has two processes: a new one waits until the old one has ended.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use phalanx_proto::{DesiredRank, RankKey, RankObserved, RankProcess};
use tracing::{info, warn};

use super::process::{HeadFacts, Launcher, RankChild};
use crate::config::defaults;

/// What the supervisor is told.
#[derive(Debug)]
pub enum Order {
    /// What should run from now on.
    Desired {
        /// All of it.
        ranks: Vec<DesiredRank>,
        /// What ranks are told about the head.
        head: HeadFacts,
    },
    /// A process has ended.
    Exited(RankKey),
    /// End everything, then the thread.
    Shutdown,
}

/// The agent's side of the thread.
pub struct SupervisorHandle {
    /// Orders, in order.
    pub orders: mpsc::SyncSender<Order>,
    /// What became of the ranks; closed when the thread has ended.
    pub observed: tokio::sync::mpsc::Receiver<RankObserved>,
}

/// Starts the thread.
///
/// # Errors
/// The system gives no thread.
pub fn spawn(launcher: Launcher) -> std::io::Result<SupervisorHandle> {
    let (orders, inbox) = mpsc::sync_channel(defaults::AGENT_QUEUE);
    let (outbox, observed) = tokio::sync::mpsc::channel(defaults::AGENT_QUEUE);
    let supervisor = Supervisor {
        launcher,
        head: HeadFacts::default(),
        desired: BTreeMap::new(),
        running: BTreeMap::new(),
        finished: Vec::new(),
        orders: orders.clone(),
        outbox,
    };
    std::thread::Builder::new().name("ranks".into()).spawn(move || supervisor.run(&inbox))?;
    Ok(SupervisorHandle { orders, observed })
}

struct Supervisor {
    launcher: Launcher,
    head: HeadFacts,
    desired: BTreeMap<RankKey, DesiredRank>,
    running: BTreeMap<RankKey, Running>,
    /// Desired keys that have had their one process.
    finished: Vec<RankKey>,
    orders: mpsc::SyncSender<Order>,
    outbox: tokio::sync::mpsc::Sender<RankObserved>,
}

struct Running {
    child: RankChild,
    device_slot: u32,
    /// Present once it was asked to end: when it is killed.
    kill_at: Option<Instant>,
}

impl Supervisor {
    fn run(mut self, inbox: &mpsc::Receiver<Order>) {
        let mut ending = false;
        loop {
            self.reconcile(Instant::now());
            if ending && self.running.is_empty() {
                return;
            }
            match inbox.recv_timeout(self.next_look(Instant::now())) {
                Ok(Order::Desired { ranks, head }) if !ending => {
                    self.head = head;
                    self.desire(ranks);
                }
                Ok(Order::Desired { .. }) | Err(RecvTimeoutError::Timeout) => {}
                Ok(Order::Exited(key)) => self.exited(&key),
                Ok(Order::Shutdown) | Err(RecvTimeoutError::Disconnected) => {
                    ending = true;
                    self.desire(Vec::new());
                }
            }
        }
    }

    fn desire(&mut self, ranks: Vec<DesiredRank>) {
        self.desired = ranks.into_iter().map(|rank| (rank.key.clone(), rank)).collect();
        self.finished.retain(|key| self.desired.contains_key(key));
    }

    /// Ends what is not desired, starts what is missing.
    fn reconcile(&mut self, now: Instant) {
        for (key, running) in &mut self.running {
            match running.kill_at {
                None if !self.desired.contains_key(key) => {
                    info!(rank = %key, pid = running.child.pid(), "ending rank");
                    running.child.terminate();
                    running.kill_at = Some(now + defaults::RANK_END_DEADLINE);
                }
                Some(at) if at <= now => {
                    warn!(rank = %key, pid = running.child.pid(), "rank did not end in time: killing it");
                    running.child.kill();
                    running.kill_at = Some(now + defaults::RANK_END_DEADLINE);
                }
                _ => {}
            }
        }
        let missing: Vec<DesiredRank> = self.desired.values().filter(|rank| self.may_start(rank)).cloned().collect();
        for rank in missing {
            // Two desired ranks may name one slot: the first one takes it.
            if self.may_start(&rank) {
                self.start(&rank);
            }
        }
    }

    fn may_start(&self, rank: &DesiredRank) -> bool {
        let slot_is_free = self.running.values().all(|running| running.device_slot != rank.device_slot);
        slot_is_free && !self.running.contains_key(&rank.key) && !self.finished.contains(&rank.key)
    }

    fn start(&mut self, rank: &DesiredRank) {
        let key = rank.key.clone();
        match self.launcher.launch(rank, &self.head, &self.orders) {
            Ok(child) => {
                info!(rank = %key, pid = child.pid(), device_slot = rank.device_slot, "rank started");
                self.report(RankObserved { key: key.clone(), pid: child.pid(), state: RankProcess::Spawned });
                self.running.insert(key, Running { child, device_slot: rank.device_slot, kill_at: None });
            }
            Err(error) => {
                warn!(rank = %key, %error, "rank cannot be started");
                let last_lines = format!("the rank cannot be started: {error}");
                self.finished.push(key.clone());
                let state = RankProcess::Exited { code: None, signal: None, by_agent: false, last_lines };
                self.report(RankObserved { key, pid: 0, state });
            }
        }
    }

    fn exited(&mut self, key: &RankKey) {
        let Some(running) = self.running.remove(key) else { return };
        let (pid, was_asked) = (running.child.pid(), running.kill_at.is_some());
        let was_told = running.child.was_told();
        let (status, last_lines) = running.child.reap();
        let (code, signal) = status.map_or((None, None), |status| (status.code(), status.signal()));
        // The signal need not be the one that was sent: a rank also kills itself when its pipe ends.
        let by_agent = signal.is_some() && was_told;
        if was_asked {
            info!(rank = %key, pid, ?code, ?signal, "rank ended");
        } else {
            warn!(rank = %key, pid, ?code, ?signal, "rank ended by itself");
        }
        if self.desired.contains_key(key) {
            self.finished.push(key.clone());
        }
        let state = RankProcess::Exited { code, signal, by_agent, last_lines };
        self.report(RankObserved { key: key.clone(), pid, state });
    }

    fn report(&self, observed: RankObserved) {
        // The agent drains this channel as long as it lives; when it is gone, so is this process.
        let _ = self.outbox.blocking_send(observed);
    }

    fn next_look(&self, now: Instant) -> Duration {
        let next = self.running.values().filter_map(|running| running.kill_at).min();
        next.map_or(Duration::from_secs(3600), |at| at.saturating_duration_since(now))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use phalanx_proto::{DeploymentName, DeviceKind, Incarnation, NodeId, Rank};

    use super::super::devices::DeviceSlot;
    use super::*;

    fn launcher(dir: &Path, script: &str) -> Launcher {
        Launcher {
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            node_id: NodeId("n".into()),
            head_note: dir.join("head.json"),
            trust_dir: None,
            secrets: Vec::new(),
            log_dir: dir.to_path_buf(),
            device: DeviceKind::Cpu,
            slots: vec![DeviceSlot { name: "cpu".into(), env: None }; 2],
            num_threads: 1,
            env: Vec::new(),
            kernel_cache_dir: dir.join("kernels"),
            cuda_home: None,
        }
    }

    fn rank(rank: u32, incarnation: u64) -> DesiredRank {
        let key = RankKey {
            deployment: DeploymentName("m".into()),
            replica: 0,
            rank: Rank(rank),
            incarnation: Incarnation(incarnation),
        };
        DesiredRank { key, device_slot: rank, num_threads: None, launch_token: "t".into(), env: BTreeMap::new() }
    }

    struct Bench {
        handle: SupervisorHandle,
        _dir: tempfile::TempDir,
    }

    impl Bench {
        fn new(script: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            Self { handle: spawn(launcher(dir.path(), script)).unwrap(), _dir: dir }
        }

        fn desire(&self, ranks: Vec<DesiredRank>) {
            self.handle.orders.send(Order::Desired { ranks, head: HeadFacts::default() }).unwrap();
        }

        /// The next event, or `None` where none comes for a while.
        fn next(&mut self, patience: Duration) -> Option<RankObserved> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let next = async { tokio::time::timeout(patience, self.handle.observed.recv()).await.ok().flatten() };
            runtime.block_on(next)
        }

        fn spawned(&mut self) -> RankObserved {
            let observed = self.next(Duration::from_secs(5)).unwrap();
            assert_eq!(observed.state, RankProcess::Spawned);
            observed
        }
    }

    fn lives(pid: u32) -> bool {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), None).is_ok()
    }

    const QUIET: Duration = Duration::from_millis(300);
    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn saying_it_twice_changes_nothing() {
        let mut bench = Bench::new("exec sleep 100");
        bench.desire(vec![rank(0, 1), rank(1, 1)]);
        let pids = [bench.spawned().pid, bench.spawned().pid];
        bench.desire(vec![rank(0, 1), rank(1, 1)]);
        assert_eq!(bench.next(QUIET), None);
        assert!(pids.into_iter().all(lives));
        bench.desire(vec![rank(1, 1)]);
        let ended = bench.next(SOON).unwrap();
        assert_eq!((ended.key.rank, ended.pid), (Rank(0), pids[0]));
        assert!(matches!(ended.state, RankProcess::Exited { code: None, signal: Some(15), by_agent: true, .. }));
        assert!(!lives(pids[0]) && lives(pids[1]));
    }

    #[test]
    fn a_signal_from_elsewhere_is_not_the_agents() {
        let mut bench = Bench::new("exec sleep 100");
        bench.desire(vec![rank(0, 1)]);
        let pid = bench.spawned().pid;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), nix::sys::signal::SIGKILL).unwrap();
        let ended = bench.next(SOON).unwrap();
        assert!(matches!(ended.state, RankProcess::Exited { signal: Some(9), by_agent: false, .. }), "{ended:?}");
    }

    #[test]
    fn what_ends_is_started_again_only_under_a_new_incarnation() {
        let mut bench = Bench::new("echo first; echo last words; exit 7");
        bench.desire(vec![rank(0, 1)]);
        bench.spawned();
        let RankProcess::Exited { code, signal, last_lines, .. } = bench.next(SOON).unwrap().state else { panic!() };
        assert_eq!((code, signal, last_lines.as_str()), (Some(7), None, "first\nlast words"));
        bench.desire(vec![rank(0, 1)]);
        assert_eq!(bench.next(QUIET), None);
        bench.desire(vec![rank(0, 2)]);
        assert_eq!(bench.spawned().key.incarnation, Incarnation(2));
    }

    #[test]
    fn a_slot_is_free_only_when_its_process_has_ended() {
        let mut bench = Bench::new("trap '' TERM; while :; do sleep 0.05; done");
        bench.desire(vec![rank(0, 1)]);
        let old = bench.spawned().pid;
        std::thread::sleep(QUIET);
        bench.desire(vec![rank(0, 2)]);
        let ended = bench.next(SOON).unwrap();
        assert!(matches!(ended.state, RankProcess::Exited { signal: Some(9), by_agent: true, .. }), "{ended:?}");
        assert!(!lives(old));
        bench.spawned();
    }

    #[test]
    fn shutdown_ends_everything_and_then_the_thread() {
        let mut bench = Bench::new("exec sleep 100");
        bench.desire(vec![rank(0, 1), rank(1, 1)]);
        let pids = [bench.spawned().pid, bench.spawned().pid];
        bench.handle.orders.send(Order::Shutdown).unwrap();
        assert!(bench.next(SOON).is_some() && bench.next(SOON).is_some());
        assert_eq!(bench.next(SOON), None);
        assert!(!pids.into_iter().any(lives));
    }

    #[test]
    fn what_cannot_be_started_is_said() {
        let mut bench = Bench::new("true");
        bench.desire(vec![DesiredRank { device_slot: 9, ..rank(0, 1) }]);
        let observed = bench.next(SOON).unwrap();
        let RankProcess::Exited { last_lines, .. } = observed.state else { panic!() };
        assert!(observed.pid == 0 && last_lines.contains("slot 9 of 2"), "{last_lines}");
    }

    #[test]
    fn a_rank_dies_with_the_pipe_to_its_agent() {
        // `cat` ends when its input does, as a rank does.
        let mut bench = Bench::new("trap '' TERM; cat > /dev/null; exit 3");
        bench.desire(vec![rank(0, 1)]);
        bench.spawned();
        std::thread::sleep(QUIET);
        bench.desire(vec![]);
        let ended = bench.next(SOON).unwrap();
        assert!(matches!(ended.state, RankProcess::Exited { code: Some(3), .. }), "{ended:?}");
    }
}
