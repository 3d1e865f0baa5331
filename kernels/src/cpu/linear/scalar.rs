//! Plain code for every machine: the arithmetic that the other tiers repeat bit for bit.

use super::{
    driver::{DEPTH, FloatRows, Span, Sums},
    format::{BLOCK, Format, Scales},
    packed::{LANES, Part},
    scratch::{QuantTile, TILE_ROWS},
};

/// Products of a tile of quantised activations with one group; `out` `[rows][16]`.
///
/// # Safety
/// The tile's planes hold as many blocks as the part has, and `out` has room for `tile.rows` rows.
pub(super) unsafe fn int8_tile(part: &Part, group: usize, tile: QuantTile, out: *mut f32) {
    let layout = &part.layout;
    let Some(format) = layout.format else { return };
    let group = part.group(group);
    let mut sums = [[0.0; LANES]; TILE_ROWS];
    for block in 0..layout.num_blocks {
        for lane in 0..LANES {
            let codes = layout.codes(format, group, block, lane).map(|code| format.value(code));
            let scales = layout.scales(format, group, block, lane);
            for (row, sums) in sums.iter_mut().take(tile.rows).enumerate() {
                let at = block * tile.rows + row;
                // SAFETY: the tile has this block and this row.
                let (x, x_scale, x_sum) = unsafe {
                    (&*tile.codes.add(at * BLOCK).cast::<[i8; BLOCK]>(), *tile.scales.add(at), *tile.sums.add(at))
                };
                let sum = &mut sums[lane];
                if format.scales == Scales::SuperHalves {
                    for half in 0..2 {
                        let range = half * (BLOCK / 2)..(half + 1) * (BLOCK / 2);
                        let product = integer_product(format, &codes[range.clone()], &x[range]);
                        *sum = (product as f32 * x_scale).mul_add(scales.scales[half], *sum);
                    }
                } else {
                    *sum = (integer_product(format, &codes, x) as f32 * x_scale).mul_add(scales.scales[0], *sum);
                }
                if format.has_minimum() {
                    *sum = scales.minimum.mul_add(x_sum, *sum);
                }
            }
        }
    }
    for (row, sums) in sums.iter().take(tile.rows).enumerate() {
        // SAFETY: `out` has room for this row.
        unsafe { out.add(row * LANES).cast::<[f32; LANES]>().write(*sums) };
    }
}

fn integer_product(format: Format, codes: &[u8], x: &[i8]) -> i32 {
    let offset = i32::from(format.offset);
    codes.iter().zip(x).map(|(code, x)| (i32::from(*code) - offset) * i32::from(*x)).sum()
}

/// Products of a stretch of rows with a span, into `sums` from group `to` on.
pub(super) fn float_stretch(span: Span<'_>, rows: FloatRows<'_>, to: usize, sums: Sums) {
    let mut panel = [[0.0; LANES]; DEPTH];
    for group in 0..span.len {
        for start in (0..rows.cols).step_by(DEPTH) {
            let len = DEPTH.min(rows.cols - start);
            fill_panel(span.part, span.first + group, start, &mut panel[..len]);
            for row in 0..rows.num_rows {
                let mut sum = [0.0; LANES];
                for (x, weights) in rows.x[row * rows.cols + start..][..len].iter().zip(&panel) {
                    for (sum, weight) in sum.iter_mut().zip(weights) {
                        *sum = x.mul_add(*weight, *sum);
                    }
                }
                // SAFETY: a span has at most `SPAN_MAX - to` groups, a stretch at most `STRETCH` rows.
                let total = unsafe { &mut *sums.at(to + group, row).cast::<[f32; LANES]>() };
                if start == 0 {
                    *total = sum;
                } else {
                    total.iter_mut().zip(sum).for_each(|(total, sum)| *total += sum);
                }
            }
        }
    }
}

/// Exact weights of columns `start..` of a group, `[column][lane]`.
fn fill_panel(part: &Part, group: usize, start: usize, panel: &mut [[f32; LANES]]) {
    let layout = &part.layout;
    let group = part.group(group);
    let Some(format) = layout.format else {
        for (col, weights) in panel.iter_mut().enumerate() {
            for (lane, weight) in weights.iter_mut().enumerate() {
                *weight = layout.element(part.dtype, group, start + col, lane);
            }
        }
        return;
    };
    for (block, panel) in panel.chunks_exact_mut(BLOCK).enumerate() {
        let block = start / BLOCK + block;
        for lane in 0..LANES {
            let codes = layout.codes(format, group, block, lane);
            let weights = format.weights(&codes, layout.scales(format, group, block, lane));
            for (column, weight) in panel.iter_mut().zip(weights) {
                column[lane] = weight;
            }
        }
    }
}

/// `out = gate / (1 + exp(-gate)) * up`.
pub(super) fn silu_mul(gate: &[f32; LANES], up: &[f32; LANES], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + (-gate).exp()) * up;
    }
}
