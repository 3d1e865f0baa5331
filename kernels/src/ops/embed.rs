//! `out[t] = table[token_ids[t] - first_id]`, zero where the id is outside: this rank's term of the embedding.

use crate::{
    KernelError,
    cpu::{CpuMatrix, Pool, rows::for_rows},
    ops::fit,
};

/// Looks token ids up. `table` `[vocab on this rank, hidden]` in any stored format, `out` `[tokens, hidden]`.
pub(crate) fn embed(
    pool: &Pool,
    token_ids: &[u32],
    table: &CpuMatrix,
    first_id: u32,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let width = table.cols();
    fit("embed", out.len() == token_ids.len() * width, || {
        format!("{} tokens of width {width} into {} values", token_ids.len(), out.len())
    })?;
    for_rows(pool, out, width, |token, out| {
        let row = token_ids[token].checked_sub(first_id).map(|row| row as usize);
        // A row that the table has has its width: `row` fails outside the table only.
        if row.is_none_or(|row| table.row(row, out).is_err()) {
            out.fill(0.0);
        }
    });
    Ok(())
}
