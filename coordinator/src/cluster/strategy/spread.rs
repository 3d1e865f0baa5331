//! As many nodes as possible.
//!
//! **Invariant:** a node takes a second bundle only when no node without one has room.

use std::cmp::Reverse;

use super::Search;

/// The node with the fewest bundles so far first, among those the one with most room.
pub(super) fn candidates(search: &Search<'_>, waiting: &[usize]) -> Vec<usize> {
    let mut nodes: Vec<usize> = search.fitting(waiting).collect();
    nodes.sort_by_key(|&node| (search.taken[node], Reverse(search.left[node]), node));
    nodes
}
