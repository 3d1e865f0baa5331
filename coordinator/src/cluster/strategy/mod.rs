//! Placement strategies: which node takes which bundle.
//!
//! Each file is one strategy: which nodes it would try for the next bundle, best first. One search drives them all, largest bundle
//! first. They see numbers only: no names, no states, no clock.
//!
//! **Invariant:** a strategy never gives a node more than it has free, and gives the same answer to the same question.

mod pack;
mod spread;
mod strict_pack;
mod strict_spread;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How the bundles of a placement group lie on nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// On as few nodes as possible.
    Pack,
    /// On as many nodes as possible.
    Spread,
    /// On one node.
    #[default]
    StrictPack,
    /// On one node each.
    StrictSpread,
}

impl Strategy {
    /// All of them, in the order of the flag's help.
    pub const ALL: [Self; 4] = [Self::Pack, Self::Spread, Self::StrictPack, Self::StrictSpread];

    /// The word in flags and in `status`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pack => "pack",
            Self::Spread => "spread",
            Self::StrictPack => "strict-pack",
            Self::StrictSpread => "strict-spread",
        }
    }

    /// Gives each bundle a node. `taken` counts the bundles of the same group that lie on each node already.
    ///
    /// Bundles that are all alike are solved exactly; for others, ways are tried up to a limit.
    pub fn assign(self, left: &[Room], taken: &[u32], bundles: &[Demand]) -> Fit {
        let mut search = Search {
            strategy: self,
            left: left.to_vec(),
            taken: taken.to_vec(),
            bundles,
            assigned: vec![0; bundles.len()],
            tries_left: TRIES_MAX,
            // Where all are alike, no order of nodes finds what the first choice does not.
            greedy: bundles.windows(2).all(|pair| pair[0] == pair[1]),
        };
        if search.place(&largest_first(bundles)) {
            if search.greedy && self == Self::Spread {
                // Neighbours in rank order share a node.
                search.assigned.sort_unstable();
            }
            return Fit::Found(search.assigned);
        }
        if search.tries_left == 0 { Fit::Unknown } else { Fit::None }
    }

    fn candidates(self, search: &Search<'_>, waiting: &[usize]) -> Vec<usize> {
        match self {
            Self::Pack => pack::candidates(search, waiting),
            Self::Spread => spread::candidates(search, waiting),
            Self::StrictPack => strict_pack::candidates(search, waiting),
            Self::StrictSpread => strict_spread::candidates(search, waiting),
        }
    }
}

/// What a node has, or a bundle takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Room {
    /// Device slots.
    pub slots: u32,
    /// Thousandths of a processor.
    pub millicpus: u32,
}

impl Room {
    /// Room for so many devices, and no processor.
    pub fn of_slots(slots: u32) -> Self {
        Self { slots, millicpus: 0 }
    }

    /// What is left of it after `taken`; `None` where it is not enough.
    pub fn less(self, taken: Self) -> Option<Self> {
        let slots = self.slots.checked_sub(taken.slots)?;
        Some(Self { slots, millicpus: self.millicpus.checked_sub(taken.millicpus)? })
    }

    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        let slots = self.slots.saturating_add(other.slots);
        Self { slots, millicpus: self.millicpus.saturating_add(other.millicpus) }
    }
}

/// One bundle, as a strategy sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Demand {
    /// What it takes.
    pub room: Room,
    /// Nodes (by their place) that it may not use.
    pub barred: Vec<usize>,
}

/// Whether bundles fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fit {
    /// The node of each, a place in the list of nodes.
    Found(Vec<usize>),
    /// There is no way.
    None,
    /// No way was found among as many as are tried.
    Unknown,
}

impl Fit {
    /// The nodes, where they were found.
    pub fn found(self) -> Option<Vec<usize>> {
        if let Self::Found(nodes) = self { Some(nodes) } else { None }
    }
}

/// Choices of a node for a bundle that one search may make.
const TRIES_MAX: u32 = 20_000;

/// A search under way: what is left of each node, and who has got what.
struct Search<'a> {
    strategy: Strategy,
    left: Vec<Room>,
    /// Bundles of this group on each node.
    taken: Vec<u32>,
    bundles: &'a [Demand],
    assigned: Vec<usize>,
    tries_left: u32,
    greedy: bool,
}

impl Search<'_> {
    /// Places these bundles in this order; false where they do not fit, with everything as it was.
    fn place(&mut self, waiting: &[usize]) -> bool {
        let Some((&bundle, rest)) = waiting.split_first() else { return true };
        let room = self.bundles[bundle].room;
        for node in self.strategy.candidates(self, waiting) {
            let Some(left) = self.tries_left.checked_sub(1) else { return false };
            self.tries_left = left;
            let Some(smaller) = self.left[node].less(room) else { continue };
            let before = std::mem::replace(&mut self.left[node], smaller);
            self.taken[node] += 1;
            self.assigned[bundle] = node;
            if self.place(rest) {
                return true;
            }
            self.left[node] = before;
            self.taken[node] -= 1;
            if self.greedy {
                return false;
            }
        }
        false
    }

    fn allows(&self, node: usize, bundle: usize) -> bool {
        !self.bundles[bundle].barred.contains(&node)
    }

    /// Nodes that have room for the first of these bundles.
    fn fitting(&self, waiting: &[usize]) -> impl Iterator<Item = usize> {
        let first = waiting.first().copied();
        (0..self.left.len()).filter(move |&node| {
            first.is_some_and(|bundle| {
                self.allows(node, bundle) && self.left[node].less(self.bundles[bundle].room).is_some()
            })
        })
    }

    /// Whether a node has room for all of these bundles.
    fn holds_all(&self, node: usize, waiting: &[usize]) -> bool {
        let sum = waiting.iter().fold(Room::default(), |sum, &bundle| sum.plus(self.bundles[bundle].room));
        waiting.iter().all(|&bundle| self.allows(node, bundle)) && self.left[node].less(sum).is_some()
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Strategy {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let wanted = name.replace('_', "-").to_ascii_lowercase();
        Self::ALL
            .into_iter()
            .find(|strategy| strategy.as_str() == wanted)
            .ok_or_else(|| format!("{name} is not a strategy; known are pack, spread, strict-pack and strict-spread"))
    }
}

/// Bundle indices, largest first; equal ones stay in order.
fn largest_first(bundles: &[Demand]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..bundles.len()).collect();
    order.sort_by_key(|&bundle| (std::cmp::Reverse(bundles[bundle].room), bundle));
    order
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::cluster::strategy::{Demand, Fit, Room, Strategy};

    fn assign(strategy: Strategy, free: &[u32], bundles: &[u32]) -> Option<Vec<usize>> {
        let rooms: Vec<Room> = free.iter().map(|&slots| Room::of_slots(slots)).collect();
        let demand = |&slots: &u32| Demand { room: Room::of_slots(slots), barred: Vec::new() };
        let demands: Vec<Demand> = bundles.iter().map(demand).collect();
        strategy.assign(&rooms, &vec![0; free.len()], &demands).found()
    }

    #[track_caller]
    fn check(strategy: Strategy, free: &[u32], bundles: &[u32], expected: Option<&[usize]>) {
        assert_eq!(assign(strategy, free, bundles).as_deref(), expected, "{strategy} {free:?} {bundles:?}");
    }

    #[test]
    fn strategies_place_as_they_say() {
        check(Strategy::StrictPack, &[2, 4, 3], &[1, 1, 1], Some(&[2, 2, 2]));
        check(Strategy::StrictPack, &[2, 2], &[1, 1, 1], None);
        check(Strategy::Pack, &[2, 2], &[1, 1, 1, 1], Some(&[0, 0, 1, 1]));
        check(Strategy::Pack, &[1, 4, 2], &[1, 1], Some(&[2, 2]));
        check(Strategy::Pack, &[1, 4, 2], &[1, 1, 1, 1, 1], Some(&[1, 1, 1, 1, 0]));
        check(Strategy::Pack, &[1, 1], &[1, 1, 1], None);
        check(Strategy::Spread, &[4, 4], &[1, 1], Some(&[0, 1]));
        check(Strategy::Spread, &[4, 1], &[1, 1, 1], Some(&[0, 0, 1]));
        check(Strategy::Spread, &[3], &[1, 1, 1], Some(&[0, 0, 0]));
        check(Strategy::StrictSpread, &[4, 1], &[1, 1], Some(&[0, 1]));
        check(Strategy::StrictSpread, &[4], &[1, 1], None);
        check(Strategy::StrictSpread, &[1, 2], &[2, 1], Some(&[1, 0]));
        check(Strategy::Pack, &[], &[1], None);
        check(Strategy::Pack, &[], &[], Some(&[]));
    }

    #[test]
    fn processors_and_barred_nodes_are_seen_and_other_ways_are_tried() {
        let room = |slots, cpus: u32| Room { slots, millicpus: cpus * 1000 };
        let demand = |slots, cpus, barred: &[usize]| Demand { room: room(slots, cpus), barred: barred.to_vec() };
        let rooms = [room(4, 1), room(1, 4)];
        let none = [0, 0];
        let found = |strategy: Strategy, demands: &[Demand]| strategy.assign(&rooms, &none, demands).found();
        assert_eq!(found(Strategy::Pack, &[demand(1, 3, &[])]), Some(vec![1]));
        assert_eq!(found(Strategy::StrictPack, &[demand(1, 1, &[]), demand(0, 1, &[])]), Some(vec![1, 1]));
        assert_eq!(found(Strategy::Pack, &[demand(1, 0, &[0]), demand(1, 0, &[0])]), None);
        // The first bundle's first choice leaves nothing for the second.
        assert_eq!(found(Strategy::StrictSpread, &[demand(1, 1, &[]), demand(1, 1, &[1])]), Some(vec![1, 0]));
        // A lost bundle comes back beside those that stayed, or away from them.
        let again = |strategy: Strategy| strategy.assign(&[room(1, 1); 2], &[1, 0], &[demand(1, 0, &[])]).found();
        assert_eq!((again(Strategy::Pack), again(Strategy::StrictPack)), (Some(vec![0]), Some(vec![0])));
        assert_eq!((again(Strategy::Spread), again(Strategy::StrictSpread)), (Some(vec![1]), Some(vec![1])));
    }

    #[test]
    fn what_was_not_found_in_time_is_not_called_impossible() {
        // Every node but one is too small for the pair that is left, and none says so before it is tried.
        let rooms = vec![Room::of_slots(7); 12];
        let sizes = [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2];
        let demands: Vec<Demand> =
            sizes.iter().map(|&slots| Demand { room: Room::of_slots(slots), barred: Vec::new() }).collect();
        assert_ne!(Strategy::Pack.assign(&rooms, &[0; 12], &demands), Fit::None);
    }

    #[test]
    fn names_go_both_ways() {
        for strategy in Strategy::ALL {
            assert_eq!(strategy.as_str().parse(), Ok(strategy));
        }
        assert_eq!("STRICT_PACK".parse(), Ok(Strategy::StrictPack));
        assert!("loose".parse::<Strategy>().is_err());
    }

    proptest! {
        #[test]
        fn no_node_is_given_more_than_it_has(
            free in prop::collection::vec(0u32..6, 0..6),
            bundles in prop::collection::vec(1u32..4, 0..8),
        ) {
            for strategy in Strategy::ALL {
                let Some(nodes) = assign(strategy, &free, &bundles) else { continue };
                prop_assert_eq!(nodes.len(), bundles.len());
                let mut used = vec![0; free.len()];
                for (bundle, &node) in nodes.iter().enumerate() {
                    used[node] += bundles[bundle];
                }
                prop_assert!(used.iter().zip(&free).all(|(used, free)| used <= free));
                let mut distinct = nodes.clone();
                distinct.sort_unstable();
                distinct.dedup();
                match strategy {
                    Strategy::StrictPack => prop_assert!(distinct.len() <= 1),
                    Strategy::StrictSpread => prop_assert_eq!(distinct.len(), bundles.len()),
                    Strategy::Pack | Strategy::Spread => {}
                }
                prop_assert_eq!(assign(strategy, &free, &bundles), Some(nodes));
            }
        }

        #[test]
        fn single_slots_are_placed_exactly_when_they_fit(
            free in prop::collection::vec(0u32..6, 0..6),
            num_bundles in 1usize..10,
        ) {
            let bundles = vec![1; num_bundles];
            let total = free.iter().sum::<u32>() as usize;
            let largest = free.iter().copied().max().unwrap_or(0) as usize;
            let non_empty = free.iter().filter(|&&free| free > 0).count();
            prop_assert_eq!(assign(Strategy::Pack, &free, &bundles).is_some(), total >= num_bundles);
            prop_assert_eq!(assign(Strategy::Spread, &free, &bundles).is_some(), total >= num_bundles);
            prop_assert_eq!(assign(Strategy::StrictPack, &free, &bundles).is_some(), largest >= num_bundles);
            prop_assert_eq!(assign(Strategy::StrictSpread, &free, &bundles).is_some(), non_empty >= num_bundles);
        }

        #[test]
        fn pack_uses_the_fewest_and_spread_the_most_nodes(
            free in prop::collection::vec(0u32..6, 1..6),
            num_bundles in 1usize..10,
        ) {
            let bundles = vec![1; num_bundles];
            let num_nodes = |nodes: Vec<usize>| nodes.into_iter().collect::<std::collections::BTreeSet<_>>().len();
            let Some(packed) = assign(Strategy::Pack, &free, &bundles) else { return Ok(()) };
            let mut sizes = free.clone();
            sizes.sort_unstable_by(|a, b| b.cmp(a));
            let mut sum = 0;
            let fewest = sizes.iter().take_while(|&&size| { let more = sum < num_bundles; sum += size as usize; more }).count();
            prop_assert_eq!(num_nodes(packed), fewest);
            let spread = assign(Strategy::Spread, &free, &bundles).expect("fits as packed");
            let non_empty = free.iter().filter(|&&free| free > 0).count();
            prop_assert_eq!(num_nodes(spread), non_empty.min(num_bundles));
        }
    }
}
