//! Two heads over a real etcd: one leads, one stands by, and each of them, or etcd, is killed, frozen or cut off.
//!
//! One machine has two homes: head A with two slots, where the ranks run, and head B with one.

use std::time::{Duration, Instant};

use harness::{Cable, Etcd, Http, Lasting, Node, Processes, StreamEnd, Work, golden, wait_for};
use nix::sys::signal::Signal;
use phalanx_proto::{HeadStatus, StatusSnapshot};
use serde_json::{Value, json};

/// The head's own part of its status.
fn head(of: &Lasting) -> HeadStatus {
    of.cluster.status().head
}

/// Something once a head says that it leads, or stands by.
fn is(of: &Lasting, state: &str) -> Option<()> {
    let status = of.cluster.node.run("coordinator", &["status", "--json"]);
    let snapshot: StatusSnapshot = serde_json::from_str(&status.stdout).ok()?;
    (snapshot.head.state == state).then_some(())
}

/// Both heads, with a deployment on A's two slots that A leads.
struct Two {
    work: Work,
    a: Lasting,
    b: Lasting,
    /// A's way to etcd.
    cable: Cable,
    etcd: Etcd,
}

impl Two {
    fn start() -> Self {
        let etcd = Etcd::start();
        let cable = etcd.cable();
        let a = Lasting::start_on(Node::new(), 2, &["--store", &cable.store()]);
        let b = Node::new().with_keys_of(&a.cluster.node);
        let b = Lasting::start_on(b, 1, &["--store", &etcd.store()]);
        assert_eq!((head(&a).state.as_str(), head(&b).state.as_str()), ("leading", "standby"));
        assert_eq!(head(&b).leader, a.cluster.address);
        wait_for("both machines to be there", || (a.cluster.status().nodes.len() == 2).then_some(()));
        let flags = ["--tensor-parallel-size", "2", "--dtype", "float32", "--max-num-seqs", "16"];
        a.cluster.serve(&golden("tiny-llama").folder, "m", &flags);
        let work = Work::ask_alone(&a.cluster.http, 6, 40, 200);
        Self { work, a, b, cable, etcd }
    }

    fn rank_pids(&self, head: &Lasting) -> Vec<u32> {
        head.cluster.ranks("m").iter().map(|rank| rank.pid).collect()
    }

    /// Sends the first request until it is answered; gives the time.
    fn wait_for_answers(&self, http: &Http, since: Instant) -> Duration {
        let right = wait_for("the other head to answer", || answer(http, &self.work.bodies[0]));
        assert_eq!(right, self.work.expected[0], "a resend gets the right text");
        since.elapsed()
    }
}

/// Token ids of an answer, where there is one.
fn answer(http: &Http, body: &Value) -> Option<Value> {
    let mut stream = http.try_stream("/v1/completions", body)?;
    (stream.finish() == StreamEnd::Done).then(|| json!(stream.token_ids))
}

#[test]
fn a_standby_takes_over_from_a_killed_leader() {
    let two = Two::start();
    let (status, refused) = two.b.cluster.http.get("/v1/models");
    assert_eq!((status, refused.contains("stands by")), (503, true), "{refused}");
    assert_eq!(two.b.cluster.http.get("/health").0, 503);
    assert_eq!(two.b.cluster.http.get("/health/live").0, 200);
    let deploy = two.b.cluster.node.run("coordinator", &["undeploy", "m"]);
    assert!(deploy.code == 1 && deploy.stderr.contains(&two.a.cluster.address), "{deploy:?}");

    // A head that machines would not know is no second one.
    let ports = ["--port", "0", "--http-port", "0", "--dashboard-port", "0"];
    let start = ["start", "--head", "--store", &two.etcd.store()];
    for more in [&[][..], &["--insecure"][..]] {
        let stranger = Node::new().run("coordinator", &[&start[..], &ports[..], more].concat());
        assert!(stranger.code == 1 && stranger.stderr.contains("Copy trust/authority.json"), "{stranger:?}");
    }

    let before = two.rank_pids(&two.a);
    let company = two.work.start(&two.a.cluster.http);
    wait_for("streams to run", || (two.a.cluster.status().queue.running > 0).then_some(()));
    let killed = Instant::now();
    Processes::kill(head(&two.a).pid);
    for end in company.ends() {
        assert_ne!(end, StreamEnd::Done, "a head that is killed in the middle ends nothing well");
    }
    let closed = killed.elapsed();
    assert!(closed < Duration::from_secs(1), "connections closed after {closed:?}");
    let answered = two.wait_for_answers(&two.b.cluster.http, killed);
    println!("connections closed {closed:?} after the leader was killed, the standby answered after {answered:?}");
    assert!(answered < Duration::from_secs(10), "the standby answered after {answered:?}");
    assert_eq!(head(&two.b).state, "leading");
    // A plan that reached one rank only, when the head died, leaves a group that must start again; else ranks are kept.
    let now = two.rank_pids(&two.b);
    println!("ranks {}", if now == before { "kept their weights" } else { "were started again" });

    // The machine that was gone comes back, and stands by; its agent has gone on all the time.
    two.a.start_head();
    assert_eq!((head(&two.a).state, head(&two.a).leader), ("standby".to_owned(), two.b.cluster.address.clone()));
    assert_eq!(two.b.cluster.status().nodes.iter().filter(|node| node.state == "alive").count(), 2);
    two.work.start(&two.b.cluster.http).check();

    // And back again, with nothing in flight.
    let killed = Instant::now();
    Processes::kill(head(&two.b).pid);
    let answered = two.wait_for_answers(&two.a.cluster.http, killed);
    println!("the first head answered {answered:?} after the second was killed");
    assert!(answered < Duration::from_secs(10), "the first head answered after {answered:?}");
    assert_eq!(two.rank_pids(&two.a), now, "ranks went to the other head with their weights");
    let undeployed = two.a.cluster.node.run("coordinator", &["undeploy", "m"]);
    assert_eq!(undeployed.code, 0, "{undeployed:?}");
    Processes::wait_gone(&now);
}

#[test]
fn a_leader_that_was_frozen_stands_by_when_it_wakes() {
    let two = Two::start();
    let (before, pid) = (two.rank_pids(&two.a), head(&two.a).pid);
    let frozen = Instant::now();
    Processes::signal(pid, Signal::SIGSTOP);
    let answered = two.wait_for_answers(&two.b.cluster.http, frozen);
    println!("the standby answered {answered:?} after the leader was frozen");
    assert_eq!(two.rank_pids(&two.b), before, "ranks went to the other head with their weights");
    let company = two.work.start(&two.b.cluster.http);
    Processes::signal(pid, Signal::SIGCONT);
    let woken = Instant::now();
    wait_for("the old leader to stand by", || is(&two.a, "standby"));
    println!("the old leader stood by {:?} after it woke", woken.elapsed());
    company.check();
    assert_eq!(head(&two.a).pid, pid, "the same process, started anew");
    assert_eq!(two.rank_pids(&two.b), before, "nothing that the old leader did counts");
}

#[test]
fn serving_does_not_need_etcd() {
    let mut two = Two::start();
    let before = two.rank_pids(&two.a);
    // Shorter than the lease: nobody notices.
    let company = two.work.start(&two.a.cluster.http);
    two.etcd.signal(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_secs(2));
    two.etcd.signal(Signal::SIGCONT);
    company.check();
    assert_eq!((head(&two.a).state.as_str(), head(&two.b).state.as_str()), ("leading", "standby"));
    // Longer than the lease: what runs goes on, and what would change waits.
    two.etcd.kill();
    wait_for("the head to say so", || head(&two.a).reason.contains("nothing can be changed").then_some(()));
    two.work.start(&two.a.cluster.http).check();
    assert_eq!(two.a.cluster.http.get("/health").0, 200);
    let mut waiting = two.a.cluster.node.spawn("coordinator", &["undeploy", "m"]);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(waiting.try_wait().expect("a process"), None, "what is not written down is not answered");
    two.etcd.start_again();
    assert!(waiting.wait().expect("a process").success(), "what waited for etcd is done when it is back");
    assert_eq!((head(&two.a).state.as_str(), head(&two.a).reason.as_str()), ("leading", ""));
    Processes::wait_gone(&before);
}

#[test]
fn a_leader_without_etcd_hears_from_agents_that_another_leads() {
    let two = Two::start();
    let (before, pid) = (two.rank_pids(&two.a), head(&two.a).pid);
    let company = two.work.start(&two.a.cluster.http);
    wait_for("streams to run", || (two.a.cluster.status().queue.running > 0).then_some(()));
    two.cable.cut();
    let cut = Instant::now();
    let answered = two.wait_for_answers(&two.b.cluster.http, cut);
    wait_for("the old leader to stand by", || is(&two.a, "standby"));
    println!("cut off, the standby answered after {answered:?}, and the old leader stood by after {:?}", cut.elapsed());
    // Those that ended well before the other head led are right, too.
    company.ends();
    assert_eq!(head(&two.a).pid, pid, "the same process, started anew");
    assert_eq!(two.rank_pids(&two.b), before, "ranks went to the other head with their weights");
}
