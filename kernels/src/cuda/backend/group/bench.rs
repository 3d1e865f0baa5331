//! How long sums over the devices of a group take, by each way that there is.
//!
//! Owns the buffers and the timing: the same buffers for every way, in one run. The ways are the served ones; nothing is
//! reduced here by code that serves nobody.
//!
//! **Invariant:** all ranks measure the same ways in the same order; a figure is the slowest rank's, and stands beside whether
//! the sums were right.

use std::time::Duration;

use half::{bf16, f16};
use nccl_rs::{Library, Search};

use super::nccl::NcclGroup;
use super::peers::Peers;
use super::{Exchange, Rows};
use crate::cuda::backend::PEER_WAIT;
use crate::cuda::backend::buffers::Dtype;
use crate::cuda::peer_plan::{Algorithm, PeerOp, PeerPlan, Rule};
use crate::cuda::{Context, DeviceMemory, Event, GraphExec, ModuleSet, ModuleSettings, Priority, Stream};
use crate::{Collective, CollectiveError, KernelError};

/// Values in a row of the fused reduction: that of the models for which these figures matter.
const HIDDEN: usize = 4096;
/// Longest wait for the device: longer than a kernel waits for another rank.
const DEADLINE: Duration = Duration::from_secs(60);
/// Timed repetitions, of which the middle one counts.
const NUM_SAMPLES: usize = 5;
/// Bytes that a sample should move at most, and how many sums it has.
const SAMPLE_BYTES: usize = 512 << 20;
const NUM_SUMS: (usize, usize) = (4, 100);
/// Values of the pattern: their sum over eight ranks is exact in bfloat16.
const PATTERN: usize = 29;

/// A way to sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceWay {
    /// As a model's step would: own kernels, by the group's table.
    Planned,
    /// Every rank reads all ranks' data.
    Pull {
        /// Most blocks.
        blocks: u32,
    },
    /// Every rank sums a slice and spreads it.
    TwoShot {
        /// Most blocks.
        blocks: u32,
    },
    /// Rows into the other ranks' inboxes; adds to the residual stream and normalises as well.
    Push {
        /// Blocks that share a row.
        cluster: u32,
    },
    /// NCCL, as a model's step calls it.
    Nccl,
    /// NCCL, recorded into a graph as the own kernels are.
    NcclGraph,
}

impl ReduceWay {
    /// Every way, those that may spoil a communicator last.
    pub const ALL: [Self; 12] = [
        Self::Planned,
        Self::Pull { blocks: 16 },
        Self::Pull { blocks: 64 },
        Self::Pull { blocks: 128 },
        Self::TwoShot { blocks: 16 },
        Self::TwoShot { blocks: 64 },
        Self::TwoShot { blocks: 128 },
        Self::Push { cluster: 1 },
        Self::Push { cluster: 2 },
        Self::Push { cluster: 4 },
        Self::Nccl,
        Self::NcclGraph,
    ];

    /// The word in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Planned => "own",
            Self::Pull { .. } => "pull",
            Self::TwoShot { .. } => "two-shot",
            Self::Push { .. } => "push+add+norm",
            Self::Nccl => "nccl",
            Self::NcclGraph => "nccl in a graph",
        }
    }

    /// Blocks at most, or blocks of a cluster.
    pub fn blocks(self) -> u32 {
        match self {
            Self::Pull { blocks } | Self::TwoShot { blocks } => blocks,
            Self::Push { cluster } => cluster,
            Self::Planned | Self::Nccl | Self::NcclGraph => 0,
        }
    }

    fn is_own(self) -> bool {
        !matches!(self, Self::Nccl | Self::NcclGraph)
    }

    /// The group's table for this way alone.
    fn plan(self, world_size: u32) -> Result<PeerPlan, KernelError> {
        let usual = PeerPlan::usual(world_size);
        let rules = |op| usual.rules(op).to_vec();
        let only = |algorithm, blocks_max| vec![Rule { bytes_max: u64::MAX, algorithm, blocks_max }];
        let (mut fused, mut plain) = (rules(PeerOp::ReduceAddNorm), rules(PeerOp::AllReduce));
        match self {
            Self::Planned | Self::Nccl | Self::NcclGraph => {}
            Self::Pull { blocks } => plain = only(Algorithm::Pull, blocks),
            Self::TwoShot { blocks } => plain = only(Algorithm::TwoShot, blocks),
            Self::Push { cluster } => fused = only(Algorithm::Push { cluster }, crate::cuda::peer_memory::BLOCKS_MAX),
        }
        let unfit = |error: crate::cuda::peer_memory::PeerPlanError| setup(error.to_string());
        PeerPlan::from_rules(fused, plain, rules(PeerOp::AllGather)).map_err(unfit)
    }
}

/// What one way took for one size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReduceTiming {
    /// One sum on the slowest rank.
    pub seconds: f64,
    /// Whether every rank found the sums that they should be.
    pub is_right: bool,
}

/// A rank of a group that measures.
pub struct ReduceBench {
    peers: Option<Peers>,
    nccl: Option<NcclGroup>,
    nccl_missing: Option<String>,
    terms: DeviceMemory,
    residual: DeviceMemory,
    weight: DeviceMemory,
    normed: DeviceMemory,
    pattern: Vec<u8>,
    sums: Vec<f32>,
    stream: Stream,
    dtype: Dtype,
    collective: Box<dyn Collective>,
}

impl ReduceBench {
    /// Opens the first visible device and joins the group: through peer memory, and through NCCL. Collective.
    ///
    /// # Errors
    /// No usable device, or no memory. A group without peer access or NCCL is none: those ways are left out.
    pub fn open(
        modules: &ModuleSettings,
        mut collective: Box<dyn Collective>,
        bytes_max: usize,
    ) -> Result<Self, KernelError> {
        let context = Context::open(0)?;
        let dtype = if context.device().has_bfloat16() { Dtype::Bf16 } else { Dtype::F16 };
        let stream = Stream::new(&context, Priority::High)?;
        let modules = ModuleSet::new(&context, modules.clone());
        let exchange = Exchange { dtype, hidden: HIDDEN, only_nccl: false, wait_max: PEER_WAIT };
        let peers = Peers::form(&context, &stream, &modules, &exchange, &mut *collective)?;
        let (nccl, nccl_missing) = match join(&exchange, &mut *collective)? {
            Ok(nccl) => (Some(nccl), None),
            Err(reason) => (None, Some(reason)),
        };
        let rows = Peers::ROWS_MAX.min(bytes_max.div_ceil(HIDDEN * dtype.bytes()));
        let alloc = |values: usize, bytes: usize| DeviceMemory::alloc(&context, values * bytes);
        let memory = (alloc(rows * HIDDEN, 4)?, alloc(HIDDEN, 4)?, alloc(rows * HIDDEN, dtype.bytes())?);
        let terms = DeviceMemory::alloc(&context, bytes_max)?;
        let (rank, world_size) = (collective.rank(), collective.world_size());
        let num = bytes_max / dtype.bytes();
        let pattern = (0..num).flat_map(|index| stored(dtype, value(index, rank))).collect();
        let sums = (0..num).map(|index| (0..world_size).map(|rank| value(index, rank)).sum()).collect();
        let (residual, weight, normed) = memory;
        stream.fill(weight.span(), 0)?;
        Ok(Self {
            peers,
            nccl,
            nccl_missing,
            terms,
            residual,
            weight,
            normed,
            pattern,
            sums,
            stream,
            dtype,
            collective,
        })
    }

    /// Whether the devices reach each other's memory.
    pub fn has_peers(&self) -> bool {
        self.peers.is_some()
    }

    /// Why NCCL takes no part, where it takes none.
    pub fn nccl_missing(&self) -> Option<&str> {
        self.nccl_missing.as_deref()
    }

    /// Whether a way can sum so many bytes of each rank here; the same on all ranks.
    pub fn can(&self, way: ReduceWay, bytes: usize) -> bool {
        let fits = bytes <= self.terms.len() && bytes.is_multiple_of(16);
        let row_bytes = HIDDEN * self.dtype.bytes();
        fits && match way {
            ReduceWay::Nccl | ReduceWay::NcclGraph => self.nccl.is_some(),
            ReduceWay::Push { cluster } => {
                let has_clusters = self.stream.context().device().capability.0 >= 9;
                let rows = bytes / row_bytes;
                self.has_peers()
                    && bytes.is_multiple_of(row_bytes)
                    && (1..=Peers::ROWS_MAX).contains(&rows)
                    && (cluster == 1 || has_clusters)
            }
            _ => self.has_peers(),
        }
    }

    /// Sums `bytes` of each rank, looks at the result, and takes the time of many. Collective.
    ///
    /// # Errors
    /// A way that `can` refuses, a rank that is late or gone, a device that failed: the group is broken then.
    pub fn measure(&mut self, way: ReduceWay, bytes: usize) -> Result<ReduceTiming, KernelError> {
        if !self.can(way, bytes) {
            return Err(setup(format!("{} cannot sum {bytes} bytes here", way.name())));
        }
        let world_size = self.collective.world_size() as u32;
        if let Some(peers) = self.peers.as_mut().filter(|_| way.is_own()) {
            peers.set_plan(way.plan(world_size)?);
        }
        let is_right = self.is_right(way, bytes)?;
        let seconds = self.seconds(way, bytes)?;
        let mine = [&seconds.to_le_bytes()[..], &[u8::from(is_right)]].concat();
        let mut all = vec![0; mine.len() * world_size as usize];
        self.collective.all_gather(&mine, &mut all)?;
        let mut slowest = ReduceTiming { seconds: 0.0, is_right: true };
        for rank in all.chunks(mine.len()) {
            let Some((seconds, right)) = rank.split_first_chunk() else { continue };
            slowest.seconds = slowest.seconds.max(f64::from_le_bytes(*seconds));
            slowest.is_right &= right == [1];
        }
        Ok(slowest)
    }

    /// Puts one sum into the stream.
    fn run(&self, way: ReduceWay, bytes: usize) -> Result<(), KernelError> {
        let terms = self.terms.part(0..bytes)?;
        let absent = || setup(format!("{} is not there", way.name()));
        if !way.is_own() {
            return self.nccl.as_ref().ok_or_else(absent)?.all_reduce(&self.stream, terms);
        }
        let peers = self.peers.as_ref().ok_or_else(absent)?;
        if !matches!(way, ReduceWay::Push { .. }) {
            return peers.all_reduce(&self.stream, terms);
        }
        let rows = bytes / (HIDDEN * self.dtype.bytes());
        let rows = Rows {
            terms,
            residual: self.residual.part(0..rows * HIDDEN * 4)?,
            weight: self.weight.span(),
            normed: self.normed.part(0..bytes)?,
            rows,
            hidden: HIDDEN,
            eps: 1e-6,
        };
        if peers.reduce_add_norm(&self.stream, &rows)? { Ok(()) } else { Err(absent()) }
    }

    /// Sums a pattern whose sum is known.
    fn is_right(&self, way: ReduceWay, bytes: usize) -> Result<bool, KernelError> {
        let num = bytes / self.dtype.bytes();
        let pattern = self.pattern.get(..bytes).unwrap_or_default();
        self.stream.upload(pattern, self.terms.part(0..bytes)?, DEADLINE)?;
        self.stream.fill(self.residual.span(), 0)?;
        self.run(way, bytes)?;
        self.wait(way)?;
        let expected = self.sums.iter().take(num);
        if matches!(way, ReduceWay::Push { .. }) {
            let mut found = vec![0; num * 4];
            self.stream.download(self.residual.part(0..num * 4)?, &mut found, DEADLINE)?;
            return Ok(found.chunks_exact(4).zip(expected).all(|(bits, sum)| bits == sum.to_le_bytes()));
        }
        let mut found = vec![0; bytes];
        self.stream.download(self.terms.part(0..bytes)?, &mut found, DEADLINE)?;
        Ok(found.chunks_exact(2).zip(expected).all(|(bits, sum)| bits == stored(self.dtype, *sum)))
    }

    /// The middle of some samples, each of many sums.
    ///
    /// The first of a sample's launches is not timed: after it the ranks are in step, so that no figure holds the wait for a
    /// rank that began later.
    fn seconds(&mut self, way: ReduceWay, bytes: usize) -> Result<f64, KernelError> {
        let num = (SAMPLE_BYTES / bytes.max(1)).clamp(NUM_SUMS.0, NUM_SUMS.1);
        // Zeroes stay what they are, however often they are summed.
        self.stream.fill(self.terms.part(0..bytes)?, 0)?;
        self.stream.fill(self.residual.span(), 0)?;
        let many = || (0..num).try_for_each(|_| self.run(way, bytes));
        let graph = if way == ReduceWay::Nccl { None } else { Some(self.stream.capture("all-reduce", many)?) };
        let again = |graph: &Option<GraphExec>| match graph {
            // SAFETY: what is recorded are launches of `run`, whose memory `self` holds.
            Some(graph) => unsafe { graph.launch(&self.stream) }.map_err(KernelError::from),
            None => (0..num).try_for_each(|_| self.run(way, bytes)),
        };
        let (from, to) = (Event::timing(self.stream.context())?, Event::timing(self.stream.context())?);
        let mut samples = Vec::with_capacity(NUM_SAMPLES);
        for _ in 0..NUM_SAMPLES {
            again(&graph)?;
            from.record(&self.stream)?;
            again(&graph)?;
            to.record(&self.stream)?;
            to.wait(DEADLINE, "sums over the devices")?;
            samples.push(to.since(&from)?.as_secs_f64() / num as f64);
        }
        self.wait(way)?;
        samples.sort_unstable_by(f64::total_cmp);
        Ok(samples.get(NUM_SAMPLES / 2).copied().unwrap_or_default())
    }

    fn wait(&self, way: ReduceWay) -> Result<(), KernelError> {
        self.stream.synchronize(DEADLINE, "sums over the devices")?;
        match (&self.peers, &self.nccl) {
            (Some(peers), _) if way.is_own() => peers.check(),
            (_, Some(nccl)) if !way.is_own() => nccl.check(),
            _ => Ok(()),
        }
    }
}

/// Joins NCCL, or says why not, on all ranks alike.
fn join(exchange: &Exchange, collective: &mut dyn Collective) -> Result<Result<NcclGroup, String>, KernelError> {
    // Asked first: a rank without the library would leave the others waiting.
    let library = Library::open(&Search::default());
    if !all_agree(library.is_ok(), collective)? {
        let reason = library.err().map_or_else(|| "another rank has no library".into(), |error| error.to_string());
        return Ok(Err(reason));
    }
    let joined = NcclGroup::form(exchange, collective).map_err(|error| error.to_string());
    if !all_agree(joined.is_ok(), collective)? {
        return Ok(Err(joined.err().unwrap_or_else(|| "another rank could not join".into())));
    }
    Ok(joined)
}

fn all_agree(mine: bool, collective: &mut dyn Collective) -> Result<bool, KernelError> {
    let mut all = vec![0; collective.world_size()];
    collective.all_gather(&[u8::from(mine)], &mut all)?;
    Ok(!all.contains(&0))
}

fn value(index: usize, rank: usize) -> f32 {
    ((index * 7 + rank * 3) % PATTERN) as f32
}

/// As the device stores it. Only 16-bit types are measured.
fn stored(dtype: Dtype, value: f32) -> [u8; 2] {
    if dtype == Dtype::Bf16 { bf16::from_f32(value).to_le_bytes() } else { f16::from_f32(value).to_le_bytes() }
}

fn setup(reason: String) -> KernelError {
    CollectiveError::Setup { reason }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_has_a_table_and_the_pattern_sums_exactly() {
        for way in ReduceWay::ALL {
            for world_size in [2, 4, 8] {
                assert!(way.plan(world_size).is_ok(), "{way:?}");
            }
        }
        for index in 0..1000 {
            let sum: f32 = (0..8).map(|rank| value(index, rank)).sum();
            assert_eq!(bf16::from_f32(sum).to_f32(), sum);
        }
    }
}
