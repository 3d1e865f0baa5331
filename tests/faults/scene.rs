//! Machines, a deployment and streams, and what a cell does to them.

use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use harness::{Clock, Cluster, Company, FarHost, Http, Lasting, Node, Processes, StreamEnd, Work, golden, wait_for};
use nix::sys::signal::Signal;
use phalanx_proto::{NodeStatus, StatusSnapshot};
use serde_json::json;

use super::{Cell, Expected, Fault, Moment, Victim};

/// How long a frozen head stands still: longer than its patience with silent machines.
const HEAD_PAUSE: Duration = Duration::from_secs(6);
/// A machine that says nothing is given up within this.
const DETECTED: Duration = Duration::from_secs(5);
/// One way of a slow link.
const SLOW_ONE_WAY: Duration = Duration::from_millis(100);
/// Steps after which streams of the decoding work have left their prompts behind.
const STEPS_TO_DECODE: u64 = 25;
/// Room for a store: what redb begins with, and some.
const STORE_BYTES: u64 = 12 << 20;
/// Lines of logs that are shown of a cell that went wrong.
const LAST_LINES: usize = 40;
/// A day.
pub(super) const DAY_S: i64 = 86_400;

/// What kind of scene a cell needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// One machine.
    OneMachine,
    /// Two machines without a network between them; each has room for all ranks.
    TwoMachines,
    /// A machine behind a cable that has one of the ranks; this one has room for both.
    Shared,
    /// A machine behind a cable that has all ranks; this one has too few slots.
    AllFar,
    /// One machine with a wall clock that jumps.
    OtherClock,
    /// One machine with a small disk for its store.
    SmallDisk,
    /// Two heads over etcd.
    TwoHeads,
    /// Two heads, one of them behind a cable.
    FarHead,
}

/// Long prompts, and long answers, with the text that each has alone: the same on any scene.
pub(super) struct Works {
    pub prefill: Work,
    pub decode: Work,
}

/// Machines with a deployment `m` of two ranks.
pub struct Scene {
    kind: Kind,
    lasting: Lasting,
    other: Option<Node>,
    far: Option<FarHost>,
    clock: Option<Clock>,
    works: &'static Works,
}

pub(super) fn works(http: &Http) -> &'static Works {
    static WORKS: OnceLock<Works> = OnceLock::new();
    WORKS
        .get_or_init(|| Works { prefill: Work::ask_alone(http, 12, 800, 4), decode: Work::ask_alone(http, 8, 40, 250) })
}

impl Scene {
    /// The kind that a cell needs.
    pub fn kind(cell: &Cell) -> Kind {
        match (cell.fault, cell.victim) {
            (Fault::Cut, Victim::Leader | Victim::Standby) => Kind::FarHead,
            (_, Victim::Leader | Victim::Standby) => Kind::TwoHeads,
            (Fault::Cut, Victim::Agent | Victim::Head) => Kind::AllFar,
            (Fault::Cut | Fault::SlowLink, _) => Kind::Shared,
            (Fault::DiskFull, _) => Kind::SmallDisk,
            (Fault::ClockJump, _) => Kind::OtherClock,
            (_, Victim::Agent) => Kind::TwoMachines,
            _ => Kind::OneMachine,
        }
    }

    /// Whether this scene is what a cell needs.
    pub fn is_of(&self, cell: &Cell) -> bool {
        self.kind == Self::kind(cell)
    }

    /// Sets the scene for a cell; `None` where this machine lets nobody do so.
    pub fn set(cell: &Cell) -> Option<Self> {
        let kind = Self::kind(cell);
        let far = if matches!(kind, Kind::Shared | Kind::AllFar) { Some(FarHost::new()?) } else { None };
        let clock = (kind == Kind::OtherClock).then(Clock::new);
        let mut node = if kind == Kind::SmallDisk { Node::with_store(STORE_BYTES)? } else { Node::new() };
        if let Some(clock) = &clock {
            node = clock.give(node);
        }
        let slots = match kind {
            Kind::AllFar => 1,
            Kind::SmallDisk => 3,
            _ => 2,
        };
        let here = far.as_ref().map(FarHost::address_here);
        let flags: Vec<&str> = here.iter().flat_map(|address| ["--cluster-host", address.as_str()]).collect();
        let lasting = Lasting::start_on(node, slots, &flags);
        let other = match kind {
            Kind::TwoMachines => Some((Node::new(), "2")),
            Kind::Shared => {
                far.as_ref().map(|far| (Node::inside(far.name()).with_token_of(&lasting.cluster.node), "1"))
            }
            Kind::AllFar => {
                far.as_ref().map(|far| (Node::inside(far.name()).with_token_of(&lasting.cluster.node), "2"))
            }
            _ => None,
        };
        let other = other.map(|(node, slots)| {
            join(&node, &lasting.cluster, slots);
            node
        });
        serve(&lasting.cluster, kind);
        let works = works(&lasting.cluster.http);
        Some(Self { kind, lasting, other, far, clock, works })
    }

    /// Plays a cell, and puts the scene back as it was. Gives what was measured.
    ///
    /// # Panics
    /// If anything but what is expected happens.
    pub fn play(&self, cell: &Cell) -> String {
        let cluster = self.cluster();
        wait_for("the deployment to be ready", || (self.state() == "ready").then_some(()));
        let before = cluster.status();
        let company = begin(cluster, self.works, cell.moment, &before);
        match cell.expected {
            Expected::OwnText => self.break_rank(cell, &before, company),
            Expected::MovedText if cell.fault == Fault::Cut => self.cut_shared(company),
            Expected::MovedText => self.lose_machine(cell, company),
            Expected::BackWithText => self.cut_for_a_while(company),
            Expected::ErrorThenText => self.cut_for_long(company),
            Expected::Closed => self.kill_head(cell, company),
            Expected::Paused => self.pause_head(&before, company),
            Expected::NoBreak => self.jump(cell, &before, company),
            Expected::Named => self.slow_down(company),
            Expected::Refused => self.fill_disk(cell, &before, company),
            Expected::TakenOver | Expected::Unnoticed => unreachable!("a cell of two heads"),
        }
    }

    /// The end of all logs.
    pub fn last_words(&self) -> String {
        let logs = self.cluster().node.logs();
        let lines: Vec<&str> = logs.lines().filter(|line| line.contains("WARN") || line.contains("ERROR")).collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
    }

    fn cluster(&self) -> &Cluster {
        &self.lasting.cluster
    }

    fn state(&self) -> String {
        self.cluster().deployment_state("m")
    }

    /// The deployment answers again, with the right text.
    fn answers_again(&self) {
        wait_for("the deployment to be ready again", || (self.state() == "ready").then_some(()));
        let work = &self.works.decode;
        let answer = self.cluster().http.ask("/v1/completions", &work.bodies[0]);
        assert_eq!(answer["choices"][0]["token_ids"], work.expected[0], "a resend gets the right text");
    }

    fn break_rank(&self, cell: &Cell, before: &StatusSnapshot, company: Option<Company>) -> String {
        let (rank, signal) = match (cell.victim, cell.fault) {
            (Victim::RankZero, Fault::Exit) => (0, Signal::SIGTERM),
            (_, Fault::Exit) => (1, Signal::SIGABRT),
            (victim, fault) => {
                let signal = if fault == Fault::Kill { Signal::SIGKILL } else { Signal::SIGSTOP };
                (usize::from(victim != Victim::RankZero), signal)
            }
        };
        let hit = self.cluster().ranks("m");
        Processes::signal(hit[rank].pid, signal);
        let words = right_text(company);
        let epoch = before.deployments[0].epoch;
        wait_for("the deployment to be ready in a later epoch", || {
            let deployment = self.cluster().status().deployments.remove(0);
            (deployment.state == "ready" && deployment.epoch > epoch).then_some(())
        });
        Processes::wait_gone(&hit.iter().chain(&before.ranks).map(|rank| rank.pid).collect::<Vec<_>>());
        self.answers_again();
        words
    }

    /// The machine that the ranks are on, and its home.
    fn machine_of_ranks(&self) -> (NodeStatus, &Node) {
        let status = self.cluster().status();
        let node = status.nodes.iter().find(|node| node.id == status.ranks[0].node).expect("a node").clone();
        let homes = [Some(&self.cluster().node), self.other.as_ref()];
        let home = homes.into_iter().flatten().find(|home| home.agent_pid() == Some(node.pid)).expect("its home");
        (node, home)
    }

    fn lose_machine(&self, cell: &Cell, company: Option<Company>) -> String {
        let (node, home) = self.machine_of_ranks();
        let old: Vec<u32> = self.cluster().ranks("m").iter().map(|rank| rank.pid).collect();
        let signal = match cell.fault {
            Fault::Freeze => Signal::SIGSTOP,
            Fault::Exit => Signal::SIGTERM,
            _ => Signal::SIGKILL,
        };
        Processes::signal(node.pid, signal);
        let words = right_text(company);
        wait_for("the deployment to be ready on the other machine", || {
            let now = self.cluster().status();
            let moved = now.ranks.iter().all(|rank| rank.node != node.id && rank.state == "ready");
            (moved && now.deployments[0].state == "ready").then_some(())
        });
        Processes::wait_gone(&old);
        if cell.fault == Fault::Freeze {
            Processes::signal(node.pid, Signal::SIGCONT);
        } else {
            Processes::wait_gone(&[node.pid]);
            join(home, self.cluster(), "2");
        }
        self.is_back(&node.id);
        words
    }

    /// A machine that was lost is there again, and what serves elsewhere does not notice.
    fn is_back(&self, node: &str) {
        wait_for("the machine to be back", || {
            self.cluster().status().nodes.iter().any(|other| other.id == node && other.state == "alive").then_some(())
        });
        self.answers_again();
        let epoch = self.cluster().status().deployments[0].epoch;
        sleep(Duration::from_secs(1));
        self.answers_again();
        assert_eq!(self.cluster().status().deployments[0].epoch, epoch, "who comes back disturbs nobody");
    }

    fn far(&self) -> &FarHost {
        self.far.as_ref().expect("a machine behind a cable")
    }

    /// The machine behind the cable.
    fn far_node(&self) -> NodeStatus {
        let there = self.far().address_there();
        let nodes = self.cluster().status().nodes;
        nodes.into_iter().find(|node| node.address.starts_with(&there)).expect("the far node")
    }

    /// Loses the far machine; gives its id, and how long it was until the head knew.
    fn cut(&self) -> (String, Duration) {
        let far = self.far_node();
        self.far().cut();
        let cut = Instant::now();
        wait_for("the far machine to be given up", || (self.far_node().state == "dead").then_some(()));
        let took = cut.elapsed();
        assert!(took < DETECTED + Duration::from_secs(1), "a silent machine is given up after {took:?}");
        (far.id, took)
    }

    fn cut_shared(&self, company: Option<Company>) -> String {
        let ranks = self.cluster().ranks("m");
        let (far, took) = self.cut();
        let words = right_text(company);
        self.answers_again();
        assert!(self.cluster().ranks("m").iter().all(|rank| rank.node != far), "all ranks are on this machine");
        self.far().connect(Duration::ZERO);
        Processes::wait_gone(&ranks.iter().map(|rank| rank.pid).collect::<Vec<_>>());
        self.is_back(&far);
        assert_eq!(self.cluster().node.run("coordinator", &["undeploy", "m"]).code, 0);
        serve(self.cluster(), self.kind);
        format!("given up after {:.1} s, {words}", took.as_secs_f64())
    }

    fn cut_for_a_while(&self, company: Option<Company>) -> String {
        let ranks = self.cluster().ranks("m");
        let (far, took) = self.cut();
        sleep(Duration::from_secs(1));
        self.far().connect(Duration::ZERO);
        let words = right_text(company);
        Processes::wait_gone(&ranks.iter().map(|rank| rank.pid).collect::<Vec<_>>());
        self.is_back(&far);
        format!("given up after {:.1} s, {words}", took.as_secs_f64())
    }

    fn cut_for_long(&self, company: Option<Company>) -> String {
        let (far, _) = self.cut();
        let ends = company.expect("streams").ends();
        assert!(ends.iter().all(|end| matches!(end, StreamEnd::Error(_))), "{ends:?}");
        self.far().connect(Duration::ZERO);
        self.is_back(&far);
        format!("{} streams ended with an error event", ends.len())
    }

    fn kill_head(&self, cell: &Cell, company: Option<Company>) -> String {
        let was_ready = cell.moment != Moment::Starting;
        let before = self.lasting.pids();
        self.lasting.kill_head();
        let killed = Instant::now();
        let ends = company.map(Company::ends).unwrap_or_default();
        let closed = killed.elapsed();
        assert!(closed < Duration::from_secs(1), "connections close within a second, not {closed:?}");
        assert!(ends.iter().all(|end| matches!(end, StreamEnd::Cut | StreamEnd::Done)), "{ends:?}");
        sleep(Duration::from_secs(1));
        assert!(!was_ready || before.iter().all(|pid| Processes::alive(*pid)), "agent and ranks wait for their head");
        let took = self.lasting.restart_head();
        if was_ready {
            assert_eq!(self.lasting.pids(), before, "nothing was started again");
        }
        self.answers_again();
        format!(
            "connections closed after {:.2} s, ready {:.2} s after the start",
            closed.as_secs_f64(),
            took.as_secs_f64()
        )
    }

    fn pause_head(&self, before: &StatusSnapshot, company: Option<Company>) -> String {
        Processes::signal(before.head.pid, Signal::SIGSTOP);
        sleep(HEAD_PAUSE);
        Processes::signal(before.head.pid, Signal::SIGCONT);
        let words = right_text(company);
        self.answers_again();
        assert!(self.cluster().status().nodes.iter().all(|node| node.state == "alive"), "no machine was given up");
        words
    }

    fn jump(&self, cell: &Cell, before: &StatusSnapshot, company: Option<Company>) -> String {
        let clock = self.clock.as_ref().expect("a clock");
        for offset in [DAY_S, -DAY_S] {
            clock.jump(offset);
            let created =
                || self.cluster().http.ask("/v1/completions", &self.works.decode.bodies[1])["created"].as_i64();
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
            let differs = created().expect("a time") - now as i64 - offset;
            assert!(differs.abs() < 600, "the head's clock has jumped: {differs} s");
        }
        let words = right_text(company);
        clock.jump(0);
        self.answers_again();
        let now = self.cluster().status();
        assert!(now.nodes.iter().all(|node| node.state == "alive"));
        if cell.moment != Moment::Starting {
            assert_eq!(now.deployments[0].epoch, before.deployments[0].epoch, "no group broke");
        }
        words
    }

    fn slow_down(&self, company: Option<Company>) -> String {
        self.far().connect(SLOW_ONE_WAY);
        let named = wait_for("status to name the slow machine", || {
            let far = self.far_node();
            far.reason.contains("slow").then_some(far)
        });
        let time = named.round_trip_ms.expect("measured");
        assert!((200.0..400.0).contains(&time), "{time} ms");
        assert_eq!(named.state, "alive");
        wait_for("the deployment to be ready", || (self.state() == "ready").then_some(()));
        let mut body = self.works.decode.bodies[0].clone();
        body["max_tokens"] = 2.into();
        let asked = Instant::now();
        let answer = self.cluster().http.ask("/v1/completions", &body);
        let took = asked.elapsed();
        let expected = self.works.decode.expected[0].as_array().expect("token ids");
        assert_eq!(answer["choices"][0]["token_ids"], json!(expected[..2]));
        self.far().connect(Duration::ZERO);
        wait_for("status to forget it", || self.far_node().reason.is_empty().then_some(()));
        let words = right_text(company);
        self.answers_again();
        format!("named with {time:.0} ms, 2 tokens in {:.1} s, {words}", took.as_secs_f64())
    }

    fn fill_disk(&self, cell: &Cell, before: &StatusSnapshot, company: Option<Company>) -> String {
        let cluster = self.cluster();
        let disk = cluster.node.store().expect("a disk");
        disk.fill();
        let folder = golden("tiny-llama").folder;
        let folder = folder.to_str().expect("a path");
        let refused = cluster.node.run("coordinator", &["serve", folder, "--served-model-name", "n"]);
        assert!(refused.code != 0 && refused.stderr.contains("cannot write it down"), "{refused:?}");
        if cell.moment == Moment::Decode {
            // What runs goes on, and is started again where it breaks, though nothing can be written about it.
            Processes::kill(before.ranks[1].pid);
        }
        let words = right_text(company);
        self.answers_again();
        disk.free();
        wait_for("what was refused to be possible", || {
            let removed = cluster.node.run("coordinator", &["undeploy", "n"]).code == 0;
            let flags = ["serve", folder, "--served-model-name", "n"];
            (removed && cluster.node.run("coordinator", &flags).code == 0).then_some(())
        });
        assert_eq!(cluster.node.run("coordinator", &["undeploy", "n"]).code, 0);
        // By now the store was asked again about `m`.
        sleep(Duration::from_secs(3));
        let pids = self.lasting.pids();
        self.lasting.kill_head();
        self.lasting.restart_head();
        assert_eq!(self.lasting.pids(), pids, "what was acknowledged is there, and as it was");
        self.answers_again();
        words
    }
}

/// Brings the deployment to the moment: streams that run, or a group that is being started again.
pub(super) fn begin(cluster: &Cluster, works: &Works, moment: Moment, before: &StatusSnapshot) -> Option<Company> {
    let work = match moment {
        Moment::Idle => return None,
        Moment::Prefill => &works.prefill,
        Moment::Decode | Moment::Starting => &works.decode,
    };
    let company = work.start(&cluster.http);
    let steps = before.ranks[0].steps + if moment == Moment::Decode { STEPS_TO_DECODE } else { 1 };
    // Only steps are asked for: where the machine is fast, streams may have ended before anybody looks.
    wait_for("streams to run", || (cluster.status().ranks[0].steps >= steps).then_some(()));
    if moment == Moment::Starting {
        Processes::kill(before.ranks[1].pid);
        wait_for("the next group to start", || {
            let ranks = cluster.ranks("m");
            ranks.iter().all(|rank| rank.pid != 0 && before.ranks.iter().all(|old| old.pid != rank.pid)).then_some(())
        });
    }
    Some(company)
}

/// Every stream has the right text; says how long the longest pause was.
pub(super) fn right_text(company: Option<Company>) -> String {
    match company.map(Company::check) {
        Some(pause) => format!("longest pause {:.2} s", pause.as_secs_f64()),
        None => "nothing ran".to_owned(),
    }
}

fn join(node: &Node, cluster: &Cluster, slots: &str) {
    let joined = node.run("worker", &["join", "--address", &cluster.address, "--num-gpus", slots]);
    assert_eq!(joined.code, 0, "{joined:?}");
    wait_for("the machine to have joined", || {
        let nodes = cluster.status().nodes;
        nodes.iter().any(|known| known.state == "alive" && node.agent_pid() == Some(known.pid)).then_some(())
    });
}

pub(super) fn serve(cluster: &Cluster, kind: Kind) {
    let strategy = if kind == Kind::Shared { "spread" } else { "strict-pack" };
    let flags = ["--tensor-parallel-size", "2", "--dtype", "float32", "--placement-strategy", strategy];
    // Small steps: a prompt takes many of them.
    let small = ["--max-num-batched-tokens", "64", "--max-num-seqs", "16"];
    cluster.serve(&golden("tiny-llama").folder, "m", &[&flags[..], &small[..]].concat());
}
