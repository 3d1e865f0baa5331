//! All bundles on one node.
//!
//! **Invariant:** the node with the least room to spare is taken, so that large gaps stay for large groups.

use super::Search;

/// The nodes that hold all bundles, tightest first; once one holds some, that one.
pub(super) fn candidates(search: &Search<'_>, waiting: &[usize]) -> Vec<usize> {
    let holds_some = |node: &usize| search.taken[*node] > 0;
    let mut nodes: Vec<usize> = match (0..search.left.len()).find(holds_some) {
        Some(node) => vec![node],
        None => (0..search.left.len()).collect(),
    };
    nodes.retain(|&node| search.holds_all(node, waiting));
    nodes.sort_by_key(|&node| (search.left[node], node));
    nodes
}
