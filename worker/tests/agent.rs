//! The real `worker` program against a head that a test plays: joining, desired state, and who outlives whom.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests stop the test")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::pin::Pin;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use phalanx_proto::{
    AgentCommand, AgentEvent, AgentHello, AgentWelcome, DeploymentName, DesiredRank, DesiredRanks, Incarnation, Rank,
    RankEvent, RankHello, RankKey, RankObserved, RankProcess, Term, pb,
};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

const WORKER: &str = env!("CARGO_BIN_EXE_worker");
const SOON: Duration = Duration::from_secs(10);

// ---- a head that does as it is told ----

enum Seen {
    Agent(AgentEvent, mpsc::Sender<AgentCommand>),
    AgentGone,
    Rank(RankEvent, mpsc::Sender<Result<pb::HeadToRank, Status>>),
}

#[derive(Clone)]
struct Service {
    seen: mpsc::Sender<Seen>,
    refusal: Option<&'static str>,
}

type Down<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl pb::agents_server::Agents for Service {
    type JoinStream = Down<pb::HeadToAgent>;

    async fn join(&self, request: Request<Streaming<pb::AgentMessage>>) -> Result<Response<Self::JoinStream>, Status> {
        if let Some(words) = self.refusal {
            return Err(Status::failed_precondition(words));
        }
        let (commands, down) = mpsc::channel(16);
        let (seen, mut up, sender) = (self.seen.clone(), request.into_inner(), commands.clone());
        tokio::spawn(async move {
            while let Ok(Some(message)) = up.message().await {
                let _ = seen.send(Seen::Agent(message.try_into().unwrap(), sender.clone())).await;
            }
            let _ = seen.send(Seen::AgentGone).await;
        });
        let welcome = AgentWelcome {
            term: Term(1),
            heartbeat: Duration::from_millis(100),
            head_grace: Duration::ZERO,
            version: "1".into(),
            socket: None,
        };
        commands.send(AgentCommand::Welcome(welcome)).await.unwrap();
        Ok(Response::new(Box::pin(ReceiverStream::new(down).map(|command| Ok(command.into())))))
    }
}

#[tonic::async_trait]
impl pb::rank_sessions_server::RankSessions for Service {
    type SessionStream = Down<pb::HeadToRank>;

    async fn session(
        &self,
        request: Request<Streaming<pb::RankMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (commands, down) = mpsc::channel(16);
        let (seen, mut up) = (self.seen.clone(), request.into_inner());
        tokio::spawn(async move {
            while let Ok(Some(message)) = up.message().await {
                let _ = seen.send(Seen::Rank(message.try_into().unwrap(), commands.clone())).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(down))))
    }
}

struct Head {
    runtime: Option<tokio::runtime::Runtime>,
    seen: mpsc::Receiver<Seen>,
    address: String,
    agent: Option<mpsc::Sender<AgentCommand>>,
}

impl Head {
    fn start(port: u16, refusal: Option<&'static str>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (sender, seen) = mpsc::channel(1024);
        let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", port))).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let service = Service { seen: sender, refusal };
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(pb::agents_server::AgentsServer::new(service.clone()))
                .add_service(pb::rank_sessions_server::RankSessionsServer::new(service))
                .serve_with_incoming(tonic::transport::server::TcpIncoming::from(listener)),
        );
        Self { runtime: Some(runtime), seen, address, agent: None }
    }

    fn port(&self) -> u16 {
        self.address.rsplit_once(':').unwrap().1.parse().unwrap()
    }

    /// Skips what was seen until `wanted` makes something of it.
    fn until<T>(&mut self, what: &str, mut wanted: impl FnMut(&Seen) -> Option<T>) -> T {
        let started = Instant::now();
        loop {
            let left = SOON.checked_sub(started.elapsed()).unwrap_or_else(|| panic!("{what} was not seen"));
            let next = async { tokio::time::timeout(left, self.seen.recv()).await };
            let Ok(Some(seen)) = self.runtime.as_ref().unwrap().block_on(next) else { panic!("{what} was not seen") };
            if let Seen::Agent(AgentEvent::Hello(_), commands) = &seen {
                self.agent = Some(commands.clone());
            }
            if let Some(found) = wanted(&seen) {
                return found;
            }
        }
    }

    fn joined(&mut self) -> AgentHello {
        self.until("a hello", |seen| match seen {
            Seen::Agent(AgentEvent::Hello(hello), _) => Some(hello.clone()),
            _ => None,
        })
    }

    /// The next rank process that has ended.
    fn exited(&mut self) -> RankObserved {
        self.until("a rank's end", |seen| match seen {
            Seen::Agent(AgentEvent::Rank(observed), _) if observed.state != RankProcess::Spawned => {
                Some(observed.clone())
            }
            _ => None,
        })
    }

    fn said_goodbye(&mut self) {
        self.until("a goodbye", |seen| matches!(seen, Seen::Agent(AgentEvent::Leaving(_), _)).then_some(()));
    }

    /// A rank's hello, and the way to speak to it.
    fn rank_dialed(&mut self) -> (RankHello, mpsc::Sender<Result<pb::HeadToRank, Status>>) {
        self.until("a rank's hello", |seen| match seen {
            Seen::Rank(RankEvent::Hello(hello), commands) => Some((hello.clone(), commands.clone())),
            _ => None,
        })
    }

    fn command(&self, command: AgentCommand) {
        let agent = self.agent.as_ref().unwrap();
        self.runtime.as_ref().unwrap().block_on(agent.send(command)).unwrap();
    }

    fn desire(&self, ranks: &[(u32, u64)]) {
        let ranks = ranks.iter().map(|&(rank, incarnation)| DesiredRank {
            key: RankKey {
                deployment: DeploymentName("m".into()),
                replica: 0,
                rank: Rank(rank),
                incarnation: Incarnation(incarnation),
            },
            device_slot: rank,
            num_threads: None,
            launch_token: format!("token-{rank}"),
            env: [("PHALANX_LOG".to_owned(), "info".to_owned())].into(),
        });
        self.command(AgentCommand::Desired(DesiredRanks { revision: 1, ranks: ranks.collect() }));
    }

    /// Ends as a killed process does: no goodbye.
    fn die(mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

// ---- a worker ----

struct Worker(Child);

impl Worker {
    fn join(home: &Path, address: &str, more: &[&str]) -> Self {
        let mut command = command(home);
        command
            .args(["join", "--insecure", "--address", address, "--num-gpus", "2", "--device", "cpu", "--block"])
            .args(more);
        Self(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn ended(&mut self) -> Option<i32> {
        let started = Instant::now();
        while started.elapsed() < SOON {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the worker did not end")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(home: &Path) -> Command {
    let mut command = Command::new(WORKER);
    command.env_remove("PHALANX_ADDRESS").env_remove("PHALANX_LOG").env("PHALANX_HOME", home).stdin(Stdio::null());
    command
}

fn run(home: &Path, args: &[&str]) -> Output {
    command(home).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn signal(pid: u32, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal).unwrap();
}

/// Whether a process runs; one that has ended and waits for its parent does not.
fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

#[track_caller]
fn ends_within(pid: u32, limit: Duration) {
    let started = Instant::now();
    while runs(pid) {
        assert!(started.elapsed() < limit, "process {pid} still runs after {limit:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn cluster(more: &[&str]) -> (Head, Worker, tempfile::TempDir) {
    let home = tempfile::tempdir().unwrap();
    let mut head = Head::start(0, None);
    let worker = Worker::join(home.path(), &head.address, more);
    let hello = head.joined();
    assert_eq!((hello.num_slots, hello.pid, hello.device_names.len()), (2, worker.pid(), 2));
    (head, worker, home)
}

/// Two ranks that have dialed; their process ids.
fn two_ranks(head: &mut Head) -> [u32; 2] {
    head.desire(&[(0, 1), (1, 1)]);
    let mut pids = [0; 2];
    for _ in 0..2 {
        let (hello, _) = head.rank_dialed();
        assert_eq!(hello.launch_token, format!("token-{}", hello.rank));
        pids[hello.rank.0 as usize] = hello.pid;
    }
    assert!(pids.into_iter().all(runs));
    pids
}

#[test]
fn an_agent_starts_and_ends_ranks_as_the_head_wishes() {
    let (mut head, _worker, _home) = cluster(&[]);
    let pids = two_ranks(&mut head);
    head.desire(&[(1, 1)]);
    let ended = head.exited();
    assert_eq!((ended.pid, ended.key.rank), (pids[0], Rank(0)));
    assert!(!runs(pids[0]) && runs(pids[1]));
    head.desire(&[(0, 2), (1, 1)]);
    assert_eq!(head.rank_dialed().0.incarnation, Incarnation(2));
}

#[test]
fn a_killed_rank_is_reported_and_comes_back_only_when_desired() {
    let (mut head, _worker, _home) = cluster(&[]);
    head.desire(&[(0, 1)]);
    let (hello, _) = head.rank_dialed();
    std::thread::sleep(Duration::from_millis(200));
    signal(hello.pid, nix::sys::signal::Signal::SIGKILL);
    let RankProcess::Exited { signal, last_lines, .. } = head.exited().state else { panic!() };
    assert_eq!(signal, Some(9));
    assert!(last_lines.contains("session open"), "{last_lines}");
    head.desire(&[(0, 2)]);
    assert_ne!(head.rank_dialed().0.pid, hello.pid);
}

#[test]
fn a_rank_ends_when_the_head_says_so() {
    let (mut head, _worker, _home) = cluster(&[]);
    head.desire(&[(0, 1)]);
    let (hello, commands) = head.rank_dialed();
    let shutdown = phalanx_proto::HeadMessage::Shutdown("undeployed".into());
    head.runtime.as_ref().unwrap().block_on(commands.send(Ok((&shutdown).into()))).unwrap();
    let state = head.exited().state;
    assert!(matches!(state, RankProcess::Exited { code: Some(0), .. }), "{state:?}");
    ends_within(hello.pid, Duration::from_secs(1));
}

#[test]
fn a_killed_agent_leaves_no_rank_behind() {
    let (mut head, mut worker, _home) = cluster(&[]);
    let pids = two_ranks(&mut head);
    worker.0.kill().unwrap();
    pids.into_iter().for_each(|pid| ends_within(pid, Duration::from_secs(1)));
    head.until("the agent's end", |seen| matches!(seen, Seen::AgentGone).then_some(()));
}

#[test]
fn a_stopped_rank_ends_with_its_agent_all_the_same() {
    let (mut head, mut worker, _home) = cluster(&[]);
    let pids = two_ranks(&mut head);
    signal(pids[0], nix::sys::signal::Signal::SIGSTOP);
    worker.0.kill().unwrap();
    pids.into_iter().for_each(|pid| ends_within(pid, Duration::from_secs(1)));
}

#[test]
fn ranks_end_with_a_lost_head_and_a_joined_worker_waits_for_its_return() {
    let (mut head, mut worker, _home) = cluster(&[]);
    let pids = two_ranks(&mut head);
    let port = head.port();
    head.die();
    pids.into_iter().for_each(|pid| ends_within(pid, Duration::from_secs(5)));
    assert!(worker.0.try_wait().unwrap().is_none());
    let mut head = Head::start(port, None);
    assert_eq!(head.joined().pid, worker.pid());
    two_ranks(&mut head);
}

#[test]
fn an_agent_that_was_started_with_its_head_ends_with_it() {
    let (mut head, mut worker, _home) = cluster(&["--with-head"]);
    let pids = two_ranks(&mut head);
    head.die();
    assert_eq!(worker.ended(), Some(0));
    assert!(!pids.into_iter().any(runs));
}

#[test]
fn the_head_can_end_an_agent() {
    let (mut head, mut worker, _home) = cluster(&[]);
    let pids = two_ranks(&mut head);
    head.command(AgentCommand::End("stop".into()));
    head.said_goodbye();
    assert_eq!(worker.ended(), Some(0));
    assert!(!pids.into_iter().any(runs));
}

#[test]
fn a_worker_may_come_before_its_head() {
    let home = tempfile::tempdir().unwrap();
    let port = free_port();
    let mut worker = Worker::join(home.path(), &format!("127.0.0.1:{port}"), &["--json"]);
    let mut lines = BufReader::new(worker.0.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.is_ok_and(|line| line.contains("does not answer"))), "the worker says that it waits");
    std::thread::sleep(Duration::from_millis(300));
    let mut head = Head::start(port, None);
    let hello = head.joined();
    let mut line = String::new();
    BufReader::new(worker.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let object: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(object["address"], format!("127.0.0.1:{port}"));
    assert_eq!(object["pid"], worker.pid());
    assert_eq!(object["node"], hello.node_id.0);
}

#[test]
fn a_background_worker_joins_and_leaves() {
    let home = tempfile::tempdir().unwrap();
    let mut head = Head::start(0, None);
    let joined = run(home.path(), &["join", "--insecure", "--address", &head.address, "--num-gpus", "2", "--json"]);
    assert!(joined.status.success(), "{}", text(&joined.stderr));
    let object: serde_json::Value = serde_json::from_slice(&joined.stdout).unwrap();
    let pid = object["pid"].as_u64().unwrap() as u32;
    assert_eq!(head.joined().pid, pid);
    let pids = two_ranks(&mut head);

    let again = run(home.path(), &["join", "--insecure", "--address", &head.address]);
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains(&format!("pid {pid}")), "{}", text(&again.stderr));
    assert_eq!(run(home.path(), &["leave", "--node", "another"]).status.code(), Some(1));

    let left = run(home.path(), &["leave"]);
    assert!(left.status.success(), "{}", text(&left.stderr));
    ends_within(pid, Duration::from_secs(1));
    assert!(!pids.into_iter().any(runs));
    head.said_goodbye();
    assert_eq!(run(home.path(), &["leave"]).status.code(), Some(1));
    assert!(home.path().join("logs/agent.log").metadata().unwrap().len() > 0);
    assert!(home.path().join("logs/rank-m-0-0.log").exists());
}

#[test]
fn a_background_worker_that_waits_says_so_and_stays() {
    let home = tempfile::tempdir().unwrap();
    let port = free_port();
    let joined = run(home.path(), &["join", "--insecure", "--address", &format!("127.0.0.1:{port}")]);
    assert!(joined.status.success() && text(&joined.stderr).contains("keeps trying"), "{}", text(&joined.stderr));
    let mut head = Head::start(port, None);
    let pid = head.joined().pid;
    assert!(run(home.path(), &["leave"]).status.success());
    ends_within(pid, Duration::from_secs(1));
}

#[test]
fn wrong_usage_refusals_and_missing_devices_have_their_exit_codes() {
    #[track_caller]
    fn check(args: &[&str], code: i32, words: &str) {
        let home = tempfile::tempdir().unwrap();
        let output = run(home.path(), args);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(words), "{args:?}: {}", text(&output.stderr));
    }
    check(&["join"], 2, "--address");
    check(&["join", "--address", "a:b"], 2, "HOST:PORT");
    check(&["join", "--address", "127.0.0.1:1", "--num-gpus", "0"], 2, "num-gpus");
    check(&["join", "--address", "127.0.0.1:1", "--device", "tpu"], 2, "auto, cuda, rocm or cpu");
    check(&["join", "--address", "127.0.0.1:1", "--block", "--log-level", "a=b=c"], 2, "--log-level");
    check(&["jion"], 2, "jion");
    check(&["leave"], 1, "no worker");
    check(&["rank"], 1, "never by hand");
    check(&["reduce-bench-rank"], 1, "never by hand");
    check(&["reduce-bench", "--device", "cpu", "--world", "1"], 1, "groups of 2 to 8");
    if phalanx_worker::backend::presence::count(phalanx_proto::DeviceKind::Cuda, SOON).is_err() {
        check(&["join", "--address", "127.0.0.1:1", "--device", "cuda", "--json"], 1, "\"error\"");
    }
    let head = Head::start(0, Some("install the same version"));
    check(&["join", "--insecure", "--address", &head.address, "--block"], 1, "install the same version");
    check(&["join", "--insecure", "--address", &head.address], 1, "install the same version");
}

/// The report ends with its count whatever the machine has, and a machine without a GPU is measured between two processes.
#[test]
fn a_doctor_reports_on_any_machine() {
    let home = tempfile::tempdir().unwrap();
    let output = run(home.path(), &["doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let failed = report["num_failed"].as_u64().unwrap();
    assert_eq!(output.status.code(), Some(i32::from(failed > 0)), "{report}");
    let named = |name: &str| report["checks"].as_array().unwrap().iter().find(|check| check["name"] == name).cloned();
    for name in ["processor", "/dev/shm", "open files", "home", "clock", "NVIDIA devices"] {
        assert!(named(name).is_some(), "{name}: {report}");
    }
    if phalanx_worker::backend::presence::count(phalanx_proto::DeviceKind::Cuda, SOON).is_err() {
        let pair = named("two processes").expect("a measured pair");
        assert_eq!(
            (&pair["state"], pair["data"]["timings"].as_array().map(Vec::len)),
            (&"ok".into(), Some(4)),
            "{pair}"
        );
    }
}
