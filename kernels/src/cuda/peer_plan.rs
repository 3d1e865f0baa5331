//! Exchanges between the GPUs of one node: which algorithm takes which size, and how it is launched.
//!
//! Owns the table of rules. Plain arithmetic: knows no driver, no stream, no process.
//!
//! **Invariant:** what is chosen depends on the table, the layout and the sizes alone, which are equal on all ranks; so all ranks
//! launch the same kernels with the same grids. A grid never exceeds the blocks that are resident at once.

use super::peer_memory::{BLOCKS_MAX, PeerLayout, PeerPlanError};

/// Threads of a block that moves bulk data, and the most of one that reduces a row.
const THREADS: u32 = 512;
/// Threads of a block that gathers small records.
const GATHER_THREADS: u32 = 256;
/// Vectors of 16 bytes that a thread of the push kernel holds: a row's values in f32 stay in its registers.
const PUSH_VALUES_MAX: u32 = 16;

/// What is exchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PeerOp {
    /// The ranks' sum into the residual stream, and its norm.
    ReduceAddNorm,
    /// The ranks' sum, rounded to the type.
    AllReduce,
    /// All ranks' bytes on every rank.
    AllGather,
}

/// How it is exchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// One kernel for `ReduceAddNorm`: rows go into the other ranks' inboxes, the data is its own flag. `cluster` blocks share a row.
    Push {
        /// 1, 2, 4 or 8; above 1 needs compute capability 9.0.
        cluster: u32,
    },
    /// `ReduceAddNorm` as an `AllReduce` in place and a kernel that adds and normalises.
    Apart,
    /// Every rank reads all ranks' data.
    Pull,
    /// Every rank sums a slice and spreads it.
    TwoShot,
    /// Records with flags beside the data.
    Small,
    /// Pieces with a flag for each block.
    Staged,
}

impl Algorithm {
    fn serves(self, op: PeerOp) -> bool {
        match op {
            PeerOp::ReduceAddNorm => matches!(self, Self::Push { .. } | Self::Apart),
            PeerOp::AllReduce => matches!(self, Self::Pull | Self::TwoShot),
            PeerOp::AllGather => matches!(self, Self::Small | Self::Staged),
        }
    }
}

/// Up to how many bytes an algorithm is taken, and with how many blocks at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Largest size, in bytes of one rank's contribution.
    pub bytes_max: u64,
    /// The algorithm.
    pub algorithm: Algorithm,
    /// Most blocks.
    pub blocks_max: u32,
}

/// The group's table: per op, rules in rising order, the last without a bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerPlan {
    reduce_add_norm: Vec<Rule>,
    all_reduce: Vec<Rule>,
    all_gather: Vec<Rule>,
}

impl PeerPlan {
    /// The table of a group of a size; from figures of two H200 joined by NVLink; those of more ranks are estimates.
    ///
    /// A push sends `world_size - 1` copies, so it ends the sooner the more ranks there are.
    pub fn usual(world_size: u32) -> Self {
        let (push, pull) = match world_size {
            0..=2 => (1 << 20, 1 << 20),
            3..=4 => (256 << 10, 256 << 10),
            _ => (64 << 10, 128 << 10),
        };
        let rule = |bytes_max, algorithm, blocks_max| Rule { bytes_max, algorithm, blocks_max };
        Self {
            reduce_add_norm: vec![
                rule(push, Algorithm::Push { cluster: 1 }, BLOCKS_MAX),
                rule(u64::MAX, Algorithm::Apart, BLOCKS_MAX),
            ],
            all_reduce: vec![
                rule(pull / 8, Algorithm::Pull, 16),
                rule(pull, Algorithm::Pull, 64),
                rule(4 << 20, Algorithm::TwoShot, 64),
                rule(u64::MAX, Algorithm::TwoShot, 128),
            ],
            all_gather: vec![rule(32 << 10, Algorithm::Small, 128), rule(u64::MAX, Algorithm::Staged, 32)],
        }
    }

    /// Takes a table of other rules, as a measurement of one algorithm does.
    ///
    /// # Errors
    /// A table that is empty, out of order, bounded at its end or names an algorithm of another op.
    pub fn from_rules(
        reduce_add_norm: Vec<Rule>,
        all_reduce: Vec<Rule>,
        all_gather: Vec<Rule>,
    ) -> Result<Self, PeerPlanError> {
        let plan = Self { reduce_add_norm, all_reduce, all_gather };
        for op in [PeerOp::ReduceAddNorm, PeerOp::AllReduce, PeerOp::AllGather] {
            let rules = plan.rules(op);
            let rising = rules.windows(2).all(|pair| pair[0].bytes_max < pair[1].bytes_max);
            let unbounded = rules.last().is_some_and(|rule| rule.bytes_max == u64::MAX);
            let fitting = rules.iter().all(|rule| {
                let cluster = if let Algorithm::Push { cluster } = rule.algorithm { cluster } else { 1 };
                rule.algorithm.serves(op)
                    && matches!(cluster, 1 | 2 | 4 | 8)
                    && (cluster..=BLOCKS_MAX).contains(&rule.blocks_max)
            });
            if !(rising && unbounded && fitting) {
                return Err(PeerPlanError::Table { op });
            }
        }
        Ok(plan)
    }

    /// The rules of an op.
    pub fn rules(&self, op: PeerOp) -> &[Rule] {
        match op {
            PeerOp::ReduceAddNorm => &self.reduce_add_norm,
            PeerOp::AllReduce => &self.all_reduce,
            PeerOp::AllGather => &self.all_gather,
        }
    }

    fn rule(&self, op: PeerOp, bytes: u64) -> Rule {
        let rules = self.rules(op);
        let found = rules.iter().find(|rule| bytes <= rule.bytes_max);
        *found.unwrap_or_else(|| unreachable!("a table without an end was refused"))
    }

    /// How a sum over ranks of `rows` rows becomes part of the residual stream, and its norm.
    pub fn reduce_add_norm(&self, device: &Residency, layout: &PeerLayout, rows: u32, row: Row) -> ReduceAddNorm {
        let bytes = u64::from(rows) * row.bytes();
        let rule = self.rule(PeerOp::ReduceAddNorm, bytes);
        let pushed = match rule.algorithm {
            Algorithm::Push { cluster } => push(device, layout, rule, cluster, rows, row),
            _ => None,
        };
        pushed.map_or_else(|| ReduceAddNorm::Apart(self.all_reduce(device, bytes)), ReduceAddNorm::Fused)
    }

    /// How `bytes` of each rank are summed.
    pub fn all_reduce(&self, device: &Residency, bytes: u64) -> Launch {
        let rule = self.rule(PeerOp::AllReduce, bytes);
        let kernel = match rule.algorithm {
            Algorithm::Pull => "peer_all_reduce_pull",
            _ => "peer_all_reduce_two_shot",
        };
        let grid = bulk_grid(device, rule, bytes);
        Launch { kernel, typed: true, grid, block: THREADS, cluster: 1 }
    }

    /// How `bytes` of each rank come to all; they are a multiple of 8, and of 16 where the answer is the staged kernel.
    pub fn all_gather(&self, device: &Residency, layout: &PeerLayout, bytes: u64) -> Launch {
        let rule = self.rule(PeerOp::AllGather, bytes);
        let fits = bytes <= u64::from(layout.limits().gather_bytes_max);
        if fits && (rule.algorithm == Algorithm::Small || !bytes.is_multiple_of(16)) {
            let items = bytes / 8 * u64::from(layout.limits().world_size);
            let most = rule.blocks_max.min(device.blocks).min(BLOCKS_MAX);
            let grid = blocks_for(items, GATHER_THREADS, most);
            return Launch { kernel: "peer_all_gather", typed: false, grid, block: GATHER_THREADS, cluster: 1 };
        }
        let grid = bulk_grid(device, rule, bytes);
        Launch { kernel: "peer_all_gather_staged", typed: false, grid, block: THREADS, cluster: 1 }
    }
}

/// A row of the residual stream as its terms travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Values, a multiple of 8.
    pub hidden: u32,
    /// Bytes of a term: 2 or 4.
    pub element_bytes: u32,
}

impl Row {
    fn bytes(self) -> u64 {
        u64::from(self.hidden) * u64::from(self.element_bytes)
    }
}

/// How many blocks of 512 threads a device holds at once, one to a multiprocessor, and how many clusters of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Residency {
    /// Multiprocessors.
    pub blocks: u32,
    /// Whether blocks can be launched in clusters (compute capability 9.0).
    pub has_clusters: bool,
}

impl Residency {
    /// Clusters of a size that are resident at once. Large ones may not fill a processor group, so a quarter is left out.
    fn clusters(&self, cluster: u32) -> u32 {
        match cluster {
            1 => self.blocks,
            _ if !self.has_clusters => 0,
            2 => self.blocks / 2,
            _ => self.blocks / cluster * 3 / 4,
        }
    }
}

/// A launch, but for its arguments. Dynamic shared memory: none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// The kernel's name; without its type's suffix where it has one.
    pub kernel: &'static str,
    /// Whether the name ends in `_f32`, `_f16` or `_bf16`.
    pub typed: bool,
    /// Blocks.
    pub grid: u32,
    /// Threads of a block.
    pub block: u32,
    /// Blocks of a cluster; 1: launched without the attribute.
    pub cluster: u32,
}

/// How a reduction with add and norm is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceAddNorm {
    /// By one kernel.
    Fused(Launch),
    /// By an all-reduce in place; add and norm follow.
    Apart(Launch),
}

/// The launch of the push kernel, if layout, device and kernel can take the rows.
fn push(device: &Residency, layout: &PeerLayout, rule: Rule, cluster: u32, rows: u32, row: Row) -> Option<Launch> {
    let per_vector = 16 / row.element_bytes;
    let vectors = row.hidden / per_vector;
    let block = vectors.div_ceil(cluster).next_multiple_of(32).min(THREADS);
    let held = PUSH_VALUES_MAX / per_vector * block * cluster;
    let clusters = device.clusters(cluster).min(rule.blocks_max / cluster).min(BLOCKS_MAX / cluster).min(rows);
    let limits = layout.limits();
    let fits = rows <= limits.rows_max && row.bytes() <= u64::from(limits.row_bytes_max) && vectors <= held;
    (fits && clusters > 0).then_some(Launch {
        kernel: "peer_reduce_add_norm",
        typed: true,
        grid: clusters * cluster,
        block,
        cluster,
    })
}

/// Blocks for bulk data: no more than have a vector each thread.
fn bulk_grid(device: &Residency, rule: Rule, bytes: u64) -> u32 {
    blocks_for(bytes / 16, THREADS, rule.blocks_max.min(device.blocks).min(BLOCKS_MAX))
}

fn blocks_for(items: u64, threads: u32, most: u32) -> u32 {
    let wanted = items.div_ceil(u64::from(threads)).max(1);
    u32::try_from(wanted).map_or(most, |wanted| wanted.min(most))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::peer_memory::PeerLimits;

    const LIMITS: PeerLimits = PeerLimits {
        world_size: 3,
        rows_max: 64,
        row_bytes_max: 8192,
        gather_bytes_max: 1000,
        staging_bytes_max: 1 << 20,
        scatter_bytes_max: 4 << 20,
    };
    const H200: Residency = Residency { blocks: 132, has_clusters: true };

    fn layout() -> PeerLayout {
        PeerLayout::new(LIMITS).expect("limits that fit")
    }

    #[test]
    fn sizes_take_the_algorithm_of_the_table() {
        let plan = PeerPlan::usual(3);
        let check = |bytes, kernel, grid| {
            let launch = plan.all_reduce(&H200, bytes);
            assert_eq!((launch.kernel, launch.grid), (kernel, grid), "{bytes} bytes");
        };
        check(16, "peer_all_reduce_pull", 1);
        check(64 << 10, "peer_all_reduce_pull", 8);
        check(256 << 10, "peer_all_reduce_pull", 32);
        check((256 << 10) + 16, "peer_all_reduce_two_shot", 33);
        check(4 << 20, "peer_all_reduce_two_shot", 64);
        check(1 << 30, "peer_all_reduce_two_shot", 128);
        let gather = |bytes| plan.all_gather(&H200, &layout(), bytes).kernel;
        assert_eq!(
            [gather(8), gather(1008), gather(1024)],
            ["peer_all_gather", "peer_all_gather", "peer_all_gather_staged"]
        );
    }

    #[test]
    fn what_the_push_kernel_cannot_hold_goes_apart() {
        let plan = PeerPlan::usual(3);
        let check = |rows, hidden, element_bytes, expected: Option<(u32, u32)>| {
            let fused = match plan.reduce_add_norm(&H200, &layout(), rows, Row { hidden, element_bytes }) {
                ReduceAddNorm::Fused(launch) => Some((launch.grid, launch.block)),
                ReduceAddNorm::Apart(_) => None,
            };
            assert_eq!(fused, expected, "{rows} rows of {hidden} by {element_bytes}");
        };
        check(1, 4096, 2, Some((1, 512)));
        check(32, 4096, 2, Some((32, 512)));
        check(33, 4096, 2, None);
        check(7, 96, 2, Some((7, 32)));
        check(7, 896, 4, Some((7, 224)));
        check(65, 8, 2, None);
        check(1, 8192, 2, None);
    }

    #[test]
    fn no_grid_exceeds_what_is_resident() {
        for cluster in [1, 2, 4, 8] {
            let rule = |algorithm, blocks_max| vec![Rule { bytes_max: u64::MAX, algorithm, blocks_max }];
            let plan = PeerPlan::from_rules(
                rule(Algorithm::Push { cluster }, BLOCKS_MAX),
                rule(Algorithm::TwoShot, BLOCKS_MAX),
                rule(Algorithm::Small, BLOCKS_MAX),
            )
            .expect("a table of one rule each");
            for blocks in [1, 7, 16, 132, 1000] {
                let device = Residency { blocks, has_clusters: true };
                let reduced = plan.reduce_add_norm(&device, &layout(), 64, Row { hidden: 4096, element_bytes: 2 });
                let (ReduceAddNorm::Fused(launch) | ReduceAddNorm::Apart(launch)) = reduced;
                assert!((1..=blocks.min(BLOCKS_MAX)).contains(&launch.grid), "{launch:?} on {blocks}");
                assert!(launch.grid.is_multiple_of(launch.cluster));
                assert!(plan.all_reduce(&device, 1 << 30).grid <= blocks.min(BLOCKS_MAX));
                assert!(plan.all_gather(&device, &layout(), 1008).grid <= blocks.min(BLOCKS_MAX));
            }
            let old = Residency { blocks: 108, has_clusters: false };
            let reduced = plan.reduce_add_norm(&old, &layout(), 4, Row { hidden: 64, element_bytes: 2 });
            assert_eq!(matches!(reduced, ReduceAddNorm::Fused(_)), cluster == 1);
        }
    }

    #[test]
    fn a_table_says_one_thing_for_each_size() {
        let rule = |bytes_max, algorithm, blocks_max| Rule { bytes_max, algorithm, blocks_max };
        let rules = [rule(4096, Algorithm::Pull, 16), rule(u64::MAX, Algorithm::TwoShot, 64)];
        let plan = PeerPlan::usual(2);
        let rest = |all_reduce| {
            let of = |op| plan.rules(op).to_vec();
            PeerPlan::from_rules(of(PeerOp::ReduceAddNorm), all_reduce, of(PeerOp::AllGather))
        };
        assert!(rest(rules.to_vec()).is_ok());
        let refused = Err(PeerPlanError::Table { op: PeerOp::AllReduce });
        assert_eq!(rest(Vec::new()), refused);
        assert_eq!(rest(rules[..1].to_vec()), refused);
        assert_eq!(rest(rules.iter().rev().copied().collect()), refused);
        assert_eq!(rest(vec![rule(u64::MAX, Algorithm::Small, 1)]), refused);
        assert_eq!(rest(vec![rule(u64::MAX, Algorithm::Pull, 257)]), refused);
        assert_eq!(rest(vec![rule(u64::MAX, Algorithm::Pull, 0)]), refused);
    }
}
