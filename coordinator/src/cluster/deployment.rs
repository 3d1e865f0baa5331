//! One deployment: what was asked for, its replicas, and the state that `status` shows.
//!
//! **Invariant:** the state is derived from the replicas and the user's wish in one place, [`Deployment::derive_state`];
//! every state but `ready` has a reason or a phase to show.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use phalanx_formats::Geometry;
use phalanx_proto::{DeploymentStatus, Incarnation, NodeId, Phase, Rank};
use tokio::sync::{mpsc, oneshot};

use super::ClusterError;
use super::placement::Wanted;
use super::placement_group::{Place, PlacementGroup};
use super::reconcile::KeptVersion;
use super::replica::{Replica, Stage};
use super::spec::DeploymentSpec;
use crate::engine::EngineHandle;

/// Where a deployment stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeploymentState {
    /// It waits for slots.
    Pending,
    /// Its ranks start.
    Starting,
    /// It serves.
    Ready,
    /// It has served, and some replica starts again: running and new requests wait for it.
    Recovering,
    /// It does not serve; the reason says whether it starts again by itself.
    Failed,
    /// It is being removed.
    Stopping,
}

impl DeploymentState {
    /// The word in `status`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Recovering => "recovering",
            Self::Failed => "failed",
            Self::Stopping => "stopping",
        }
    }
}

/// A deployment that was checked against its model: what the cluster takes in.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckedSpec {
    /// What was asked for.
    pub spec: DeploymentSpec,
    /// The model's numbers.
    pub geometry: Geometry,
}

/// Why a deployment was refused or did not come to serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeployFailure {
    /// Which kind.
    pub code: DeployFailureCode,
    /// What happened, with the arithmetic where there is any.
    pub message: String,
    /// What to do; may be empty.
    pub hint: String,
}

/// Kinds of [`DeployFailure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeployFailureCode {
    /// It can never fit on the machines that are there.
    Infeasible,
    /// The slots are taken.
    Busy,
    /// The time to wait for machines passed.
    Timeout,
    /// The model's files cannot be used.
    Model,
    /// Ranks did not come up.
    StartFailed,
    /// The name is in use.
    NameTaken,
    /// Values that contradict each other.
    Invalid,
    /// It was removed, or the head ended, before it was ready.
    Stopped,
}

impl DeployFailureCode {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Infeasible,
        Self::Busy,
        Self::Timeout,
        Self::Model,
        Self::StartFailed,
        Self::NameTaken,
        Self::Invalid,
        Self::Stopped,
    ];

    /// The word on the wire and in errors.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Infeasible => "infeasible",
            Self::Busy => "busy",
            Self::Timeout => "timeout",
            Self::Model => "model_error",
            Self::StartFailed => "start_failed",
            Self::NameTaken => "name_taken",
            Self::Invalid => "invalid",
            Self::Stopped => "stopped",
        }
    }
}

/// What whoever asked for a deployment hears; ends with `Ready` or `Failed`, once.
#[derive(Debug, Clone, PartialEq)]
pub enum DeployEvent {
    /// Something went on.
    Progress {
        /// The deployment's state.
        state: String,
        /// A line for a person.
        text: String,
        /// Which rank of which replica, where it is about one.
        rank: Option<u32>,
        /// Phase of that rank's start, else empty.
        phase: String,
        /// 0 to 1 within it, where known.
        fraction: Option<f32>,
    },
    /// It serves.
    Ready(DeploymentStatus),
    /// It does not, and will not without another `serve`.
    Failed(DeployFailure),
}

/// A restart of all replicas, one after the other.
#[derive(Debug)]
pub(super) struct Rolling {
    pub since: Instant,
    /// The replica whose turn it is, and its incarnation before.
    pub turn: Option<(usize, Incarnation)>,
    /// Replicas that have had theirs.
    pub num_done: usize,
    pub replies: Vec<oneshot::Sender<Result<(), ClusterError>>>,
}

/// A deployment and everything of it.
pub(super) struct Deployment {
    pub checked: Arc<CheckedSpec>,
    pub size: u32,
    pub group: PlacementGroup,
    pub replicas: Vec<Replica>,
    /// The last incarnation of replicas that are not there any more.
    last_incarnation: Incarnation,
    pub state: DeploymentState,
    pub reason: String,
    pub placed_at: SystemTime,
    /// The same among all that were given slots.
    pub placed_order: u64,
    pub wait_until: Option<Instant>,
    /// It was ready once: from then on breaks lead to restarts.
    pub has_served: bool,
    /// It does not start again by itself.
    pub gave_up: bool,
    /// Where it stands among the others, oldest first.
    pub order: u64,
    /// The sign of what the store holds, or is about to hold; none: no record.
    pub kept: Option<KeptVersion>,
    /// When the store is asked again, where it could not write what it was given.
    pub keep_again_at: Option<Instant>,
    /// The store held a record of it once.
    pub was_kept: bool,
    /// Requests find it.
    pub published: bool,
    /// What requests find is not what serves now.
    pub stale: bool,
    /// That is being put right.
    pub publishing: bool,
    pub stopping_since: Option<Instant>,
    pub watchers: Vec<mpsc::Sender<DeployEvent>>,
    /// It is being started again, replica by replica.
    pub rolling: Option<Rolling>,
    pub undeploy_replies: Vec<oneshot::Sender<Result<(), ClusterError>>>,
}

impl Deployment {
    /// `last` is the last incarnation of an earlier deployment.
    pub fn new(checked: CheckedSpec, size: u32, last: Incarnation, now: Instant) -> Self {
        let spec = &checked.spec;
        Self {
            size,
            group: PlacementGroup::new(format!("pg-{}", spec.name), spec.strategy, spec.replicas, size),
            replicas: (0..spec.replicas).map(|_| Replica::new(last)).collect(),
            last_incarnation: last,
            state: DeploymentState::Pending,
            reason: String::new(),
            placed_at: SystemTime::now(),
            placed_order: 0,
            wait_until: spec.wait.map(|wait| now + wait),
            has_served: false,
            gave_up: false,
            order: 0,
            kept: None,
            keep_again_at: None,
            was_kept: false,
            published: false,
            stale: false,
            publishing: false,
            stopping_since: None,
            watchers: Vec::new(),
            rolling: None,
            undeploy_replies: Vec::new(),
            checked: Arc::new(checked),
        }
    }

    /// What has no slots yet, for placement: all replicas at first, later those that lost theirs.
    pub fn wanted(&self) -> Wanted {
        let unplaced = self.replicas.iter().filter(|replica| matches!(replica.stage, Stage::Unplaced)).count();
        Wanted {
            tensor_parallel_size: self.size,
            // Those that follow the machines come one by one.
            replicas: u32::try_from(unplaced).unwrap_or(u32::MAX).min(if self.is_auto() { 1 } else { u32::MAX }),
            strategy: self.checked.spec.strategy,
            waits: self.has_served || self.wait_until.is_some(),
        }
    }

    /// Whether its replicas follow the machines.
    pub fn is_auto(&self) -> bool {
        self.checked.spec.replicas_auto
    }

    /// Replicas that must serve. Of those that follow the machines, one that nobody uses yet is no loss.
    fn num_counted(&self) -> usize {
        let counts = |replica: &&Replica| !self.is_auto() || replica.engine.is_some();
        self.replicas.iter().filter(counts).count()
    }

    /// Engines that take steps and are to go on with it.
    pub fn serving(&self) -> impl Iterator<Item = &EngineHandle> {
        let serves = |replica: &&Replica| matches!(replica.stage, Stage::Serving);
        self.replicas.iter().filter(serves).filter_map(|replica| replica.engine())
    }

    /// Has one more replica, without slots.
    pub fn grow(&mut self) {
        self.replicas.push(Replica::new(self.last_incarnation));
        self.group.grow();
    }

    /// The last incarnation of any replica that there was.
    pub fn last_incarnation(&self) -> Incarnation {
        self.replicas.iter().map(|replica| replica.incarnation).fold(self.last_incarnation, Ord::max)
    }

    /// Forgets replicas at the end that have no machine and no request. True where there were any.
    pub fn shrink(&mut self) -> bool {
        let before = self.replicas.len();
        let is_idle = |replica: &Replica| matches!(replica.stage, Stage::Unplaced) && replica.engine.is_none();
        while self.replicas.len() > 1 && self.replicas.last().is_some_and(is_idle) {
            self.last_incarnation = self.last_incarnation();
            self.replicas.pop();
            self.group.shrink();
        }
        self.replicas.len() < before
    }

    /// The state that follows from the replicas.
    pub fn derive_state(&self) -> DeploymentState {
        let serving = self.replicas.iter().filter(|replica| replica.engine().is_some()).count();
        if self.stopping_since.is_some() {
            DeploymentState::Stopping
        } else if self.gave_up {
            DeploymentState::Failed
        } else if serving > 0 && serving == self.num_counted() && self.published && !self.stale && !self.publishing {
            DeploymentState::Ready
        } else if self.has_served {
            let is_lost = |replica: &Replica| replica.engine.is_none() && matches!(replica.stage, Stage::Unplaced);
            if self.replicas.iter().all(is_lost) { DeploymentState::Failed } else { DeploymentState::Recovering }
        } else if self.replicas.iter().any(|replica| matches!(replica.stage, Stage::Unplaced)) {
            DeploymentState::Pending
        } else {
            DeploymentState::Starting
        }
    }

    /// Notes the state that follows from the replicas. True where it serves in full: no reason is left to show then.
    pub fn settle_state(&mut self) -> bool {
        self.state = self.derive_state();
        let ready = self.state == DeploymentState::Ready;
        if ready {
            self.has_served = true;
            self.reason.clear();
        }
        ready
    }

    /// Keeps the slots of each replica that nobody has taken and that it may have; a replica without waits for others.
    pub fn keep_slots(&mut self, taken: &mut BTreeSet<(NodeId, u32)>, may_have: impl Fn(&Place) -> bool) {
        for number in 0..self.replicas.len() {
            let places = self.group.places(number as u32);
            let is_lost = |place: &Place| taken.contains(&(place.node.clone(), place.slot)) || !may_have(place);
            if places.iter().any(is_lost) {
                self.group.reschedule(number as u32, "others have its slots".to_owned());
                self.replicas[number].stage = Stage::Unplaced;
            } else {
                taken.extend(places.into_iter().map(|place| (place.node, place.slot)));
            }
        }
        self.state = self.derive_state();
    }

    /// Tells everyone who waits for this deployment. The last place of a queue is kept for the end.
    pub fn tell(&mut self, event: &DeployEvent) {
        let last = !matches!(event, DeployEvent::Progress { .. });
        self.watchers.retain(|watcher| {
            if last || watcher.capacity() > 1 {
                let _ = watcher.try_send(event.clone());
            }
            !last && !watcher.is_closed()
        });
    }

    /// Tells a line about the whole deployment.
    pub fn tell_line(&mut self, text: String) {
        let state = self.state.as_str().to_owned();
        self.tell(&DeployEvent::Progress { state, text, rank: None, phase: String::new(), fraction: None });
    }

    /// Tells that a rank entered or went on in a phase.
    pub fn tell_phase(&mut self, replica: u32, rank: Rank, phase: Phase, fraction: Option<f32>, detail: &str) {
        let number = replica * self.size + rank.0;
        let place = self.replicas.get(replica as usize).and_then(|replica| replica.ranks.get(rank.0 as usize));
        let node = place.map(|record| record.place.node.to_string()).unwrap_or_default();
        let mut text = format!("rank {number} on {node}: {phase}");
        if !detail.is_empty() {
            text = format!("{text} ({detail})");
        }
        let (state, phase) = (self.state.as_str().to_owned(), phase.as_str().to_owned());
        self.tell(&DeployEvent::Progress { state, text, rank: Some(number), phase, fraction });
    }

    /// Does not start again: tells the reason and everyone who waits.
    pub fn give_up(&mut self, code: DeployFailureCode, message: String, hint: String) {
        self.gave_up = true;
        for replica in &mut self.replicas {
            replica.fail_requests(&message);
        }
        self.reason.clone_from(&message);
        self.state = DeploymentState::Failed;
        self.tell(&DeployEvent::Failed(DeployFailure { code, message, hint }));
    }
}

/// Restarts within `window` before `now`, after forgetting older ones.
pub(super) fn recent_restarts(restarts: &mut Vec<Instant>, now: Instant, window: Duration) -> usize {
    restarts.retain(|at| now.saturating_duration_since(*at) < window);
    restarts.len()
}
