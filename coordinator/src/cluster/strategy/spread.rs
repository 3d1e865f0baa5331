//! As many nodes as possible.
//!
//! **Invariant:** a node takes a second bundle only when no node without one has room.

use super::largest_first;

/// Each bundle goes to the node with the fewest bundles so far, among those the one with most room.
pub(super) fn assign(free: &[u32], bundles: &[u32]) -> Option<Vec<usize>> {
    let mut assigned = vec![0; bundles.len()];
    let mut left = free.to_vec();
    let mut taken = vec![0u32; free.len()];
    for bundle in largest_first(bundles) {
        let fitting = (0..left.len()).filter(|&node| left[node] >= bundles[bundle]);
        let node = fitting.min_by_key(|&node| (taken[node], std::cmp::Reverse(left[node]), node))?;
        left[node] -= bundles[bundle];
        taken[node] += 1;
        assigned[bundle] = node;
    }
    if bundles.iter().all(|&size| Some(&size) == bundles.first()) {
        assigned.sort_unstable();
    }
    Some(assigned)
}
