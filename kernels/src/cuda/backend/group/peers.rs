//! Devices of one node, by kernels over each other's memory.
//!
//! Owns this rank's symmetric buffer and the mappings of the others', and the two words through which waiting kernels and the
//! host speak. The kernels are in `cuda/peer.cu`, their sizes in `peer_plan.rs`.
//!
//! **Invariant:** a kernel that waits ends by itself, at its limit or when this rank's part in the group ends: it leaves a record,
//! which is looked at before a step's results are used.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::super::STEP_DEADLINE;
use super::super::buffers::Dtype;
use super::{Exchange, Rows};
use crate::cuda::peer_memory::{HostWords, PeerFailure, PeerGroup, PeerLayout, PeerLimits, WORLD_MAX};
use crate::cuda::peer_plan::{Launch, PeerPlan, ReduceAddNorm, Residency, Row};
use crate::cuda::{
    Context, DeviceMemory, IpcHandle, Kernel, KernelArg, LaunchConfig, ModuleSet, PeerMemory, PinnedMemory, Span,
    Stream,
};
use crate::{Collective, CollectiveError, KernelError, kernel_args};

/// Most bytes of a rank in a gather of small records.
const GATHER_BYTES_MAX: u32 = 64 << 10;
/// Bytes of a piece of a one-shot reduction, and of a two-shot one.
const STAGING_BYTES: u32 = 1 << 20;
const SCATTER_BYTES: u32 = 8 << 20;
/// The word that ends waits, in words, and the record of a wait that ended so, in bytes of the pinned memory.
const ABORT_WORD: usize = 0;
const STATUS_AT: usize = 64;
const WORDS_BYTES: usize = 128;
/// Longest name of a machine's boot that is compared.
const BOOT_ID_BYTES: usize = 40;

/// The group as this rank sees it.
pub(in super::super) struct Peers {
    kernels: PeerKernels,
    plan: PeerPlan,
    layout: PeerLayout,
    residency: Residency,
    group: [u8; PeerGroup::BYTES],
    dtype: Dtype,
    rank: usize,
    /// The device, for those who read that it waited.
    device: String,
    is_dependent: bool,
    wait_max: Duration,
    words: PinnedMemory,
    _mapped: Vec<PeerMemory>,
    _own: DeviceMemory,
}

struct PeerKernels {
    reduce_add_norm: Kernel,
    pull: Kernel,
    two_shot: Kernel,
    gather: Kernel,
    gather_staged: Kernel,
}

/// What a rank tells the others, as bytes.
struct Card {
    boot_id: [u8; BOOT_ID_BYTES],
    handle: [u8; 64],
    len: u64,
}

impl Card {
    const BYTES: usize = BOOT_ID_BYTES + 64 + 8;

    fn to_bytes(&self) -> Vec<u8> {
        [&self.boot_id[..], &self.handle, &self.len.to_le_bytes()].concat()
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (boot_id, rest) = bytes.split_first_chunk()?;
        let (handle, len) = rest.split_first_chunk()?;
        Some(Self { boot_id: *boot_id, handle: *handle, len: u64::from_le_bytes(*len.first_chunk()?) })
    }
}

/// Names the running system: two processes with the same name share its devices.
fn boot_id() -> [u8; BOOT_ID_BYTES] {
    let text = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let mut id = [0; BOOT_ID_BYTES];
    id.iter_mut().zip(text).for_each(|(to, from)| *to = from);
    id
}

impl Peers {
    /// Most rows whose sum is fused with the norm.
    pub(super) const ROWS_MAX: usize = 512;

    /// Forms the group, or finds on all ranks alike that the devices do not reach each other. Collective.
    pub(super) fn form(
        context: &Context,
        stream: &Stream,
        modules: &ModuleSet,
        exchange: &Exchange,
        collective: &mut dyn Collective,
    ) -> Result<Option<Self>, KernelError> {
        let (rank, world_size) = (collective.rank(), collective.world_size());
        let row_bytes_max = (exchange.hidden * exchange.dtype.bytes()) as u32;
        let layout = PeerLayout::new(PeerLimits {
            world_size: world_size.min(u32::MAX as usize) as u32,
            rows_max: Self::ROWS_MAX as u32,
            row_bytes_max,
            gather_bytes_max: GATHER_BYTES_MAX,
            staging_bytes_max: STAGING_BYTES,
            scatter_bytes_max: SCATTER_BYTES,
        });
        let (Ok(layout), true) = (layout, world_size <= WORLD_MAX) else { return Ok(None) };
        let own = DeviceMemory::alloc(context, layout.bytes() as usize)?;
        stream.fill(own.span(), 0)?;
        stream.synchronize(STEP_DEADLINE, "the exchange buffer")?;
        let cards = exchange_cards(&own, collective)?;
        let (bases, mapped) = map(context, &own, &cards, rank);
        // All or none: a device that does not reach one of the others sends the whole group to NCCL.
        let reached = u8::from(bases.len() == world_size);
        let mut all = vec![0; world_size];
        collective.all_gather(&[reached], &mut all)?;
        if all.contains(&0) {
            return Ok(None);
        }
        let words = PinnedMemory::alloc(context, WORDS_BYTES)?;
        let address = words.span().address();
        let host = HostWords {
            abort: address + ABORT_WORD as u64 * 4,
            status: address + STATUS_AT as u64,
            limit_ns: exchange.wait_max.as_nanos() as u64,
        };
        let unfit = |reason: String| KernelError::from(CollectiveError::Setup { reason });
        let group = layout.group(rank as u32, &bases, host).map_err(|error| unfit(error.to_string()))?;
        let device = context.device();
        let has_clusters = device.capability.0 >= 9;
        Ok(Some(Self {
            kernels: PeerKernels::find(modules, exchange.dtype)?,
            plan: PeerPlan::usual(world_size as u32),
            layout,
            residency: Residency { blocks: device.num_multiprocessors, has_clusters },
            group: group.to_bytes(),
            dtype: exchange.dtype,
            rank,
            device: format!("{} ({})", device.name, device.uuid),
            is_dependent: has_clusters,
            wait_max: exchange.wait_max,
            words,
            _mapped: mapped,
            _own: own,
        }))
    }

    /// Takes another table; all ranks take the same one.
    pub(super) fn set_plan(&mut self, plan: PeerPlan) {
        self.plan = plan;
    }

    pub(super) fn world_size(&self) -> usize {
        self.layout.limits().world_size as usize
    }

    /// What the first kernel that gave up has left.
    pub(super) fn check(&self) -> Result<(), KernelError> {
        let word = |index: usize| u64::from(self.words.words()[index].load(Ordering::Relaxed));
        let status = word(STATUS_AT / 4) | word(STATUS_AT / 4 + 1) << 32;
        let Some(failure) = PeerFailure::from_status(status) else { return Ok(()) };
        let limit_ms = (!failure.aborted).then_some(self.wait_max.as_millis() as u64);
        let (rank, device) = (self.rank, self.device.clone());
        Err(CollectiveError::DeviceWait { op: failure.kernel, rank, device, peer: failure.peer as usize, limit_ms }
            .into())
    }

    /// Ends the waits of this rank's kernels, now and later: the group is over.
    pub(super) fn abort(&self) {
        self.words.words()[ABORT_WORD].store(1, Ordering::Relaxed);
    }

    pub(super) fn all_reduce(&self, stream: &Stream, terms: Span) -> Result<(), KernelError> {
        let launch = self.plan.all_reduce(&self.residency, terms.len() as u64);
        let length = (terms.len() / self.dtype.bytes()) as u64;
        let kernel = self.kernels.of(launch.kernel);
        self.launch(stream, kernel, &launch, |group| kernel_args![group, terms, terms, length].to_vec())
    }

    pub(super) fn reduce_add_norm(&self, stream: &Stream, rows: &Rows) -> Result<bool, KernelError> {
        let row = Row { hidden: rows.hidden as u32, element_bytes: self.dtype.bytes() as u32 };
        let planned = self.plan.reduce_add_norm(&self.residency, &self.layout, rows.rows as u32, row);
        let ReduceAddNorm::Fused(launch) = planned else { return Ok(false) };
        let Rows { terms, residual, weight, normed, rows, hidden, eps } = *rows;
        self.launch(stream, &self.kernels.reduce_add_norm, &launch, |group| {
            kernel_args![group, terms, residual, weight, normed, rows as u32, hidden as u32, eps].to_vec()
        })?;
        Ok(true)
    }

    pub(super) fn all_gather(&self, stream: &Stream, own: Span, everyones: Span) -> Result<(), KernelError> {
        let launch = self.plan.all_gather(&self.residency, &self.layout, own.len() as u64);
        let kernel = self.kernels.of(launch.kernel);
        let is_staged = launch.kernel == "peer_all_gather_staged";
        self.launch(stream, kernel, &launch, |group| match is_staged {
            true => kernel_args![group, own, everyones, own.len() as u64].to_vec(),
            false => kernel_args![group, own, everyones, own.len() as u32].to_vec(),
        })
    }

    fn launch<'a>(
        &'a self,
        stream: &Stream,
        kernel: &Kernel,
        launch: &Launch,
        args: impl FnOnce(&'a [u8]) -> Vec<KernelArg<'a>>,
    ) -> Result<(), KernelError> {
        let mut config = LaunchConfig::linear(launch.grid, launch.block);
        if launch.cluster > 1 {
            config = config.cluster([launch.cluster, 1, 1]);
        }
        if self.is_dependent {
            config = config.dependent();
        }
        // SAFETY: `PeerGroup` is the kernels' own struct; buffers were mapped when the group formed and live as long as
        // this value; the plan keeps sizes within the layout.
        Ok(unsafe { stream.launch(kernel, &config, &args(&self.group)) }?)
    }
}

impl PeerKernels {
    fn find(modules: &ModuleSet, dtype: Dtype) -> Result<Self, KernelError> {
        let typed = |name: &str| modules.kernel("peer", &format!("{name}_{}", dtype.suffix()));
        Ok(Self {
            reduce_add_norm: typed("peer_reduce_add_norm")?,
            pull: typed("peer_all_reduce_pull")?,
            two_shot: typed("peer_all_reduce_two_shot")?,
            gather: modules.kernel("peer", "peer_all_gather")?,
            gather_staged: modules.kernel("peer", "peer_all_gather_staged")?,
        })
    }

    fn of(&self, name: &str) -> &Kernel {
        match name {
            "peer_all_reduce_pull" => &self.pull,
            "peer_all_reduce_two_shot" => &self.two_shot,
            "peer_all_gather" => &self.gather,
            "peer_all_gather_staged" => &self.gather_staged,
            _ => &self.reduce_add_norm,
        }
    }
}

/// Every rank's card, in rank order; `None` where one makes no sense.
fn exchange_cards(own: &DeviceMemory, collective: &mut dyn Collective) -> Result<Vec<Option<Card>>, KernelError> {
    // A platform without such handles sends one that nobody can open.
    let handle = own.ipc_handle().map_or([0; 64], |handle| handle.bytes);
    let card = Card { boot_id: boot_id(), handle, len: own.len() as u64 };
    let mut all = vec![0; Card::BYTES * collective.world_size()];
    collective.all_gather(&card.to_bytes(), &mut all)?;
    Ok(all.chunks(Card::BYTES).map(Card::parse).collect())
}

/// The buffers of all ranks as this process sees them; fewer where one cannot be reached.
fn map(context: &Context, own: &DeviceMemory, cards: &[Option<Card>], rank: usize) -> (Vec<u64>, Vec<PeerMemory>) {
    let (mut bases, mut mapped) = (Vec::new(), Vec::new());
    let here = boot_id();
    for (peer, card) in cards.iter().enumerate() {
        if peer == rank {
            bases.push(own.address());
            continue;
        }
        let Some(card) = card.as_ref().filter(|card| card.boot_id == here) else { break };
        let Ok(memory) = PeerMemory::open(context, &IpcHandle { bytes: card.handle, len: card.len }) else { break };
        bases.push(memory.address());
        mapped.push(memory);
    }
    (bases, mapped)
}
