//! The snapshot as text for people.

use std::collections::BTreeMap;
use std::fmt::Write;

use phalanx_proto::{BundleStatus, DeploymentStatus, NodeStatus, PlacementGroupStatus, RankStatus, StatusSnapshot};

const NODE_HEADS: [&str; 9] = ["NODE", "STATE", "SLOTS", "DEVICE", "LABELS", "ADDRESS", "PID", "ROUND TRIP", "WHY"];

/// The whole cluster.
pub(super) fn text(snapshot: &StatusSnapshot) -> String {
    let head = &snapshot.head;
    let mut out = String::new();
    let _ = writeln!(
        out,
        "head {} (pid {}, version {}, up {})  API {}  dashboard {}",
        head.address,
        head.pid,
        head.version,
        duration(head.uptime_s),
        head.http,
        head.dashboard
    );
    if head.state == "standby" {
        let leader =
            if head.leader.is_empty() { "no head leads now".to_owned() } else { format!("{} leads", head.leader) };
        let _ = writeln!(out, "standby: {leader}");
    } else if !head.heads.is_empty() {
        let _ = writeln!(out, "this head leads; heads: {}", head.heads.join(", "));
    }
    if !head.reason.is_empty() {
        let _ = writeln!(out, "store: {}", head.reason);
    }
    if head.insecure {
        let _ = writeln!(
            out,
            "INSECURE: started with --insecure; whoever reaches {} joins and commands, and reads what goes by",
            head.address
        );
    }
    let used: u32 = snapshot.nodes.iter().filter(|node| node.state == "alive").map(|node| node.slots_used).sum();
    let slots: u32 = snapshot.nodes.iter().filter(|node| node.state == "alive").map(|node| node.slots).sum();
    let queue = &snapshot.queue;
    let _ =
        writeln!(out, "{used} of {slots} slots used, {} requests running, {} waiting", queue.running, queue.waiting);
    section(&mut out, "NODES", &NODE_HEADS, nodes(&snapshot.nodes));
    let heads = ["DEPLOYMENT", "STATE", "MODEL", "RANKS", "KV BLOCKS FREE", "RUNNING", "WAITING", "WHY"];
    section(&mut out, "DEPLOYMENTS", &heads, deployments(&snapshot.deployments));
    let heads = ["RANK", "STATE", "PHASE", "FOR", "NODE", "PID", "DEVICE", "WEIGHTS", "KV CACHE", "DETAIL"];
    section(&mut out, "RANKS", &heads, ranks(&snapshot.ranks));
    section(&mut out, "PLACEMENT GROUPS", &GROUP_HEADS, groups(&snapshot.placement_groups));
    out
}

fn nodes(nodes: &[NodeStatus]) -> Vec<Vec<String>> {
    let row = |n: &NodeStatus| {
        let slots = format!("{}/{}", n.slots_used, n.slots);
        vec![
            n.id.clone(),
            n.state.clone(),
            slots,
            n.device.clone(),
            labels(&n.labels),
            n.address.clone(),
            n.pid.to_string(),
            n.round_trip_ms.map(|time| format!("{time:.1} ms")).unwrap_or_default(),
            n.reason.clone(),
        ]
    };
    nodes.iter().map(row).collect()
}

fn labels(labels: &BTreeMap<String, String>) -> String {
    labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
}

fn deployments(deployments: &[DeploymentStatus]) -> Vec<Vec<String>> {
    let row = |d: &DeploymentStatus| {
        let size = d.tensor_parallel_size;
        let ranks = if d.replicas > 1 { format!("{} x {size}", d.replicas) } else { size.to_string() };
        let blocks = format!("{}/{}", d.num_blocks_free, d.num_blocks * d.replicas);
        let (running, waiting) = (d.running.to_string(), d.waiting.to_string());
        vec![d.name.clone(), d.state.clone(), d.model.clone(), ranks, blocks, running, waiting, why(d)]
    };
    deployments.iter().map(row).collect()
}

/// The reason of a deployment, or which rank of it is furthest behind.
fn why(deployment: &DeploymentStatus) -> String {
    let said = [deployment.reason.as_str(), deployment.progress.as_str()];
    said.into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("; ")
}

fn ranks(ranks: &[RankStatus]) -> Vec<Vec<String>> {
    let row = |r: &RankStatus| {
        vec![
            format!("{}/{}/{}", r.deployment, r.replica, r.rank),
            r.state.clone(),
            r.phase.clone(),
            duration(r.elapsed_s),
            r.node.clone(),
            if r.pid == 0 { String::new() } else { r.pid.to_string() },
            r.device.clone(),
            bytes(r.weight_bytes),
            bytes(r.kv_cache_bytes),
            r.detail.clone(),
        ]
    };
    ranks.iter().map(row).collect()
}

/// Placement groups as a table.
pub(super) fn groups(groups: &[PlacementGroupStatus]) -> Vec<Vec<String>> {
    let row = |g: &PlacementGroupStatus| {
        let place = |bundle: &BundleStatus| format!("{}:{}", bundle.index, seat(bundle));
        let bundles: Vec<String> = g.bundles.iter().map(place).collect();
        let (state, strategy) = (g.state.clone(), g.strategy.clone());
        vec![
            g.id.clone(),
            state,
            strategy,
            bundles.join(" "),
            g.deployments.join(" "),
            g.since.clone(),
            g.reason.clone(),
        ]
    };
    groups.iter().map(row).collect()
}

/// The heads of [`groups`].
pub(super) const GROUP_HEADS: [&str; 7] =
    ["PLACEMENT GROUP", "STATE", "STRATEGY", "BUNDLES", "USED BY", "SINCE", "WHY"];

/// One group with everything that is known of it.
pub(super) fn group(group: &PlacementGroupStatus) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "placement group {}: {}, {}, since {}", group.id, group.state, group.strategy, group.since);
    for (name, text) in
        [("why", group.reason.clone()), ("labels", labels(&group.labels)), ("used by", group.deployments.join(" "))]
    {
        if !text.is_empty() {
            let _ = writeln!(out, "{name}: {text}");
        }
    }
    let row = |bundle: &BundleStatus| {
        let amounts: Vec<String> = bundle.resources.iter().map(|(name, amount)| format!("{name}={amount}")).collect();
        let slots: Vec<String> = bundle.slots.iter().map(u32::to_string).collect();
        let node = bundle.node.clone().unwrap_or_default();
        let (index, labels) = (bundle.index.to_string(), labels(&bundle.labels));
        vec![index, bundle.state.clone(), amounts.join(","), labels, node, slots.join(",")]
    };
    let rows = group.bundles.iter().map(row).collect();
    section(&mut out, "BUNDLES", &["BUNDLE", "STATE", "RESOURCES", "NODE MUST HAVE", "NODE", "SLOTS"], rows);
    out
}

fn seat(bundle: &BundleStatus) -> &str {
    bundle.node.as_deref().unwrap_or("waiting")
}

/// A table; columns without content are left out.
pub(super) fn section(out: &mut String, title: &str, heads: &[&str], rows: Vec<Vec<String>>) {
    if rows.is_empty() {
        let _ = writeln!(out, "\n{title}: none");
        return;
    }
    let filled = |column: &usize| rows.iter().any(|row| row.get(*column).is_some_and(|cell| !cell.is_empty()));
    let columns: Vec<usize> = (0..heads.len()).filter(filled).collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([heads[column].chars().count()]).max().unwrap_or_default()
    };
    let widths: Vec<usize> = columns.iter().map(|&column| width(column)).collect();
    let mut line = |cells: Vec<&str>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let _ = writeln!(out, "{}", padded.join("  ").trim_end());
    };
    line(Vec::new());
    line(columns.iter().map(|&column| heads[column]).collect());
    for row in &rows {
        line(columns.iter().map(|&column| row.get(column).map(String::as_str).unwrap_or_default()).collect());
    }
}

/// Seconds as people say them.
pub(super) fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 60.0 => format!("{s:.0} s"),
        s if s < 3600.0 => format!("{:.0} min", s / 60.0),
        s if s < 86_400.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} d", s / 86_400.0),
    }
}

/// Bytes as people say them; nothing for none.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    if count == 0 {
        return String::new();
    }
    let (mut value, mut unit) = (count as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.*} {}", usize::from(unit > 0 && value < 10.0), UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_run_says_why() {
        let mut snapshot = StatusSnapshot::default();
        snapshot.nodes.push(NodeStatus {
            id: "a".into(),
            state: "dead".into(),
            reason: "gone".into(),
            ..Default::default()
        });
        snapshot.deployments.push(DeploymentStatus {
            name: "m".into(),
            state: "pending".into(),
            reason: "needs 4 GPUs".into(),
            ..Default::default()
        });
        let text = text(&snapshot);
        assert!(text.contains("gone") && text.contains("needs 4 GPUs") && text.contains("RANKS: none"), "{text}");
    }

    #[test]
    fn quantities_are_short() {
        assert_eq!([bytes(0), bytes(12), bytes(1536), bytes(40 << 20)], ["", "12 B", "1.5 KiB", "40 MiB"]);
        assert_eq!([duration(3.2), duration(120.0), duration(7200.0)], ["3 s", "2 min", "2.0 h"]);
    }
}
