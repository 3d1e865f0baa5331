//! The last snapshot of the cluster, for whoever asks: CLI, HTTP, dashboard.
//!
//! **Invariant:** the lock is held for a copy only.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use phalanx_proto::{HeadStatus, RankStatus, StatusSnapshot};
use tokio::sync::watch;

use crate::engine::EngineHandle;
use crate::store::etcd::HeadsSeen;

/// The engine of one replica, and where its numbers belong.
pub(super) struct PostedEngine {
    /// Place of its deployment in the snapshot.
    pub deployment: usize,
    /// Which replica.
    pub replica: u32,
    /// The engine.
    pub engine: EngineHandle,
}

/// A shared snapshot; the numbers of running engines are read when it is asked for.
#[derive(Clone)]
pub struct StatusBoard {
    posted: Arc<RwLock<Posted>>,
    started: Instant,
    heads: Option<watch::Receiver<HeadsSeen>>,
}

#[derive(Default)]
struct Posted {
    snapshot: StatusSnapshot,
    engines: Arc<[PostedEngine]>,
}

impl StatusBoard {
    /// A board that shows nothing yet.
    pub fn new(started: Instant) -> Self {
        Self { posted: Arc::default(), started, heads: None }
    }

    /// The same board for one of several heads.
    pub(super) fn with_heads(mut self, heads: Option<watch::Receiver<HeadsSeen>>) -> Self {
        self.heads = heads;
        self
    }

    /// Puts a new snapshot up, with the engines that serve.
    pub(super) fn post(&self, snapshot: StatusSnapshot, engines: Vec<PostedEngine>) {
        *self.posted.write().unwrap_or_else(PoisonError::into_inner) = Posted { snapshot, engines: engines.into() };
    }

    /// The cluster as it is now.
    pub fn snapshot(&self) -> StatusSnapshot {
        let (mut snapshot, engines) = {
            let posted = self.posted.read().unwrap_or_else(PoisonError::into_inner);
            (posted.snapshot.clone(), Arc::clone(&posted.engines))
        };
        snapshot.head.uptime_s = self.started.elapsed().as_secs_f64();
        describe(&mut snapshot.head, self.heads.as_ref());
        for posted in engines.iter() {
            let now = posted.engine.snapshot();
            let Some(deployment) = snapshot.deployments.get_mut(posted.deployment) else { continue };
            deployment.num_blocks_free += now.num_blocks_free;
            deployment.running += now.running;
            deployment.waiting += now.waiting;
            deployment.epoch = deployment.epoch.max(now.epoch);
            snapshot.queue.running += now.running;
            snapshot.queue.waiting += now.waiting;
            let name = deployment.name.clone();
            let is_its = |rank: &&mut RankStatus| rank.deployment == name && rank.replica == posted.replica;
            for rank in snapshot.ranks.iter_mut().filter(is_its) {
                rank.steps = now.steps();
            }
        }
        snapshot
    }
}

/// Says which of the heads this one is.
fn describe(head: &mut HeadStatus, heads: Option<&watch::Receiver<HeadsSeen>>) {
    let Some(heads) = heads else {
        (head.state, head.leader) = ("leading".to_owned(), head.address.clone());
        return;
    };
    let seen = heads.borrow();
    head.state = if seen.leads { "leading" } else { "standby" }.to_owned();
    head.leader = seen.leader.as_ref().map(|leader| leader.address.clone()).unwrap_or_default();
    head.heads.clone_from(&seen.heads);
    head.reason.clone_from(&seen.trouble);
}
