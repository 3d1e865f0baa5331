//! Two heads over etcd, and what a cell does to the one that leads, or to the one that stands by.
//!
//! All ranks are on one machine, which has one of the heads; the other head has a machine of its own. Which of them leads changes
//! from cell to cell: whoever was hit stands by afterwards.

use std::thread::sleep;
use std::time::{Duration, Instant};

use harness::{Clock, Cluster, Company, Etcd, FarHost, Lasting, Node, Processes, StreamEnd, golden, wait_for};
use nix::sys::signal::Signal;
use phalanx_proto::{HeadStatus, StatusSnapshot};
use serde_json::json;

use super::scene::{DAY_S, Kind, Scene, Works, begin, hits, right_text, serve, works};
use super::{Cell, Expected, Fault, Figures, Moment, Victim};

/// The head that stands by answers new requests within this.
const TAKEN_OVER: Duration = Duration::from_secs(10);
/// Lines of logs that are shown of a cell that went wrong.
const LAST_LINES: usize = 60;
/// Longer than a lease: a head that has not renewed it for so long is known to be gone.
const LEASE_AND_MORE: Duration = Duration::from_secs(5);

/// Two heads with a deployment `m` of two ranks. The heads go before what they need.
pub struct HeadsScene {
    kind: Kind,
    /// The head on the machine that the ranks are on.
    near: Lasting,
    other: Lasting,
    /// The wall clocks of both.
    clocks: [Clock; 2],
    etcd: Etcd,
    far: Option<FarHost>,
    works: &'static Works,
}

/// The head's part of its status, where it answers.
fn status(of: &Lasting) -> Option<HeadStatus> {
    let status = of.cluster.node.run("coordinator", &["status", "--json"]);
    serde_json::from_str::<StatusSnapshot>(&status.stdout).ok().map(|snapshot| snapshot.head)
}

fn is(of: &Lasting, state: &str) -> Option<()> {
    (status(of)?.state == state).then_some(())
}

impl HeadsScene {
    /// Whether this scene is what a cell needs.
    pub fn is_of(&self, cell: &Cell) -> bool {
        self.kind == Scene::kind(cell)
    }

    /// Sets the scene for a cell; `None` where this machine lets nobody do so.
    pub fn set(cell: &Cell) -> Option<Self> {
        let kind = Scene::kind(cell);
        let far = if kind == Kind::FarHead { Some(FarHost::new()?) } else { None };
        let here = far.as_ref().map_or_else(|| "127.0.0.1".to_owned(), FarHost::address_here);
        let etcd = Etcd::start_at(&here);
        let (store, clocks) = (etcd.store(), [Clock::new(), Clock::new()]);
        let flags = ["--store", &store, "--cluster-host", &here];
        let near = Lasting::start_on(clocks[0].give(Node::new()), 2, &flags);
        let (node, there) = match &far {
            Some(far) => (Node::inside(far.name()), far.address_there()),
            None => (Node::new(), here),
        };
        let node = clocks[1].give(node).with_keys_of(&near.cluster.node);
        let other = Lasting::start_on(node, 1, &["--store", &store, "--cluster-host", &there, "--host", &there]);
        wait_for("both machines to be there", || (near.cluster.status().nodes.len() == 2).then_some(()));
        serve(&near.cluster, kind);
        let works = works(&near.cluster.http);
        Some(Self { kind, near, other, clocks, etcd, far, works })
    }

    /// Plays a cell, and leaves two heads, one of which leads. Gives what was measured.
    ///
    /// # Panics
    /// If anything but what is expected happens.
    pub fn play(&self, cell: &Cell) -> Figures {
        if cell.fault == Fault::Cut {
            self.let_lead(if cell.victim == Victim::Leader { &self.other } else { &self.near });
        }
        let (leader, standby) = self.roles();
        wait_for("the deployment to be ready", || (leader.cluster.deployment_state("m") == "ready").then_some(()));
        let before = leader.cluster.status();
        let company = begin(&leader.cluster, self.works, cell.moment, &before);
        match cell.expected {
            Expected::TakenOver => self.take_over(cell, leader, standby, company),
            Expected::Unnoticed => self.go_unnoticed(cell, &before, company),
            Expected::Refused => self.fill_etcd(cell, &before, company),
            other => unreachable!("{other:?} is not of two heads"),
        }
    }

    /// The end of all logs.
    pub fn last_words(&self) -> String {
        let logs = [&self.near, &self.other].map(|head| head.cluster.node.logs()).concat();
        let lines: Vec<&str> = logs.lines().filter(|line| line.contains("WARN") || line.contains("ERROR")).collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
    }

    /// The head that leads, and the one that stands by.
    fn roles(&self) -> (&Lasting, &Lasting) {
        let pairs = [(&self.near, &self.other), (&self.other, &self.near)];
        wait_for("one head to lead, and one to stand by", || {
            pairs.into_iter().find(|(leader, standby)| {
                is(leader, "leading").is_some()
                    && status(standby).is_some_and(|seen| seen.state == "standby" && !seen.leader.is_empty())
            })
        })
    }

    fn let_lead(&self, wanted: &Lasting) {
        let (leader, _) = self.roles();
        if leader.cluster.address != wanted.cluster.address {
            leader.kill_head();
            wait_for("the other head to lead", || is(wanted, "leading"));
            leader.start_head();
            self.roles();
            self.all_alive(wanted);
        }
    }

    fn all_alive(&self, leader: &Lasting) {
        wait_for("both machines to be there", || {
            let nodes = leader.cluster.status().nodes;
            (nodes.iter().filter(|node| node.state == "alive").count() == 2).then_some(())
        });
    }

    fn far(&self) -> &FarHost {
        self.far.as_ref().expect("a machine behind a cable")
    }

    fn pids_of_ranks(leader: &Cluster) -> Vec<u32> {
        leader.ranks("m").iter().map(|rank| rank.pid).collect()
    }

    /// Sends a request until it is answered, as a client does; gives the time.
    fn answered(&self, leader: &Lasting, since: Instant) -> Duration {
        let work = &self.works.decode;
        let mut body = work.bodies[0].clone();
        body["max_tokens"] = 8.into();
        let tokens = wait_for("the other head to answer", || {
            let mut stream = leader.cluster.http.try_stream("/v1/completions", &body)?;
            (stream.finish() == StreamEnd::Done).then_some(stream.token_ids)
        });
        let expected = work.expected[0].as_array().expect("token ids");
        assert_eq!(json!(tokens), json!(expected[..tokens.len()]), "a resend gets the right text");
        since.elapsed()
    }

    fn take_over(&self, cell: &Cell, leader: &Lasting, standby: &Lasting, company: Option<Company>) -> Figures {
        let (pid, ranks) = (leader.cluster.status().head.pid, Self::pids_of_ranks(&leader.cluster));
        let since = Instant::now();
        let mut running = company;
        let mut figures = Figures::new();
        hits(running.as_ref());
        match cell.fault {
            Fault::Kill => {
                Processes::kill(pid);
                let ends = running.take().map(Company::ends).unwrap_or_default();
                let closed = since.elapsed();
                assert!(closed < Duration::from_secs(1), "connections close within a second, not {closed:?}");
                assert!(ends.iter().all(|end| matches!(end, StreamEnd::Cut | StreamEnd::Done)), "{ends:?}");
                figures.push(("connections closed after", closed));
            }
            Fault::Freeze => Processes::signal(pid, Signal::SIGSTOP),
            _ => self.far().cut(),
        }
        let took = self.answered(standby, since);
        assert!(took < TAKEN_OVER, "the other head answered after {took:?}");
        is(standby, "leading").expect("it leads");
        let now = Self::pids_of_ranks(&standby.cluster);
        assert!(cell.moment != Moment::Idle || now == ranks, "ranks at rest keep their weights");
        match cell.fault {
            Fault::Kill => leader.start_head(),
            Fault::Freeze => Processes::signal(pid, Signal::SIGCONT),
            _ => self.far().connect(Duration::ZERO),
        }
        wait_for("the head that is back to stand by", || is(leader, "standby"));
        // What ran at a head that was not killed ends when that one is back.
        running.map(Company::ends);
        assert_eq!(Self::pids_of_ranks(&standby.cluster), now, "who comes back disturbs nobody");
        self.all_alive(standby);
        self.answered(standby, Instant::now());
        figures.push((if now == ranks { "answered, ranks kept, after" } else { "answered, ranks anew, after" }, took));
        figures
    }

    fn go_unnoticed(&self, cell: &Cell, before: &StatusSnapshot, company: Option<Company>) -> Figures {
        let (leader, standby) = self.roles();
        let victim = if cell.victim == Victim::Leader { leader } else { standby };
        let pid = status(victim).expect("it answers").pid;
        let alone = || wait_for("the other head to be missed", || (status(leader)?.heads.len() == 1).then_some(()));
        let figures = match cell.fault {
            Fault::ClockJump => {
                let clock = &self.clocks[usize::from(victim.cluster.address == self.other.cluster.address)];
                for offset in [DAY_S, -DAY_S] {
                    clock.jump(offset);
                    sleep(LEASE_AND_MORE);
                }
                let figures = right_text(company);
                clock.jump(0);
                figures
            }
            fault => {
                match fault {
                    Fault::Kill => Processes::kill(pid),
                    Fault::Freeze => Processes::signal(pid, Signal::SIGSTOP),
                    _ => self.far().cut(),
                }
                alone();
                let figures = right_text(company);
                match fault {
                    Fault::Kill => standby.start_head(),
                    Fault::Freeze => Processes::signal(pid, Signal::SIGCONT),
                    _ => self.far().connect(Duration::ZERO),
                }
                figures
            }
        };
        wait_for("two heads", || (status(leader)?.heads.len() == 2).then_some(()));
        wait_for("the other to stand by", || is(standby, "standby"));
        self.all_alive(leader);
        self.answered(leader, Instant::now());
        let now = leader.cluster.status();
        assert_eq!((now.head.state.as_str(), now.head.pid), ("leading", before.head.pid), "the same head leads");
        if cell.moment != Moment::Starting {
            assert_eq!(now.deployments[0].epoch, before.deployments[0].epoch, "no group broke");
        }
        figures
    }

    fn fill_etcd(&self, cell: &Cell, before: &StatusSnapshot, company: Option<Company>) -> Figures {
        let (leader, standby) = self.roles();
        let cluster = &leader.cluster;
        self.etcd.fill();
        let folder = golden("tiny-llama").folder;
        let folder = folder.to_str().expect("a path");
        let serve = ["serve", folder, "--served-model-name", "n"];
        let refused = cluster.node.run("coordinator", &serve);
        assert!(refused.code != 0 && refused.stderr.contains("space exceeded"), "{refused:?}");
        if cell.moment == Moment::Decode {
            // What runs goes on, and is started again where it breaks, though nothing can be written about it.
            Processes::kill(before.ranks[1].pid);
        }
        let mut figures = right_text(company);
        self.answered(leader, Instant::now());
        assert_eq!(cluster.status().head.state, "leading", "nobody else could take the lead");
        self.etcd.free();
        wait_for("what was refused to be possible", || {
            let removed = cluster.node.run("coordinator", &["undeploy", "n"]).code == 0;
            (removed && cluster.node.run("coordinator", &serve).code == 0).then_some(())
        });
        assert_eq!(cluster.node.run("coordinator", &["undeploy", "n"]).code, 0);
        // By now the store was asked again about `m`.
        sleep(Duration::from_secs(3));
        let ranks = Self::pids_of_ranks(cluster);
        let killed = Instant::now();
        leader.kill_head();
        let took = self.answered(standby, killed);
        assert_eq!(Self::pids_of_ranks(&standby.cluster), ranks, "what was acknowledged is there, and as it was");
        leader.start_head();
        figures.push(("killed then, answered after", took));
        figures
    }
}
