//! Placement: whether and where a deployment's bundles fit, and in which words it is said when they do not.
//!
//! A pure function over what each node offers and what is taken. Knows no clock, no channel and no process; whoever
//! calls it takes the slots.
//!
//! **Invariant:** every answer that is not `Placed` carries the arithmetic, in the same words for the command line, the
//! API, `status` and the dashboard. Solving twice changes nothing.

use phalanx_proto::{DeviceKind, NodeId};

use super::strategy::Strategy;

/// What a node offers, as placement sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeCapacity {
    /// Its id.
    pub id: NodeId,
    /// What its slots are.
    pub device_kind: DeviceKind,
    /// Slots offered.
    pub num_slots: u32,
    /// Slots taken.
    pub num_used: u32,
}

/// Who holds slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// The deployment.
    pub deployment: String,
    /// How many slots.
    pub num_slots: u32,
    /// Since when, as words (`10:02:11 UTC`).
    pub since: String,
}

/// What is to be placed: `replicas` groups of one slot per rank, each group by the strategy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Ranks of one group.
    pub tensor_parallel_size: u32,
    /// Groups.
    pub replicas: u32,
    /// How the ranks of one group lie.
    pub strategy: Strategy,
    /// Whether machines that are not there are waited for.
    pub waits: bool,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// The node of each rank, per replica.
    Placed(Vec<Vec<NodeId>>),
    /// It does not fit now, and may later: busy, or waiting for machines.
    Pending(Shortage),
    /// It can never fit on the machines that are there.
    Infeasible(Shortage),
}

/// Why something does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// True where the slots exist but are taken.
    pub busy: bool,
    /// The arithmetic.
    pub reason: String,
    /// What to do.
    pub hint: String,
}

impl Shortage {
    /// Reason and hint as one text.
    pub fn text(&self) -> String {
        if self.hint.is_empty() { self.reason.clone() } else { format!("{}. {}", self.reason, self.hint) }
    }
}

/// Places `wanted` on `nodes` (those that may take work); `holds` says who has what.
pub fn place(nodes: &[NodeCapacity], holds: &[Hold], wanted: &Wanted) -> Placement {
    let free: Vec<u32> = nodes.iter().map(|node| node.num_slots.saturating_sub(node.num_used)).collect();
    if let Some(replicas) = assign(&free, wanted) {
        let names = |replica: Vec<usize>| replica.into_iter().map(|node| nodes[node].id.clone()).collect();
        return Placement::Placed(replicas.into_iter().map(names).collect());
    }
    let total: Vec<u32> = nodes.iter().map(|node| node.num_slots).collect();
    if assign(&total, wanted).is_some() {
        return Placement::Pending(busy(nodes, holds, wanted));
    }
    let shortage = Shortage {
        busy: false,
        reason: arithmetic(nodes, wanted),
        hint: if wanted.waits { String::new() } else { advice(&total, wanted) },
    };
    if wanted.waits { Placement::Pending(shortage) } else { Placement::Infeasible(shortage) }
}

/// A node for each rank of each replica, one replica after the other.
fn assign(free: &[u32], wanted: &Wanted) -> Option<Vec<Vec<usize>>> {
    let mut left = free.to_vec();
    let bundles = vec![1; wanted.tensor_parallel_size as usize];
    let mut replicas = Vec::new();
    for _ in 0..wanted.replicas {
        let nodes = wanted.strategy.assign(&left, &bundles)?;
        for &node in &nodes {
            left[node] -= 1;
        }
        replicas.push(nodes);
    }
    Some(replicas)
}

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

fn arithmetic(nodes: &[NodeCapacity], wanted: &Wanted) -> String {
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
    let shares: Vec<String> = nodes.iter().map(|node| format!("{}: {}", node.id, node.num_slots)).collect();
    shares.join(", ")
}

fn advice(total: &[u32], wanted: &Wanted) -> String {
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

fn busy(nodes: &[NodeCapacity], holds: &[Hold], wanted: &Wanted) -> Shortage {
    let total: u32 = nodes.iter().map(|node| node.num_slots).sum();
    let used: u32 = nodes.iter().map(|node| node.num_used).sum();
    let needed = wanted.tensor_parallel_size * wanted.replicas;
    let held: Vec<String> = holds
        .iter()
        .map(|hold| {
            let verb = if hold.num_slots == 1 { "is" } else { "are" };
            format!("{} {verb} held by deployment {} since {}", hold.num_slots, hold.deployment, hold.since)
        })
        .collect();
    let free = total.saturating_sub(used);
    let verb = if free == 1 { "is" } else { "are" };
    let mut reason = format!(
        "needs {needed} {}{}; {free} of {total} {verb} free",
        unit(nodes, needed),
        if wanted.strategy == Strategy::StrictPack && needed > 1 { " on one node" } else { "" },
    );
    for line in held {
        reason.push_str("; ");
        reason.push_str(&line);
    }
    let hint = match (wanted.waits, holds.first()) {
        (true, _) => String::new(),
        (false, Some(hold)) => {
            format!("Use --wait 10m, or end one with: coordinator undeploy {}", hold.deployment)
        }
        (false, None) => "Use --wait 10m".to_owned(),
    };
    Shortage { busy: true, reason, hint }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cluster::strategy::Strategy;

    fn node(id: &str, num_slots: u32, num_used: u32) -> NodeCapacity {
        NodeCapacity { id: NodeId(id.into()), device_kind: DeviceKind::Cuda, num_slots, num_used }
    }

    fn wanted(tensor_parallel_size: u32, strategy: Strategy) -> Wanted {
        Wanted { tensor_parallel_size, replicas: 1, strategy, waits: false }
    }

    #[track_caller]
    fn check(nodes: &[NodeCapacity], wanted: Wanted, expected: &str) {
        let holds = [Hold { deployment: "x".into(), num_slots: 2, since: "10:02:11 UTC".into() }];
        let answer = match place(nodes, &holds, &wanted) {
            Placement::Placed(replicas) => format!("placed {replicas:?}"),
            Placement::Pending(shortage) => format!("pending: {}", shortage.text()),
            Placement::Infeasible(shortage) => format!("infeasible: {}", shortage.text()),
        };
        assert_eq!(answer, expected);
    }

    #[test]
    fn what_can_never_fit_says_the_arithmetic() {
        check(
            &[node("node-a", 2, 0)],
            wanted(4, Strategy::StrictPack),
            "infeasible: needs 4 GPUs on one node; the largest node has 2 (node-a). Use --tensor-parallel-size 2, join \
             more machines, or --wait 10m",
        );
        check(
            &[node("a", 2, 0), node("b", 2, 2)],
            wanted(4, Strategy::StrictPack),
            "infeasible: needs 4 GPUs on one node; the largest node has 2 (a). Use --tensor-parallel-size 2 or \
             --placement-strategy pack, join more machines, or --wait 10m",
        );
        check(
            &[node("a", 2, 0), node("b", 1, 0)],
            wanted(4, Strategy::Pack),
            "infeasible: needs 4 GPUs; the cluster has 3 (a: 2, b: 1). Use --tensor-parallel-size 3, join more \
             machines, or --wait 10m",
        );
        check(
            &[node("a", 2, 0)],
            wanted(2, Strategy::StrictSpread),
            "infeasible: needs 2 GPUs, each on a node of its own; the cluster has 1 node (a: 2). Use \
             --tensor-parallel-size 1 or --placement-strategy pack, join more machines, or --wait 10m",
        );
        check(
            &[],
            wanted(1, Strategy::StrictPack),
            "infeasible: needs 1 device slot; no machine is in the cluster. Join more machines, or --wait 10m",
        );
    }

    #[test]
    fn slots_of_processors_are_called_so() {
        let nodes = [NodeCapacity { device_kind: DeviceKind::Cpu, ..node("a", 2, 0) }];
        let Placement::Infeasible(shortage) = place(&nodes, &[], &wanted(4, Strategy::StrictPack)) else {
            panic!("must be infeasible");
        };
        assert_eq!(shortage.reason, "needs 4 CPU slots on one node; the largest node has 2 (a)");
    }

    #[test]
    fn a_busy_cluster_says_who_holds_what() {
        check(
            &[node("a", 4, 2)],
            wanted(4, Strategy::StrictPack),
            "pending: needs 4 GPUs on one node; 2 of 4 are free; 2 are held by deployment x since 10:02:11 UTC. Use \
             --wait 10m, or end one with: coordinator undeploy x",
        );
    }

    #[test]
    fn who_waits_is_pending_with_the_arithmetic() {
        check(
            &[node("a", 2, 0)],
            Wanted { waits: true, ..wanted(4, Strategy::Pack) },
            "pending: needs 4 GPUs; the cluster has 2 (a: 2)",
        );
    }

    #[test]
    fn replicas_are_groups_of_their_own() {
        check(
            &[node("a", 2, 0), node("b", 2, 0)],
            Wanted { replicas: 2, ..wanted(2, Strategy::StrictPack) },
            "placed [[NodeId(\"a\"), NodeId(\"a\")], [NodeId(\"b\"), NodeId(\"b\")]]",
        );
        check(
            &[node("a", 3, 0)],
            Wanted { replicas: 2, ..wanted(2, Strategy::StrictPack) },
            "infeasible: needs 2 times 2 GPUs, each on one node; the cluster has 3 (a: 3). Use --tensor-parallel-size \
             1, join more machines, or --wait 10m",
        );
    }

    proptest! {
        #[test]
        fn solving_twice_changes_nothing_and_nothing_is_overfilled(
            slots in prop::collection::vec((1u32..5, 0u32..5), 0..5),
            tensor_parallel_size in 1u32..6,
            replicas in 1u32..3,
            strategy in prop::sample::select(Strategy::ALL.to_vec()),
            waits: bool,
        ) {
            let nodes: Vec<NodeCapacity> =
                slots.iter().enumerate().map(|(i, &(slots, used))| node(&format!("n{i}"), slots, used.min(slots))).collect();
            let wanted = Wanted { tensor_parallel_size, replicas, strategy, waits };
            let answer = place(&nodes, &[], &wanted);
            prop_assert_eq!(&answer, &place(&nodes, &[], &wanted));
            match answer {
                Placement::Placed(groups) => {
                    prop_assert_eq!(groups.len(), replicas as usize);
                    for node in &nodes {
                        let given = groups.iter().flatten().filter(|id| **id == node.id).count() as u32;
                        prop_assert!(given + node.num_used <= node.num_slots);
                    }
                }
                Placement::Pending(shortage) => prop_assert!(shortage.busy || waits),
                Placement::Infeasible(shortage) => {
                    prop_assert!(!waits && !shortage.busy && shortage.reason.contains("needs"));
                }
            }
        }
    }
}
