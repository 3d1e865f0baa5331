//! Sums in rank order, and how a vector is cut into one segment per rank.
//!
//! **Invariant:** every element is `((x_0 + x_1) + x_2) + ...`, whoever computes it.

use std::ops::Range;

/// Floats that are summed at a time: the accumulator stays in the first-level cache.
const TILE: usize = 1024;

/// Replaces `own` (the term of `rank`) by the sum over ranks. `term(peer)` is the term of another rank, as long as `own`.
pub(super) fn sum_in_rank_order<'a>(
    own: &mut [f32],
    rank: usize,
    world_size: usize,
    term: impl Fn(usize) -> &'a [f32],
) {
    let mut tile = [0.0f32; TILE];
    let mut start = 0;
    while start < own.len() {
        let end = own.len().min(start + TILE);
        let acc = &mut tile[..end - start];
        for peer in 0..world_size {
            let part = if peer == rank { &own[start..end] } else { &term(peer)[start..end] };
            if peer == 0 {
                acc.copy_from_slice(part);
            } else {
                add(acc, part);
            }
        }
        own[start..end].copy_from_slice(acc);
        start = end;
    }
}

fn add(acc: &mut [f32], part: &[f32]) {
    for (a, b) in acc.iter_mut().zip(part) {
        *a += *b;
    }
}

/// The segment of `len` elements that `rank` sums in a two-shot all-reduce: in whole cache lines, the last one shorter.
pub(super) fn segment(len: usize, world_size: usize, rank: usize) -> Range<usize> {
    let step = len.div_ceil(world_size).next_multiple_of(16);
    (step * rank).min(len)..(step * (rank + 1)).min(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_cover_everything_once() {
        for len in [0, 1, 15, 16, 17, 100, 4096, 4097] {
            for world_size in 1..6 {
                let mut next = 0;
                for rank in 0..world_size {
                    let part = segment(len, world_size, rank);
                    assert_eq!(part.start, next);
                    next = part.end;
                }
                assert_eq!(next, len);
            }
        }
    }

    #[test]
    fn the_order_is_the_ranks_order() {
        let terms: Vec<Vec<f32>> = vec![vec![1e8; 3000], vec![1.0; 3000], vec![-1e8; 3000]];
        for rank in 0..3 {
            let mut own = terms[rank].clone();
            sum_in_rank_order(&mut own, rank, 3, |peer| &terms[peer]);
            assert!(own.iter().all(|x| x.to_bits() == ((1e8f32 + 1.0) - 1e8).to_bits()));
        }
    }
}
