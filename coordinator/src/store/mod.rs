//! What survives a restart of the head: its term, and one record for each deployment and each placement group.
//!
//! Two keep it: a database file of this head ([`Store`]), or etcd, which two heads share ([`etcd`]). Owns the file and the thread
//! that writes. Knows names and bytes; what the records say is the cluster's business.
//!
//! **Invariant:** a term is on disk before the head that has it listens, so no two lives of a head share one.
//! **Invariant:** a change is answered only when it is on disk, and changes are written in the order in which they came.

pub mod etcd;
mod file;
#[cfg(test)]
mod simulation;
mod writer;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use phalanx_proto::Term;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

pub use writer::{Change, StoreWriter};

/// The file in the store's folder.
const FILE: &str = "head.redb";
/// Numbers of the head itself.
const NUMBERS: TableDefinition<&str, u64> = TableDefinition::new("numbers");
/// Records of deployments by name.
const DEPLOYMENTS: TableDefinition<&str, &[u8]> = TableDefinition::new("deployments");
/// Records of placement groups by name.
const PLACEMENT_GROUPS: TableDefinition<&str, &[u8]> = TableDefinition::new("placement_groups");
/// The head's term among the numbers.
const TERM: &str = "term";

/// What a record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// A deployment.
    Deployments,
    /// A placement group that was made by hand.
    PlacementGroups,
}

impl Table {
    /// Every table.
    pub const ALL: [Self; 2] = [Self::Deployments, Self::PlacementGroups];

    /// Its name in a store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployments => "deployments",
            Self::PlacementGroups => "placement_groups",
        }
    }

    fn definition(self) -> TableDefinition<'static, &'static str, &'static [u8]> {
        match self {
            Self::Deployments => DEPLOYMENTS,
            Self::PlacementGroups => PLACEMENT_GROUPS,
        }
    }
}

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Its folder cannot be made.
    #[error("cannot use {path}: {source}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The database says no: a full or read-only disk, another process, damage.
    #[error("cannot use {path}: {source}")]
    Database {
        /// The file.
        path: PathBuf,
        /// What the database said.
        #[source]
        source: Box<redb::Error>,
    },
    /// etcd refuses.
    #[error(transparent)]
    Etcd(etcd::EtcdError),
}

/// What keeps records: this head's own file, or etcd.
pub trait Backend: Send {
    /// The term of this life of the head: no other has it.
    ///
    /// # Errors
    /// It cannot be written.
    fn next_term(&mut self) -> Result<Term, StoreError>;

    /// All records of a table, by name, as an earlier head has left them.
    ///
    /// # Errors
    /// They cannot be read.
    fn records(&mut self, table: Table) -> Result<Vec<(String, Vec<u8>)>, StoreError>;

    /// Writes a record, or removes it where there is none; it survives this process when this returns.
    ///
    /// # Errors
    /// It cannot be written.
    fn keep(&mut self, table: Table, name: &str, record: Option<&[u8]>) -> Result<(), StoreError>;
}

impl Backend for Store {
    fn next_term(&mut self) -> Result<Term, StoreError> {
        Store::next_term(self)
    }

    fn records(&mut self, table: Table) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        Store::records(self, table)
    }

    fn keep(&mut self, table: Table, name: &str, record: Option<&[u8]>) -> Result<(), StoreError> {
        Store::keep(self, table, name, record)
    }
}

/// The open store.
#[derive(Debug)]
pub struct Store {
    /// None behind a change that failed: a database that could not write takes nothing more until it is opened again.
    database: Option<Database>,
    path: PathBuf,
    /// A disk that is made up stands for the file.
    #[cfg(test)]
    simulated: Option<simulation::Disk>,
}

impl Store {
    /// Opens the store in a folder; makes both where they are not there.
    ///
    /// # Errors
    /// Folder or file cannot be used.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        fs::create_dir_all(dir).map_err(|source| StoreError::Folder { path: dir.to_owned(), source })?;
        let path = dir.join(FILE);
        Self {
            database: None,
            path,
            #[cfg(test)]
            simulated: None,
        }
        .opened()
    }

    /// The store on a disk that is made up.
    #[cfg(test)]
    fn on(disk: simulation::Disk) -> Result<Self, StoreError> {
        Self { database: None, path: PathBuf::new(), simulated: Some(disk) }.opened()
    }

    fn opened(mut self) -> Result<Self, StoreError> {
        match self.database() {
            Ok(_) => Ok(self),
            Err(error) => Err(failed(&self.path, error)),
        }
    }

    /// Takes the next term: it is on disk when this returns.
    ///
    /// # Errors
    /// The database cannot be written.
    pub fn next_term(&mut self) -> Result<Term, StoreError> {
        self.transact(|transaction| {
            let mut numbers = transaction.open_table(NUMBERS)?;
            let next = numbers.get(TERM)?.map_or(0, |term| term.value()) + 1;
            numbers.insert(TERM, next)?;
            Ok(Term(next))
        })
    }

    /// All records of a table, by name.
    ///
    /// # Errors
    /// The database cannot be read.
    pub fn records(&mut self, table: Table) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let path = self.path.clone();
        let mut read = || -> Result<Vec<(String, Vec<u8>)>, redb::Error> {
            let transaction = self.database()?.begin_read()?;
            let table = match transaction.open_table(table.definition()) {
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
                table => table?,
            };
            let mut records = Vec::new();
            for entry in table.iter()? {
                let (name, record) = entry?;
                records.push((name.value().to_owned(), record.value().to_owned()));
            }
            Ok(records)
        };
        read().map_err(|error| failed(&path, error))
    }

    /// Writes a record, or removes it where there is none; on disk when this returns.
    ///
    /// # Errors
    /// The database cannot be written.
    pub fn keep(&mut self, table: Table, name: &str, record: Option<&[u8]>) -> Result<(), StoreError> {
        self.transact(|transaction| {
            let mut table = transaction.open_table(table.definition())?;
            match record {
                Some(record) => table.insert(name, record)?,
                None => table.remove(name)?,
            };
            Ok(())
        })
    }

    fn transact<T>(
        &mut self,
        change: impl FnOnce(&redb::WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let write = || {
            let transaction = self.database()?.begin_write()?;
            let value = change(&transaction)?;
            transaction.commit()?;
            Ok(value)
        };
        write().map_err(|error: redb::Error| {
            self.database = None;
            failed(&self.path, error)
        })
    }

    /// The database, opened again where a change had failed: what was committed before is there.
    fn database(&mut self) -> Result<&Database, redb::Error> {
        let database = match self.database.take() {
            Some(database) => database,
            None => self.create()?,
        };
        Ok(self.database.insert(database))
    }

    /// Opens the file; one that is not there is made under another name first, so that whoever dies meanwhile leaves none that
    /// is half made.
    fn create(&self) -> Result<Database, redb::Error> {
        #[cfg(test)]
        if let Some(disk) = &self.simulated {
            return disk.open();
        }
        if !self.path.exists() {
            let unfinished = self.path.with_extension("new");
            match fs::remove_file(&unfinished) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
            drop(file::open(&unfinished)?);
            fs::rename(&unfinished, &self.path)?;
            if let Some(folder) = self.path.parent() {
                fs::File::open(folder)?.sync_all()?;
            }
        }
        file::open(&self.path)
    }
}

fn failed(path: &Path, error: impl Into<redb::Error>) -> StoreError {
    StoreError::Database { path: path.to_owned(), source: Box::new(error.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_grow_and_records_come_back() {
        let dir = tempfile::tempdir().expect("a folder");
        let folder = dir.path().join("store");
        let mut store = Store::open(&folder).expect("opens");
        assert_eq!(store.records(Table::Deployments).expect("reads"), []);
        assert_eq!(store.next_term().expect("writes"), Term(1));
        store.keep(Table::Deployments, "m", Some(b"one")).expect("writes");
        store.keep(Table::Deployments, "n", Some(b"two")).expect("writes");
        store.keep(Table::Deployments, "m", Some(b"three")).expect("writes");
        store.keep(Table::Deployments, "n", None).expect("writes");
        store.keep(Table::PlacementGroups, "m", Some(b"four")).expect("writes");
        assert!(Store::open(&folder).is_err(), "one process has it");
        drop(store);
        let mut store = Store::open(&folder).expect("opens again");
        assert_eq!(store.next_term().expect("writes"), Term(2));
        assert_eq!(store.records(Table::Deployments).expect("reads"), [("m".to_owned(), b"three".to_vec())]);
    }

    #[test]
    fn a_file_that_was_half_made_when_its_head_died_is_made_again() {
        let dir = tempfile::tempdir().expect("a folder");
        let unfinished = dir.path().join(FILE).with_extension("new");
        fs::write(&unfinished, [0; 100]).expect("writes");
        let mut store = Store::open(dir.path()).expect("opens");
        assert_eq!(store.next_term().expect("writes"), Term(1));
        assert!(!unfinished.exists());
    }

    #[test]
    fn damage_is_said() {
        let dir = tempfile::tempdir().expect("a folder");
        fs::write(dir.path().join(FILE), "two").expect("writes");
        assert!(Store::open(dir.path()).expect_err("damaged").to_string().contains(FILE));
    }
}
