//! A head that shares its store: it stands by while another leads, and takes over when that one is gone.
//!
//! **Invariant:** a head that stands by answers who leads, and nothing else; it stops answering before it leads.
//! **Invariant:** whoever is let in by it, leading or not, is let in by one gate, which is there before it asks for the lead.
//! **Invariant:** the sockets are the head's own throughout, so its addresses never change.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use phalanx_proto::HeadSocket;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::servers::{cluster_servers, http_server, unix_socket};
use super::{BoundHead, CLOSE_DEADLINE, HeadError, HeadRecord, RunningHead, Shared, boot_id, gate};
use crate::api;
use crate::cluster::membership::{ClusterServer, HeadsDesk, Lead, Story};
use crate::cluster::{self, Chronicle, ClusterHandle, StatusBoard};
use crate::dashboard;
use crate::security::access::Gate;
use crate::store::etcd::{Campaign, Deposed, EtcdPlace, HeadCard, HeadsSeen};

/// Time for a head that has just started to learn whether another one leads.
const FIRST_LOOK: Duration = Duration::from_secs(3);

/// A head that waits for the lead.
pub struct StandingHead {
    head: BoundHead,
    gate: Gate,
    campaign: Campaign,
    /// What the command line may ask of it: its status, and to stop.
    pub cluster: ClusterHandle,
    servers: Vec<JoinHandle<()>>,
    end: watch::Sender<bool>,
}

/// How standing by ended.
pub enum Stood {
    /// It leads now.
    Leads(Box<RunningHead>),
    /// It was asked to end.
    Ended,
}

impl BoundHead {
    /// Begins to stand by. `deposed` is called, on a thread of its own, when this head has led and must end at once.
    ///
    /// # Errors
    /// A socket or a thread cannot be had, or this head's own keys cannot be used.
    pub fn stand_by(self, place: EtcdPlace, deposed: Deposed) -> Result<StandingHead, HeadError> {
        let gate = gate(&self.options)?;
        let card = HeadCard {
            id: uuid::Uuid::new_v4().to_string(),
            address: self.status.address.clone(),
            http: self.status.http.clone(),
            authority: gate.authority(),
        };
        let started = Campaign::start(place, card, deposed);
        let campaign = started.map_err(|source| HeadError::Socket { purpose: "the lease", source })?;
        let (cluster, board) = cluster::stand_by(self.status.clone(), campaign.seen.clone());
        let (end, ended) = watch::channel(false);
        let servers = self.standby_servers(&cluster, &board, &campaign.seen, &gate, &ended)?;
        Ok(StandingHead { head: self, gate, campaign, cluster, servers, end })
    }

    fn standby_servers(
        &self,
        cluster: &ClusterHandle,
        board: &StatusBoard,
        seen: &watch::Receiver<HeadsSeen>,
        gate: &Gate,
        ended: &watch::Receiver<bool>,
    ) -> Result<Vec<JoinHandle<()>>, HeadError> {
        let again = |listener: &TcpListener, purpose| {
            listener.try_clone().map_err(|source| HeadError::Socket { purpose, source })
        };
        let unix = unix_socket(&self.options.home);
        let path = unix.as_ref().map(|(path, _)| path.display().to_string());
        let socket = path.map(|path| HeadSocket { path, boot_id: boot_id() });
        let desk = HeadsDesk { address: self.status.address.clone(), socket, lead: Lead::StandsBy(seen.clone()) };
        let story =
            Story { chronicle: Chronicle::open(&self.options.home.events()), head_log: self.options.log.clone() };
        let server = ClusterServer::new(cluster.clone(), board.clone(), gate.clone(), desk, story);
        let tcp = again(&self.cluster, "the cluster")?;
        let mut servers = cluster_servers(&server, tcp, unix.map(|(_, listener)| listener), ended)?;
        let seen = seen.clone();
        let leader = move || seen.borrow().leader.as_ref().map(|leader| leader.http.clone());
        let http = api::standby::router(Arc::new(leader));
        servers.push(http_server("HTTP", again(&self.http, "HTTP")?, http, ended.clone())?);
        let page = dashboard::router(board.clone());
        servers.push(http_server("the dashboard", again(&self.dashboard, "the dashboard")?, page, ended.clone())?);
        self.lock.write(&HeadRecord { stands_by: Some(String::new()), ..self.record() })?;
        Ok(servers)
    }
}

impl StandingHead {
    /// The heads, once it is known who leads: where nobody does, or etcd does not answer, as they are seen after a while.
    pub async fn first_look(&mut self) -> HeadsSeen {
        let seen = self.campaign.seen.wait_for(|seen| seen.leader.is_some() || seen.is_stranger);
        let _ = tokio::time::timeout(FIRST_LOOK, seen).await;
        self.campaign.seen.borrow().clone()
    }

    /// What it says of itself, where that one leads.
    pub fn record(&self, leader: Option<&HeadCard>) -> HeadRecord {
        let stands_by = Some(leader.map(|leader| leader.address.clone()).unwrap_or_default());
        HeadRecord { stands_by, ..self.head.record() }
    }

    /// Waits for the lead, or for the word to end.
    ///
    /// # Errors
    /// This head leads and cannot start.
    pub async fn stand(mut self) -> Result<Stood, HeadError> {
        let cluster = self.cluster.clone();
        let store = tokio::select! {
            store = self.campaign.won() => store,
            () = cluster.stopped() => {
                self.close().await;
                self.campaign.resign().await;
                return Ok(Stood::Ended);
            }
        };
        self.close().await;
        let shared = Shared { leadership: store.leadership(), campaign: self.campaign };
        let running = self.head.start_with(self.gate, Box::new(store), Some(shared))?;
        Ok(Stood::Leads(Box::new(running)))
    }

    /// Ends the servers: connections that are open are told to go.
    async fn close(&mut self) {
        let _ = self.end.send(true);
        let closing = async {
            for server in &mut self.servers {
                let _ = server.await;
            }
        };
        if tokio::time::timeout(CLOSE_DEADLINE / 4, closing).await.is_err() {
            self.servers.iter().for_each(JoinHandle::abort);
        }
    }
}
