//! `out[i] = x[logit_rows[i]] W^T`: only the rows that are sampled meet the output head.

use crate::{
    KernelError,
    cpu::{self, CpuMatrix, Pool, Scratch},
};

/// Multiplies the wanted rows of `x` `[tokens, hidden]`; `out` `[logit_rows, vocab on this rank]`.
///
/// `gathered` holds the wanted rows where they are not neighbours.
pub(crate) fn logits(
    pool: &Pool,
    scratch: &mut Scratch,
    (x, rows): (&[f32], &[u32]),
    head: &CpuMatrix,
    gathered: &mut [f32],
    out: &mut [f32],
) -> Result<(), KernelError> {
    let width = head.cols();
    let row = |row: u32| row as usize * width..(row as usize + 1) * width;
    let neighbours = rows.windows(2).all(|w| w[1] == w[0] + 1);
    let wanted = match rows {
        [] => return Ok(()),
        [first, ..] if neighbours => x.get(row(*first).start..row(*first).start + rows.len() * width),
        _ => {
            for (to, &from) in gathered.chunks_exact_mut(width).zip(rows) {
                match x.get(row(from)) {
                    Some(from) => to.copy_from_slice(from),
                    None => return Err(shape(from)),
                }
            }
            gathered.get(..rows.len() * width)
        }
    };
    let Some(wanted) = wanted else { return Err(shape(rows[rows.len() - 1])) };
    cpu::linear(pool, scratch, wanted, head, None, out)
}

fn shape(row: u32) -> KernelError {
    KernelError::Shape { op: "logits", reason: format!("row {row} is not in the buffers") }
}
