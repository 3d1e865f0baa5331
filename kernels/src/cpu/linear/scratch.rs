//! Activations on their way into a matrix: quantised in blocks of 32, in tiles of rows.
//!
//! A batch is cut into tiles of 16, 8, 4, 2 and 1 rows. Within a tile things lie `[block][row]`, so that a kernel finds what it
//! needs for all rows of a block side by side.
//!
//! **Invariant:** a row's codes, scales and sums depend on that row only.

#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use super::{
    format::BLOCK,
    isa::{Isa, Tier},
    matrix::Activations,
};
use crate::cpu::disjoint::Disjoint;
use crate::{KernelError, cpu::Pool};

/// Rows of the largest tile.
pub(super) const TILE_ROWS: usize = 16;
/// Below this many values the caller quantises alone: sharing out would take longer.
const ALONE_MAX: usize = 8192;

/// A tile of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tile {
    pub(super) first: usize,
    pub(super) rows: usize,
}

/// The tile of a batch that begins at row `first`.
pub(super) fn tile_at(first: usize, num_rows: usize) -> Tile {
    let left = num_rows - first;
    let rows = if left >= TILE_ROWS { TILE_ROWS } else { 1 << left.ilog2() };
    Tile { first, rows }
}

/// Tiles of rows `first..end` of a batch; `first` begins a tile.
pub(super) fn tiles(first: usize, end: usize) -> impl Iterator<Item = Tile> {
    let mut next = first;
    std::iter::from_fn(move || {
        let tile = (next < end).then(|| tile_at(next, end))?;
        next += tile.rows;
        Some(tile)
    })
}

/// Quantised activations of one call, planned beforehand.
pub struct Scratch {
    isa: Isa,
    values_max: usize,
    num_blocks: usize,
    codes: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<f32>,
    offsets: Vec<i32>,
    half_offsets: Vec<i32>,
}

/// What a tile's rows are, for kernels: pointers to `[block][row]` planes.
#[derive(Clone, Copy)]
pub(super) struct QuantTile {
    /// `[block][row][32]`
    pub(super) codes: *const i8,
    /// `[block][row]`
    pub(super) scales: *const f32,
    /// `[block][row]`: scale times sum of codes.
    pub(super) sums: *const f32,
    /// `[block][row]`: -8 times sum of codes.
    pub(super) offsets: *const i32,
    /// `[block][half][row]`: -32 times sum of codes.
    pub(super) half_offsets: *const i32,
    /// Rows in the tile: the distance from block to block.
    pub(super) rows: usize,
}

impl Scratch {
    /// Plans for `rows_max` rows of `cols_max` columns, with the best instructions of this machine.
    ///
    /// # Errors
    /// No memory.
    pub fn new(rows_max: usize, cols_max: usize, activations: Activations) -> Result<Self, KernelError> {
        Self::with_isa(rows_max, cols_max, activations, Isa::detect())
    }

    /// As `new`, with given instructions.
    ///
    /// # Errors
    /// No memory.
    pub fn with_isa(rows_max: usize, cols_max: usize, activations: Activations, isa: Isa) -> Result<Self, KernelError> {
        let num_blocks = match activations {
            Activations::Float32 => 0,
            Activations::Int8 => rows_max * cols_max.div_ceil(BLOCK),
        };
        Ok(Self {
            isa,
            values_max: num_blocks * BLOCK,
            num_blocks: 0,
            codes: zeroed(num_blocks * BLOCK)?,
            scales: zeroed(num_blocks)?,
            sums: zeroed(num_blocks)?,
            offsets: zeroed(num_blocks)?,
            half_offsets: zeroed(2 * num_blocks)?,
        })
    }

    pub(super) fn isa(&self) -> Isa {
        self.isa
    }

    /// Quantises `x` `[num_rows, cols]`, `cols` a multiple of 32.
    pub(super) fn quantize(&mut self, pool: &Pool, x: &[f32], num_rows: usize, cols: usize) -> Result<(), KernelError> {
        if x.len() > self.values_max {
            return Err(KernelError::Shape {
                op: "linear",
                reason: format!("{num_rows} x {cols} activations, {} values planned", self.values_max),
            });
        }
        self.num_blocks = cols / BLOCK;
        let num_blocks = self.num_blocks;
        let tier = self.isa.tier();
        let codes = Disjoint::new(&mut self.codes);
        let scales = Disjoint::new(&mut self.scales);
        let sums = Disjoint::new(&mut self.sums);
        let offsets = Disjoint::new(&mut self.offsets);
        let half_offsets = Disjoint::new(&mut self.half_offsets);
        let one_tile = |tile: Tile| {
            let (at, len) = (tile.first * num_blocks, tile.rows * num_blocks);
            // SAFETY: tiles are disjoint runs of rows, and each run of rows owns its own stretch of every plane.
            let mut planes = unsafe {
                Planes {
                    rows: tile.rows,
                    codes: codes.slice(at * BLOCK, len * BLOCK),
                    scales: scales.slice(at, len),
                    sums: sums.slice(at, len),
                    offsets: offsets.slice(at, len),
                    half_offsets: half_offsets.slice(2 * at, 2 * len),
                }
            };
            planes.fill(tier, &x[tile.first * cols..][..tile.rows * cols]);
        };
        if x.len() <= ALONE_MAX {
            tiles(0, num_rows).for_each(one_tile);
        } else {
            let num_parts = num_rows.div_ceil(TILE_ROWS);
            pool.run(num_parts, |part| {
                let first = part * TILE_ROWS;
                tiles(first, num_rows.min(first + TILE_ROWS)).for_each(one_tile);
            });
        }
        Ok(())
    }

    /// The planes of a tile of what was last quantised.
    pub(super) fn tile(&self, tile: Tile) -> QuantTile {
        let (at, len) = (tile.first * self.num_blocks, tile.rows * self.num_blocks);
        QuantTile {
            codes: self.codes[at * BLOCK..][..len * BLOCK].as_ptr(),
            scales: self.scales[at..][..len].as_ptr(),
            sums: self.sums[at..][..len].as_ptr(),
            offsets: self.offsets[at..][..len].as_ptr(),
            half_offsets: self.half_offsets[2 * at..][..2 * len].as_ptr(),
            rows: tile.rows,
        }
    }
}

fn zeroed<T: Copy + Default>(len: usize) -> Result<Vec<T>, KernelError> {
    let mut values = Vec::new();
    values
        .try_reserve_exact(len)
        .map_err(|_| KernelError::OutOfMemory { device: "host", bytes: (len * size_of::<T>()) as u64 })?;
    values.resize(len, T::default());
    Ok(values)
}

/// A tile's stretch of each plane.
struct Planes<'a> {
    rows: usize,
    codes: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
    offsets: &'a mut [i32],
    half_offsets: &'a mut [i32],
}

impl Planes<'_> {
    fn fill(&mut self, tier: Tier, x: &[f32]) {
        match tier {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this tier exists only where the CPU has these instructions.
            Tier::Avx512 => unsafe { self.fill_avx512(x) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Tier::Avx2 => unsafe { self.fill_avx2(x) },
            _ => self.fill_with(x, quantize_block),
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    fn fill_avx512(&mut self, x: &[f32]) {
        self.fill_with(x, |x| avx512::quantize_block(x));
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn fill_avx2(&mut self, x: &[f32]) {
        self.fill_with(x, |x| avx2::quantize_block(x));
    }

    #[inline(always)]
    fn fill_with(&mut self, x: &[f32], quantize: impl Fn(&[f32; BLOCK]) -> QuantBlock) {
        let cols = x.len() / self.rows;
        for (row, x) in x.chunks_exact(cols).enumerate() {
            let (blocks, _) = x.as_chunks::<BLOCK>();
            for (block, x) in blocks.iter().enumerate() {
                let at = block * self.rows + row;
                let quantized = quantize(x);
                self.codes[at * BLOCK..][..BLOCK].copy_from_slice(&quantized.codes);
                let [low, high] = quantized.half_sums;
                self.scales[at] = quantized.scale;
                self.sums[at] = quantized.scale * (low + high) as f32;
                self.offsets[at] = -8 * (low + high);
                self.half_offsets[2 * block * self.rows + row] = -32 * low;
                self.half_offsets[(2 * block + 1) * self.rows + row] = -32 * high;
            }
        }
    }
}

/// 32 activations as `scale * code`, codes from -127 to 127.
pub(super) struct QuantBlock {
    pub(super) codes: [i8; BLOCK],
    pub(super) scale: f32,
    /// Sums of the codes of each half.
    pub(super) half_sums: [i32; 2],
}

/// The scale of a block whose largest magnitude is given, and what values are multiplied with to get codes.
#[inline(always)]
pub(super) fn scale_of(largest: f32) -> (f32, f32) {
    let factor = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    (largest / 127.0, factor)
}

/// Quantises a block. Where a value is not finite, the scale is not either.
fn quantize_block(x: &[f32; BLOCK]) -> QuantBlock {
    // Adding this rounds to the nearest whole number, ties to even, and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // As whole numbers, magnitudes are ordered like the floats, infinity and NaN above all.
    let largest = x.iter().fold(0, |largest: u32, x| largest.max(x.to_bits() & 0x7fff_ffff));
    let (scale, factor) = scale_of(f32::from_bits(largest));
    let mut levels = [0; BLOCK];
    for (level, x) in levels.iter_mut().zip(x) {
        *level = (x * factor + ROUND).to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
    }
    let mut codes = [0; BLOCK];
    for (code, level) in codes.iter_mut().zip(levels) {
        *code = level as i8;
    }
    let (low, high) = codes.split_at(BLOCK / 2);
    let half_sums = [low, high].map(|half| half.iter().fold(0, |sum: i32, code| sum.wrapping_add(i32::from(*code))));
    QuantBlock { codes, scale, half_sums }
}
