//! How the weight-streaming linear kernels are launched: tile, split, ring and grid of `linear_stream_*`.
//!
//! It knows the kernels' limits and a model of their time, and no device: a plan is a pure function of the shape.
//!
//! **Invariant:** every plan satisfies the limits stated at the kernel in `cuda/linear.cu`.
//! **Invariant:** the same arguments give the same plan, so a captured graph and an eager step sum in the same order.

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

const STAGES_MAX: u32 = 8;
const WARP_STAGE_BYTES: u32 = 4096;
const RUN_COLUMNS: u32 = 64;
const WARP_ROWS: u32 = 32;

/// The best launch for `x [m, k]` by `w [n, k]` under the model below; none where the streaming kernels cannot take the shape.
#[must_use]
pub fn plan(m: u32, n: u32, k: u32, chip: Chip, epilogue: Epilogue) -> Option<LinearPlan> {
    let gated = matches!(epilogue, Epilogue::SiluMul | Epilogue::GeluTanhMul);
    let takes =
        (1..=ROWS_MAX).contains(&m) && n > 0 && k > 0 && k.is_multiple_of(8) && (!gated || n.is_multiple_of(32));
    if !takes || u64::from(n) * u64::from(k) / 8 >= u64::from(u32::MAX) {
        return None;
    }
    let shape = Shape { m, padded_rows: m.next_multiple_of(8), n, k };
    let mut best: Option<(f64, LinearPlan)> = None;
    for candidate in candidates(shape, chip) {
        let time = microseconds(shape, chip, &candidate);
        if best.is_none_or(|(least, _)| time < least) {
            best = Some((time, candidate.plan));
        }
    }
    best.map(|(_, plan)| plan)
}

#[derive(Clone, Copy)]
struct Shape {
    m: u32,
    padded_rows: u32,
    n: u32,
    k: u32,
}

struct Candidate {
    plan: LinearPlan,
    blocks_per_sm: u32,
}

fn candidates(shape: Shape, chip: Chip) -> Vec<Candidate> {
    let mut all = Vec::new();
    let warps_max = if shape.padded_rows <= 16 { 15 } else { 8 };
    for warp_rows in 1..=8 {
        for warp_cols in [1, 2, 4, 8] {
            for split in [1, 2, 4, 8] {
                let fits = warp_rows * warp_cols <= warps_max && (split == 1 || chip.has_clusters);
                if !fits || split > shape.k.div_ceil(RUN_COLUMNS * warp_cols) {
                    continue;
                }
                for blocks_per_sm in 1..=4 {
                    all.extend(candidate(shape, chip, [warp_rows, warp_cols, split, blocks_per_sm]));
                }
            }
        }
    }
    all
}

/// The launch with as many stages as leave room for `blocks_per_sm` blocks.
fn candidate(shape: Shape, chip: Chip, [warp_rows, warp_cols, split, blocks_per_sm]: [u32; 4]) -> Option<Candidate> {
    let warps = warp_rows * warp_cols + 1;
    if warps * registers_per_warp(shape.padded_rows) * blocks_per_sm > 65_536 || warps * blocks_per_sm > 64 {
        return None;
    }
    let tiles = shape.n.div_ceil(WARP_ROWS * warp_rows);
    let clusters = tiles.min((chip.num_sms * blocks_per_sm / split).max(1));
    let budget = ((chip.shared_bytes_max + 1024) / blocks_per_sm - 1024) / 1024 * 1024;
    let stage_bytes = warp_rows * warp_cols * WARP_STAGE_BYTES + warp_cols * shape.padded_rows * RUN_COLUMNS * 2;
    let sums_bytes = warp_cols * shape.padded_rows * (WARP_ROWS * warp_rows + 4) * 4;
    let for_sums = if clusters == tiles { 0 } else { sums_bytes };
    let steps = shape.k.div_ceil(RUN_COLUMNS * warp_cols).div_ceil(split) * tiles.div_ceil(clusters);
    let stages = (budget.checked_sub(for_sums)? / stage_bytes).min(STAGES_MAX).min((steps + 1).max(2));
    let shared_bytes = (stages * stage_bytes + for_sums).max(sums_bytes);
    if stages < 2 || shared_bytes > budget {
        return None;
    }
    let plan = LinearPlan {
        padded_rows: shape.padded_rows,
        warp_rows,
        warp_cols,
        stages,
        split,
        ahead: 0,
        grid: clusters * split,
        block: 32 * warps,
        shared_bytes,
    };
    Some(Candidate { plan, blocks_per_sm })
}

/// What the compiler takes on `sm_90a`, per warp.
fn registers_per_warp(padded_rows: u32) -> u32 {
    32 * match padded_rows {
        0..=8 => 104,
        9..=16 => 120,
        17..=24 => 128,
        25..=32 => 144,
        33..=48 => 160,
        _ => 168,
    }
}

/// The model: the slowest of device memory, L2, shared memory and the busiest multiprocessor's bytes in flight, and the ends.
fn microseconds(shape: Shape, chip: Chip, candidate: &Candidate) -> f64 {
    // Bytes per microsecond, of the whole device or of one multiprocessor.
    const MEMORY: f64 = 4.5e6;
    const L2: f64 = 5.5e6;
    const SHARED_PER_SM: f64 = 0.17e6;
    const L2_PER_SM: f64 = 0.075e6;
    const LATENCY: f64 = 1.6;
    const CLUSTER: f64 = 0.8;
    const PEER: f64 = 0.2;
    const TILE_END: f64 = 0.4;

    let LinearPlan { warp_rows, warp_cols, stages, split, grid, .. } = candidate.plan;
    let tile_rows = WARP_ROWS * warp_rows;
    let tiles = shape.n.div_ceil(tile_rows);
    let rounds = f64::from(tiles.div_ceil(grid / split));
    let weights = f64::from(shape.n) * f64::from(shape.k) * 2.0;
    let inputs = f64::from(tiles) * f64::from(shape.m) * f64::from(shape.k) * 2.0;

    let steps_of_block = f64::from(shape.k.div_ceil(RUN_COLUMNS * warp_cols).div_ceil(split)) * rounds;
    let blocks_of_sm = f64::from(grid.div_ceil(chip.num_sms));
    let step_bytes = f64::from(warp_rows * warp_cols * WARP_STAGE_BYTES);
    let step_inputs = f64::from(warp_cols * shape.padded_rows * RUN_COLUMNS * 2);
    let step_read = step_bytes + f64::from(warp_cols * shape.m * RUN_COLUMNS * 2);
    let resident = blocks_of_sm.min(f64::from(candidate.blocks_per_sm));
    let in_flight = resident * f64::from(stages - 1) * step_read;
    let of_sm = blocks_of_sm * steps_of_block;
    let busiest = of_sm * step_read / L2_PER_SM.min(in_flight / LATENCY);
    let shared = of_sm * (2.0 * step_bytes + step_inputs * f64::from(1 + warp_rows)) / SHARED_PER_SM;

    let body = (weights / MEMORY).max((weights + inputs) / L2).max(busiest).max(shared);
    let ends =
        rounds * TILE_END / resident + if split > 1 { rounds * (CLUSTER + PEER * f64::from(split)) } else { 0.0 };
    body + ends + f64::from(warp_cols) * 0.02
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
    fn layers_of_an_8b_model_fill_the_device() {
        for (n, k) in [(6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336), (128_256, 4096), (4096, 2048)] {
            for m in [1, 8, 32, 64] {
                let plan = plan(m, n, k, H200, Epilogue::Plain).expect("a plan");
                assert!(plan.grid >= 80, "{m} x {n} x {k}: {plan:?}");
            }
        }
    }
}
