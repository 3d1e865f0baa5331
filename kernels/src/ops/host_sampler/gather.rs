//! What ranks tell each other about their logits, merged in rank order.

use super::Wanted;
use crate::ops::sample::{Candidate, MaxSum, merge_top_n};
use crate::{Collective, KernelError, Scored};

/// One row over all ranks, before its token's rank is known.
pub(super) struct Merged {
    token: u32,
    /// The token's.
    pub logit: f32,
    log_sum_exp: f64,
    top: Vec<Candidate>,
}

impl Merged {
    /// With the place of its token among all, the row's score.
    pub(super) fn finish(self, rank: u32) -> Scored {
        let logprob = |logit: f64| (logit - self.log_sum_exp) as f32;
        Scored {
            token: self.token,
            logprob: logprob(f64::from(self.logit)),
            rank,
            top: self.top.iter().map(|best| (best.id, logprob(best.value))).collect(),
        }
    }
}

/// What this rank sends, and what all ranks sent.
#[derive(Debug, Default)]
pub(super) struct Gather {
    /// To be filled before `run`.
    pub part: Vec<u8>,
    all: Vec<u8>,
}

impl Gather {
    /// Sends this rank's part and takes in all ranks'. Collective.
    pub(super) fn run(&mut self, group: &mut dyn Collective) -> Result<(), KernelError> {
        self.all.resize(self.part.len() * group.world_size(), 0);
        Ok(group.all_gather(&self.part, &mut self.all)?)
    }

    /// Entry `index` of each rank, in rank order, where all entries have `len` bytes.
    pub(super) fn entries(&self, index: usize, len: usize) -> impl Iterator<Item = &[u8]> + Clone {
        self.all.chunks_exact(self.part.len().max(1)).map(move |part| &part[index * len..][..len])
    }

    /// The best of the ranks' candidates for a row.
    pub(super) fn best(&self, index: usize) -> Option<Candidate> {
        Candidate::merge(self.entries(index, Candidate::BYTES).map(candidate))
    }

    /// The sum of the ranks' counts for a row.
    pub(super) fn sum(&self, index: usize) -> u32 {
        self.entries(index, 4).filter_map(|part| part.first_chunk()).map(|part| u32::from_le_bytes(*part)).sum()
    }

    /// A row as `score` sends it: its sum, its token's logit, its best tokens.
    pub(super) fn merged(&self, index: usize, row: &Wanted, num_top: usize) -> Merged {
        let entries = self.entries(index, MaxSum::BYTES + 4 + num_top * Candidate::BYTES);
        let sums = entries.clone().filter_map(|part| part.first_chunk()).map(MaxSum::from_bytes);
        let logits = entries.clone().filter_map(|part| part[MaxSum::BYTES..].first_chunk());
        let best = entries.flat_map(|part| part[MaxSum::BYTES + 4..].chunks_exact(Candidate::BYTES));
        Merged {
            token: row.token,
            logit: logits.map(|bytes| f32::from_le_bytes(*bytes)).fold(f32::NEG_INFINITY, f32::max),
            log_sum_exp: MaxSum::merge(sums).log_sum_exp(),
            top: merge_top_n(best.filter_map(candidate), (row.num_top as usize).min(num_top)),
        }
    }
}

/// A candidate as it came from the wire.
fn candidate(bytes: &[u8]) -> Option<Candidate> {
    bytes.first_chunk().and_then(Candidate::from_bytes)
}
