//! The last snapshot of the cluster, for whoever asks: CLI, HTTP, dashboard.
//!
//! **Invariant:** the lock is held for a copy only.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use phalanx_proto::StatusSnapshot;

use crate::engine::EngineHandle;

/// A shared snapshot; the numbers of running engines are read when it is asked for.
#[derive(Clone)]
pub struct StatusBoard {
    posted: Arc<RwLock<Posted>>,
    started: Instant,
}

#[derive(Default)]
struct Posted {
    snapshot: StatusSnapshot,
    engines: Vec<(usize, EngineHandle)>,
}

impl StatusBoard {
    /// A board that shows nothing yet.
    pub fn new(started: Instant) -> Self {
        Self { posted: Arc::default(), started }
    }

    /// Puts a new snapshot up; `engines` belong to deployments by their place in it.
    pub(super) fn post(&self, snapshot: StatusSnapshot, engines: Vec<(usize, EngineHandle)>) {
        *self.posted.write().unwrap_or_else(PoisonError::into_inner) = Posted { snapshot, engines };
    }

    /// The cluster as it is now.
    pub fn snapshot(&self) -> StatusSnapshot {
        let (mut snapshot, engines) = {
            let posted = self.posted.read().unwrap_or_else(PoisonError::into_inner);
            (posted.snapshot.clone(), posted.engines.clone())
        };
        snapshot.head.uptime_s = self.started.elapsed().as_secs_f64();
        for (index, engine) in engines {
            let now = engine.snapshot();
            let Some(deployment) = snapshot.deployments.get_mut(index) else { continue };
            deployment.num_blocks_free += now.num_blocks_free;
            deployment.running += now.running;
            deployment.waiting += now.waiting;
            deployment.epoch = deployment.epoch.max(now.epoch);
            snapshot.queue.running += now.running;
            snapshot.queue.waiting += now.waiting;
            let name = deployment.name.clone();
            for rank in snapshot.ranks.iter_mut().filter(|rank| rank.deployment == name) {
                rank.steps = rank.steps.max(now.steps());
            }
        }
        snapshot
    }
}
