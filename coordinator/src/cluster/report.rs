//! The cluster's state in the words of `status`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use phalanx_proto::{
    BundleStatus, DeploymentName, DeploymentStatus, DeviceKind, HeadStatus, NodeId, NodeStatus, Phase,
    PlacementGroupStatus, QueueStatus, RankStatus, StatusSnapshot,
};

use super::board::PostedEngine;
use super::deployment::{Deployment, DeploymentState};
use super::named_group::NamedGroup;
use super::nodes::{Node, NodeTable};
use super::placement_group::{Bundle, PlacementGroup};
use super::replica::{Process, RankRecord, Replica, Stage};
use crate::engine::EngineHandle;

/// Everything at one moment, and the engines whose numbers belong to its deployments.
pub(super) fn snapshot(
    head: HeadStatus,
    nodes: &NodeTable,
    deployments: &[(DeploymentName, Deployment)],
    groups: &[NamedGroup],
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
    let ranks_slots = deployments.iter().flat_map(|(_, deployment)| deployment.group.slots());
    let taken: BTreeSet<(NodeId, u32)> = ranks_slots
        .chain(groups.iter().flat_map(|named| named.group.slots()))
        .map(|place| (place.node, place.slot))
        .collect();
    let used = |node: &Node| taken.iter().filter(|(id, _)| *id == node.hello.node_id).count() as u32;
    let named = groups.iter().map(|named| named_group_status(named, deployments, nodes));
    let own = deployments.iter().filter(|(_, known)| known.checked.spec.placement_group().is_none());
    let own = own.map(|(name, known)| PlacementGroupStatus {
        deployments: vec![name.to_string()],
        since: clock(known.placed_at),
        ..group_status(&known.group, nodes, false)
    });
    let snapshot = StatusSnapshot {
        head,
        nodes: nodes.iter().map(|node| node_status(node, used(node))).collect(),
        placement_groups: named.chain(own).collect(),
        deployments: deployments.iter().map(|(name, known)| deployment(name, known, now)).collect(),
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
        labels: node.hello.labels.clone(),
    }
}

/// A group that was made by hand.
pub(super) fn named_group_status(
    named: &NamedGroup,
    deployments: &[(DeploymentName, Deployment)],
    nodes: &NodeTable,
) -> PlacementGroupStatus {
    let name = &named.spec.name;
    let inside = deployments.iter().filter(|(_, known)| known.checked.spec.placement_group() == Some(name));
    PlacementGroupStatus {
        name: name.clone(),
        deployments: inside.map(|(deployment, _)| deployment.to_string()).collect(),
        labels: named.spec.labels.clone(),
        since: clock(named.created_at),
        ..group_status(&named.group, nodes, true)
    }
}

fn group_status(group: &PlacementGroup, nodes: &NodeTable, is_named: bool) -> PlacementGroupStatus {
    let bundle = |(index, bundle): (usize, &Bundle)| {
        let seat = bundle.seat.as_ref();
        let node = seat.and_then(|seat| nodes.node(&seat.node));
        let is_cpu = node.is_none_or(|node| node.hello.device_kind == DeviceKind::Cpu);
        // A rank on a machine without a GPU takes a slot of its processors; what was asked for by hand is shown as it was.
        let device = if is_cpu && !is_named { "cpu" } else { "gpu" };
        let mut resources = BTreeMap::new();
        if bundle.spec.millicpus > 0 {
            resources.insert("cpu".to_owned(), f64::from(bundle.spec.millicpus) / 1000.0);
        }
        if bundle.spec.slots > 0 {
            resources.insert(device.to_owned(), f64::from(bundle.spec.slots));
        }
        BundleStatus {
            index: index as u32,
            node: seat.map(|seat| seat.node.to_string()),
            slots: seat.map(|seat| seat.slots.clone()).unwrap_or_default(),
            resources,
            labels: bundle.spec.labels.clone(),
            state: if seat.is_some() { "created" } else { "pending" }.to_owned(),
        }
    };
    PlacementGroupStatus {
        id: group.id().to_owned(),
        strategy: group.strategy().to_string(),
        state: group.state().as_str().to_owned(),
        reason: group.reason().to_owned(),
        bundles: group.bundles().iter().enumerate().map(bundle).collect(),
        ..PlacementGroupStatus::default()
    }
}

/// One deployment, without the numbers of its engines.
pub(super) fn deployment(name: &DeploymentName, deployment: &Deployment, now: Instant) -> DeploymentStatus {
    let spec = &deployment.checked.spec;
    let epoch = deployment.replicas.iter().map(|replica| replica.epoch.0).max().unwrap_or_default();
    let incarnation = deployment.replicas.iter().map(|replica| replica.incarnation.0).max().unwrap_or_default();
    let serving = deployment.replicas.iter().filter(|replica| replica.engine.is_some());
    let nobody_waits = deployment.watchers.iter().all(tokio::sync::mpsc::Sender::is_closed);
    let is_left = deployment.state == DeploymentState::Pending && !deployment.has_served && nobody_waits;
    let mut reason = deployment.reason.clone();
    if is_left {
        reason.push_str(&format!("; nobody waits for it any more: coordinator undeploy {name} removes it"));
    }
    DeploymentStatus {
        name: name.to_string(),
        model: spec.model.clone(),
        state: deployment.state.as_str().to_owned(),
        reason,
        progress: deployment.replicas.iter().find_map(|replica| replica.slowest_words(now)).unwrap_or_default(),
        tensor_parallel_size: deployment.size,
        replicas: u32::try_from(deployment.replicas.len()).unwrap_or(u32::MAX),
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
        (_, Stage::Serving | Stage::Yielding { .. } | Stage::Draining) => ("ready", String::new()),
        (_, Stage::Connecting { .. } | Stage::Starting { .. }) => {
            let percent = record.fraction.filter(|_| record.phase != Phase::Ready);
            let percent = percent.map(|fraction| format!("{:.0} % ", fraction * 100.0)).unwrap_or_default();
            ("starting", format!("{percent}{}", record.detail).trim().to_owned())
        }
    }
}

/// A moment, `2026-11-22T10:02:11.123Z`.
pub(super) fn timestamp(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs();
    let (year, month, day) = date(seconds / 86_400);
    let (hours, minutes, rest) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hours:02}:{minutes:02}:{rest:02}.{:03}Z", since.subsec_millis())
}

/// A time of day, `10:02:11 UTC`, with its date where that is not today.
pub(super) fn clock(at: SystemTime) -> String {
    let seconds_of = |at: SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    words(seconds_of(at), seconds_of(SystemTime::now()))
}

fn words(seconds: u64, now: u64) -> String {
    let (hours, minutes, rest) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let time = format!("{hours:02}:{minutes:02}:{rest:02} UTC");
    let (year, month, day) = date(seconds / 86_400);
    if seconds / 86_400 == now / 86_400 { time } else { format!("{year:04}-{month:02}-{day:02} {time}") }
}

/// The civil date of a day since 1970. Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_say_their_date_where_it_is_another() {
        assert_eq!(words(1_795_384_931, 1_795_390_000), "22:02:11 UTC");
        assert_eq!(words(951_826_154, 1_795_390_000), "2000-02-29 12:09:14 UTC");
        assert_eq!(timestamp(UNIX_EPOCH + Duration::from_millis(1_795_384_931_007)), "2026-11-22T22:02:11.007Z");
        assert_eq!([date(0), date(19_782), date(20_453)], [(1970, 1, 1), (2024, 2, 29), (2025, 12, 31)]);
    }
}
