//! How the weight-streaming linear kernels are launched: tile, split, ring and grid of `linear_stream_*`.
//!
//! It knows the kernels' limits and the launches that were fastest where they were timed, and no device: a plan is a pure
//! function of the shape. A shape that was not timed takes the launch of the nearest one that was, made to fit.
//!
//! **Invariant:** every plan satisfies the limits stated at the kernel in `cuda/linear.cu`.
//! **Invariant:** the same arguments give the same plan, so a captured graph and an eager step sum in the same order.

use crate::GateActivation;

/// What becomes of a linear layer's sums. The numbers are the kernels' own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Epilogue {
    /// Sums in the model's type.
    Plain = 0,
    /// Sums in f32: logits.
    Float = 1,
    /// `silu(gate) * up` of rows interleaved by 16.
    SiluMul = 2,
    /// The same with the tanh form of GELU.
    GeluTanhMul = 3,
}

impl From<GateActivation> for Epilogue {
    fn from(activation: GateActivation) -> Self {
        match activation {
            GateActivation::Silu => Self::SiluMul,
            GateActivation::GeluTanh => Self::GeluTanhMul,
        }
    }
}

/// What a plan depends on of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chip {
    /// Multiprocessors.
    pub num_sms: u32,
    /// Most dynamic shared memory of one block; a multiprocessor has 1 KiB more.
    pub shared_bytes_max: u32,
    /// Whether blocks can form clusters (compute capability 9.0 and later).
    pub has_clusters: bool,
}

/// One launch of `linear_stream_{type}_m{padded_rows}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearPlan {
    /// The number in the kernel's name: rows of X rounded up to 8.
    pub padded_rows: u32,
    /// Warps along W's rows; a block takes 32 rows per warp.
    pub warp_rows: u32,
    /// Warps along K.
    pub warp_cols: u32,
    /// Slots of the ring.
    pub stages: u32,
    /// Blocks along K: the cluster's size.
    pub split: u32,
    /// Stages asked into L2 beyond the ring before the kernel waits.
    pub ahead: u32,
    /// Blocks.
    pub grid: u32,
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

/// Most rows of X that the streaming kernels take.
pub const ROWS_MAX: u32 = 64;

const STAGES_MAX: u32 = 12;
const WARP_STAGE_BYTES: u32 = 4096;
const RUN_COLUMNS: u32 = 64;
const WARP_ROWS: u32 = 32;

/// The fastest launch of the shapes timed on an H200, by shape: N, K, then the launch.
#[derive(Clone, Copy)]
struct Tuned {
    n: u32,
    k: u32,
    launch: Launch,
}

/// What tells one launch from another, but for the number of blocks.
#[derive(Clone, Copy)]
struct Launch {
    warp_rows: u32,
    warp_cols: u32,
    stages: u32,
    split: u32,
    /// Most blocks of a multiprocessor; what no block has room for is done in further turns.
    blocks_per_sm: u32,
}

const fn tuned([n, k, warp_rows, warp_cols, stages, split, blocks_per_sm]: [u32; 7]) -> Tuned {
    Tuned { n, k, launch: Launch { warp_rows, warp_cols, stages, split, blocks_per_sm } }
}

/// One row or two; timed with 1.
const ONE_ROW: [Tuned; 20] = [
    tuned([576, 576, 2, 1, 4, 4, 1]),
    tuned([576, 1536, 2, 2, 4, 4, 1]),
    tuned([960, 576, 2, 1, 4, 4, 1]),
    tuned([1024, 1024, 1, 2, 3, 4, 1]),
    tuned([1024, 2816, 1, 2, 4, 8, 2]),
    tuned([3072, 576, 1, 4, 4, 1, 1]),
    tuned([3072, 1024, 1, 2, 3, 4, 3]),
    tuned([3072, 4096, 1, 2, 5, 4, 4]),
    tuned([4096, 2048, 2, 1, 8, 4, 2]),
    tuned([4096, 4096, 1, 2, 8, 2, 2]),
    tuned([4096, 7168, 1, 4, 5, 2, 2]),
    tuned([4096, 14_336, 1, 4, 5, 2, 2]),
    tuned([5632, 1024, 2, 1, 5, 4, 3]),
    tuned([6144, 4096, 1, 4, 3, 2, 3]),
    tuned([14_336, 4096, 7, 2, 3, 2, 1]),
    tuned([28_672, 4096, 7, 2, 3, 2, 1]),
    tuned([49_152, 576, 3, 1, 4, 1, 4]),
    tuned([64_128, 4096, 1, 4, 3, 1, 3]),
    tuned([128_256, 4096, 2, 2, 3, 1, 3]),
    tuned([151_936, 1024, 3, 2, 4, 1, 2]),
];

/// Up to 16 rows; timed with 8.
const EIGHT_ROWS: [Tuned; 20] = [
    tuned([576, 576, 2, 1, 4, 4, 1]),
    tuned([576, 1536, 1, 2, 4, 4, 1]),
    tuned([960, 576, 1, 1, 4, 4, 1]),
    tuned([1024, 1024, 1, 2, 3, 4, 1]),
    tuned([1024, 2816, 1, 2, 4, 8, 2]),
    tuned([3072, 576, 1, 4, 4, 1, 1]),
    tuned([3072, 1024, 1, 8, 3, 1, 1]),
    tuned([3072, 4096, 1, 2, 5, 4, 4]),
    tuned([4096, 2048, 2, 1, 8, 4, 2]),
    tuned([4096, 4096, 2, 2, 4, 4, 3]),
    tuned([4096, 7168, 2, 4, 3, 2, 2]),
    tuned([4096, 14_336, 2, 4, 3, 2, 2]),
    tuned([5632, 1024, 2, 1, 5, 4, 3]),
    tuned([6144, 4096, 1, 2, 7, 2, 3]),
    tuned([14_336, 4096, 7, 2, 3, 2, 1]),
    tuned([28_672, 4096, 7, 2, 3, 2, 1]),
    tuned([49_152, 576, 3, 2, 4, 1, 2]),
    tuned([64_128, 4096, 4, 2, 3, 1, 2]),
    tuned([128_256, 4096, 2, 2, 3, 1, 3]),
    tuned([151_936, 1024, 2, 2, 3, 1, 3]),
];

/// Up to 40 rows; timed with 32.
const THIRTY_TWO_ROWS: [Tuned; 15] = [
    tuned([1024, 1024, 2, 2, 3, 4, 1]),
    tuned([1024, 2816, 1, 2, 4, 8, 2]),
    tuned([3072, 1024, 2, 2, 3, 4, 2]),
    tuned([3072, 4096, 2, 2, 4, 4, 2]),
    tuned([4096, 2048, 5, 1, 4, 8, 2]),
    tuned([4096, 4096, 5, 1, 4, 8, 2]),
    tuned([4096, 7168, 5, 1, 4, 8, 2]),
    tuned([4096, 14_336, 5, 1, 4, 8, 2]),
    tuned([5632, 1024, 1, 4, 3, 1, 2]),
    tuned([6144, 4096, 3, 2, 3, 2, 2]),
    tuned([14_336, 4096, 4, 1, 5, 2, 2]),
    tuned([28_672, 4096, 7, 1, 7, 1, 1]),
    tuned([64_128, 4096, 4, 2, 4, 1, 1]),
    tuned([128_256, 4096, 2, 2, 4, 1, 2]),
    tuned([151_936, 1024, 2, 2, 4, 1, 2]),
];

/// Up to 64 rows; timed with 64.
const SIXTY_FOUR_ROWS: [Tuned; 15] = [
    tuned([1024, 1024, 2, 4, 2, 4, 1]),
    tuned([1024, 2816, 3, 2, 4, 8, 1]),
    tuned([3072, 1024, 4, 1, 3, 8, 2]),
    tuned([3072, 4096, 4, 1, 4, 8, 2]),
    tuned([4096, 2048, 3, 1, 3, 8, 3]),
    tuned([4096, 4096, 3, 1, 3, 8, 3]),
    tuned([4096, 7168, 3, 1, 3, 8, 3]),
    tuned([4096, 14_336, 5, 1, 4, 8, 2]),
    tuned([5632, 1024, 2, 4, 3, 1, 1]),
    tuned([6144, 4096, 4, 1, 4, 4, 2]),
    tuned([14_336, 4096, 4, 1, 4, 2, 2]),
    tuned([28_672, 4096, 4, 1, 4, 1, 2]),
    tuned([64_128, 4096, 8, 1, 4, 1, 1]),
    tuned([128_256, 4096, 8, 1, 4, 1, 1]),
    tuned([151_936, 1024, 2, 2, 2, 1, 2]),
];

/// The launch for `x [m, k]` by `w [n, k]`; none where the streaming kernels cannot take the shape.
#[must_use]
pub fn plan(m: u32, n: u32, k: u32, chip: Chip, epilogue: Epilogue) -> Option<LinearPlan> {
    let gated = matches!(epilogue, Epilogue::SiluMul | Epilogue::GeluTanhMul);
    let takes =
        (1..=ROWS_MAX).contains(&m) && n > 0 && k > 0 && k.is_multiple_of(8) && (!gated || n.is_multiple_of(32));
    if !takes || u64::from(n) * u64::from(k) / 8 >= u64::from(u32::MAX) {
        return None;
    }
    let table: &[Tuned] = match m {
        0..=2 => &ONE_ROW,
        3..=16 => &EIGHT_ROWS,
        17..=40 => &THIRTY_TWO_ROWS,
        _ => &SIXTY_FOUR_ROWS,
    };
    let nearest = table.iter().min_by(|a, b| distance(a, n, k).total_cmp(&distance(b, n, k)))?;
    let shape = Shape { padded_rows: m.next_multiple_of(8), n, k };
    let mut launch = shaped(nearest.launch, shape, chip);
    loop {
        if let Some(plan) = fitted(launch, shape, chip) {
            return Some(plan);
        }
        launch = smaller(launch)?;
    }
}

#[derive(Clone, Copy)]
struct Shape {
    padded_rows: u32,
    n: u32,
    k: u32,
}

/// How far a shape is from a timed one: the factor between their N times that between their K.
fn distance(of: &Tuned, n: u32, k: u32) -> f64 {
    let factor = |a: u32, b: u32| f64::from(a.max(b)) / f64::from(a.min(b));
    factor(of.n, n) * factor(of.k, k)
}

/// A launch without parts that would have no work in this shape, or that the kernel or chip does not have.
fn shaped(mut launch: Launch, shape: Shape, chip: Chip) -> Launch {
    let warps_max = if shape.padded_rows <= 16 { 15 } else { 8 };
    launch.warp_rows = launch.warp_rows.min(shape.n.div_ceil(WARP_ROWS));
    while launch.warp_cols > 1 && launch.warp_cols * RUN_COLUMNS >= 2 * shape.k {
        launch.warp_cols /= 2;
    }
    while launch.warp_rows * launch.warp_cols > warps_max {
        launch.warp_rows -= 1;
    }
    let steps = shape.k.div_ceil(RUN_COLUMNS * launch.warp_cols);
    if !chip.has_clusters {
        launch.split = 1;
    }
    while launch.split > steps {
        launch.split /= 2;
    }
    launch
}

/// The next launch to try where one wants more shared memory than there is.
fn smaller(mut launch: Launch) -> Option<Launch> {
    if launch.blocks_per_sm > 1 {
        launch.blocks_per_sm -= 1;
    } else if launch.warp_cols > 1 {
        launch.warp_cols /= 2;
    } else {
        launch.warp_rows = launch.warp_rows.checked_sub(1).filter(|&rows| rows > 0)?;
    }
    Some(launch)
}

/// The launch with as many of its stages as its blocks have room for; none if that is below two.
fn fitted(launch: Launch, shape: Shape, chip: Chip) -> Option<LinearPlan> {
    let Launch { warp_rows, warp_cols, split, blocks_per_sm, .. } = launch;
    let tiles = shape.n.div_ceil(WARP_ROWS * warp_rows);
    let clusters = tiles.min((chip.num_sms * blocks_per_sm / split).max(1));
    let budget = ((chip.shared_bytes_max + 1024) / blocks_per_sm).checked_sub(1024)? / 1024 * 1024;
    let stage_bytes = warp_rows * warp_cols * WARP_STAGE_BYTES + warp_cols * shape.padded_rows * RUN_COLUMNS * 2;
    let sums_bytes = warp_cols * shape.padded_rows * (WARP_ROWS * warp_rows + 4) * 4;
    let for_sums = if clusters == tiles { 0 } else { sums_bytes };
    let steps = shape.k.div_ceil(RUN_COLUMNS * warp_cols).div_ceil(split) * tiles.div_ceil(clusters);
    let room = budget.checked_sub(for_sums)? / stage_bytes;
    let stages = launch.stages.min(room).min((steps + 1).max(2)).min(STAGES_MAX);
    let shared_bytes = (stages * stage_bytes + for_sums).max(sums_bytes);
    if stages < 2 || shared_bytes > budget {
        return None;
    }
    Some(LinearPlan {
        padded_rows: shape.padded_rows,
        warp_rows,
        warp_cols,
        stages,
        split,
        ahead: 0,
        grid: clusters * split,
        block: 32 * (warp_rows * warp_cols + 1),
        shared_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Chip = Chip { num_sms: 132, shared_bytes_max: 227 * 1024, has_clusters: true };
    const A100: Chip = Chip { num_sms: 108, shared_bytes_max: 163 * 1024, has_clusters: false };

    fn check(m: u32, n: u32, k: u32, chip: Chip, epilogue: Epilogue) {
        let plan = plan(m, n, k, chip, epilogue).unwrap_or_else(|| panic!("no plan for {m} x {n} x {k}"));
        let what = format!("{m} x {n} x {k}: {plan:?}");
        let tiles = n.div_ceil(32 * plan.warp_rows);
        let clusters = plan.grid / plan.split;
        assert_eq!(plan.grid % plan.split, 0, "{what}");
        assert!((1..=tiles).contains(&clusters), "{what}");
        assert!(plan.padded_rows >= m && plan.padded_rows < m + 8, "{what}");
        assert!((2..=12).contains(&plan.stages), "{what}");
        assert!(plan.split * 64 * plan.warp_cols <= k.next_multiple_of(64 * plan.warp_cols), "{what}");
        assert!(plan.split == 1 || chip.has_clusters, "{what}");
        assert_eq!(plan.block, 32 * (plan.warp_rows * plan.warp_cols + 1), "{what}");
        assert!(plan.block <= if plan.padded_rows <= 16 { 512 } else { 288 }, "{what}");
        let ring = plan.stages * (plan.warp_rows * plan.warp_cols * 4096 + plan.warp_cols * plan.padded_rows * 128);
        let sums = plan.warp_cols * plan.padded_rows * (32 * plan.warp_rows + 4) * 4;
        let needed = if clusters == tiles { ring.max(sums) } else { ring + sums };
        assert_eq!(plan.shared_bytes, needed, "{what}");
        assert!(plan.shared_bytes <= chip.shared_bytes_max, "{what}");
    }

    #[test]
    fn every_plan_is_within_the_limits_of_the_kernel() {
        for chip in [H200, A100] {
            for m in [1, 2, 3, 5, 8, 13, 16, 24, 31, 40, 48, 56, 64] {
                for n in [1, 7, 16, 64, 100, 576, 960, 1024, 3072, 4096, 6144, 28_672, 49_152, 128_256, 151_936] {
                    for k in [8, 64, 72, 576, 1024, 1536, 2816, 4096, 7168, 14_336] {
                        check(m, n, k, chip, Epilogue::Plain);
                        if n % 32 == 0 {
                            check(m, n, k, chip, Epilogue::SiluMul);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn shapes_it_cannot_take_have_no_plan() {
        assert_eq!(plan(65, 64, 64, H200, Epilogue::Plain), None);
        assert_eq!(plan(0, 64, 64, H200, Epilogue::Plain), None);
        assert_eq!(plan(1, 64, 60, H200, Epilogue::Plain), None);
        assert_eq!(plan(1, 48, 64, H200, Epilogue::SiluMul), None);
        assert_eq!(plan(1, u32::MAX, 4096, H200, Epilogue::Float), None);
    }

    #[test]
    fn a_timed_shape_takes_its_own_launch() {
        for (m, table) in [(1, &ONE_ROW[..]), (8, &EIGHT_ROWS), (32, &THIRTY_TWO_ROWS), (64, &SIXTY_FOUR_ROWS)] {
            for Tuned { n, k, launch } in table {
                let plan = plan(m, *n, *k, H200, Epilogue::Plain).expect("a plan");
                let chosen = [plan.warp_rows, plan.warp_cols, plan.stages, plan.split];
                assert_eq!(
                    chosen,
                    [launch.warp_rows, launch.warp_cols, launch.stages, launch.split],
                    "{m} x {n} x {k}"
                );
            }
        }
    }

    #[test]
    fn layers_of_an_8b_model_fill_the_device() {
        for (n, k) in [(6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336), (128_256, 4096), (4096, 2048)] {
            for m in [1, 8, 32, 64] {
                let plan = plan(m, n, k, H200, Epilogue::Plain).expect("a plan");
                assert!(plan.grid >= 80, "{m} x {n} x {k}: {plan:?}");
            }
        }
    }
}
