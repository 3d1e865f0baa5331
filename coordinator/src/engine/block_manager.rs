//! KV blocks: who holds them, which prefixes they hold, when they may be handed out again.
//!
//! Knows block numbers and hashes only: no sequences, no ranks, no clock. The same number names the same block on every rank.
//!
//! **Invariant:** a block is in exactly one place: referenced by tables, in quarantine, cached without references, or free.
//! **Invariant:** a block is handed out only after the last plan that names it has committed.
//! **Invariant:** a hash names at most one block, and a cached block never holds an uncommitted token.

use std::collections::{BTreeMap, HashMap};

use phalanx_proto::{BlockId, StepId, TokenId};
use sha2::{Digest, Sha256};

/// Names the content of a full block: its tokens and everything before them.
///
/// 128 bits of SHA-256, so that no client can construct two prompts that share a block by collision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash(u128);

impl BlockHash {
    /// What stands before the first block of a sequence with a salt, so that none of its blocks equals one of another salt.
    pub fn of_salt(salt: &str) -> Self {
        Self::of(Sha256::new().chain_update(b"salt").chain_update(salt))
    }

    /// The hash of a block behind `previous` (none: it is the first of its sequence).
    pub fn chain(previous: Option<BlockHash>, tokens: &[TokenId]) -> Self {
        let mut hash = Sha256::new();
        hash.update(previous.map_or(0, |hash| hash.0).to_le_bytes());
        for token in tokens {
            hash.update(token.0.to_le_bytes());
        }
        Self::of(hash)
    }

    fn of(hash: Sha256) -> Self {
        let mut low = [0; 16];
        low.copy_from_slice(&hash.finalize()[..16]);
        Self(u128::from_le_bytes(low))
    }
}

/// The blocks of one sequence in order of position. Not `Clone`: [`BlockManager::release`] takes it back by value.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<BlockId>,
    num_cached: usize,
    num_registered: usize,
}

impl BlockTable {
    /// The blocks, first positions first.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// How many of the first blocks came from the prefix cache.
    pub fn num_cached(&self) -> usize {
        self.num_cached
    }

    /// How many of the first blocks have been entered into the prefix cache.
    pub fn num_registered(&self) -> usize {
        self.num_registered
    }
}

/// Where a block is that no table references, and that it is referenced otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Held,
    Quarantine,
    /// The key of the least-recently-used order.
    Cached(u64),
    Free,
}

#[derive(Debug, Clone)]
struct Block {
    num_refs: u32,
    place: Place,
    hash: Option<BlockHash>,
    /// The last plan that named it, as far as released tables said.
    last_named: StepId,
}

/// All KV blocks of a group.
#[derive(Debug)]
pub struct BlockManager {
    block_size: u32,
    caching: bool,
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    /// Cached blocks without references, least recently used first.
    cached: BTreeMap<u64, BlockId>,
    /// Entries may be stale: a block counts where its `place` says so.
    quarantine: BTreeMap<StepId, Vec<BlockId>>,
    num_quarantined: u32,
    by_hash: HashMap<BlockHash, BlockId>,
    clock: u64,
    committed: StepId,
}

impl BlockManager {
    /// All blocks are free. `caching` turns the prefix cache on.
    pub fn new(num_blocks: u32, block_size: u32, caching: bool) -> Self {
        let block = Block { num_refs: 0, place: Place::Free, hash: None, last_named: StepId(0) };
        Self {
            block_size,
            caching,
            blocks: vec![block; num_blocks as usize],
            free: (0..num_blocks).rev().map(BlockId).collect(),
            cached: BTreeMap::new(),
            quarantine: BTreeMap::new(),
            num_quarantined: 0,
            by_hash: HashMap::new(),
            clock: 0,
            committed: StepId(0),
        }
    }

    /// Blocks that exist.
    pub fn num_blocks(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Tokens in a block.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// True where prefixes are shared.
    pub fn is_caching(&self) -> bool {
        self.caching
    }

    /// Blocks that can be handed out now: free ones and cached ones without references.
    pub fn num_available(&self) -> u32 {
        (self.free.len() + self.cached.len()) as u32
    }

    /// Released blocks that a plan in flight still names.
    pub fn num_quarantined(&self) -> u32 {
        self.num_quarantined
    }

    /// Blocks that hold a prefix that can be found.
    pub fn num_cached(&self) -> u32 {
        self.by_hash.len() as u32
    }

    /// How many of the first blocks of `prefix` the cache holds.
    pub fn num_found(&self, prefix: &[BlockHash]) -> usize {
        prefix.iter().take_while(|hash| self.by_hash.contains_key(hash)).count()
    }

    /// A table of `num_blocks`, its first ones from the cache where `prefix` names them. None if that would leave fewer than
    /// `reserve` available.
    pub fn open(&mut self, prefix: &[BlockHash], num_blocks: usize, reserve: u32) -> Option<BlockTable> {
        let mut table = BlockTable::default();
        for hash in prefix.iter().take(num_blocks) {
            let Some(&block) = self.by_hash.get(hash) else { break };
            self.hold(block);
            table.blocks.push(block);
        }
        table.num_cached = table.blocks.len();
        table.num_registered = table.blocks.len();
        if self.num_available() < (num_blocks - table.blocks.len()) as u32 + reserve {
            self.release(table, StepId(0));
            return None;
        }
        while table.blocks.len() < num_blocks {
            assert!(self.grow(&mut table), "blocks were counted before");
        }
        Some(table)
    }

    /// Appends one block; false if none can be handed out now.
    pub fn grow(&mut self, table: &mut BlockTable) -> bool {
        let Some(block) = self.take() else { return false };
        table.blocks.push(block);
        true
    }

    /// Enters the first `hashes.len()` blocks of a table into the prefix cache. A prefix that another block holds already stays there.
    pub fn register(&mut self, table: &mut BlockTable, hashes: &[BlockHash]) {
        if !self.caching {
            return;
        }
        for (block, hash) in table.blocks.iter().zip(hashes).skip(table.num_registered) {
            if let std::collections::hash_map::Entry::Vacant(entry) = self.by_hash.entry(*hash) {
                entry.insert(*block);
                self.blocks[block.0 as usize].hash = Some(*hash);
            }
        }
        table.num_registered = table.num_registered.max(hashes.len().min(table.blocks.len()));
    }

    /// Takes a table back. `last_named` is the last plan that names it: until that has committed no block is handed out again.
    pub fn release(&mut self, table: BlockTable, last_named: StepId) {
        // Back to front, so that the end of a prefix is evicted before its beginning.
        for id in table.blocks.into_iter().rev() {
            let block = &mut self.blocks[id.0 as usize];
            assert!(block.num_refs > 0, "block {id} was released twice");
            block.num_refs -= 1;
            block.last_named = block.last_named.max(last_named);
            if block.num_refs > 0 {
                continue;
            }
            if block.last_named > self.committed {
                block.place = Place::Quarantine;
                self.num_quarantined += 1;
                self.quarantine.entry(block.last_named).or_default().push(id);
            } else {
                self.settle(id);
            }
        }
    }

    /// A step has committed: what only it and earlier ones named leaves quarantine.
    pub fn commit(&mut self, step: StepId) {
        self.committed = step;
        while let Some(entry) = self.quarantine.first_entry() {
            if *entry.key() > step {
                break;
            }
            for id in entry.remove() {
                let block = &self.blocks[id.0 as usize];
                if block.place == Place::Quarantine && block.last_named <= step {
                    self.num_quarantined -= 1;
                    self.settle(id);
                }
            }
        }
    }

    /// Checks this module's invariants. `held` says how many tables name each block.
    ///
    /// # Panics
    /// If one does not hold.
    pub fn check_invariants(&self, held: &HashMap<BlockId, u32>) {
        let mut num_quarantined = 0;
        for (index, block) in self.blocks.iter().enumerate() {
            let id = BlockId(index as u32);
            assert_eq!(block.num_refs, held.get(&id).copied().unwrap_or(0), "references of block {id}");
            assert_eq!(block.num_refs > 0, block.place == Place::Held, "place of block {id}");
            match block.place {
                Place::Held => {}
                Place::Quarantine => {
                    num_quarantined += 1;
                    assert!(block.last_named > self.committed, "block {id} stays in quarantine");
                    let listed = self.quarantine.get(&block.last_named).is_some_and(|ids| ids.contains(&id));
                    assert!(listed, "block {id} would never leave quarantine");
                }
                Place::Cached(stamp) => {
                    assert_eq!(self.cached.get(&stamp), Some(&id), "order of block {id}");
                    assert!(block.hash.is_some(), "block {id} is cached without a hash");
                }
                Place::Free => assert!(block.hash.is_none(), "block {id} is free but named"),
            }
            if let Some(hash) = block.hash {
                assert_eq!(self.by_hash.get(&hash), Some(&id), "hash of block {id}");
            }
        }
        let num_hashed = self.blocks.iter().filter(|block| block.hash.is_some()).count();
        assert_eq!(num_hashed, self.by_hash.len(), "a hash names a block that does not know it");
        assert_eq!(num_quarantined, self.num_quarantined, "blocks in quarantine");
        let num_held = self.blocks.iter().filter(|block| block.num_refs > 0).count();
        let num_idle = self.free.len() + self.cached.len() + self.num_quarantined as usize;
        assert_eq!(num_held + num_idle, self.blocks.len(), "a block is lost");
    }

    /// References a block that the cache named.
    fn hold(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        match block.place {
            Place::Held | Place::Free => {}
            Place::Quarantine => self.num_quarantined -= 1,
            Place::Cached(stamp) => {
                self.cached.remove(&stamp);
            }
        }
        block.place = Place::Held;
        block.num_refs += 1;
    }

    /// A block for new content: a free one, else the least recently used prefix is forgotten.
    fn take(&mut self) -> Option<BlockId> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => self.cached.pop_first()?.1,
        };
        let block = &mut self.blocks[id.0 as usize];
        block.num_refs = 1;
        block.place = Place::Held;
        if let Some(hash) = block.hash.take() {
            self.by_hash.remove(&hash);
        }
        Some(id)
    }

    /// Puts a block without references where it can be handed out from.
    fn settle(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        if block.hash.is_some() {
            self.clock += 1;
            block.place = Place::Cached(self.clock);
            self.cached.insert(self.clock, id);
        } else {
            block.place = Place::Free;
            self.free.push(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(tokens: &[u32]) -> Vec<BlockHash> {
        let mut all = Vec::new();
        for token in tokens {
            all.push(BlockHash::chain(all.last().copied(), &[TokenId(*token)]));
        }
        all
    }

    #[test]
    fn the_chain_depends_on_everything_before() {
        assert_eq!(hashes(&[1, 2])[1], hashes(&[1, 2])[1]);
        assert_ne!(hashes(&[1, 2])[1], hashes(&[3, 2])[1]);
    }

    #[test]
    fn a_prefix_is_shared_and_survives_its_owner() {
        let mut blocks = BlockManager::new(4, 1, true);
        let names = hashes(&[1, 2, 3]);
        let mut first = blocks.open(&names, 3, 0).unwrap();
        assert_eq!(first.num_cached(), 0);
        blocks.register(&mut first, &names[..2]);
        let second = blocks.open(&names, 3, 0).unwrap();
        assert_eq!(second.num_cached(), 2);
        assert_eq!(second.blocks()[..2], first.blocks()[..2]);
        assert!(blocks.open(&names, 3, 0).is_none(), "no block is left");
        blocks.release(first, StepId(0));
        blocks.release(second, StepId(0));
        assert_eq!(blocks.num_available(), 4);
        assert_eq!(blocks.open(&names, 2, 0).unwrap().num_cached(), 2);
    }

    #[test]
    fn the_least_recently_used_end_goes_first() {
        let mut blocks = BlockManager::new(3, 1, true);
        let names = hashes(&[1, 2, 3]);
        let mut table = blocks.open(&names, 3, 0).unwrap();
        blocks.register(&mut table, &names);
        blocks.release(table, StepId(0));
        let other = blocks.open(&[], 1, 0).unwrap();
        blocks.release(other, StepId(0));
        let again = blocks.open(&names, 3, 0).unwrap();
        assert_eq!(again.num_cached(), 2);
    }

    #[test]
    fn quarantine_lasts_until_the_last_plan_that_names_the_block() {
        let mut blocks = BlockManager::new(2, 1, true);
        let names = hashes(&[1]);
        let mut first = blocks.open(&names, 1, 0).unwrap();
        blocks.register(&mut first, &names);
        let second = blocks.open(&names, 2, 0).unwrap();
        blocks.release(second, StepId(2));
        blocks.release(first, StepId(1));
        assert_eq!((blocks.num_available(), blocks.num_quarantined()), (0, 2));
        blocks.commit(StepId(1));
        assert_eq!(blocks.num_available(), 0, "the shared block was named by step 2 too");
        let hit = blocks.open(&names, 1, 0).unwrap();
        assert_eq!(hit.num_cached(), 1, "its content may be used meanwhile");
        blocks.commit(StepId(2));
        assert_eq!(blocks.num_available(), 1);
        blocks.release(hit, StepId(3));
        blocks.commit(StepId(3));
        assert_eq!((blocks.num_available(), blocks.num_quarantined()), (2, 0));
        blocks.check_invariants(&HashMap::new());
    }

    #[test]
    fn a_block_that_is_used_again_in_quarantine_stays_there_for_its_last_plan() {
        let mut blocks = BlockManager::new(1, 1, true);
        let names = hashes(&[1]);
        let mut first = blocks.open(&names, 1, 0).unwrap();
        blocks.register(&mut first, &names);
        blocks.release(first, StepId(1));
        let second = blocks.open(&names, 1, 0).unwrap();
        blocks.release(second, StepId(2));
        blocks.commit(StepId(1));
        assert_eq!(blocks.num_available(), 0);
        blocks.commit(StepId(2));
        assert_eq!(blocks.num_available(), 1);
    }
}
