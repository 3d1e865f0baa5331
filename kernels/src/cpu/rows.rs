//! Work that goes row by row, shared out among the threads where it is worth it.

use super::{Pool, disjoint::Disjoint};

/// Below this many values the caller works alone: sharing out would take longer.
const ALONE_MAX: usize = 16_384;
/// Values of a part at least.
const PART_MIN: usize = 4_096;

/// Calls `each(row, out_row)` for all rows of `out` `[rows, width]`.
pub(crate) fn for_rows(pool: &Pool, out: &mut [f32], width: usize, each: impl Fn(usize, &mut [f32]) + Sync) {
    if out.len() < ALONE_MAX || pool.num_threads() == 1 {
        out.chunks_exact_mut(width).enumerate().for_each(|(row, out)| each(row, out));
        return;
    }
    let rows = out.len() / width;
    let rows_of_part = PART_MIN.div_ceil(width);
    let out = Disjoint::new(out);
    pool.run(rows.div_ceil(rows_of_part), |part| {
        for row in part * rows_of_part..rows.min((part + 1) * rows_of_part) {
            // SAFETY: parts differ in their rows.
            each(row, unsafe { out.slice(row * width, width) });
        }
    });
}

/// As [`for_rows`], over two matrices of the same shape.
pub(crate) fn for_row_pairs(
    pool: &Pool,
    a: &mut [f32],
    b: &mut [f32],
    width: usize,
    each: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) {
    assert_eq!(a.len(), b.len(), "two matrices of one shape");
    let b = Disjoint::new(b);
    for_rows(pool, a, width, |row, a| {
        // SAFETY: `for_rows` calls each row once.
        each(row, a, unsafe { b.slice(row * width, width) });
    });
}
