//! The cluster's state in the words of `status`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use phalanx_proto::{
    BundleStatus, DeploymentName, DeploymentStatus, DeviceKind, HeadStatus, NodeId, NodeStatus, Phase,
    PlacementGroupStatus, QueueStatus, RankStatus, StatusSnapshot,
};
use time::OffsetDateTime;

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
    let millis = at.duration_since(UNIX_EPOCH).unwrap_or_default().subsec_millis();
    let at = utc(at);
    format!("{}T{}.{millis:03}Z", day_of(at), time_of(at))
}

/// A time of day, `10:02:11 UTC`, with its date where that is not today.
pub(super) fn clock(at: SystemTime) -> String {
    words(utc(at), utc(SystemTime::now()))
}

fn words(at: OffsetDateTime, now: OffsetDateTime) -> String {
    let time = format!("{} UTC", time_of(at));
    if at.date() == now.date() { time } else { format!("{} {time}", day_of(at)) }
}

/// In UTC; a clock beyond the calendar is at its beginning.
fn utc(at: SystemTime) -> OffsetDateTime {
    let seconds = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    OffsetDateTime::from_unix_timestamp(seconds.cast_signed()).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

fn day_of(at: OffsetDateTime) -> String {
    format!("{:04}-{:02}-{:02}", at.year(), u8::from(at.month()), at.day())
}

fn time_of(at: OffsetDateTime) -> String {
    format!("{:02}:{:02}:{:02}", at.hour(), at.minute(), at.second())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_say_their_date_where_it_is_another() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let check = |seconds, expected: &str| assert_eq!(words(utc(at(seconds)), utc(at(1_795_390_000))), expected);
        check(1_795_384_931, "22:02:11 UTC");
        check(951_826_154, "2000-02-29 12:09:14 UTC");
        assert_eq!(timestamp(UNIX_EPOCH + Duration::from_millis(1_795_384_931_007)), "2026-11-22T22:02:11.007Z");
        assert_eq!(timestamp(at(1 << 50)), "1970-01-01T00:00:00.000Z", "a clock beyond the calendar");
    }
}
