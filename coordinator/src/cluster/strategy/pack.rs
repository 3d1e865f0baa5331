//! As few nodes as possible.
//!
//! **Invariant:** bundles that share a node are neighbours in rank order wherever their sizes are equal.

use super::{largest_first, strict_pack};

/// One node if one is enough, else the roomiest nodes first, and for what is left the smallest node that holds it.
pub(super) fn assign(free: &[u32], bundles: &[u32]) -> Option<Vec<usize>> {
    let mut assigned = vec![0; bundles.len()];
    let mut left = free.to_vec();
    let mut waiting = largest_first(bundles);
    while !waiting.is_empty() {
        let sizes: Vec<u32> = waiting.iter().map(|&bundle| bundles[bundle]).collect();
        if let Some(nodes) = strict_pack::assign(&left, &sizes) {
            for (&bundle, node) in waiting.iter().zip(nodes) {
                assigned[bundle] = node;
            }
            return Some(assigned);
        }
        let roomiest = (0..left.len()).max_by_key(|&node| (left[node], std::cmp::Reverse(node)))?;
        let before = waiting.len();
        waiting.retain(|&bundle| {
            let fits = left[roomiest] >= bundles[bundle];
            if fits {
                left[roomiest] -= bundles[bundle];
                assigned[bundle] = roomiest;
            }
            !fits
        });
        if waiting.len() == before {
            return None;
        }
        left[roomiest] = 0;
    }
    Some(assigned)
}
