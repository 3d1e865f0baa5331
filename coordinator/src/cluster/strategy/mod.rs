//! Placement strategies: which node takes which bundle.
//!
//! Each file is one strategy, a function from free slots and bundle sizes to a node for each bundle. Strategies see
//! numbers only: no names, no states, no clock. Bundles of one slot each (one rank, one device) are solved exactly;
//! mixed sizes are packed largest first.
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

    /// Gives each bundle a node (an index into `free`), or `None` where they do not all fit.
    pub fn assign(self, free: &[u32], bundles: &[u32]) -> Option<Vec<usize>> {
        match self {
            Self::Pack => pack::assign(free, bundles),
            Self::Spread => spread::assign(free, bundles),
            Self::StrictPack => strict_pack::assign(free, bundles),
            Self::StrictSpread => strict_spread::assign(free, bundles),
        }
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
fn largest_first(bundles: &[u32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..bundles.len()).collect();
    order.sort_by_key(|&bundle| (std::cmp::Reverse(bundles[bundle]), bundle));
    order
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::cluster::strategy::Strategy;

    #[track_caller]
    fn check(strategy: Strategy, free: &[u32], bundles: &[u32], expected: Option<&[usize]>) {
        assert_eq!(strategy.assign(free, bundles).as_deref(), expected, "{strategy} {free:?} {bundles:?}");
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
                let Some(nodes) = strategy.assign(&free, &bundles) else { continue };
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
                prop_assert_eq!(strategy.assign(&free, &bundles), Some(nodes));
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
            prop_assert_eq!(Strategy::Pack.assign(&free, &bundles).is_some(), total >= num_bundles);
            prop_assert_eq!(Strategy::Spread.assign(&free, &bundles).is_some(), total >= num_bundles);
            prop_assert_eq!(Strategy::StrictPack.assign(&free, &bundles).is_some(), largest >= num_bundles);
            prop_assert_eq!(Strategy::StrictSpread.assign(&free, &bundles).is_some(), non_empty >= num_bundles);
        }

        #[test]
        fn pack_uses_the_fewest_and_spread_the_most_nodes(
            free in prop::collection::vec(0u32..6, 1..6),
            num_bundles in 1usize..10,
        ) {
            let bundles = vec![1; num_bundles];
            let num_nodes = |nodes: Vec<usize>| nodes.into_iter().collect::<std::collections::BTreeSet<_>>().len();
            let Some(packed) = Strategy::Pack.assign(&free, &bundles) else { return Ok(()) };
            let mut sizes = free.clone();
            sizes.sort_unstable_by(|a, b| b.cmp(a));
            let mut sum = 0;
            let fewest = sizes.iter().take_while(|&&size| { let more = sum < num_bundles; sum += size as usize; more }).count();
            prop_assert_eq!(num_nodes(packed), fewest);
            let spread = Strategy::Spread.assign(&free, &bundles).expect("fits as packed");
            let non_empty = free.iter().filter(|&&free| free > 0).count();
            prop_assert_eq!(num_nodes(spread), non_empty.min(num_bundles));
        }
    }
}
