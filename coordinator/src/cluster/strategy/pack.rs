//! As few nodes as possible.
//!
//! **Invariant:** bundles that share a node are neighbours in rank order wherever their sizes are equal.

use std::cmp::Reverse;

use super::Search;

/// A node that has bundles already is filled first. The next one is the tightest that holds all that is left, else the roomiest.
pub(super) fn candidates(search: &Search<'_>, waiting: &[usize]) -> Vec<usize> {
    let mut nodes: Vec<usize> = search.fitting(waiting).collect();
    nodes.sort_by_key(|&node| {
        let (is_new, room) = (search.taken[node] == 0, search.left[node]);
        if search.holds_all(node, waiting) {
            (is_new, false, room, Reverse(room), node)
        } else {
            (is_new, true, Default::default(), Reverse(room), node)
        }
    });
    nodes
}
