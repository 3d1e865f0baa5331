//! A prompt's hidden states become one vector, over as many steps as it has chunks.
//!
//! Owns the sums of prompts that are under way. Knows no device and no model: it is given rows.
//!
//! **Invariant:** rows are added one by one in the order of their positions, so a vector does not depend on chunks or batches.

use std::collections::HashMap;
use std::ops::Range;

use phalanx_proto::{PlanRow, PooledRow, Pooling, SeqSlot};

/// Rows of a step that belong to one vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolChunk {
    /// The sequence's slot.
    slot: SeqSlot,
    /// Batch rows whose hidden states are needed.
    pub rows: Range<usize>,
    /// The first of them is the prompt's first token, or the only one that counts.
    begins: bool,
    /// The vector is whole then.
    ends: bool,
}

impl PoolChunk {
    /// What a row of a plan gives, where its first token is batch row `first_row`; none where no hidden state of it counts.
    pub fn new(pooling: Pooling, row: &PlanRow, first_row: u32) -> Option<Self> {
        let (first, end) = (first_row as usize, (first_row + row.num_tokens) as usize);
        let slot = row.slot;
        match pooling {
            Pooling::Mean => Some(Self { slot, rows: first..end, begins: row.start == 0, ends: row.pools }),
            Pooling::Last => row.pools.then_some(Self { slot, rows: end - 1..end, begins: true, ends: true }),
        }
    }
}

/// The vectors that are not whole yet, by slot.
#[derive(Debug, Default)]
pub struct Pools {
    sums: HashMap<SeqSlot, Sum>,
}

#[derive(Debug, Default)]
struct Sum {
    values: Vec<f64>,
    num_rows: u32,
}

impl Pools {
    /// Takes the hidden states of a chunk in, `[rows, hidden]`, and gives the mean where the last one has come.
    pub fn add(&mut self, chunk: &PoolChunk, hidden: &[f32]) -> Option<PooledRow> {
        let width = hidden.len().checked_div(chunk.rows.len())?.max(1);
        if chunk.begins {
            // What a sequence left here that has gone before its end is forgotten.
            self.sums.remove(&chunk.slot);
        }
        let sum = self.sums.entry(chunk.slot).or_default();
        sum.values.resize(width, 0.0);
        for row in hidden.chunks_exact(width) {
            sum.num_rows += 1;
            for (sum, value) in sum.values.iter_mut().zip(row) {
                *sum += f64::from(*value);
            }
        }
        if !chunk.ends {
            return None;
        }
        let Sum { values, num_rows } = self.sums.remove(&chunk.slot)?;
        let values = values.into_iter().map(|sum| (sum / f64::from(num_rows)) as f32).collect();
        Some(PooledRow { slot: chunk.slot, values })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(start: u32, num_tokens: u32, pools: bool) -> PlanRow {
        PlanRow { slot: SeqSlot(1), start, num_tokens, new_blocks: vec![], samples: false, consumes: None, pools }
    }

    #[test]
    fn a_vector_does_not_depend_on_chunks() {
        let hidden: Vec<f32> = (0..12).map(|value| value as f32 * 0.3).collect();
        let mut pools = Pools::default();
        let whole = PoolChunk::new(Pooling::Mean, &row(0, 4, true), 0).expect("all rows count");
        let expected = pools.add(&whole, &hidden).expect("it is whole");
        let left = PoolChunk::new(Pooling::Mean, &row(0, 2, false), 5).expect("all rows count");
        assert_eq!((left.rows.clone(), pools.add(&left, &[9.0; 6])), (5..7, None));
        let first = PoolChunk::new(Pooling::Mean, &row(0, 1, false), 0).expect("all rows count");
        assert_eq!(pools.add(&first, &hidden[..3]), None);
        let rest = PoolChunk::new(Pooling::Mean, &row(1, 3, true), 2).expect("all rows count");
        assert_eq!(pools.add(&rest, &hidden[3..]), Some(expected));
        assert!(pools.sums.is_empty());
        assert_eq!(PoolChunk::new(Pooling::Last, &row(0, 4, false), 0), None);
        let last = PoolChunk::new(Pooling::Last, &row(4, 4, true), 8).expect("the last row counts");
        assert_eq!(last.rows, 11..12);
        assert_eq!(pools.add(&last, &hidden[9..]).expect("it is whole").values, hidden[9..]);
    }
}
