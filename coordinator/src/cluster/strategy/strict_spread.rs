//! Each bundle on a node of its own.
//!
//! **Invariant:** no node is named twice.

use std::cmp::Reverse;

use super::Search;

/// Nodes without a bundle, roomiest first, so that the largest bundle gets the most room.
pub(super) fn candidates(search: &Search<'_>, waiting: &[usize]) -> Vec<usize> {
    let mut nodes: Vec<usize> = search.fitting(waiting).filter(|&node| search.taken[node] == 0).collect();
    nodes.sort_by_key(|&node| (Reverse(search.left[node]), node));
    nodes
}
