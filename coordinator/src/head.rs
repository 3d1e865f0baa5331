//! Puts the head together: ports, cluster, engines, API, dashboard.
//!
//! Owns nothing but the order: take the home, bind every port, then start. What the parts say to each other goes through
//! their own handles.
//!
//! **Invariant:** all ports are bound before anything else starts; when the cluster has stopped, every server ends within a
//! deadline.

mod ports;
mod record;
mod servers;
mod serving;
mod standby;

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use phalanx_proto::{HeadSocket, HeadStatus, VERSION};
use phalanx_trust::{TrustError, rendezvous};
use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};

use ports::PickedPorts;
pub use ports::{PortError, PortWish};
pub use record::{HeadRecord, HomeError, HomeLock, ProcessId, running_head};
use servers::{cluster_servers, http_server, unix_socket, until};
pub use standby::{StandingHead, Stood};

use crate::api::{self, AllowedOrigins, ApiState, ServedModels};
use crate::cluster::membership::{ClusterServer, HeadsDesk, Lead, Story};
use crate::cluster::{
    self, Chronicle, ClusterHandle, ClusterSettings, DeploymentRecord, GroupRecord, Patience, Restored, StatusBoard,
};
use crate::config::{Home, defaults};
use crate::dashboard;
use crate::security::FileError;
use crate::security::access::Gate;
use crate::security::key_file::KeyFile;
use crate::security::keys::KeyRing;
use crate::security::tokens::{TokenBook, TokenBookError};
use crate::store::etcd::{Campaign, Leadership};
use crate::store::{Backend, Store, StoreError, StoreWriter, Table};
use crate::traces::{TraceEndpoint, TraceSink};

/// Time between two writings of what keys have used.
const USAGE_INTERVAL: Duration = Duration::from_secs(10);
/// Time for open connections when the head ends.
const CLOSE_DEADLINE: Duration = Duration::from_secs(2);

/// Where a head listens and what it is told.
#[derive(Debug, Clone)]
pub struct HeadOptions {
    /// Its home.
    pub home: Home,
    /// gRPC.
    pub cluster: PortWish,
    /// OpenAI-compatible API.
    pub http: PortWish,
    /// Dashboard.
    pub dashboard: PortWish,
    /// Where other machines reach this one, if not at the cluster's host.
    pub advertise_address: Option<String>,
    /// How long agents and ranks outlive the head.
    pub head_grace: Duration,
    /// Silence after which a machine counts as dead.
    pub node_timeout: Duration,
    /// Where its log goes; none: to a terminal.
    pub log: Option<PathBuf>,
    /// Keys that open the API; none: open to all.
    pub api_keys: Vec<String>,
    /// Plain text between machines, no tokens, no certificates.
    pub insecure: bool,
    /// How long a node's certificate is valid.
    pub certificate_lifetime: Duration,
    /// Pages that may read the API's answers.
    pub allowed_origins: AllowedOrigins,
    /// The collector that spans of requests are sent to.
    pub traces: Option<TraceEndpoint>,
}

/// Why a head cannot start.
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// Its home is taken or cannot be written.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// A port cannot be had.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The API keys cannot be read: nobody is let in on a guess.
    #[error(transparent)]
    Keys(#[from] FileError),
    /// Tokens cannot be had.
    #[error(transparent)]
    Tokens(#[from] TokenBookError),
    /// The head's own certificate cannot be made.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// A socket that is bound cannot be served.
    #[error("cannot serve {purpose}: {source}")]
    Socket {
        /// What it is for.
        purpose: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A head whose ports are bound and that does nothing yet.
pub struct BoundHead {
    options: HeadOptions,
    picked: PickedPorts,
    lock: HomeLock,
    cluster: TcpListener,
    http: TcpListener,
    dashboard: TcpListener,
    status: HeadStatus,
    local_address: String,
    rendezvous: Option<Rendezvous>,
}

/// A head at work.
pub struct RunningHead {
    /// What it says of itself.
    pub record: HeadRecord,
    /// The cluster.
    pub cluster: ClusterHandle,
    servers: Vec<tokio::task::JoinHandle<()>>,
    end: watch::Sender<bool>,
    socket: Option<PathBuf>,
    picked: PickedPorts,
    campaign: Option<Campaign>,
    _rendezvous: Option<Rendezvous>,
    _lock: HomeLock,
}

/// What a head holds that leads others.
struct Shared {
    leadership: Arc<Leadership>,
    campaign: Campaign,
}

/// Takes the home and binds every port.
///
/// # Errors
/// Another head runs in this home, or a port cannot be had.
pub fn bind(options: HeadOptions) -> Result<BoundHead, HeadError> {
    let lock = HomeLock::take(&options.home)?;
    let mut picked = PickedPorts::read(options.home.ports());
    let cluster = picked.bind(&options.cluster)?;
    let http = picked.bind(&options.http)?;
    let dashboard = picked.bind(&options.dashboard)?;
    if let Err(error) = picked.write() {
        warn!(%error, "ports are not kept: a head that is started again picks others");
    }
    let at =
        |listener: &TcpListener, purpose| listener.local_addr().map_err(|source| HeadError::Socket { purpose, source });
    let address = at(&cluster, "the cluster")?;
    let status = HeadStatus {
        address: advertised(options.advertise_address.as_deref(), address),
        http: url(at(&http, "HTTP")?),
        dashboard: url(at(&dashboard, "the dashboard")?),
        version: VERSION.to_owned(),
        pid: std::process::id(),
        insecure: options.insecure,
        ..HeadStatus::default()
    };
    let rendezvous = (!options.insecure && address.ip().is_loopback())
        .then(|| Rendezvous::announce(address.port(), options.home.path()))
        .flatten();
    Ok(BoundHead { options, picked, lock, cluster, http, dashboard, status, local_address: local(address), rendezvous })
}

/// Where other machines find an address that is listened on: what the user said, `HOST` or `HOST:PORT`, else a guess.
fn advertised(said: Option<&str>, address: SocketAddr) -> String {
    let port = address.port();
    match said {
        Some(said) if has_port(said) => said.to_owned(),
        Some(host) => format!("{host}:{port}"),
        None => format!("{}:{port}", reachable(address)),
    }
}

fn has_port(said: &str) -> bool {
    said.rsplit_once(':').is_some_and(|(host, port)| {
        port.parse::<u16>().is_ok() && (!host.contains(':') || (host.starts_with('[') && host.ends_with(']')))
    })
}

/// Where this machine itself finds it, whatever names it has elsewhere.
fn local(address: SocketAddr) -> String {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port()).to_string()
}

/// The host that others should use for an address that is listened on.
fn reachable(address: SocketAddr) -> String {
    match address.ip() {
        ip if ip.is_unspecified() => hostname().unwrap_or_else(|| "127.0.0.1".to_owned()),
        IpAddr::V6(ip) => format!("[{ip}]"),
        IpAddr::V4(ip) => ip.to_string(),
    }
}

fn url(address: SocketAddr) -> String {
    format!("http://{}:{}", reachable(address), address.port())
}

fn hostname() -> Option<String> {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim().to_owned()).filter(|name| !name.is_empty())
}

impl BoundHead {
    /// Starts everything on the current runtime, with the store in this head's home.
    ///
    /// # Errors
    /// The store or a socket cannot be used.
    pub fn start(self) -> Result<RunningHead, HeadError> {
        let gate = gate(&self.options)?;
        let store = Store::open(&self.options.home.store_dir())?;
        self.start_with(gate, Box::new(store), None)
    }

    /// The ports of cluster, HTTP and dashboard.
    pub fn ports(&self) -> [u16; 3] {
        let port = |listener: &TcpListener| listener.local_addr().map_or(0, |address| address.port());
        [port(&self.cluster), port(&self.http), port(&self.dashboard)]
    }

    /// What it says of itself.
    fn record(&self) -> HeadRecord {
        let pid = self.status.pid;
        HeadRecord {
            process: ProcessId::of(pid).unwrap_or(ProcessId { pid, started: 0 }),
            address: self.status.address.clone(),
            local_address: self.local_address.clone(),
            http: self.status.http.clone(),
            dashboard: self.status.dashboard.clone(),
            socket: Some(self.options.home.head_socket()).filter(|path| path.exists()),
            log_dir: self.options.home.log_dir(),
            stands_by: None,
            trust_dir: self.options.home.trust_dir(),
            insecure: self.options.insecure,
        }
    }

    fn start_with(
        self,
        gate: Gate,
        mut store: Box<dyn Backend>,
        shared: Option<Shared>,
    ) -> Result<RunningHead, HeadError> {
        let term = store.next_term()?;
        let restored = restored(store.as_mut())?;
        let unix = unix_socket(&self.options.home);
        let record = self.record();
        let Self { options, picked, lock, cluster, http, dashboard, status, rendezvous, .. } = self;
        let socket = unix.as_ref().map(|(path, _)| path.clone());
        let head_socket =
            socket.as_ref().map(|path| HeadSocket { path: path.display().to_string(), boot_id: boot_id() });
        let seen = shared.as_ref().map(|shared| shared.campaign.seen.clone());
        let lead = match (&shared, &seen) {
            (Some(shared), Some(seen)) => Lead::First(Arc::clone(&shared.leadership), seen.clone()),
            _ => Lead::Alone(term),
        };
        let desk = HeadsDesk { address: status.address.clone(), socket: head_socket.clone(), lead };
        let mut settings = ClusterSettings::new(term, status, head_socket, options.head_grace);
        settings.patience = Patience::of(options.node_timeout);
        settings.heartbeat = settings.patience.heartbeat();
        let writer = StoreWriter::spawn(store);
        settings.chronicle = Chronicle::open(&options.home.events());
        let chronicle = settings.chronicle.clone();
        settings.store = Some(writer.map_err(|source| HeadError::Socket { purpose: "the store", source })?);
        settings.heads = seen;
        let models = ServedModels::default();
        let (serving, changes) = mpsc::channel(defaults::PEER_QUEUE);
        let (handle, board) = cluster::start(settings, restored, serving);
        tokio::spawn(serving::keep_table(models.clone(), changes));
        let (end, ended) = watch::channel(false);
        let story = Story { chronicle, head_log: options.log.clone() };
        let server = ClusterServer::new(handle.clone(), board.clone(), gate, desk, story);
        let mut servers = cluster_servers(&server, cluster, unix.map(|(_, listener)| listener), &ended)?;
        servers.push(tokio::spawn(log_stats(models.clone(), ended.clone())));
        let keys = Arc::new(KeyRing::new(&options.api_keys, Some(KeyFile::new(&options.home.store_dir())))?);
        servers.push(tokio::spawn(keep_usage(Arc::clone(&keys), ended.clone())));
        let traces = options.traces.map(|endpoint| {
            let (sink, export) = TraceSink::new(&endpoint, ended.clone());
            servers.push(tokio::spawn(export));
            sink
        });
        servers.push(http_server(
            "HTTP",
            http,
            api_router(models, &board, keys, options.allowed_origins, traces),
            ended.clone(),
        )?);
        servers.push(http_server("the dashboard", dashboard, dashboard::router(board), ended)?);
        lock.write(&record)?;
        info!(
            address = record.address,
            http = record.http,
            dashboard = record.dashboard,
            term = term.0,
            "head listens"
        );
        let campaign = shared.map(|shared| shared.campaign);
        let _rendezvous = rendezvous;
        Ok(RunningHead { record, cluster: handle, servers, end, socket, picked, campaign, _rendezvous, _lock: lock })
    }
}

impl RunningHead {
    /// Resolves when the cluster has stopped and the servers have ended.
    pub async fn ended(mut self) {
        self.cluster.stopped().await;
        self.picked.forget();
        let _ = self.end.send(true);
        let closing = async {
            for server in &mut self.servers {
                let _ = server.await;
            }
        };
        if tokio::time::timeout(CLOSE_DEADLINE, closing).await.is_err() {
            for server in &self.servers {
                server.abort();
            }
        }
        if let Some(socket) = &self.socket {
            let _ = fs::remove_file(socket);
        }
        if let Some(campaign) = self.campaign {
            campaign.resign().await;
        }
    }
}

/// The file by which other homes of this user find a head on loopback; it goes with the value.
struct Rendezvous {
    port: u16,
    home: PathBuf,
}

impl Rendezvous {
    /// `None` where it cannot be written: other homes then give a token.
    fn announce(port: u16, home: &Path) -> Option<Self> {
        match rendezvous::announce(port, home) {
            Ok(()) => Some(Self { port, home: home.to_owned() }),
            Err(error) => {
                info!(%error, "other homes of this user do not find this head by themselves");
                None
            }
        }
    }
}

impl Drop for Rendezvous {
    fn drop(&mut self) {
        rendezvous::forget(self.port, &self.home);
    }
}

/// Who is let in.
fn gate(options: &HeadOptions) -> Result<Gate, HeadError> {
    if options.insecure {
        warn!("--insecure: plain text between machines; whoever reaches the cluster port joins and commands");
        return Ok(Gate::Open);
    }
    let home = &options.home;
    let book = TokenBook::open(&home.trust_dir(), &home.store_dir(), options.certificate_lifetime)?;
    Ok(Gate::guarded(book)?)
}

/// What an earlier head has left. A record that cannot be read is named and passed over: the others come back.
fn restored(store: &mut dyn Backend) -> Result<Restored, StoreError> {
    Ok(Restored {
        deployments: readable(store, Table::Deployments, DeploymentRecord::from_bytes)?,
        groups: readable(store, Table::PlacementGroups, GroupRecord::from_bytes)?,
    })
}

fn readable<T>(
    store: &mut dyn Backend,
    table: Table,
    read: impl Fn(&[u8]) -> Result<T, serde_json::Error>,
) -> Result<Vec<T>, StoreError> {
    let mut records = Vec::new();
    for (name, bytes) in store.records(table)? {
        match read(&bytes) {
            Ok(record) => records.push(record),
            Err(error) => error!(?table, name, %error, "a record does not come back: it cannot be read"),
        }
    }
    Ok(records)
}

/// Writes lines of throughput and queues until the end.
async fn log_stats(models: ServedModels, ended: watch::Receiver<bool>) {
    tokio::select! {
        () = api::stats::log(models) => {}
        () = until(ended) => {}
    }
}

/// Writes what keys have used, now and then and at the end.
async fn keep_usage(keys: Arc<KeyRing>, mut ended: watch::Receiver<bool>) {
    loop {
        let ending = tokio::time::timeout(USAGE_INTERVAL, ended.wait_for(|ended| *ended)).await.is_ok();
        let keys = Arc::clone(&keys);
        let _ = tokio::task::spawn_blocking(move || keys.save_usage()).await;
        if ending {
            return;
        }
    }
}

fn api_router(
    models: ServedModels,
    board: &StatusBoard,
    keys: Arc<KeyRing>,
    origins: AllowedOrigins,
    traces: Option<TraceSink>,
) -> axum::Router {
    let board = board.clone();
    let mut state = ApiState::new(models, Arc::new(move || board.snapshot()));
    state.keys = keys;
    state.origins = origins;
    state.traces = traces;
    api::router(state)
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(said: Option<&str>, listens: &str, others: &str, here: &str) {
        let address = listens.parse().expect("an address");
        assert_eq!((advertised(said, address).as_str(), local(address).as_str()), (others, here));
    }

    #[test]
    fn other_machines_and_this_one_may_use_different_addresses() {
        check(None, "127.0.0.1:8001", "127.0.0.1:8001", "127.0.0.1:8001");
        check(Some("head"), "0.0.0.0:8001", "head:8001", "127.0.0.1:8001");
        check(Some("head:9001"), "0.0.0.0:8001", "head:9001", "127.0.0.1:8001");
        check(Some("[fd00::1]:9001"), "[::]:8001", "[fd00::1]:9001", "[::1]:8001");
        check(None, "10.0.0.7:8001", "10.0.0.7:8001", "10.0.0.7:8001");
    }
}
