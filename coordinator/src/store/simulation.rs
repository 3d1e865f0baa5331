//! The real store on a disk that is made up: it is full, power fails in the middle of a change and loses or tears what was not
//! synced, processes are killed, as a seed says.
//!
//! Not simulated: a disk that loses what it has synced, or says that it has synced what it has not.
//!
//! **Invariant:** a seed plays the same story each time; what it finds is kept as a seed in [`SEEDS_KEPT`].

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex, MutexGuard};

use redb::StorageBackend;

use super::{Store, StoreError, Table, file};
use crate::stories::{self, Random};

/// Stories that once went wrong.
const SEEDS_KEPT: &[u64] = &[
    // Power failed between a header that said that the file had grown, and its growth.
    4_059, 7_821, 9_936, 10_948,
];
/// Stories that every run of the tests plays.
const NUM_SEEDS: u64 = 200;
/// Things that happen in one.
const NUM_STEPS: u32 = 24;
/// What power failing leaves of a write: whole sectors.
const SECTOR_BYTES: u64 = 512;
const PAGE_BYTES: u64 = 4096;

/// Bytes by page; a page that was never written is zero.
#[derive(Debug, Clone, Default)]
struct Bytes {
    len: u64,
    pages: BTreeMap<u64, Vec<u8>>,
}

impl Bytes {
    /// Calls for each page with its part of the range: where in the page, and where in the data.
    fn parts(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let at = offset + done as u64;
            let (page, within) = (at / PAGE_BYTES, (at % PAGE_BYTES) as usize);
            let part = (PAGE_BYTES as usize - within).min(len - done);
            let range = done..done + part;
            done += part;
            (part > 0).then_some((page, within, range))
        })
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (page, within, range) in Self::parts(offset, data.len()) {
            let bytes = self.pages.entry(page).or_insert_with(|| vec![0; PAGE_BYTES as usize]);
            bytes[within..within + range.len()].copy_from_slice(&data[range]);
        }
    }

    fn read(&self, offset: u64, out: &mut [u8]) {
        for (page, within, range) in Self::parts(offset, out.len()) {
            match self.pages.get(&page) {
                Some(bytes) => out[range.clone()].copy_from_slice(&bytes[within..within + range.len()]),
                None => out[range].fill(0),
            }
        }
    }

    fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.pages.split_off(&len.div_ceil(PAGE_BYTES));
            if let Some(last) = self.pages.get_mut(&(len / PAGE_BYTES)) {
                last[(len % PAGE_BYTES) as usize..].fill(0);
            }
        }
        self.len = len;
    }

    fn apply(&mut self, change: &Unsynced) {
        match change {
            Unsynced::Write(offset, data) => self.write(*offset, data),
            Unsynced::Len(len) => self.set_len(*len),
        }
    }
}

/// What was written and not synced.
#[derive(Debug, Clone)]
enum Unsynced {
    Write(u64, Vec<u8>),
    Len(u64),
}

#[derive(Debug, Default)]
struct Inner {
    /// What a reader sees.
    seen: Bytes,
    /// What power failing cannot take away.
    synced: Bytes,
    unsynced: Vec<Unsynced>,
    is_full: bool,
    /// Calls until power fails.
    fails_in: Option<u32>,
    /// The process that may still use it: others have ended.
    process: u64,
    /// The file was made to its end, and has its name.
    is_made: bool,
}

/// The disk; the store takes it as its file.
#[derive(Debug, Default)]
pub(super) struct Disk(Arc<Mutex<Inner>>);

/// A file that one process has open.
#[derive(Debug)]
struct OpenFile {
    disk: Arc<Mutex<Inner>>,
    process: u64,
}

fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().expect("nobody panics with it")
}

impl Disk {
    /// Opens the file, which is made under another name first.
    pub(super) fn open(&self) -> Result<redb::Database, redb::Error> {
        let process = lock(&self.0).process;
        let create = || file::open_on(OpenFile { disk: Arc::clone(&self.0), process });
        if !lock(&self.0).is_made {
            let mut inner = lock(&self.0);
            (inner.seen, inner.synced) = Default::default();
            inner.unsynced.clear();
            drop(inner);
            drop(create()?);
            let mut inner = lock(&self.0);
            if inner.fails_in == Some(0) {
                return Err(io::Error::from(ErrorKind::BrokenPipe).into());
            }
            inner.is_made = true;
        }
        create()
    }

    fn share(&self) -> Self {
        Self(Arc::clone(&self.0))
    }

    /// The process ends without another word; what it wrote is there.
    fn kill_process(&self) {
        let mut inner = lock(&self.0);
        inner.process += 1;
        inner.fails_in = None;
    }

    /// Of what was not synced, some is there, in whole sectors.
    fn lose_power(&self, random: &mut Random) {
        self.kill_process();
        let mut inner = lock(&self.0);
        for change in std::mem::take(&mut inner.unsynced) {
            match change {
                _ if random.one_in(3) => {}
                Unsynced::Write(offset, data) if random.one_in(3) => {
                    let num_sectors = (data.len() as u64).div_ceil(SECTOR_BYTES);
                    let kept = (random.below(num_sectors + 1) * SECTOR_BYTES).min(data.len() as u64) as usize;
                    inner.synced.write(offset, &data[..kept]);
                }
                change => inner.synced.apply(&change),
            }
        }
        inner.seen = inner.synced.clone();
    }
}

impl OpenFile {
    fn with<T>(&self, changes: bool, act: impl FnOnce(&mut Inner) -> T) -> io::Result<T> {
        let mut inner = lock(&self.disk);
        if inner.process != self.process || inner.fails_in == Some(0) {
            return Err(ErrorKind::BrokenPipe.into());
        }
        if changes {
            inner.fails_in = inner.fails_in.map(|calls| calls - 1);
            if inner.is_full {
                return Err(ErrorKind::StorageFull.into());
            }
        }
        Ok(act(&mut inner))
    }
}

impl StorageBackend for OpenFile {
    fn len(&self) -> io::Result<u64> {
        self.with(false, |inner| inner.seen.len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.with(false, |inner| {
            let end = offset + out.len() as u64;
            (end <= inner.seen.len).then(|| inner.seen.read(offset, out)).ok_or(ErrorKind::UnexpectedEof.into())
        })?
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with(true, |inner| {
            inner.seen.set_len(len);
            inner.unsynced.push(Unsynced::Len(len));
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.with(true, |inner| {
            for change in std::mem::take(&mut inner.unsynced) {
                inner.synced.apply(&change);
            }
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.with(true, |inner| {
            inner.seen.write(offset, data);
            inner.unsynced.push(Unsynced::Write(offset, data.to_vec()));
        })
    }
}

/// A table by its number, and a name.
type Key = (usize, String);
type Records = BTreeMap<Key, Vec<u8>>;
const TABLES: [Table; 2] = [Table::Deployments, Table::PlacementGroups];

/// A head's store through several lives, and what it has acknowledged.
struct Story {
    random: Random,
    disk: Disk,
    store: Option<Store>,
    acknowledged: Records,
    /// A change that was not acknowledged: it may be there, or not.
    doubtful: Option<(Key, Option<Vec<u8>>)>,
    term: u64,
}

impl Story {
    fn open(&mut self) {
        let opened = Store::on(self.disk.share());
        let may_fail = self.is_disturbed();
        self.store = match opened {
            Ok(store) => Some(store),
            Err(error) => {
                assert!(may_fail, "the store does not open: {error}");
                return;
            }
        };
        self.take_term();
        self.check();
    }

    fn is_disturbed(&self) -> bool {
        let inner = lock(&self.disk.0);
        inner.is_full || inner.fails_in.is_some()
    }

    fn take_term(&mut self) {
        let Some(store) = &mut self.store else { return };
        match store.next_term() {
            Ok(term) => {
                assert!(term.0 > self.term, "term {} comes after {}", term.0, self.term);
                self.term = term.0;
            }
            Err(error) => self.assert_excused(&error),
        }
    }

    fn keep(&mut self) {
        let key = (self.random.below(2) as usize, ["a", "b", "c"][self.random.below(3) as usize].to_owned());
        let (fill, length) = (self.random.below(256) as u8, self.random.below(6_000) as usize);
        let record = (!self.random.one_in(4)).then(|| vec![fill; length]);
        // What an earlier change has left is decided before the next is asked for.
        self.settle();
        let Some(store) = self.store.as_mut().filter(|_| self.doubtful.is_none()) else { return };
        match store.keep(TABLES[key.0], &key.1, record.as_deref()) {
            Ok(()) => drop(match record {
                Some(record) => self.acknowledged.insert(key, record),
                None => self.acknowledged.remove(&key),
            }),
            Err(error) => {
                self.assert_excused(&error);
                self.doubtful = Some((key, record));
            }
        }
    }

    /// A commit behind a doubtful change makes it certain, one way or the other.
    fn settle(&mut self) {
        if self.doubtful.is_none() || self.store.is_none() {
            return;
        }
        let term = self.term;
        self.take_term();
        if self.term > term
            && let Some(found) = self.read()
        {
            self.check_against(&found);
            self.acknowledged = found;
            self.doubtful = None;
        }
    }

    fn assert_excused(&self, error: &StoreError) {
        assert!(self.is_disturbed(), "nothing is wrong with the disk, and yet: {error}");
    }

    fn read(&mut self) -> Option<Records> {
        let mut found = Records::new();
        for (index, table) in TABLES.into_iter().enumerate() {
            match self.store.as_mut()?.records(table) {
                Ok(records) => found.extend(records.into_iter().map(|(name, record)| ((index, name), record))),
                Err(error) => {
                    self.assert_excused(&error);
                    return None;
                }
            }
        }
        Some(found)
    }

    fn check(&mut self) {
        if let Some(found) = self.read() {
            self.check_against(&found);
        }
    }

    fn check_against(&self, found: &Records) {
        let mut other = self.acknowledged.clone();
        match self.doubtful.clone() {
            Some((key, Some(record))) => drop(other.insert(key, record)),
            Some((key, None)) => drop(other.remove(&key)),
            None => {}
        }
        assert!(*found == self.acknowledged || *found == other, "what was acknowledged is there, and nothing else");
    }

    fn step(&mut self) {
        let in_calls = 1 + self.random.below(12) as u32;
        match self.random.below(12) {
            0..=5 => self.keep(),
            6 => self.check(),
            7 => {
                let mut inner = lock(&self.disk.0);
                inner.is_full = !inner.is_full;
            }
            8 => lock(&self.disk.0).fails_in = Some(in_calls),
            9 => {
                self.disk.kill_process();
                self.store = None;
            }
            10 => {
                self.disk.lose_power(&mut self.random);
                self.store = None;
            }
            // The head ends in order.
            _ => self.store = None,
        }
        if lock(&self.disk.0).fails_in == Some(0) {
            self.disk.lose_power(&mut self.random);
            self.store = None;
        }
        if self.store.is_none() {
            self.open();
        }
    }
}

/// Plays one story.
fn play(seed: u64) {
    let mut story = Story {
        random: Random::new(seed),
        disk: Disk::default(),
        store: None,
        acknowledged: Records::new(),
        doubtful: None,
        term: 0,
    };
    for _ in 0..NUM_STEPS {
        story.step();
    }
    lock(&story.disk.0).is_full = false;
    story.disk.lose_power(&mut story.random);
    story.store = None;
    story.open();
    assert!(story.store.is_some() && story.read().is_some(), "a disk that is well is used again");
}

#[test]
fn store_stories_that_once_went_wrong() {
    stories::play_kept(SEEDS_KEPT, play);
}

#[test]
fn store_stories_end_well() {
    stories::play_range("store", NUM_SEEDS, play);
}
