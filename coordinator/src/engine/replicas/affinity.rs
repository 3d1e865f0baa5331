//! Which replica has seen which beginnings of prompts.
//!
//! **Invariant:** it forgets the oldest beyond a fixed number; a wrong guess costs time, never correctness.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use phalanx_proto::TokenId;

/// Blocks of a prompt that are looked at.
const PREFIX_BLOCKS_MAX: usize = 32;
/// Beginnings that are remembered.
const KNOWN_MAX: usize = 8192;

/// The hash of each beginning of a prompt that ends with a whole KV block, shortest first.
pub(super) fn prefixes(prompt: &[TokenId], block_size: u32) -> Vec<u64> {
    let mut hasher = DefaultHasher::new();
    let blocks = prompt.chunks_exact(block_size.max(1) as usize).take(PREFIX_BLOCKS_MAX);
    blocks
        .map(|block| {
            block.hash(&mut hasher);
            hasher.finish()
        })
        .collect()
}

/// The replica that computed a beginning last.
#[derive(Debug, Default)]
pub(super) struct Affinity {
    known: HashMap<u64, usize>,
    oldest: VecDeque<u64>,
}

impl Affinity {
    /// The replica that knows the longest of these beginnings.
    pub fn find(&self, prefixes: &[u64]) -> Option<usize> {
        prefixes.iter().rev().find_map(|prefix| self.known.get(prefix).copied())
    }

    /// Remembers that a replica computes these.
    pub fn note(&mut self, prefixes: &[u64], replica: usize) {
        for &prefix in prefixes {
            if self.known.insert(prefix, replica).is_none() {
                self.oldest.push_back(prefix);
            }
            if self.oldest.len() > KNOWN_MAX
                && let Some(oldest) = self.oldest.pop_front()
            {
                self.known.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(range: std::ops::Range<u32>) -> Vec<TokenId> {
        range.map(TokenId).collect()
    }

    #[test]
    fn the_longest_known_beginning_counts() {
        let mut affinity = Affinity::default();
        let long = prefixes(&tokens(0..70), 16);
        assert_eq!(long.len(), 4);
        affinity.note(&long[..2], 0);
        affinity.note(&long[2..3], 1);
        assert_eq!(affinity.find(&long), Some(1));
        assert_eq!(affinity.find(&prefixes(&tokens(0..40), 16)), Some(0));
        assert_eq!(affinity.find(&prefixes(&tokens(1..40), 16)), None);
        assert_eq!(affinity.find(&prefixes(&tokens(0..15), 16)), None);
    }

    #[test]
    fn the_oldest_is_forgotten() {
        let mut affinity = Affinity::default();
        for prefix in 0..KNOWN_MAX as u64 + 10 {
            affinity.note(&[prefix], 0);
        }
        assert_eq!((affinity.known.len(), affinity.oldest.len()), (KNOWN_MAX, KNOWN_MAX));
        assert_eq!((affinity.find(&[5]), affinity.find(&[10])), (None, Some(0)));
    }
}
