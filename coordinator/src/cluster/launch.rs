//! From ranks that are there to an engine that takes steps, and back: the only place that starts and stops engines.
//!
//! **Invariant:** each task ends in exactly one event to the cluster's task, unless it is aborted by it.

use std::time::Duration;

use phalanx_proto::{Epoch, LoadModel, NodeId, RankResumes, Term};
use tokio::sync::{mpsc, oneshot};

use super::deployment::CheckedSpec;
use super::event::{ClusterEvent, GroupKey, RankStep, StartedGroup};
use super::replica::Starter;
use crate::config::defaults;
use crate::engine::group::{RankLink, TpGroup};
use crate::engine::{self, EngineHandle, EngineLimits, RecoveryLimits, StartDeadlines, StartProgress};
use crate::security;

/// What one start needs.
pub(super) struct GroupStart {
    pub key: GroupKey,
    pub links: Vec<RankLink>,
    pub load: LoadModel,
    /// What the ranks have kept of an earlier life of the head: nothing is loaded then.
    pub kept: Option<Vec<RankResumes>>,
    pub limits: EngineLimits,
    /// The engine whose group broke: it goes on with this one.
    pub engine: Option<EngineHandle>,
    /// Breaks the group when its cluster gives it up.
    pub given_up: oneshot::Receiver<String>,
}

/// What the ranks load.
pub(super) fn load_model(checked: &CheckedSpec, term: Term, epoch: Epoch, rank_nodes: Vec<NodeId>) -> LoadModel {
    let spec = &checked.spec;
    LoadModel {
        term,
        epoch,
        model_path: spec.model_path.display().to_string(),
        load_format: spec.load_format.clone(),
        dtype: spec.dtype.clone(),
        kv_cache_dtype: spec.kv_cache_dtype.clone(),
        world_size: u32::try_from(rank_nodes.len()).unwrap_or(u32::MAX),
        block_size: spec.block_size,
        max_model_len: spec.max_model_len(&checked.geometry),
        max_num_seqs: spec.max_num_seqs,
        max_num_batched_tokens: spec.max_num_batched_tokens,
        memory_utilization: spec.memory_utilization,
        num_blocks_override: spec.num_blocks_override,
        seed: spec.seed,
        group_key: security::group_key(),
        rank_nodes,
        steps_in_flight_max: defaults::STEPS_IN_FLIGHT_MAX,
        enforce_eager: spec.enforce_eager,
        disable_custom_all_reduce: spec.disable_custom_all_reduce,
        collective_interface: spec.collective_interface.clone(),
        collective_ports: spec.collective_ports,
    }
}

/// The engine's limits; the number of KV blocks comes from the ranks.
pub(super) fn engine_limits(checked: &CheckedSpec) -> EngineLimits {
    let spec = &checked.spec;
    EngineLimits {
        num_blocks: 0,
        block_size: spec.block_size,
        max_model_len: spec.max_model_len(&checked.geometry),
        max_num_seqs: spec.max_num_seqs,
        max_num_batched_tokens: spec.max_num_batched_tokens,
        max_queue: spec.max_queue,
        steps_in_flight_max: defaults::STEPS_IN_FLIGHT_MAX,
        vocab_size: u32::try_from(checked.geometry.vocab_size).unwrap_or(u32::MAX),
        enable_prefix_caching: spec.enable_prefix_caching,
        step_time_budget: defaults::STEP_TIME_BUDGET,
        step_deadline_min: defaults::STEP_DEADLINE_MIN,
        policy: spec.scheduling_policy,
        recovery: RecoveryLimits::default(),
        features: phalanx_proto::SamplerFeatures::default(),
    }
}

/// Drives a group's start; ends in `GroupStarted`.
pub(super) fn start_group(start: GroupStart, events: mpsc::Sender<ClusterEvent>) -> Starter {
    #[cfg(test)]
    let Some(start) = simulated::start(start) else { return Starter(tokio::spawn(async {}).abort_handle()) };
    let GroupStart { key, links, load, kept, limits, engine, given_up } = start;
    let task = tokio::spawn(async move {
        let (progress, reports) = mpsc::channel(defaults::PEER_QUEUE);
        let relay = relay(reports, key.clone(), events.clone());
        let started = async {
            match kept {
                None => TpGroup::start(links, load, StartDeadlines::default(), progress).await,
                Some(kept) => TpGroup::resume(links, &load, kept, progress).await,
            }
        };
        let (result, ()) = tokio::join!(started, relay);
        let result = match result {
            Ok(group) => Ok(hand_over(group.with_incarnation(key.incarnation).with_fuse(given_up), engine, limits)),
            Err(error) => Err(error.to_string()),
        };
        let _ = events.send(ClusterEvent::GroupStarted { group: key, result }).await;
    });
    Starter(task.abort_handle())
}

/// Gives a group that is ready to the engine that waits for one, or to a new engine where there is none or it has ended.
fn hand_over(group: TpGroup, waiting: Option<EngineHandle>, limits: EngineLimits) -> StartedGroup {
    let (num_blocks, epoch) = (group.num_blocks(), group.epoch());
    let limits = EngineLimits { num_blocks, ..limits };
    let (engine, is_new) = match waiting {
        None => (engine::spawn(group, limits), true),
        Some(engine) => match engine.adopt(group) {
            Ok(()) => (engine, false),
            Err(group) => (engine::spawn(*group, limits), true),
        },
    };
    StartedGroup { engine, num_blocks, epoch, is_new }
}

/// Passes the ranks' phases on until the start is over.
async fn relay(mut reports: mpsc::Receiver<StartProgress>, group: GroupKey, events: mpsc::Sender<ClusterEvent>) {
    while let Some(StartProgress { rank, phase, fraction, detail, capacity }) = reports.recv().await {
        let step = RankStep { rank, phase, fraction, detail, capacity };
        let event = ClusterEvent::RankProgress { group: group.clone(), step };
        if events.send(event).await.is_err() {
            return;
        }
    }
}

/// Watches an engine; ends in `GroupFailed` when the group of this epoch breaks, and in nothing where the engine is stopped.
pub(super) fn watch_engine(key: GroupKey, engine: EngineHandle, epoch: Epoch, events: mpsc::Sender<ClusterEvent>) {
    #[cfg(test)]
    if simulated::is_on() {
        return;
    }
    tokio::spawn(async move {
        if let Some(reason) = engine.broke(epoch).await {
            let _ = events.send(ClusterEvent::GroupFailed { group: key, reason }).await;
        }
    });
}

/// Drains an engine; ends in `GroupStopped`.
pub(super) fn stop_engine(key: GroupKey, engine: EngineHandle, drain: Duration, events: mpsc::Sender<ClusterEvent>) {
    #[cfg(test)]
    let Some((key, engine)) = simulated::stop(key, engine) else { return };
    tokio::spawn(async move {
        engine.stop(drain).await;
        let _ = events.send(ClusterEvent::GroupStopped { group: key }).await;
    });
}

/// Ends an engine that nobody wants any more.
pub(super) fn discard_engine(engine: EngineHandle) {
    #[cfg(test)]
    let Some(engine) = simulated::discard(engine) else { return };
    tokio::spawn(async move { engine.stop(Duration::ZERO).await });
}

/// Where a simulation takes over what would be tasks and engines: it runs them itself, one thing after the other.
#[cfg(test)]
pub(super) mod simulated {
    use std::cell::RefCell;

    use super::{EngineHandle, GroupKey, GroupStart};

    /// What the cluster's task has asked for.
    pub enum Asked {
        Start(Box<GroupStart>),
        Stop(GroupKey, EngineHandle),
        Discard(EngineHandle),
    }

    thread_local! {
        static ASKED: RefCell<Option<Vec<Asked>>> = const { RefCell::new(None) };
    }

    /// Begins a simulation on this thread, or ends it.
    pub fn turn(on: bool) {
        ASKED.with_borrow_mut(|asked| *asked = on.then(Vec::new));
    }

    /// What was asked for since the last time.
    pub fn take() -> Vec<Asked> {
        ASKED.with_borrow_mut(|asked| asked.as_mut().map(std::mem::take).unwrap_or_default())
    }

    pub fn is_on() -> bool {
        ASKED.with_borrow(Option::is_some)
    }

    pub fn start(start: GroupStart) -> Option<GroupStart> {
        ask(start, |start| Asked::Start(Box::new(start)))
    }

    pub fn stop(key: GroupKey, engine: EngineHandle) -> Option<(GroupKey, EngineHandle)> {
        ask((key, engine), |(key, engine)| Asked::Stop(key, engine))
    }

    pub fn discard(engine: EngineHandle) -> Option<EngineHandle> {
        ask(engine, Asked::Discard)
    }

    /// Gives back what no simulation takes.
    fn ask<T>(what: T, asked: impl FnOnce(T) -> Asked) -> Option<T> {
        ASKED.with_borrow_mut(|list| match list {
            None => Some(what),
            Some(list) => {
                list.push(asked(what));
                None
            }
        })
    }
}
