//! The cluster's state in the words of `status`.

use std::collections::BTreeMap;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use phalanx_proto::{
    BundleStatus, DeploymentName, DeploymentStatus, DeviceKind, HeadStatus, NodeStatus, Phase, PlacementGroupStatus,
    QueueStatus, RankStatus, StatusSnapshot,
};

use super::board::PostedEngine;
use super::deployment::Deployment;
use super::nodes::{Node, NodeTable};
use super::placement_group::PlacementGroup;
use super::replica::{Process, RankRecord, Replica, Stage};
use crate::engine::EngineHandle;

/// Everything at one moment, and the engines whose numbers belong to its deployments.
pub(super) fn snapshot(
    head: HeadStatus,
    nodes: &NodeTable,
    deployments: &[(DeploymentName, Deployment)],
    now: Instant,
) -> (StatusSnapshot, Vec<PostedEngine>) {
    let mut engines = Vec::new();
    let mut ranks = Vec::new();
    for (index, (name, deployment)) in deployments.iter().enumerate() {
        for (number, replica) in deployment.replicas.iter().enumerate() {
            let posted = |engine: &EngineHandle| PostedEngine {
                deployment: index,
                replica: number as u32,
                engine: engine.clone(),
            };
            engines.extend(replica.engine.as_ref().map(posted));
            for (rank, record) in replica.ranks.iter().enumerate() {
                ranks.push(rank_status(name, (number as u32, replica), (rank as u32, record), now));
            }
        }
    }
    let used = |node: &Node| {
        let bundles = deployments.iter().flat_map(|(_, deployment)| deployment.group.bundles()).flatten();
        bundles.filter(|place| place.node == node.hello.node_id).count() as u32
    };
    let snapshot = StatusSnapshot {
        head,
        nodes: nodes.iter().map(|node| node_status(node, used(node))).collect(),
        placement_groups: deployments.iter().map(|(_, known)| group_status(&known.group, nodes)).collect(),
        deployments: deployments.iter().map(|(name, known)| deployment(name, known)).collect(),
        ranks,
        queue: QueueStatus::default(),
    };
    (snapshot, engines)
}

fn node_status(node: &Node, slots_used: u32) -> NodeStatus {
    NodeStatus {
        id: node.hello.node_id.to_string(),
        address: node.address.clone(),
        state: node.state.as_str().to_owned(),
        slots: node.hello.num_slots,
        slots_used,
        device: node.device(),
        pid: node.hello.pid,
        reason: node.trouble(),
        round_trip_ms: node.round_trip().map(|time| time.as_secs_f64() * 1000.0),
    }
}

fn group_status(group: &PlacementGroup, nodes: &NodeTable) -> PlacementGroupStatus {
    let bundle = |(index, place): (usize, &Option<super::placement_group::Place>)| {
        let node = place.as_ref().and_then(|place| nodes.node(&place.node));
        let kind = node.map_or(DeviceKind::Cpu, |node| node.hello.device_kind);
        let resource = if kind == DeviceKind::Cpu { "cpu" } else { "gpu" };
        BundleStatus {
            index: index as u32,
            node: place.as_ref().map(|place| place.node.to_string()),
            resources: BTreeMap::from([(resource.to_owned(), 1.0)]),
            state: if place.is_some() { "created" } else { "pending" }.to_owned(),
        }
    };
    PlacementGroupStatus {
        id: group.id().to_owned(),
        strategy: group.strategy().to_string(),
        state: group.state().as_str().to_owned(),
        reason: group.reason().to_owned(),
        bundles: group.bundles().iter().enumerate().map(bundle).collect(),
    }
}

/// One deployment, without the numbers of its engines.
pub(super) fn deployment(name: &DeploymentName, deployment: &Deployment) -> DeploymentStatus {
    let spec = &deployment.checked.spec;
    let epoch = deployment.replicas.iter().map(|replica| replica.epoch.0).max().unwrap_or_default();
    let incarnation = deployment.replicas.iter().map(|replica| replica.incarnation.0).max().unwrap_or_default();
    let serving = deployment.replicas.iter().filter(|replica| replica.engine.is_some());
    DeploymentStatus {
        name: name.to_string(),
        model: spec.model.clone(),
        state: deployment.state.as_str().to_owned(),
        reason: deployment.reason.clone(),
        tensor_parallel_size: deployment.size,
        replicas: spec.replicas,
        epoch,
        incarnation,
        num_blocks: serving.map(|replica| replica.num_blocks).min().unwrap_or_default(),
        num_blocks_free: 0,
        max_model_len: spec.max_model_len(&deployment.checked.geometry),
        running: 0,
        waiting: 0,
    }
}

fn rank_status(
    name: &DeploymentName,
    (number, replica): (u32, &Replica),
    (rank, record): (u32, &RankRecord),
    now: Instant,
) -> RankStatus {
    let block_bytes = record.capacity.map(|capacity| capacity.block_bytes).unwrap_or_default();
    let (state, detail) = rank_state(replica, record);
    RankStatus {
        deployment: name.to_string(),
        replica: number,
        rank,
        node: record.place.node.to_string(),
        pid: record.pid(),
        device: if record.device.is_empty() { format!("slot {}", record.place.slot) } else { record.device.clone() },
        state: state.to_owned(),
        phase: record.phase.as_str().to_owned(),
        elapsed_s: now.saturating_duration_since(record.phase_since).as_secs_f64(),
        weight_bytes: record.capacity.map(|capacity| capacity.weight_bytes).unwrap_or_default(),
        kv_cache_bytes: block_bytes * u64::from(replica.num_blocks),
        steps: 0,
        detail,
    }
}

fn rank_state(replica: &Replica, record: &RankRecord) -> (&'static str, String) {
    match (&record.process, &replica.stage) {
        (Process::Exited { code, signal, by_agent, .. }, _) => {
            let how = match (signal, code) {
                _ if *by_agent => "ended by its agent".to_owned(),
                (Some(signal), _) => format!("signal {signal}"),
                (None, Some(code)) => format!("exit code {code}"),
                (None, None) => "could not be started".to_owned(),
            };
            ("exited", how)
        }
        (Process::Lost(_), _) => ("exited", "its node is gone".to_owned()),
        (_, Stage::Broken { .. }) => ("failed", "its group broke; it is ending".to_owned()),
        (_, Stage::Ended { .. } | Stage::Unplaced) => ("exited", "it is ending".to_owned()),
        (_, Stage::Serving | Stage::Draining) => ("ready", String::new()),
        (_, Stage::Connecting { .. } | Stage::Starting { .. }) => {
            let percent = record.fraction.filter(|_| record.phase != Phase::Ready);
            let percent = percent.map(|fraction| format!("{:.0} % ", fraction * 100.0)).unwrap_or_default();
            ("starting", format!("{percent}{}", record.detail).trim().to_owned())
        }
    }
}

/// A time of day, `10:02:11 UTC`.
pub(super) fn clock(at: SystemTime) -> String {
    let seconds = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (hours, minutes, seconds) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{hours:02}:{minutes:02}:{seconds:02} UTC")
}
