//! In which order files have the rows of a tensor.

use std::ops::Range;

/// Where the rows of a tensor are among the rows that are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowOrder {
    /// As Hugging Face's Llama has them.
    AsStored,
    /// Rows of a head alternate between its two rotary halves, as GGUF files of the Llama family have Q and K.
    Interleaved {
        /// Rows of a head.
        head_dim: usize,
    },
    /// Q, K or V in a tensor that has all three, KV head by KV head.
    Grouped {
        /// Rows of a head.
        head_dim: usize,
        /// The first head of each group that belongs to this tensor.
        first: usize,
        /// So many do.
        taken: usize,
        /// Heads of a group: its query heads, K and V.
        group_heads: usize,
    },
}

impl RowOrder {
    /// Stored place of a row.
    pub(crate) const fn stored(self, row: usize) -> usize {
        match self {
            Self::AsStored => row,
            Self::Interleaved { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let half = head_dim / 2;
                head * head_dim + within % half * 2 + within / half
            }
            Self::Grouped { head_dim, first, taken, group_heads } => {
                let (head, within) = (row / head_dim, row % head_dim);
                (head / taken * group_heads + first + head % taken) * head_dim + within
            }
        }
    }

    /// How many rows are stored where a tensor has `num_rows`.
    pub(crate) const fn num_stored(self, num_rows: usize) -> usize {
        match self {
            Self::AsStored | Self::Interleaved { .. } => num_rows,
            Self::Grouped { taken, group_heads, .. } => num_rows / taken * group_heads,
        }
    }

    /// The stored rows from the first to the last of these, which are at least one; whole heads are meant.
    pub(crate) const fn span(self, rows: Range<usize>) -> Range<usize> {
        match self {
            Self::AsStored | Self::Interleaved { .. } => rows,
            Self::Grouped { .. } => self.stored(rows.start)..self.stored(rows.end - 1) + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(order: RowOrder, num_rows: usize, stored: &[usize]) {
        assert_eq!((0..num_rows).map(|row| order.stored(row)).collect::<Vec<_>>(), stored, "{order:?}");
    }

    #[test]
    fn rows_are_where_files_have_them() {
        check(RowOrder::AsStored, 3, &[0, 1, 2]);
        check(RowOrder::Interleaved { head_dim: 4 }, 8, &[0, 2, 1, 3, 4, 6, 5, 7]);
        // Two KV heads with two query heads each, heads of two rows: q q k v, q q k v.
        let part = |first, taken| RowOrder::Grouped { head_dim: 2, first, taken, group_heads: 4 };
        check(part(0, 2), 8, &[0, 1, 2, 3, 8, 9, 10, 11]);
        check(part(2, 1), 4, &[4, 5, 12, 13]);
        check(part(3, 1), 4, &[6, 7, 14, 15]);
        assert_eq!([part(0, 2).num_stored(8), part(2, 1).num_stored(4)], [16, 16]);
        assert_eq!(part(2, 1).span(1..3), 5..13);
    }
}
