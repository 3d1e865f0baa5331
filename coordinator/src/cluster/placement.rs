//! Placement: whether and where bundles fit, and in which words it is said when they do not.
//!
//! A pure function over what each node offers and what is taken. Knows no clock, no channel and no process; whoever
//! calls it takes the slots.
//!
//! **Invariant:** every answer that is not `Placed` carries the arithmetic, in the same words for the command line, the
//! API, `status` and the dashboard. Solving twice changes nothing.

mod words;

use std::collections::BTreeMap;

use phalanx_proto::{DeviceKind, NodeId};

pub use words::unit;

use super::bundle::BundleSpec;
use super::strategy::{Demand, Fit, Room, Strategy};

/// Labels that every node has without being given them: its id, its machine's name, its kind of device.
pub const IMPLIED_LABELS: [&str; 3] = ["node", "host", "device"];

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
    /// Thousandths of processors offered to placement groups.
    pub millicpus: u32,
    /// Of these, taken.
    pub millicpus_used: u32,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

impl NodeCapacity {
    /// A node of which only the slots matter.
    pub fn of_slots(id: NodeId, device_kind: DeviceKind, num_slots: u32, num_used: u32) -> Self {
        Self { id, device_kind, num_slots, num_used, millicpus: 0, millicpus_used: 0, labels: BTreeMap::new() }
    }

    fn total(&self) -> Room {
        Room { slots: self.num_slots, millicpus: self.millicpus }
    }

    fn free(&self) -> Room {
        Room {
            slots: self.num_slots.saturating_sub(self.num_used),
            millicpus: self.millicpus.saturating_sub(self.millicpus_used),
        }
    }
}

/// Who may hold slots.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Holder {
    /// A deployment.
    Deployment(String),
    /// A placement group that was made by hand, whatever runs in it.
    Group(String),
}

/// Who holds slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// Who.
    pub holder: Holder,
    /// The node.
    pub node: NodeId,
    /// How many of its slots.
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

/// Bundles that were asked for by hand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupWanted {
    /// All of them.
    pub bundles: Vec<BundleSpec>,
    /// The node of each that has one.
    pub placed: Vec<Option<NodeId>>,
    /// How they lie.
    pub strategy: Strategy,
    /// Whether machines that are not there are waited for.
    pub waits: bool,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// The node of each rank, per replica; for bundles, one list of those that had none.
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
    let free: Vec<Room> = nodes.iter().map(NodeCapacity::free).collect();
    if let Some(replicas) = assign(&free, wanted) {
        let names = |replica: Vec<usize>| replica.into_iter().map(|node| nodes[node].id.clone()).collect();
        return Placement::Placed(replicas.into_iter().map(names).collect());
    }
    let total: Vec<Room> = nodes.iter().map(NodeCapacity::total).collect();
    if assign(&total, wanted).is_some() {
        return Placement::Pending(words::busy(nodes, holds, wanted));
    }
    let shortage = Shortage {
        busy: false,
        reason: words::arithmetic(nodes, wanted),
        hint: if wanted.waits { String::new() } else { words::advice(&total, wanted) },
    };
    if wanted.waits { Placement::Pending(shortage) } else { Placement::Infeasible(shortage) }
}

/// Places those of the wanted bundles that lie nowhere: all of them, or none.
pub fn place_group(nodes: &[NodeCapacity], holds: &[Hold], wanted: &GroupWanted) -> Placement {
    let free = nodes.iter().map(NodeCapacity::free).collect();
    match assign_group(nodes, free, wanted) {
        Fit::Found(places) => {
            return Placement::Placed(vec![places.into_iter().map(|node| nodes[node].id.clone()).collect()]);
        }
        Fit::Unknown => return Placement::Pending(words::unsolved(nodes, wanted)),
        Fit::None => {}
    }
    let mut total: Vec<Room> = nodes.iter().map(NodeCapacity::total).collect();
    for (bundle, node) in wanted.bundles.iter().zip(&wanted.placed) {
        let place = nodes.iter().position(|known| Some(&known.id) == node.as_ref());
        if let Some(place) = place {
            total[place] = total[place].less(bundle.room()).unwrap_or_default();
        }
    }
    match assign_group(nodes, total, wanted) {
        Fit::None => {
            let shortage = words::infeasible_group(nodes, wanted);
            if wanted.waits { Placement::Pending(shortage) } else { Placement::Infeasible(shortage) }
        }
        Fit::Found(_) | Fit::Unknown => Placement::Pending(words::busy_group(nodes, holds, wanted)),
    }
}

/// A node for each rank of each replica, one replica after the other.
fn assign(free: &[Room], wanted: &Wanted) -> Option<Vec<Vec<usize>>> {
    let mut left = free.to_vec();
    let rank = Demand { room: Room::of_slots(1), barred: Vec::new() };
    let bundles = vec![rank; wanted.tensor_parallel_size as usize];
    let none_taken = vec![0; free.len()];
    let mut replicas = Vec::new();
    for _ in 0..wanted.replicas {
        let nodes = wanted.strategy.assign(&left, &none_taken, &bundles).found()?;
        for &node in &nodes {
            left[node] = left[node].less(Room::of_slots(1))?;
        }
        replicas.push(nodes);
    }
    Some(replicas)
}

/// A node for each bundle that has none.
fn assign_group(nodes: &[NodeCapacity], left: Vec<Room>, wanted: &GroupWanted) -> Fit {
    let taken: Vec<u32> = nodes
        .iter()
        .map(|node| wanted.placed.iter().filter(|placed| placed.as_ref() == Some(&node.id)).count() as u32)
        .collect();
    wanted.strategy.assign(&left, &taken, &demands(nodes, wanted))
}

fn demands(nodes: &[NodeCapacity], wanted: &GroupWanted) -> Vec<Demand> {
    let barred = |bundle: &BundleSpec| {
        let may_not = |node: &(usize, &NodeCapacity)| !bundle.allows(&node.1.labels);
        nodes.iter().enumerate().filter(may_not).map(|(place, _)| place).collect()
    };
    let unplaced = wanted.bundles.iter().zip(&wanted.placed).filter(|(_, node)| node.is_none());
    unplaced.map(|(bundle, _)| Demand { room: bundle.room(), barred: barred(bundle) }).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cluster::strategy::Strategy;

    fn node(id: &str, num_slots: u32, num_used: u32) -> NodeCapacity {
        NodeCapacity::of_slots(NodeId(id.into()), DeviceKind::Cuda, num_slots, num_used)
    }

    fn wanted(tensor_parallel_size: u32, strategy: Strategy) -> Wanted {
        Wanted { tensor_parallel_size, replicas: 1, strategy, waits: false }
    }

    #[track_caller]
    fn check(nodes: &[NodeCapacity], wanted: Wanted, expected: &str) {
        assert_eq!(words(place(nodes, &[hold()], &wanted)), expected);
    }

    fn hold() -> Hold {
        let holder = Holder::Deployment("x".into());
        Hold { holder, node: NodeId("a".into()), num_slots: 2, since: "10:02:11 UTC".into() }
    }

    fn words(answer: Placement) -> String {
        match answer {
            Placement::Placed(replicas) => format!("placed {replicas:?}"),
            Placement::Pending(shortage) => format!("pending: {}", shortage.text()),
            Placement::Infeasible(shortage) => format!("infeasible: {}", shortage.text()),
        }
    }

    #[track_caller]
    fn check_group(nodes: &[NodeCapacity], bundles: &[&str], strategy: Strategy, expected: &str) {
        let bundles: Vec<BundleSpec> = bundles.iter().map(|text| text.parse().expect("a bundle")).collect();
        let placed = vec![None; bundles.len()];
        let wanted = GroupWanted { bundles, placed, strategy, waits: false };
        assert_eq!(words(place_group(nodes, &[hold()], &wanted)), expected);
    }

    fn machine(id: &str, num_slots: u32, num_used: u32, zone: &str) -> NodeCapacity {
        let labels = BTreeMap::from([("zone".to_owned(), zone.to_owned())]);
        NodeCapacity { millicpus: 8000, labels, ..node(id, num_slots, num_used) }
    }

    #[test]
    fn bundles_are_placed_whole_or_the_arithmetic_is_said() {
        let two = [machine("a", 2, 0, "x"), machine("b", 2, 0, "y")];
        check_group(&two, &["cpu=1,gpu=1"; 2], Strategy::Pack, r#"placed [[NodeId("a"), NodeId("a")]]"#);
        check_group(&two, &["cpu=1,gpu=1,label.zone=y"], Strategy::Pack, r#"placed [[NodeId("b")]]"#);
        check_group(
            &two,
            &["cpu=1,gpu=1"; 4],
            Strategy::StrictPack,
            "infeasible: needs 4 bundles of cpu=1,gpu=1 on one node; the cluster has a: cpu=8,gpu=2; b: cpu=8,gpu=2. \
             Use --strategy pack, or at most 2 of these bundles, join more machines, or --wait 10m",
        );
        check_group(
            &two,
            &["gpu=1"; 3],
            Strategy::StrictSpread,
            "infeasible: needs 3 bundles of gpu=1, each on a node of its own; the cluster has a: cpu=8,gpu=2; b: \
             cpu=8,gpu=2. Use --strategy spread, or at most 2 of these bundles, join more machines, or --wait 10m",
        );
        check_group(
            &two,
            &["gpu=1,label.zone=z"],
            Strategy::Pack,
            "infeasible: needs 1 bundle of gpu=1,label.zone=z; no node has label.zone=z (a has zone=x; b has zone=y). \
             Join a machine with: worker join --label zone=z; or --wait 10m",
        );
        check_group(
            &two,
            &["gpu=1", "gpu=3"],
            Strategy::Pack,
            "infeasible: needs 1 bundle of gpu=1 and 1 bundle of gpu=3; bundle 1 (gpu=3) fits on no node: the cluster \
             has a: cpu=8,gpu=2; b: cpu=8,gpu=2. Use at most 1 of these bundles, join more machines, or --wait 10m",
        );
        check_group(
            &[],
            &["gpu=1"],
            Strategy::Pack,
            "infeasible: needs 1 bundle of gpu=1; no machine is in the cluster. \
             Join more machines, or --wait 10m",
        );
    }

    #[test]
    fn bundles_on_a_busy_cluster_hear_who_holds_what() {
        check_group(
            &[machine("a", 2, 2, "x")],
            &["gpu=1"],
            Strategy::Pack,
            "pending: needs 1 bundle of gpu=1; 0 of 2 GPUs are free; 2 on a are held by deployment x since 10:02:11 \
             UTC. Wait, or end one with: coordinator undeploy x",
        );
    }

    #[test]
    fn lost_bundles_come_back_by_the_strategy_and_the_others_stay() {
        let nodes = [machine("a", 2, 1, "x"), machine("b", 2, 0, "x")];
        let again = |strategy| {
            let bundles = vec!["gpu=1".parse().expect("a bundle"); 2];
            let wanted = GroupWanted { bundles, placed: vec![Some(NodeId("a".into())), None], strategy, waits: true };
            words(place_group(&nodes, &[], &wanted))
        };
        assert_eq!(again(Strategy::Pack), r#"placed [[NodeId("a")]]"#);
        assert_eq!(again(Strategy::StrictSpread), r#"placed [[NodeId("b")]]"#);
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
            "pending: needs 4 GPUs on one node; 2 of 4 are free; 2 on a are held by deployment x since 10:02:11 UTC. \
             Use --wait 10m, or end one with: coordinator undeploy x",
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
