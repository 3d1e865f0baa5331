//! The store of two heads: records in etcd, written by the head that leads.
//!
//! One head holds the leader's key, which is bound to its lease; the others wait for it. The revision in which the key was
//! made is the leader's term, and every write is a transaction that asks for it.
//!
//! **Invariant:** a head whose key is not the leader's any more writes nothing, whatever it believes.
//! **Invariant:** serving does not wait for etcd: only changes do.

mod client;
mod leadership;
mod place;

use std::sync::Arc;
use std::time::Duration;

use phalanx_proto::Term;
use tokio::runtime::Handle;

pub use client::EtcdError;
pub use leadership::{Campaign, Deposed, HeadCard, HeadsSeen, Leadership};
pub use place::EtcdPlace;

use super::{Backend, StoreError, Table};
use client::{Check, Done, Write};

/// Time between two attempts at a write that etcd has not answered.
const WRITE_AGAIN: Duration = Duration::from_millis(100);

/// Records, with their table and name.
type Records = Vec<(Table, String, Vec<u8>)>;

/// The records of a head that leads.
pub struct EtcdStore {
    leadership: Arc<Leadership>,
    /// What the head before has left, as it was read when the lead was taken.
    records: Records,
    /// The runtime that drives the connections to etcd.
    runtime: Handle,
}

impl Backend for EtcdStore {
    fn next_term(&mut self) -> Result<Term, StoreError> {
        Ok(self.leadership.term())
    }

    fn records(&mut self, table: Table) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let of_table =
            |(of, name, record): &(Table, String, Vec<u8>)| (*of == table).then(|| (name.clone(), record.clone()));
        Ok(self.records.iter().filter_map(of_table).collect())
    }

    fn keep(&mut self, table: Table, name: &str, record: Option<&[u8]>) -> Result<(), StoreError> {
        self.runtime.block_on(self.leadership.keep(table, name, record)).map_err(StoreError::Etcd)
    }
}

impl Leadership {
    /// Writes a record, or removes it. Waits for as long as etcd does not answer, or this head may not act: what was not
    /// written is never told to anybody, and a head that does not lead any more ends meanwhile.
    async fn keep(&self, table: Table, name: &str, record: Option<&[u8]>) -> Result<(), EtcdError> {
        let key = self.place().record(table, name);
        loop {
            if let Some(fence) = self.fence() {
                let write = match record {
                    Some(record) => Write::Put { key: key.clone(), value: record.to_vec(), lease: 0 },
                    None => Write::Delete { key: key.clone() },
                };
                let leads = Check::Created(self.place().leader(), fence);
                match self.client().write_if(&[leads], vec![write]).await {
                    Ok(Done::Yes { .. }) => return Ok(()),
                    Ok(Done::No) => self.doubt(),
                    Err(error @ (EtcdError::Refused { .. } | EtcdError::OtherAuthority { .. })) => return Err(error),
                    // It may have been done: doing it again changes nothing.
                    Err(EtcdError::Unreachable { .. }) => {}
                }
            }
            tokio::time::sleep(WRITE_AGAIN).await;
        }
    }
}
