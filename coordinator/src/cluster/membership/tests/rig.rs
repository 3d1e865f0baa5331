//! A cluster on a loopback port, agents that start no process, ranks that have no device.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use phalanx_formats::{Architecture, Geometry, RopeScaling};
use phalanx_proto::{
    AgentCommand, AgentEvent, AgentHello, DeploymentName, DesiredRank, DeviceKind, HeadStatus, Incarnation, NodeId,
    Phase, Rank, RankCapacity, RankEvent, RankHello, RankKey, RankObserved, RankProcess, StatusSnapshot, Term, VERSION,
    pb,
};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;

use crate::cluster::membership::{ClusterServer, HeadAddress, HeadClient, HeadsDesk, Lead, Story};
use crate::cluster::{
    self, CheckedSpec, Chronicle, ClusterHandle, ClusterSettings, DeployEvent, DeploymentSpec, Restored, ServingChange,
    StatusBoard, TensorParallelSize,
};
use crate::security::access::Gate;

const PATIENCE: Duration = Duration::from_secs(20);

/// A head's cluster without the rest of the head.
pub struct Rig {
    pub cluster: ClusterHandle,
    board: StatusBoard,
    address: String,
    pub chronicle: Chronicle,
    served: Arc<Mutex<Vec<String>>>,
}

/// A deployment of a made-up model.
pub fn spec(name: &str, size: u32) -> DeploymentSpec {
    DeploymentSpec {
        tensor_parallel_size: TensorParallelSize::Fixed(size),
        ..DeploymentSpec::new(name, "/models/made-up")
    }
}

fn geometry() -> Geometry {
    Geometry {
        architecture: Architecture::Llama,
        hidden_size: 64,
        intermediate_size: 128,
        num_layers: 2,
        num_heads: 8,
        num_kv_heads: 2,
        head_dim: 16,
        vocab_size: 515,
        max_position: 256,
        norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        tied_embeddings: false,
        qkv_bias: false,
        sliding_window: None,
    }
}

/// The same, checked.
pub fn checked(name: &str, size: u32) -> CheckedSpec {
    CheckedSpec { spec: spec(name, size), geometry: geometry() }
}

/// The last event of a deployment.
pub async fn last(events: &mut mpsc::Receiver<DeployEvent>) -> DeployEvent {
    loop {
        let event = timeout(PATIENCE, events.recv()).await.expect("an event in time").expect("an end");
        if !matches!(event, DeployEvent::Progress { .. }) {
            return event;
        }
    }
}

impl Rig {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub async fn start_with(change: impl FnOnce(&mut ClusterSettings)) -> Self {
        let mut settings = ClusterSettings::new(Term(1), HeadStatus::default(), None, Duration::ZERO);
        settings.heartbeat = Duration::from_millis(50);
        settings.settle = Duration::from_millis(100);
        settings.end_deadline = Duration::from_secs(5);
        settings.drain = Duration::from_millis(200);
        settings.drain_in_place = Duration::from_millis(400);
        change(&mut settings);
        let (serving, changes) = mpsc::channel(16);
        let chronicle = settings.chronicle.clone();
        let (cluster, board) = cluster::start(settings, Restored::default(), serving);
        let served = Arc::new(Mutex::new(Vec::new()));
        tokio::spawn(keep_names(changes, Arc::clone(&served)));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let desk = HeadsDesk { address: address.clone(), socket: None, lead: Lead::Alone(Term(1)) };
        let story = Story { chronicle: chronicle.clone(), head_log: None };
        let server = ClusterServer::new(cluster.clone(), board.clone(), Gate::Open, desk, story);
        tokio::spawn(server.serve_tcp(listener, std::future::pending()));
        Self { cluster, board, address, served, chronicle }
    }

    pub async fn client(&self) -> HeadClient {
        HeadClient::connect(HeadAddress::Tcp(self.address.clone())).await.expect("connects")
    }

    pub async fn deploy(&self, spec: DeploymentSpec) -> mpsc::Receiver<DeployEvent> {
        let (watcher, events) = mpsc::channel(64);
        self.cluster.deploy(CheckedSpec { spec, geometry: geometry() }, watcher).await.expect("asks");
        events
    }

    pub async fn deploy_ready(&self, spec: DeploymentSpec) {
        let event = last(&mut self.deploy(spec).await).await;
        assert!(matches!(event, DeployEvent::Ready(_)), "{event:?}");
    }

    pub fn cluster_status(&self) -> StatusSnapshot {
        self.board.snapshot()
    }

    pub fn served(&self) -> Vec<String> {
        self.served.lock().expect("no panic").clone()
    }

    pub async fn until(&self, what: &str, check: impl Fn(&StatusSnapshot) -> bool) {
        let seen = async {
            while !check(&self.cluster_status()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let waited = timeout(PATIENCE, seen).await;
        assert!(waited.is_ok(), "waited for: {what}; {:#?}", self.cluster_status());
    }

    /// A rank that nobody asked for.
    pub async fn dial_stranger(&self) -> Result<(), String> {
        let key =
            RankKey { deployment: DeploymentName("m".into()), replica: 0, rank: Rank(0), incarnation: Incarnation(1) };
        dial(&self.address, &key, "a", "guess").await.map(drop)
    }
}

async fn keep_names(mut changes: mpsc::Receiver<ServingChange>, served: Arc<Mutex<Vec<String>>>) {
    while let Some(change) = changes.recv().await {
        let mut served = served.lock().expect("no panic");
        match change {
            ServingChange::Starting(_) => {}
            ServingChange::Ready { checked, done, .. } => {
                served.retain(|name| *name != checked.spec.name.0);
                served.push(checked.spec.name.0.clone());
                let _ = done.send(Ok(()));
            }
            ServingChange::Gone(name) => served.retain(|known| *known != name.0),
        }
    }
}

#[derive(Debug)]
enum Order {
    Kill(u32),
    Freeze,
    FailStarts(String),
    CountRunning(oneshot::Sender<usize>),
}

/// An agent whose ranks are tasks.
#[derive(Debug)]
pub struct FakeAgent {
    orders: mpsc::Sender<Order>,
    task: JoinHandle<()>,
}

struct AgentState {
    node: String,
    head: String,
    says: mpsc::Sender<pb::AgentMessage>,
    ranks: BTreeMap<RankKey, (u32, JoinHandle<()>)>,
    next_pid: u32,
    fails_with: Option<String>,
}

impl FakeAgent {
    pub async fn join(rig: &Rig, node: &str, num_slots: u32) -> Self {
        let agent = Self::try_join(rig, node, num_slots, VERSION).await.expect("joins");
        rig.until("it joined", |s| s.nodes.iter().any(|known| known.id == node && known.state == "alive")).await;
        agent
    }

    /// `version` "same" is this version, from another process.
    pub async fn try_join(rig: &Rig, node: &str, num_slots: u32, version: &str) -> Result<Self, String> {
        let (says, outbound) = mpsc::channel(64);
        let hello = AgentHello {
            node_id: NodeId(node.into()),
            version: if version == "same" { VERSION } else { version }.into(),
            address: String::new(),
            hostname: "made-up".into(),
            device_kind: DeviceKind::Cpu,
            num_slots,
            num_cpus: 2,
            memory_bytes: 1 << 33,
            pid: if version == "same" { 2 } else { 1 },
            device_names: vec!["cpu".into(); num_slots as usize],
            labels: BTreeMap::from([("zone".to_owned(), node.to_owned())]),
        };
        says.send(AgentEvent::Hello(hello).into()).await.expect("room");
        let url = format!("http://{}", rig.address);
        let mut client = pb::agents_client::AgentsClient::connect(url).await.map_err(|error| error.to_string())?;
        let joined = client.join(ReceiverStream::new(outbound)).await.map_err(|status| status.message().to_owned())?;
        let (orders, inbox) = mpsc::channel(16);
        let state = AgentState {
            node: node.into(),
            head: rig.address.clone(),
            says,
            ranks: BTreeMap::new(),
            next_pid: 1000,
            fails_with: None,
        };
        Ok(Self { orders, task: tokio::spawn(state.run(joined.into_inner(), inbox)) })
    }

    async fn order(&self, order: Order) {
        self.orders.send(order).await.expect("it lives");
    }

    /// `kill -9` of a rank.
    pub async fn kill(&self, rank: u32) {
        self.order(Order::Kill(rank)).await;
    }

    /// `kill -9` of the agent: its stream ends, and its ranks with it.
    pub async fn die(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    /// SIGSTOP: no heartbeat any more.
    pub async fn freeze(&self) {
        self.order(Order::Freeze).await;
    }

    /// Ranks end at once from now on, with these last words.
    pub async fn fail_starts(&self, words: &str) {
        self.order(Order::FailStarts(words.into())).await;
    }

    pub async fn num_running(&self) -> usize {
        let (reply, answer) = oneshot::channel();
        self.order(Order::CountRunning(reply)).await;
        answer.await.expect("it lives")
    }

    pub async fn has_ended(self) -> bool {
        timeout(PATIENCE, self.task).await.is_ok()
    }
}

impl Drop for AgentState {
    fn drop(&mut self) {
        for (_, task) in self.ranks.values() {
            task.abort();
        }
    }
}

impl AgentState {
    async fn run(mut self, mut commands: tonic::Streaming<pb::HeadToAgent>, mut orders: mpsc::Receiver<Order>) {
        let mut beats = tokio::time::interval(Duration::from_millis(50));
        let (mut sequence, mut frozen) = (0, false);
        loop {
            tokio::select! {
                Ok(Some(command)) = commands.message() => match AgentCommand::try_from(command).expect("valid") {
                    AgentCommand::Welcome(_) | AgentCommand::Seen { .. } => {}
                    AgentCommand::Desired(desired) => self.desire(desired.ranks).await,
                    AgentCommand::ReadLog(_) => {}
                    AgentCommand::End(_) => return,
                },
                _ = beats.tick() => if !frozen {
                    sequence += 1;
                    let _ = self.says.send(AgentEvent::Heartbeat { sequence, round_trip: None }.into()).await;
                },
                order = orders.recv() => match order {
                    Some(Order::Kill(rank)) => self.kill(rank).await,
                    Some(Order::Freeze) => frozen = true,
                    Some(Order::FailStarts(words)) => self.fails_with = Some(words),
                    Some(Order::CountRunning(reply)) => { let _ = reply.send(self.ranks.len()); }
                    None => std::future::pending().await,
                },
            }
        }
    }

    async fn desire(&mut self, desired: Vec<DesiredRank>) {
        let old: Vec<RankKey> =
            self.ranks.keys().filter(|key| !desired.iter().any(|rank| rank.key == **key)).cloned().collect();
        for key in old {
            self.end(&key, Some(0), None, "").await;
        }
        for rank in desired {
            if self.ranks.contains_key(&rank.key) {
                continue;
            }
            let pid = self.next_pid;
            self.next_pid += 1;
            self.tell(&rank.key, pid, RankProcess::Spawned).await;
            let (head, node, key) = (self.head.clone(), self.node.clone(), rank.key.clone());
            let task = match &self.fails_with {
                Some(_) => tokio::spawn(async {}),
                None => tokio::spawn(fake_rank(head, node, rank.key.clone(), rank.launch_token)),
            };
            self.ranks.insert(key.clone(), (pid, task));
            if let Some(words) = self.fails_with.clone() {
                self.end(&key, Some(1), None, &words).await;
            }
        }
    }

    async fn kill(&mut self, rank: u32) {
        let key = self.ranks.keys().find(|key| key.rank == Rank(rank)).cloned().expect("it runs");
        self.end(&key, None, Some(9), "").await;
    }

    async fn end(&mut self, key: &RankKey, code: Option<i32>, signal: Option<i32>, last_lines: &str) {
        let (pid, task) = self.ranks.remove(key).expect("it runs");
        task.abort();
        let _ = task.await;
        self.tell(key, pid, RankProcess::Exited { code, signal, by_agent: false, last_lines: last_lines.into() }).await;
    }

    async fn tell(&self, key: &RankKey, pid: u32, state: RankProcess) {
        let observed = RankObserved { key: key.clone(), pid, state };
        let _ = self.says.send(AgentEvent::Rank(observed).into()).await;
    }
}

type RankStream = (mpsc::Sender<pb::RankMessage>, tonic::Streaming<pb::HeadToRank>);

async fn dial(head: &str, key: &RankKey, node: &str, launch_token: &str) -> Result<RankStream, String> {
    let (says, outbound) = mpsc::channel(64);
    let hello = RankHello {
        resumes: None,
        deployment: key.deployment.clone(),
        replica: key.replica,
        rank: key.rank,
        incarnation: key.incarnation,
        node_id: NodeId(node.into()),
        pid: 1,
        launch_token: launch_token.into(),
        version: VERSION.into(),
        device: "made-up".into(),
    };
    says.send(RankEvent::Hello(hello).into()).await.expect("room");
    let url = format!("http://{head}");
    let mut client =
        pb::rank_sessions_client::RankSessionsClient::connect(url).await.map_err(|error| error.to_string())?;
    let session = client.session(ReceiverStream::new(outbound)).await.map_err(|status| status.message().to_owned())?;
    Ok((says, session.into_inner()))
}

/// A rank that goes through its start and then waits for work that never comes.
async fn fake_rank(head: String, node: String, key: RankKey, launch_token: String) {
    use pb::head_to_rank::Message as M;
    let Ok((says, mut commands)) = dial(&head, &key, &node, &launch_token).await else { return };
    let progress = |phase| RankEvent::Progress { phase, fraction: Some(0.5), detail: String::new() };
    while let Ok(Some(message)) = commands.message().await {
        let answers = match message.message {
            Some(M::Load(_)) => vec![progress(Phase::Device), RankEvent::Listening(String::new())],
            Some(M::Connect(_)) => {
                let fits = RankCapacity {
                    num_blocks: 64,
                    weight_bytes: 1000,
                    block_bytes: 10,
                    free_bytes: 640,
                    features: phalanx_proto::SamplerFeatures::default(),
                };
                vec![progress(Phase::Communicator), progress(Phase::Weights), RankEvent::Capacity(fits)]
            }
            Some(M::InitKvCache(init)) => {
                vec![progress(Phase::KvCache), RankEvent::Ready { num_blocks: init.num_blocks }]
            }
            Some(M::Shutdown(_)) | None => return,
            Some(_) => Vec::new(),
        };
        for answer in answers {
            if says.send(answer.into()).await.is_err() {
                return;
            }
        }
    }
}
