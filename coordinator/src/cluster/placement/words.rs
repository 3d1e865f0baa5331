//! The words for what does not fit: the arithmetic, who holds what, and what would help.

use phalanx_proto::DeviceKind;

use super::{GroupWanted, Hold, Holder, NodeCapacity, Shortage, Wanted, assign, assign_group};
use crate::cluster::bundle::BundleSpec;
use crate::cluster::strategy::{Fit, Room, Strategy};

/// Nodes or holders that one sentence names.
const NAMED_MAX: usize = 8;

/// The word for `count` slots of these nodes.
pub fn unit(nodes: &[NodeCapacity], count: u32) -> &'static str {
    let gpus = nodes.iter().any(|node| node.device_kind != DeviceKind::Cpu);
    match (nodes.is_empty(), gpus, count == 1) {
        (true, _, true) => "device slot",
        (true, _, false) => "device slots",
        (_, true, true) => "GPU",
        (_, true, false) => "GPUs",
        (_, false, true) => "CPU slot",
        (_, false, false) => "CPU slots",
    }
}

pub(super) fn arithmetic(nodes: &[NodeCapacity], wanted: &Wanted) -> String {
    let size = wanted.tensor_parallel_size;
    let each = if wanted.replicas > 1 { format!("{} times ", wanted.replicas) } else { String::new() };
    let needs = format!("needs {each}{size} {}", unit(nodes, size));
    let machines = nodes.len();
    if nodes.is_empty() {
        return format!("{needs}; no machine is in the cluster");
    }
    match wanted.strategy {
        Strategy::StrictPack if wanted.replicas == 1 => {
            let one = if size == 1 { needs } else { format!("{needs} on one node") };
            let largest =
                nodes.iter().rev().max_by_key(|node| node.num_slots).map(|n| format!("{} ({})", n.num_slots, n.id));
            format!("{one}; the largest node has {}", largest.unwrap_or_default())
        }
        Strategy::StrictPack => format!("{needs}, each on one node; {}", census(nodes)),
        Strategy::StrictSpread => {
            let nodes_word = if machines == 1 { "node" } else { "nodes" };
            format!("{needs}, each on a node of its own; the cluster has {machines} {nodes_word} ({})", shares(nodes))
        }
        Strategy::Pack | Strategy::Spread => format!("{needs}; {}", census(nodes)),
    }
}

fn census(nodes: &[NodeCapacity]) -> String {
    let total: u32 = nodes.iter().map(|node| node.num_slots).sum();
    format!("the cluster has {total} ({})", shares(nodes))
}

fn shares(nodes: &[NodeCapacity]) -> String {
    listed(nodes.iter().map(|node| format!("{}: {}", node.id, node.num_slots)), ", ")
}

/// The first of them, and how many more there are.
fn listed(items: impl ExactSizeIterator<Item = String>, separator: &str) -> String {
    let num_more = items.len().saturating_sub(NAMED_MAX);
    let mut words: Vec<String> = items.take(NAMED_MAX).collect();
    if num_more > 0 {
        words.push(format!("{num_more} more"));
    }
    words.join(separator)
}

pub(super) fn advice(total: &[Room], wanted: &Wanted) -> String {
    let fits = |size: u32, strategy| {
        assign(total, &Wanted { tensor_parallel_size: size, strategy, ..*wanted }).is_some().then_some(size)
    };
    let smaller = (1..wanted.tensor_parallel_size).rev().find_map(|size| fits(size, wanted.strategy));
    let mut ways = Vec::new();
    if let Some(size) = smaller {
        ways.push(format!("--tensor-parallel-size {size}"));
    }
    if fits(wanted.tensor_parallel_size, Strategy::Pack).is_some() {
        ways.push("--placement-strategy pack".to_owned());
    }
    let use_these = if ways.is_empty() { String::new() } else { format!("Use {}, ", ways.join(" or ")) };
    let join = if use_these.is_empty() { "Join more machines" } else { "join more machines" };
    format!("{use_these}{join}, or --wait 10m")
}

pub(super) fn busy(nodes: &[NodeCapacity], holds: &[Hold], wanted: &Wanted) -> Shortage {
    let total: u32 = nodes.iter().map(|node| node.num_slots).sum();
    let used: u32 = nodes.iter().map(|node| node.num_used).sum();
    let needed = wanted.tensor_parallel_size * wanted.replicas;
    let free = total.saturating_sub(used);
    let verb = if free == 1 { "is" } else { "are" };
    let mut reason = format!(
        "needs {needed} {}{}; {free} of {total} {verb} free",
        unit(nodes, needed),
        if wanted.strategy == Strategy::StrictPack && needed > 1 { " on one node" } else { "" },
    );
    reason.push_str(&held(holds));
    let hint = match (wanted.waits, holds.first()) {
        (true, _) => String::new(),
        (false, Some(hold)) => format!("Use --wait 10m, or end one with: {}", ending(&hold.holder)),
        (false, None) => "Use --wait 10m".to_owned(),
    };
    Shortage { busy: true, reason, hint }
}

/// Who holds what since when, behind a semicolon each.
fn held(holds: &[Hold]) -> String {
    let line = |hold: &Hold| {
        let Hold { holder, node, num_slots, since } = hold;
        let verb = if *num_slots == 1 { "is" } else { "are" };
        let who = match holder {
            Holder::Deployment(name) => format!("deployment {name}"),
            Holder::Group(name) => format!("placement group {name}"),
        };
        format!("{num_slots} on {node} {verb} held by {who} since {since}")
    };
    if holds.is_empty() { String::new() } else { format!("; {}", listed(holds.iter().map(line), "; ")) }
}

/// The command that makes a holder let go.
fn ending(holder: &Holder) -> String {
    match holder {
        Holder::Deployment(name) => format!("coordinator undeploy {name}"),
        Holder::Group(name) => format!("coordinator placement-group remove {name}"),
    }
}

// ---- bundles that were asked for by hand ----

fn needs(wanted: &GroupWanted) -> String {
    let mut kinds: Vec<(&BundleSpec, usize)> = Vec::new();
    for bundle in &wanted.bundles {
        match kinds.iter_mut().find(|(kind, _)| *kind == bundle) {
            Some((_, count)) => *count += 1,
            None => kinds.push((bundle, 1)),
        }
    }
    let kind = |(bundle, count): &(&BundleSpec, usize)| {
        format!("{count} {} of {bundle}", if *count == 1 { "bundle" } else { "bundles" })
    };
    let kinds = listed(kinds.iter().map(kind), " and ");
    let how = match wanted.strategy {
        _ if wanted.bundles.len() < 2 => "",
        Strategy::StrictPack => " on one node",
        Strategy::StrictSpread => ", each on a node of its own",
        Strategy::Pack | Strategy::Spread => "",
    };
    format!("needs {kinds}{how}")
}

fn machines(nodes: &[NodeCapacity]) -> String {
    let node = |node: &NodeCapacity| {
        let Room { slots, millicpus } = node.total();
        format!("{}: {}", node.id, BundleSpec { slots, millicpus, ..BundleSpec::default() })
    };
    format!("the cluster has {}", listed(nodes.iter().map(node), "; "))
}

/// It can never fit on these nodes.
pub(super) fn infeasible_group(nodes: &[NodeCapacity], wanted: &GroupWanted) -> Shortage {
    let needs = needs(wanted);
    let shortage = |reason, hint: String| {
        let hint = if wanted.waits { String::new() } else { hint };
        Shortage { busy: false, reason, hint }
    };
    if nodes.is_empty() {
        let hint = "Join more machines, or --wait 10m".to_owned();
        return shortage(format!("{needs}; no machine is in the cluster"), hint);
    }
    let nowhere = |bundle: &BundleSpec| !nodes.iter().any(|node| bundle.allows(&node.labels));
    if let Some(bundle) = wanted.bundles.iter().find(|bundle| nowhere(bundle)) {
        let words: Vec<String> = bundle.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let asked: Vec<String> = words.iter().map(|word| format!("label.{word}")).collect();
        let reason = format!("{needs}; no node has {} ({})", asked.join(" and "), labels(nodes));
        let hint = format!("Join a machine with: worker join --label {}; or --wait 10m", words.join(" --label "));
        return shortage(reason, hint);
    }
    let too_large = |(_, bundle): &(usize, &BundleSpec)| {
        let fits = |node: &NodeCapacity| bundle.allows(&node.labels) && node.total().less(bundle.room()).is_some();
        !nodes.iter().any(fits)
    };
    let machines = machines(nodes);
    let reason = match wanted.bundles.iter().enumerate().find(too_large) {
        Some((index, bundle)) => format!("{needs}; bundle {index} ({bundle}) fits on no node: {machines}"),
        None => format!("{needs}; {machines}"),
    };
    shortage(reason, group_advice(nodes, wanted))
}

fn labels(nodes: &[NodeCapacity]) -> String {
    let node = |node: &NodeCapacity| {
        let own = node.labels.iter().filter(|(key, _)| !super::IMPLIED_LABELS.contains(&key.as_str()));
        let own: Vec<String> = own.map(|(key, value)| format!("{key}={value}")).collect();
        format!("{} has {}", node.id, if own.is_empty() { "none".to_owned() } else { own.join(",") })
    };
    listed(nodes.iter().map(node), "; ")
}

/// What would fit on the same nodes while nothing runs there.
fn group_advice(nodes: &[NodeCapacity], wanted: &GroupWanted) -> String {
    let fits = |num_bundles: usize, strategy| {
        let bundles = wanted.bundles[..num_bundles].to_vec();
        let wanted = GroupWanted { bundles, placed: vec![None; num_bundles], strategy, waits: false };
        matches!(assign_group(nodes, nodes.iter().map(NodeCapacity::total).collect(), &wanted), Fit::Found(_))
    };
    let mut ways = Vec::new();
    let softer = match wanted.strategy {
        Strategy::StrictPack => Some(Strategy::Pack),
        Strategy::StrictSpread => Some(Strategy::Spread),
        Strategy::Pack | Strategy::Spread => None,
    };
    if let Some(softer) = softer.filter(|softer| fits(wanted.bundles.len(), *softer)) {
        ways.push(format!("--strategy {softer}"));
    }
    if let Some(fewer) = (1..wanted.bundles.len()).rev().find(|&fewer| fits(fewer, wanted.strategy)) {
        ways.push(format!("at most {fewer} of these bundles"));
    }
    let join = if ways.is_empty() { "Join" } else { "join" };
    let ways = if ways.is_empty() { String::new() } else { format!("Use {}, ", ways.join(", or ")) };
    format!("{ways}{join} more machines, or --wait 10m")
}

/// It fits once others let go.
pub(super) fn busy_group(nodes: &[NodeCapacity], holds: &[Hold], wanted: &GroupWanted) -> Shortage {
    let total: u32 = nodes.iter().map(|node| node.num_slots).sum();
    let free: u32 = nodes.iter().map(|node| node.free().slots).sum();
    let verb = if free == 1 { "is" } else { "are" };
    let mut reason = format!("{}; {free} of {total} {} {verb} free", needs(wanted), unit(nodes, total));
    if wanted.bundles.iter().any(|bundle| bundle.millicpus > 0) {
        let cpus = |room: fn(&NodeCapacity) -> u32| f64::from(nodes.iter().map(room).sum::<u32>()) / 1000.0;
        let (free, total) = (cpus(|node| node.free().millicpus), cpus(|node| node.millicpus));
        reason.push_str(&format!(", {free} of {total} processors"));
    }
    reason.push_str(&held(holds));
    let hint = match holds.first() {
        Some(hold) => format!("Wait, or end one with: {}", ending(&hold.holder)),
        None => String::new(),
    };
    Shortage { busy: true, reason, hint }
}

/// No way was found, and there may be one.
pub(super) fn unsolved(nodes: &[NodeCapacity], wanted: &GroupWanted) -> Shortage {
    let reason = format!("{}; no way was found to place bundles of so many sizes; {}", needs(wanted), machines(nodes));
    Shortage { busy: true, reason, hint: "Bundles of one size are always solved".to_owned() }
}
