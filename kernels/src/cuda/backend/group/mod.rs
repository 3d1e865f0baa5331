//! The devices of a group: how terms are summed and records gathered.
//!
//! Devices that reach each other's memory exchange by kernels of our own; others, and those that are told to, through NCCL. Steps
//! record both.
//!
//! **Invariant:** which way is taken, and every launch's size, is the same on all ranks: it was agreed when the group formed,
//! and depends on padded shapes only.

mod bench;
mod nccl;
mod peers;

use std::time::Duration;

use super::CudaOps;
use super::buffers::Dtype;
use crate::cuda::{Context, ModuleSet, Span, Stream};
use crate::{Collective, KernelError};
pub use bench::{ReduceBench, ReduceTiming, ReduceWay};
use nccl::NcclGroup;
use peers::Peers;

/// The device's part in its group.
pub(super) enum Group {
    /// A group of one.
    One,
    /// Peers on one node.
    Peers(Box<Peers>),
    /// Through NCCL.
    Nccl(Box<NcclGroup>),
}

/// What a group is formed for.
pub(super) struct Exchange {
    /// Type of terms.
    pub dtype: Dtype,
    /// Values in a row of the residual stream.
    pub hidden: usize,
    /// Through NCCL, whether or not devices reach each other's memory.
    pub only_nccl: bool,
    /// Longest wait of a kernel for another rank.
    pub wait_max: Duration,
}

/// Rows that are summed and normalised.
pub(super) struct Rows {
    /// `[rows, hidden]`: this rank's terms.
    pub terms: Span,
    /// `[rows, hidden]`, f32.
    pub residual: Span,
    /// `[hidden]`, f32.
    pub weight: Span,
    /// `[rows, hidden]`: what comes out.
    pub normed: Span,
    /// How many.
    pub rows: usize,
    /// Values in each.
    pub hidden: usize,
    /// Added to the mean of squares.
    pub eps: f32,
}

impl Group {
    /// Forms the group. Collective.
    pub(super) fn form(
        context: &Context,
        stream: &Stream,
        modules: &ModuleSet,
        exchange: &Exchange,
        collective: &mut dyn Collective,
    ) -> Result<Self, KernelError> {
        if collective.world_size() == 1 {
            return Ok(Self::One);
        }
        let peers = match exchange.only_nccl {
            true => None,
            false => Peers::form(context, stream, modules, exchange, collective)?,
        };
        match peers {
            Some(peers) => Ok(Self::Peers(Box::new(peers))),
            None => Ok(Self::Nccl(Box::new(NcclGroup::form(exchange, collective)?))),
        }
    }

    /// Ranks.
    pub(super) fn world_size(&self) -> usize {
        match self {
            Self::One => 1,
            Self::Peers(peers) => peers.world_size(),
            Self::Nccl(nccl) => nccl.world_size(),
        }
    }

    /// What is known while the device still works: a peer that is gone is seen before anything that waits for it ends.
    pub(super) fn look(&self) -> Result<(), KernelError> {
        match self {
            Self::One | Self::Peers(_) => Ok(()),
            Self::Nccl(nccl) => nccl.check(),
        }
    }

    /// Ends what waits for other ranks on this device: this rank takes no part any more.
    pub(super) fn abort(&mut self) {
        match self {
            Self::One => {}
            Self::Peers(peers) => peers.abort(),
            Self::Nccl(nccl) => nccl.abort(),
        }
    }

    /// Whether all exchanges so far have ended well. Looked at when the device has ended them.
    pub(super) fn check(&self) -> Result<(), KernelError> {
        match self {
            Self::One => Ok(()),
            Self::Peers(peers) => peers.check(),
            Self::Nccl(nccl) => nccl.check(),
        }
    }
}

impl CudaOps {
    /// Replaces terms by their sum over the ranks.
    pub(super) fn all_reduce(&self, terms: Span) -> Result<(), KernelError> {
        match &self.group {
            Group::One => Ok(()),
            Group::Peers(peers) => peers.all_reduce(&self.stream, terms),
            Group::Nccl(nccl) => nccl.all_reduce(&self.stream, terms),
        }
    }

    /// Sums terms, adds them to the residual stream and normalises it by one kernel; false where there is none for the shape.
    pub(super) fn reduce_add_norm_at_once(&self, rows: &Rows) -> Result<bool, KernelError> {
        match &self.group {
            Group::Peers(peers) => peers.reduce_add_norm(&self.stream, rows),
            Group::One | Group::Nccl(_) => Ok(false),
        }
    }

    /// Every rank's `own`, in rank order: `own` itself in a group of one.
    pub(super) fn gather(&self, own: Span, into: Span) -> Result<Span, KernelError> {
        let everyones = || Ok::<Span, KernelError>(into.part(0..own.len() * self.group.world_size())?);
        match &self.group {
            Group::One => return Ok(own),
            Group::Peers(peers) => peers.all_gather(&self.stream, own, everyones()?)?,
            Group::Nccl(nccl) => nccl.all_gather(&self.stream, own, everyones()?)?,
        }
        everyones()
    }
}
