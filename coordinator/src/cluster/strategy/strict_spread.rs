//! Each bundle on a node of its own.
//!
//! **Invariant:** no node is named twice.

use super::largest_first;

/// Gives the largest bundle the roomiest node, and so on: where that fails, every matching fails.
pub(super) fn assign(free: &[u32], bundles: &[u32]) -> Option<Vec<usize>> {
    let mut nodes: Vec<usize> = (0..free.len()).collect();
    nodes.sort_by_key(|&node| (std::cmp::Reverse(free[node]), node));
    let mut assigned = vec![0; bundles.len()];
    let mut nodes = nodes.into_iter();
    for bundle in largest_first(bundles) {
        assigned[bundle] = nodes.next().filter(|&node| free[node] >= bundles[bundle])?;
    }
    Some(assigned)
}
