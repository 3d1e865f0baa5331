//! Who leads, for agents that look for the head of their cluster.

use std::sync::Arc;

use phalanx_proto::{HeadSight, HeadSocket, Term, pb};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::trust;
use crate::security::access::Gate;
use crate::store::etcd::{HeadsSeen, Leadership};

/// What this head knows of the heads of its cluster.
#[derive(Debug, Clone)]
pub struct HeadsDesk {
    /// Cluster address of this head.
    pub address: String,
    /// Its Unix socket.
    pub socket: Option<HeadSocket>,
    /// How it leads.
    pub lead: Lead,
}

/// How a head leads.
#[derive(Debug, Clone)]
pub enum Lead {
    /// It is the only one of its cluster.
    Alone(Term),
    /// It leads others.
    First(Arc<Leadership>, watch::Receiver<HeadsSeen>),
    /// Another leads, or none.
    StandsBy(watch::Receiver<HeadsSeen>),
}

impl HeadsDesk {
    fn sight(&self) -> HeadSight {
        let own = Some(self.address.clone());
        let (leads, term, leader, heads) = match &self.lead {
            Lead::Alone(term) => (true, *term, own, vec![self.address.clone()]),
            Lead::First(leadership, seen) => (true, leadership.term(), own, seen.borrow().heads.clone()),
            Lead::StandsBy(seen) => {
                let seen = seen.borrow();
                let leader = seen.leader.as_ref().map(|leader| leader.address.clone());
                (false, seen.term, leader, seen.heads.clone())
            }
        };
        HeadSight { leads, term, leader, heads, socket: self.socket.clone() }
    }
}

/// Answers nodes of this cluster.
pub(super) struct HeadsService {
    pub desk: HeadsDesk,
    pub gate: Gate,
}

#[tonic::async_trait]
impl pb::heads_server::Heads for HeadsService {
    async fn who(&self, request: Request<pb::WhoRequest>) -> Result<Response<pb::WhoReply>, Status> {
        self.gate.any_node(trust::peer(&request))?;
        if let Lead::First(leadership, _) = &self.desk.lead {
            leadership.heard_of(Term(request.get_ref().seen_term));
        }
        Ok(Response::new(self.desk.sight().into()))
    }
}
