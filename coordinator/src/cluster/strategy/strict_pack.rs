//! All bundles on one node.
//!
//! **Invariant:** the node with the least room to spare is taken, so that large gaps stay for large groups.

/// Puts all bundles on the smallest node that holds them.
pub(super) fn assign(free: &[u32], bundles: &[u32]) -> Option<Vec<usize>> {
    let needed = bundles.iter().sum::<u32>();
    if bundles.is_empty() {
        return Some(Vec::new());
    }
    let fitting = (0..free.len()).filter(|&node| free[node] >= needed);
    let node = fitting.min_by_key(|&node| (free[node], node))?;
    Some(vec![node; bundles.len()])
}
