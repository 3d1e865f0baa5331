//! Machines, a deployment and streams, and what a cell does to them.

use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use harness::{Clock, Cluster, Company, FarHost, Http, Lasting, Node, Processes, StreamEnd, Work, golden, wait_for};
use nix::sys::signal::Signal;
use phalanx_proto::{NodeStatus, StatusSnapshot};
use serde_json::json;

use super::{CELL_DEADLINE, Cell, Expected, Fault, Figures, Moment, Victim};

/// How long a frozen head stands still: longer than its patience with silent machines.
const HEAD_PAUSE: Duration = Duration::from_secs(6);
/// A machine that says nothing is given up within this.
const DETECTED: Duration = Duration::from_secs(5);
/// One way of a slow link.
const SLOW_ONE_WAY: Duration = Duration::from_millis(100);
/// Tokens of a stream, on an average, after which the decoding work has left its prompts behind.
const TOKENS_TO_DECODE: usize = 10;
/// Time between two looks at streams: they are over in less than a second.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);
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
        .get_or_init(|| Works { prefill: Work::ask_alone(http, 16, 800, 4), decode: Work::ask_alone(http, 8, 40, 300) })
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

    /// Whether this scene is what a cell needs. A store that was full once has free pages afterwards: it would take what is new on
    /// a full disk too.
    pub fn is_of(&self, cell: &Cell) -> bool {
        self.kind == Self::kind(cell) && self.kind != Kind::SmallDisk
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
    pub fn play(&self, cell: &Cell) -> Figures {
        let cluster = self.cluster();
        wait_for("the deployment to be ready", || (self.state() == "ready").then_some(()));
        let before = cluster.status();
        let company = begin(self.cluster(), self.works, cell.moment, &before);
        // Asking takes time, in which streams end: only where the ranks are others now.
        let now = if cell.moment == Moment::Starting { cluster.status() } else { before.clone() };
        match cell.expected {
            Expected::OwnText => self.break_rank(cell, &before, &now, company),
            Expected::MovedText if cell.fault == Fault::Cut => self.cut_shared(&now, company),
            Expected::MovedText => self.lose_machine(cell, &now, company),
            Expected::BackWithText => self.cut_for_a_while(&now, company),
            Expected::ErrorThenText => self.cut_for_long(company),
            Expected::Closed => self.kill_head(cell, &now, company),
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

    /// The same of a fault that breaks the group: the head has requests that cannot go on.
    fn hits_group(&self, company: Option<&Company>) {
        let waits = || {
            let now = self.cluster().status().deployments.remove(0);
            now.running + now.waiting > 0
        };
        assert!(company.is_none() || waits(), "streams had ended before the fault came");
    }

    /// The deployment answers again, with the right text.
    fn answers_again(&self) {
        wait_for("the deployment to be ready again", || (self.state() == "ready").then_some(()));
        let work = &self.works.decode;
        let answer = self.cluster().http.ask("/v1/completions", &work.bodies[0]);
        assert_eq!(answer["choices"][0]["token_ids"], work.expected[0], "a resend gets the right text");
    }

    fn break_rank(
        &self,
        cell: &Cell,
        before: &StatusSnapshot,
        now: &StatusSnapshot,
        company: Option<Company>,
    ) -> Figures {
        let (rank, signal) = match (cell.victim, cell.fault) {
            (Victim::RankZero, Fault::Exit) => (0, Signal::SIGTERM),
            (_, Fault::Exit) => (1, Signal::SIGABRT),
            (victim, fault) => {
                let signal = if fault == Fault::Kill { Signal::SIGKILL } else { Signal::SIGSTOP };
                (usize::from(victim != Victim::RankZero), signal)
            }
        };
        let hit = &now.ranks;
        Processes::signal(hit[rank].pid, signal);
        self.hits_group(company.as_ref());
        let figures = right_text(company);
        let epoch = before.deployments[0].epoch;
        wait_for("the deployment to be ready in a later epoch", || {
            let deployment = self.cluster().status().deployments.remove(0);
            (deployment.state == "ready" && deployment.epoch > epoch).then_some(())
        });
        Processes::wait_gone(&hit.iter().chain(&before.ranks).map(|rank| rank.pid).collect::<Vec<_>>());
        self.answers_again();
        figures
    }

    /// The machine that the ranks are on, and its home.
    fn machine_of_ranks(&self, status: &StatusSnapshot) -> (NodeStatus, &Node) {
        let node = status.nodes.iter().find(|node| node.id == status.ranks[0].node).expect("a node").clone();
        let homes = [Some(&self.cluster().node), self.other.as_ref()];
        let home = homes.into_iter().flatten().find(|home| home.agent_pid() == Some(node.pid)).expect("its home");
        (node, home)
    }

    fn lose_machine(&self, cell: &Cell, now: &StatusSnapshot, company: Option<Company>) -> Figures {
        let (node, home) = self.machine_of_ranks(now);
        let old: Vec<u32> = now.ranks.iter().map(|rank| rank.pid).collect();
        let signal = match cell.fault {
            Fault::Freeze => Signal::SIGSTOP,
            Fault::Exit => Signal::SIGTERM,
            _ => Signal::SIGKILL,
        };
        Processes::signal(node.pid, signal);
        hits(company.as_ref());
        let mut figures = right_text(company);
        // The ranks of a frozen agent work on until their machine is given up: streams run at that time as well.
        while cell.fault == Fault::Freeze && cell.moment != Moment::Idle && self.is_alive(&node.id) {
            figures = figures.max(right_text(Some(self.works.decode.start(&self.cluster().http))));
        }
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
        figures
    }

    fn is_alive(&self, node: &str) -> bool {
        self.cluster().status().nodes.iter().any(|other| other.id == node && other.state == "alive")
    }

    /// A machine that was lost is there again, and what serves elsewhere does not notice.
    fn is_back(&self, node: &str) {
        wait_for("the machine to be back", || self.is_alive(node).then_some(()));
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
    fn cut(&self, company: Option<&Company>) -> (String, Duration) {
        self.far().cut();
        let cut = Instant::now();
        self.hits_group(company);
        let far = self.far_node();
        wait_for("the far machine to be given up", || (self.far_node().state == "dead").then_some(()));
        let took = cut.elapsed();
        assert!(took < DETECTED + Duration::from_secs(1), "a silent machine is given up after {took:?}");
        (far.id, took)
    }

    fn cut_shared(&self, now: &StatusSnapshot, company: Option<Company>) -> Figures {
        let ranks = &now.ranks;
        let (far, took) = self.cut(company.as_ref());
        let mut figures = right_text(company);
        self.answers_again();
        assert!(self.cluster().ranks("m").iter().all(|rank| rank.node != far), "all ranks are on this machine");
        self.far().connect(Duration::ZERO);
        Processes::wait_gone(&ranks.iter().map(|rank| rank.pid).collect::<Vec<_>>());
        self.is_back(&far);
        assert_eq!(self.cluster().node.run("coordinator", &["undeploy", "m"]).code, 0);
        serve(self.cluster(), self.kind);
        figures.push(("given up after", took));
        figures
    }

    fn cut_for_a_while(&self, now: &StatusSnapshot, company: Option<Company>) -> Figures {
        let ranks = &now.ranks;
        let (far, took) = self.cut(company.as_ref());
        sleep(Duration::from_secs(1));
        self.far().connect(Duration::ZERO);
        let mut figures = right_text(company);
        Processes::wait_gone(&ranks.iter().map(|rank| rank.pid).collect::<Vec<_>>());
        self.is_back(&far);
        figures.push(("given up after", took));
        figures
    }

    fn cut_for_long(&self, company: Option<Company>) -> Figures {
        let cut = Instant::now();
        let (far, took) = self.cut(company.as_ref());
        let ends = company.expect("streams").ends();
        let told = cut.elapsed();
        assert!(ends.iter().all(|end| matches!(end, StreamEnd::Error(_))), "{ends:?}");
        self.far().connect(Duration::ZERO);
        self.is_back(&far);
        vec![("given up after", took), ("error events after", told)]
    }

    fn kill_head(&self, cell: &Cell, now: &StatusSnapshot, company: Option<Company>) -> Figures {
        let was_ready = cell.moment != Moment::Starting;
        let before = Lasting::pids_in(now);
        Processes::kill(now.head.pid);
        Processes::wait_gone(&[now.head.pid]);
        let killed = Instant::now();
        let ends = company.map(Company::ends).unwrap_or_default();
        let closed = killed.elapsed();
        assert!(closed < Duration::from_secs(1), "connections close within a second, not {closed:?}");
        assert!(ends.iter().all(|end| matches!(end, StreamEnd::Cut | StreamEnd::Done)), "{ends:?}");
        assert!(ends.is_empty() || ends.contains(&StreamEnd::Cut), "streams had ended before the head was killed");
        sleep(Duration::from_secs(1));
        assert!(!was_ready || before.iter().all(|pid| Processes::alive(*pid)), "agent and ranks wait for their head");
        let took = self.lasting.restart_head();
        if was_ready {
            assert_eq!(self.lasting.pids(), before, "nothing was started again");
        }
        self.answers_again();
        vec![("connections closed after", closed), ("ready after the start", took)]
    }

    fn pause_head(&self, before: &StatusSnapshot, company: Option<Company>) -> Figures {
        Processes::signal(before.head.pid, Signal::SIGSTOP);
        hits(company.as_ref());
        sleep(HEAD_PAUSE);
        Processes::signal(before.head.pid, Signal::SIGCONT);
        let figures = right_text(company);
        self.answers_again();
        assert!(self.cluster().status().nodes.iter().all(|node| node.state == "alive"), "no machine was given up");
        figures
    }

    fn jump(&self, cell: &Cell, before: &StatusSnapshot, company: Option<Company>) -> Figures {
        let clock = self.clock.as_ref().expect("a clock");
        for offset in [DAY_S, -DAY_S] {
            clock.jump(offset);
            if offset > 0 {
                hits(company.as_ref());
            }
            let created =
                || self.cluster().http.ask("/v1/completions", &self.works.decode.bodies[1])["created"].as_i64();
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
            let differs = created().expect("a time") - now as i64 - offset;
            assert!(differs.abs() < 600, "the head's clock has jumped: {differs} s");
        }
        let figures = right_text(company);
        clock.jump(0);
        self.answers_again();
        let now = self.cluster().status();
        assert!(now.nodes.iter().all(|node| node.state == "alive"));
        if cell.moment != Moment::Starting {
            assert_eq!(now.deployments[0].epoch, before.deployments[0].epoch, "no group broke");
        }
        figures
    }

    fn slow_down(&self, company: Option<Company>) -> Figures {
        self.far().connect(SLOW_ONE_WAY);
        hits(company.as_ref());
        // The figure is the least of the last few, one of which may have been on its way when the link became slow.
        let named = wait_for("status to name the slow machine", || {
            let far = self.far_node();
            (far.reason.contains("slow") && far.round_trip_ms.is_some_and(|time| time >= 200.0)).then_some(far)
        });
        let time = named.round_trip_ms.expect("measured");
        assert!(time < 400.0, "{time} ms");
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
        let mut figures = right_text(company);
        self.answers_again();
        figures.extend([("round trip named", Duration::from_secs_f64(time / 1000.0)), ("2 tokens in", took)]);
        figures
    }

    fn fill_disk(&self, cell: &Cell, before: &StatusSnapshot, company: Option<Company>) -> Figures {
        let cluster = self.cluster();
        let disk = cluster.node.store().expect("a disk");
        disk.fill();
        let folder = golden("tiny-llama").folder;
        let folder = folder.to_str().expect("a path");
        let refused = cluster.node.run("coordinator", &["serve", folder, "--served-model-name", "n"]);
        assert!(refused.code != 0 && refused.stderr.contains("cannot write it down"), "{refused:?}");
        let mut figures = right_text(company);
        if let Some(company) = begin(self.cluster(), self.works, cell.moment, before) {
            // What runs is started again where it breaks, though nothing can be written about it.
            Processes::kill(before.ranks[1].pid);
            self.hits_group(Some(&company));
            figures = right_text(Some(company));
        }
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
        figures
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
    // Where long prompts are at work, the first token comes when the first of them is done.
    let num_tokens = if moment == Moment::Prefill { 1 } else { company.num_streams() * TOKENS_TO_DECODE };
    let until = Instant::now() + CELL_DEADLINE;
    while company.num_tokens() < num_tokens {
        assert!(Instant::now() < until && company.is_running(), "streams run");
        sleep(LOOK_INTERVAL);
    }
    if moment == Moment::Starting {
        Processes::kill(before.ranks[1].pid);
        wait_for("the next group to start", || {
            let ranks = cluster.ranks("m");
            ranks.iter().all(|rank| rank.pid != 0 && before.ranks.iter().all(|old| old.pid != rank.pid)).then_some(())
        });
    }
    Some(company)
}

/// The fault came while streams ran: what follows is about them.
pub(super) fn hits(company: Option<&Company>) {
    assert!(company.is_none_or(Company::is_running), "streams had ended before the fault came");
}

/// Every stream has the right text; gives how long the longest pause was, where anything ran.
pub(super) fn right_text(company: Option<Company>) -> Figures {
    company.map(|company| ("longest pause", company.check())).into_iter().collect()
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
