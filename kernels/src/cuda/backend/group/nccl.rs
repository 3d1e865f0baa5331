//! Devices that do not reach each other's memory, through NCCL.
//!
//! Calls are recorded into graphs as kernels of our own are: the library takes part in a recording by itself, and being asked
//! whether a call has been put into the stream asks the device nothing.
//!
//! **Invariant:** every rank records and replays the same steps in the same order, as recordings that hold these calls are collective.
//! **Invariant:** NCCL's kernels wait for each other without a limit of their own: whoever waits for the device has one, and
//! `abort` ends them before anything that they use is dropped.

use std::time::Duration;

use nccl_rs::{
    Communicator, DataType, DevicePtr, Elements, Library, Membership, NcclError, ReduceOp, Search,
    Stream as NcclStream, UniqueId,
};

use super::Exchange;
use crate::cuda::backend::buffers::Dtype;
use crate::cuda::{Span, Stream};
use crate::{Collective, CollectiveError, KernelError};

/// Longest wait for all ranks to meet, and of a call that does not wait for the device.
const INIT_DEADLINE: Duration = Duration::from_secs(60);

/// The group as this rank sees it.
pub(in super::super) struct NcclGroup {
    communicator: Communicator,
    data_type: DataType,
    world_size: usize,
}

impl NcclGroup {
    /// Joins the communicator. Collective.
    pub(super) fn form(exchange: &Exchange, collective: &mut dyn Collective) -> Result<Self, KernelError> {
        let (rank, world_size) = (collective.rank(), collective.world_size());
        let library = Library::open(&Search::default()).map_err(setup)?;
        let own = if rank == 0 { *library.unique_id().map_err(setup)?.as_bytes() } else { [0; UniqueId::BYTES] };
        let mut all = vec![0; UniqueId::BYTES * world_size];
        collective.all_gather(&own, &mut all)?;
        let id = UniqueId::from_bytes(*all.first_chunk().unwrap_or(&own));
        let membership = Membership::new(id, rank as u32, world_size as u32).with_init_deadline(INIT_DEADLINE);
        let communicator = Communicator::join(&library, &membership).map_err(setup)?;
        let data_type = match exchange.dtype {
            Dtype::F32 => DataType::F32,
            Dtype::F16 => DataType::F16,
            Dtype::Bf16 => DataType::Bf16,
        };
        Ok(Self { communicator, data_type, world_size })
    }

    pub(super) fn world_size(&self) -> usize {
        self.world_size
    }

    pub(super) fn check(&self) -> Result<(), KernelError> {
        self.communicator.async_error().map_err(setup)
    }

    /// Ends the library's work on the device; recordings that hold it are dropped after this and before the group.
    pub(super) fn abort(&mut self) {
        // Without a thread to do so nothing can be done: the process is about to end, and that ends it.
        let _ = self.communicator.begin_abort();
    }

    pub(super) fn all_reduce(&self, stream: &Stream, terms: Span) -> Result<(), KernelError> {
        let elements = Elements::new(terms.len() / self.data_type.bytes(), self.data_type);
        let at = DevicePtr(terms.address());
        // SAFETY: a span is live memory of this device; the stream is its own, and drains before either is dropped.
        unsafe { self.communicator.all_reduce(at, at, elements, ReduceOp::Sum, raw(stream)) }.map_err(setup)
    }

    pub(super) fn all_gather(&self, stream: &Stream, own: Span, everyones: Span) -> Result<(), KernelError> {
        let elements = Elements::new(own.len(), DataType::U8);
        let (from, to) = (DevicePtr(own.address()), DevicePtr(everyones.address()));
        // SAFETY: as in `all_reduce`; `everyones` holds one part a rank.
        unsafe { self.communicator.all_gather(from, to, elements, raw(stream)) }.map_err(setup)
    }
}

fn raw(stream: &Stream) -> NcclStream {
    NcclStream::from_raw(stream.as_raw())
}

fn setup(error: NcclError) -> KernelError {
    CollectiveError::Setup { reason: error.to_string() }.into()
}
