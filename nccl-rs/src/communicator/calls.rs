//! What a communicator is for: collectives, pairs, and groups of calls.
//!
//! Owns the translation of arguments. Knows neither how a communicator began nor how it ends.
//!
//! **Invariant:** no call reaches the library with a failed communicator or a rank outside the group; a group that was started is
//! ended, however its calls end.

use super::{Communicator, argument};
use crate::error::NcclError;
use crate::types::{DevicePtr, Elements, ReduceOp, Stream};

impl Communicator {
    /// The reduction of all ranks' `from`, on every rank in `to`. Collective.
    ///
    /// # Safety
    /// `from` and `to` each hold `elements` on the communicator's device and stay so until `stream` has done the call's work;
    /// they are the same or do not overlap. `stream` belongs to that device.
    ///
    /// # Errors
    /// As for every call: [`NcclError::Call`], [`NcclError::Deadline`] or [`NcclError::Failed`]. The group must be made anew.
    pub unsafe fn all_reduce(
        &self,
        from: DevicePtr,
        to: DevicePtr,
        elements: Elements,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), NcclError> {
        let raw = self.usable()?;
        let (count, data_type) = (elements.count, elements.data_type.code());
        let all_reduce = self.library.table().all_reduce;
        // SAFETY: the communicator is alive; memory and stream are the caller's word.
        let code = unsafe { all_reduce(from.as_raw(), to.as_raw(), count, data_type, op.code(), raw, stream.as_raw()) };
        self.settle("ncclAllReduce", code)
    }

    /// All ranks' `from` in rank order, on every rank in `to`. Collective.
    ///
    /// # Safety
    /// As [`Self::all_reduce`], but `to` holds `world_size` times `elements`; in place, `from` lies at this rank's place in `to`.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    pub unsafe fn all_gather(
        &self,
        from: DevicePtr,
        to: DevicePtr,
        elements: Elements,
        stream: Stream,
    ) -> Result<(), NcclError> {
        let raw = self.usable()?;
        let (count, data_type) = (elements.count, elements.data_type.code());
        let all_gather = self.library.table().all_gather;
        // SAFETY: the communicator is alive; memory and stream are the caller's word.
        let code = unsafe { all_gather(from.as_raw(), to.as_raw(), count, data_type, raw, stream.as_raw()) };
        self.settle("ncclAllGather", code)
    }

    /// This rank's part of the reduction of all ranks' `from`. Collective.
    ///
    /// # Safety
    /// As [`Self::all_reduce`], but `from` holds `world_size` times `elements`; in place, `to` lies at this rank's place in `from`.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    pub unsafe fn reduce_scatter(
        &self,
        from: DevicePtr,
        to: DevicePtr,
        elements: Elements,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), NcclError> {
        let raw = self.usable()?;
        let (count, data_type) = (elements.count, elements.data_type.code());
        let scatter = self.library.table().reduce_scatter;
        // SAFETY: the communicator is alive; memory and stream are the caller's word.
        let code = unsafe { scatter(from.as_raw(), to.as_raw(), count, data_type, op.code(), raw, stream.as_raw()) };
        self.settle("ncclReduceScatter", code)
    }

    /// Rank `root`'s `from`, on every rank in `to`. Collective; `from` is read on `root` only.
    ///
    /// # Safety
    /// As [`Self::all_reduce`].
    ///
    /// # Errors
    /// As [`Self::all_reduce`]; [`NcclError::Argument`] for a root that is no rank.
    pub unsafe fn broadcast(
        &self,
        from: DevicePtr,
        to: DevicePtr,
        elements: Elements,
        root: u32,
        stream: Stream,
    ) -> Result<(), NcclError> {
        let raw = self.usable()?;
        let root = self.peer(root)?;
        let (count, data_type) = (elements.count, elements.data_type.code());
        let broadcast = self.library.table().broadcast;
        // SAFETY: the communicator is alive; memory and stream are the caller's word.
        let code = unsafe { broadcast(from.as_raw(), to.as_raw(), count, data_type, root, raw, stream.as_raw()) };
        self.settle("ncclBroadcast", code)
    }

    /// Sends to rank `peer`, which receives. Pairs that cross must lie in one [`Self::group`].
    ///
    /// # Safety
    /// As [`Self::all_reduce`], for `from` alone.
    ///
    /// # Errors
    /// As [`Self::broadcast`].
    pub unsafe fn send(&self, from: DevicePtr, elements: Elements, peer: u32, stream: Stream) -> Result<(), NcclError> {
        let raw = self.usable()?;
        let peer = self.peer(peer)?;
        let (count, data_type) = (elements.count, elements.data_type.code());
        // SAFETY: the communicator is alive; memory and stream are the caller's word.
        let code = unsafe { (self.library.table().send)(from.as_raw(), count, data_type, peer, raw, stream.as_raw()) };
        self.settle("ncclSend", code)
    }

    /// Receives from rank `peer`, which sends.
    ///
    /// # Safety
    /// As [`Self::all_reduce`], for `to` alone.
    ///
    /// # Errors
    /// As [`Self::broadcast`].
    pub unsafe fn recv(&self, to: DevicePtr, elements: Elements, peer: u32, stream: Stream) -> Result<(), NcclError> {
        let raw = self.usable()?;
        let peer = self.peer(peer)?;
        let (count, data_type) = (elements.count, elements.data_type.code());
        // SAFETY: the communicator is alive; memory and stream are the caller's word.
        let code = unsafe { (self.library.table().recv)(to.as_raw(), count, data_type, peer, raw, stream.as_raw()) };
        self.settle("ncclRecv", code)
    }

    /// Issues what `calls` calls as one operation. All of it is this communicator's.
    ///
    /// # Errors
    /// The first error of `calls`, else that of the group's end; [`NcclError::Argument`] for a group within a group.
    pub fn group(&self, calls: impl FnOnce() -> Result<(), NcclError>) -> Result<(), NcclError> {
        self.usable()?;
        if self.in_group.get() {
            return Err(argument("a group within a group".to_owned()));
        }
        // SAFETY: has no precondition.
        let code = unsafe { (self.library.table().group_start)() };
        self.settle("ncclGroupStart", code)?;
        self.in_group.set(true);
        let open = OpenGroup { communicator: self };
        let called = calls();
        let ended = open.end();
        called.and(ended)
    }
}

/// A group that has been started; ends it however it is left.
struct OpenGroup<'a> {
    communicator: &'a Communicator,
}

impl OpenGroup<'_> {
    fn end(self) -> Result<(), NcclError> {
        let communicator = self.communicator;
        std::mem::forget(self);
        communicator.in_group.set(false);
        // SAFETY: this thread started a group.
        let code = unsafe { (communicator.library.table().group_end)() };
        communicator.usable()?;
        communicator.settle("ncclGroupEnd", code)
    }
}

impl Drop for OpenGroup<'_> {
    /// Only a panic of the caller's comes here.
    fn drop(&mut self) {
        self.communicator.in_group.set(false);
        self.communicator.record("a panic within a group");
        // SAFETY: this thread started a group.
        unsafe { (self.communicator.library.table().group_end)() };
    }
}
