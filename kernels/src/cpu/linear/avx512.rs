//! Kernels for AVX-512 with VNNI: one lane of a vector is one output.
//!
//! Reads packed groups and quantised tiles as `packed` and `scratch` lay them out; repeats the arithmetic of `scalar`.

use std::arch::x86_64::*;

use phalanx_formats::StoredType;

use super::{
    driver::{DEPTH, FloatRows, SPAN_MAX, Span, Sums},
    format::{BLOCK, Codes, Scales, TABLE},
    memory::LINE_BYTES,
    packed::{GroupLayout, LANES, Part, SUPER},
    scratch::{QuantBlock, QuantTile, scale_of},
};

/// Repeats a body for `0..$n` with the index a constant, so that arrays stay in registers; `$n` is at most 16, or 4.
macro_rules! unrolled {
    (4; $n:expr, |$i:ident| $body:block) => { unrolled!(@ $n, $i, $body, 0 1 2 3) };
    ($n:expr, |$i:ident| $body:block) => {
        unrolled!(@ $n, $i, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $n:expr, $i:ident, $body:block, $($k:literal)*) => {
        $(if $k < $n { let $i: usize = $k; $body })*
    };
}

/// How a block's codes become bytes: vector `c` holds codes `4 c` to `4 c + 3` of all lanes.
trait Unpack {
    /// Left shift from `QuantTile::offsets` (-8 times the sum of codes) to this format's offset.
    const OFFSET_SHIFT: u32;

    /// # Safety
    /// `codes` is a packed block.
    unsafe fn unpack(codes: *const u8) -> [__m512i; 8];
}

/// How a block's scales become numbers.
trait Scale {
    /// Blocks have minimums (and no offset).
    const MINIMUM: bool;
    /// Halves of a block have scales of their own.
    const HALVES: bool;

    /// Scales of the halves, and the minimum.
    ///
    /// # Safety
    /// `records` are a group's scales, `block` is one of its blocks.
    unsafe fn scale(records: *const u8, block: usize) -> ([__m512; 2], __m512);
}

struct Four;
struct Table;
struct Five;
struct Six;
struct Eight;
struct Half;
struct HalfMinimum;
struct Super;
struct SuperHalves;

/// The four vectors of nibbles as eight of bytes.
///
/// # Safety
/// `codes` is a packed block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn nibbles(codes: *const u8) -> [__m512i; 8] {
    let mask = _mm512_set1_epi8(15);
    let mut bytes = [_mm512_setzero_si512(); 8];
    unrolled!(4, |i| {
        // SAFETY: four vectors of nibbles begin the block.
        let packed = unsafe { _mm512_loadu_si512(codes.add(64 * i).cast()) };
        bytes[i] = _mm512_and_si512(packed, mask);
        bytes[4 + i] = _mm512_and_si512(_mm512_srli_epi32::<4>(packed), mask);
    });
    bytes
}

impl Unpack for Four {
    const OFFSET_SHIFT: u32 = 0;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn unpack(codes: *const u8) -> [__m512i; 8] {
        // SAFETY: passed on.
        unsafe { nibbles(codes) }
    }
}

impl Unpack for Table {
    const OFFSET_SHIFT: u32 = 4;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn unpack(codes: *const u8) -> [__m512i; 8] {
        // SAFETY: the table has 16 bytes; the rest is passed on.
        let (table, mut bytes) = unsafe { (_mm_loadu_si128(TABLE.as_ptr().cast()), nibbles(codes)) };
        let table = _mm512_broadcast_i32x4(table);
        unrolled!(8, |i| { bytes[i] = _mm512_shuffle_epi8(table, bytes[i]) });
        bytes
    }
}

/// `low | high & mask`.
#[inline]
#[target_feature(enable = "avx512f")]
fn or_masked(low: __m512i, high: __m512i, mask: __m512i) -> __m512i {
    _mm512_ternarylogic_epi32::<0xea>(high, mask, low)
}

impl Unpack for Five {
    const OFFSET_SHIFT: u32 = 1;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn unpack(codes: *const u8) -> [__m512i; 8] {
        // SAFETY: the vector of fifth bits follows four of nibbles.
        let (mut bytes, high) = unsafe { (nibbles(codes), _mm512_loadu_si512(codes.add(256).cast())) };
        let mask = _mm512_set1_epi8(16);
        bytes[0] = or_masked(bytes[0], _mm512_slli_epi32::<4>(high), mask);
        bytes[1] = or_masked(bytes[1], _mm512_slli_epi32::<3>(high), mask);
        bytes[2] = or_masked(bytes[2], _mm512_slli_epi32::<2>(high), mask);
        bytes[3] = or_masked(bytes[3], _mm512_slli_epi32::<1>(high), mask);
        bytes[4] = or_masked(bytes[4], high, mask);
        bytes[5] = or_masked(bytes[5], _mm512_srli_epi32::<1>(high), mask);
        bytes[6] = or_masked(bytes[6], _mm512_srli_epi32::<2>(high), mask);
        bytes[7] = or_masked(bytes[7], _mm512_srli_epi32::<3>(high), mask);
        bytes
    }
}

impl Unpack for Six {
    /// Not used: halves have offsets of their own.
    const OFFSET_SHIFT: u32 = 0;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn unpack(codes: *const u8) -> [__m512i; 8] {
        // SAFETY: passed on.
        let mut bytes = unsafe { nibbles(codes) };
        let mask = _mm512_set1_epi8(48);
        unrolled!(2, |i| {
            // SAFETY: two vectors of pairs follow four of nibbles.
            let high = unsafe { _mm512_loadu_si512(codes.add(256 + 64 * i).cast()) };
            bytes[4 * i] = or_masked(bytes[4 * i], _mm512_slli_epi32::<4>(high), mask);
            bytes[4 * i + 1] = or_masked(bytes[4 * i + 1], _mm512_slli_epi32::<2>(high), mask);
            bytes[4 * i + 2] = or_masked(bytes[4 * i + 2], high, mask);
            bytes[4 * i + 3] = or_masked(bytes[4 * i + 3], _mm512_srli_epi32::<2>(high), mask);
        });
        bytes
    }
}

impl Unpack for Eight {
    const OFFSET_SHIFT: u32 = 4;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn unpack(codes: *const u8) -> [__m512i; 8] {
        let mut bytes = [_mm512_setzero_si512(); 8];
        // SAFETY: a block is eight vectors.
        unrolled!(8, |i| { bytes[i] = unsafe { _mm512_loadu_si512(codes.add(64 * i).cast()) } });
        bytes
    }
}

/// Sixteen f16 as f32.
///
/// # Safety
/// 32 bytes can be read.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn halves(bytes: *const u8) -> __m512 {
    // SAFETY: by the caller's promise.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(bytes.cast()) })
}

impl Scale for Half {
    const MINIMUM: bool = false;
    const HALVES: bool = false;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn scale(records: *const u8, block: usize) -> ([__m512; 2], __m512) {
        // SAFETY: a record is 16 scales.
        let scale = unsafe { halves(records.add(2 * LANES * block)) };
        ([scale; 2], _mm512_setzero_ps())
    }
}

impl Scale for HalfMinimum {
    const MINIMUM: bool = true;
    const HALVES: bool = false;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn scale(records: *const u8, block: usize) -> ([__m512; 2], __m512) {
        // SAFETY: a record is 16 scales and 16 minimums.
        unsafe {
            let record = records.add(4 * LANES * block);
            ([halves(record); 2], halves(record.add(2 * LANES)))
        }
    }
}

impl Scale for Super {
    const MINIMUM: bool = true;
    const HALVES: bool = false;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn scale(records: *const u8, block: usize) -> ([__m512; 2], __m512) {
        let within = block % SUPER;
        // SAFETY: a record is 16 scales, 16 minimums, and 8 times 16 factors of each.
        unsafe {
            let record = records.add(block / SUPER * (4 + 2 * SUPER) * LANES);
            let factors =
                |at: usize| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(record.add(at * LANES).cast())));
            let scale = _mm512_mul_ps(halves(record), factors(4 + within));
            let minimum = _mm512_mul_ps(halves(record.add(2 * LANES)), factors(4 + SUPER + within));
            ([scale; 2], minimum)
        }
    }
}

impl Scale for SuperHalves {
    const MINIMUM: bool = false;
    const HALVES: bool = true;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn scale(records: *const u8, block: usize) -> ([__m512; 2], __m512) {
        let within = block % SUPER;
        // SAFETY: a record is 16 scales and 16 times 16 factors.
        unsafe {
            let record = records.add(block / SUPER * (2 + 2 * SUPER) * LANES);
            let factors =
                |at: usize| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(record.add(at * LANES).cast())));
            let scale = halves(record);
            let first = _mm512_mul_ps(scale, factors(2 + 2 * within));
            let second = _mm512_mul_ps(scale, factors(3 + 2 * within));
            ([first, second], _mm512_setzero_ps())
        }
    }
}

/// Quantises a block, as `scratch::quantize_block` does.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn quantize_block(x: &[f32; BLOCK]) -> QuantBlock {
    let (low, high) = x.split_at(LANES);
    // SAFETY: each half is one vector.
    let (low, high) = unsafe { (_mm512_loadu_ps(low.as_ptr()), _mm512_loadu_ps(high.as_ptr())) };
    let magnitude = |x| _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fff_ffff));
    let largest = _mm512_reduce_max_epu32(_mm512_max_epu32(magnitude(low), magnitude(high)));
    let (scale, factor) = scale_of(f32::from_bits(largest));
    let factor = _mm512_set1_ps(factor);
    // Nearest, ties to even; what is not finite gives a low byte of zero.
    let level = |x| _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, factor)));
    let (low, high) = (level(low), level(high));
    let sum = |codes| {
        let sums = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1), codes);
        let sums = _mm_add_epi32(sums, _mm_shuffle_epi32::<0b01_00_11_10>(sums));
        _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_shuffle_epi32::<0b10_11_00_01>(sums)))
    };
    let mut codes = [0; BLOCK];
    // SAFETY: the codes have room for two vectors of 16 bytes.
    unsafe {
        _mm_storeu_si128(codes.as_mut_ptr().cast(), low);
        _mm_storeu_si128(codes.as_mut_ptr().add(LANES).cast(), high);
    }
    QuantBlock { codes, scale, half_sums: [sum(low), sum(high)] }
}

/// A group as kernels see it.
#[derive(Clone, Copy)]
struct Group {
    codes: *const u8,
    code_bytes: usize,
    records: *const u8,
    num_blocks: usize,
    /// Bytes of the group for one block.
    block_bytes: usize,
}

/// Bytes ahead of where a kernel reads: memory is fetched across the pages at which the hardware's own prefetch stops.
const AHEAD: usize = 2048;

impl Group {
    fn new(part: &Part, index: usize) -> Self {
        let GroupLayout { num_blocks, code_bytes, scales_at, stride, .. } = part.layout;
        let bytes = part.group(index);
        Self {
            codes: bytes.as_ptr(),
            code_bytes,
            records: bytes[scales_at..].as_ptr(),
            num_blocks,
            block_bytes: stride / num_blocks.max(1),
        }
    }
}

/// Fetches what lies `AHEAD` of an address.
#[inline]
fn prefetch(address: *const u8) {
    // SAFETY: a prefetch of any address is allowed.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.wrapping_add(AHEAD).cast()) };
}

impl Group {
    /// Fetches what lies `AHEAD` of a block: groups follow each other, so it is soon read.
    #[inline]
    fn prefetch(self, block: usize) {
        let codes = self.codes.wrapping_add(block * self.block_bytes);
        for line in (0..self.block_bytes).step_by(LINE_BYTES) {
            prefetch(codes.wrapping_add(line));
        }
    }
}

/// The kernel of a format, by name of its codes and scales.
macro_rules! with_format {
    ($format:expr, $call:ident $(, $arg:tt)*) => {
        match ($format.codes, $format.scales) {
            (Codes::Four, Scales::Half) => $call!(Four, Half $(, $arg)*),
            (Codes::Four, Scales::HalfMinimum) => $call!(Four, HalfMinimum $(, $arg)*),
            (Codes::Four, Scales::Super) => $call!(Four, Super $(, $arg)*),
            (Codes::Five, Scales::Half) => $call!(Five, Half $(, $arg)*),
            (Codes::Five, Scales::HalfMinimum) => $call!(Five, HalfMinimum $(, $arg)*),
            (Codes::Five, Scales::Super) => $call!(Five, Super $(, $arg)*),
            (Codes::Six, Scales::SuperHalves) => $call!(Six, SuperHalves $(, $arg)*),
            (Codes::Table, Scales::Half) => $call!(Table, Half $(, $arg)*),
            (Codes::Eight, Scales::Half) => $call!(Eight, Half $(, $arg)*),
            (codes, scales) => unreachable!("no format has {codes:?} with {scales:?}"),
        }
    };
}

/// Products of a tile of quantised activations with one group; `out` `[rows][16]`.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL, VNNI; the tile's planes hold as many blocks as the part has; `out` has room for
/// `tile.rows` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn int8_tile(part: &Part, group: usize, tile: QuantTile, out: *mut f32) {
    let Some(format) = part.layout.format else { return };
    let group = Group::new(part, group);
    macro_rules! call {
        ($codes:ty, $scales:ty) => {
            // SAFETY: passed on; `R` is the tile's number of rows.
            unsafe {
                match tile.rows {
                    16 => int8_rows::<$codes, $scales, 16>(group, tile, out),
                    8 => int8_rows::<$codes, $scales, 8>(group, tile, out),
                    4 => int8_rows::<$codes, $scales, 4>(group, tile, out),
                    2 => int8_rows::<$codes, $scales, 2>(group, tile, out),
                    _ => int8_rows::<$codes, $scales, 1>(group, tile, out),
                }
            }
        };
    }
    with_format!(format, call)
}

/// # Safety
/// As `int8_tile`; `R` is `tile.rows`; the group is of this format.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn int8_rows<U: Unpack, S: Scale, const R: usize>(group: Group, tile: QuantTile, out: *mut f32) {
    let mut totals = [_mm512_setzero_ps(); R];
    for block in 0..group.num_blocks {
        group.prefetch(block);
        // SAFETY: the group and the tile have this block.
        let (codes, scales, minimum, x, x_scales) = unsafe {
            let codes = U::unpack(group.codes.add(block * group.code_bytes));
            let (scales, minimum) = S::scale(group.records, block);
            (codes, scales, minimum, tile.codes.add(block * R * BLOCK), tile.scales.add(block * R))
        };
        unrolled!(R, |row| {
            // SAFETY: the tile has `R` rows in this block.
            unsafe {
                let x = x.add(row * BLOCK).cast::<i32>();
                let x_scale = _mm512_set1_ps(*x_scales.add(row));
                if S::HALVES {
                    let offsets = tile.half_offsets.add(2 * block * R + row);
                    let mut first = _mm512_set1_epi32(*offsets);
                    unrolled!(4, |c| { first = _mm512_dpbusd_epi32(first, codes[c], _mm512_set1_epi32(*x.add(c))) });
                    let mut second = _mm512_set1_epi32(*offsets.add(R));
                    unrolled!(4, |c| {
                        second = _mm512_dpbusd_epi32(second, codes[4 + c], _mm512_set1_epi32(*x.add(4 + c)))
                    });
                    let first = _mm512_mul_ps(_mm512_cvtepi32_ps(first), x_scale);
                    let second = _mm512_mul_ps(_mm512_cvtepi32_ps(second), x_scale);
                    totals[row] = _mm512_fmadd_ps(first, scales[0], totals[row]);
                    totals[row] = _mm512_fmadd_ps(second, scales[1], totals[row]);
                } else {
                    let mut product = if S::MINIMUM {
                        _mm512_setzero_si512()
                    } else {
                        let offset = _mm512_set1_epi32(*tile.offsets.add(block * R + row));
                        match U::OFFSET_SHIFT {
                            1 => _mm512_slli_epi32::<1>(offset),
                            4 => _mm512_slli_epi32::<4>(offset),
                            _ => offset,
                        }
                    };
                    unrolled!(8, |c| {
                        product = _mm512_dpbusd_epi32(product, codes[c], _mm512_set1_epi32(*x.add(c)))
                    });
                    let product = _mm512_mul_ps(_mm512_cvtepi32_ps(product), x_scale);
                    totals[row] = _mm512_fmadd_ps(product, scales[0], totals[row]);
                    if S::MINIMUM {
                        let x_sum = _mm512_set1_ps(*tile.sums.add(block * R + row));
                        totals[row] = _mm512_fmadd_ps(minimum, x_sum, totals[row]);
                    }
                }
            }
        });
    }
    // SAFETY: `out` has room for `R` rows.
    unrolled!(R, |row| { unsafe { _mm512_storeu_ps(out.add(row * LANES), totals[row]) } });
}

/// Products of a stretch of rows with a span, into `sums` from group `to` on.
///
/// # Safety
/// The CPU has AVX-512 F and BW; `to + span.len <= SPAN_MAX`, `rows.num_rows <= STRETCH`.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn float_stretch(span: Span<'_>, rows: FloatRows<'_>, to: usize, sums: Sums) {
    let mut panels = std::mem::MaybeUninit::<[f32; SPAN_MAX * DEPTH * LANES]>::uninit();
    let panels = panels.as_mut_ptr().cast::<f32>();
    for start in (0..rows.cols).step_by(DEPTH) {
        let len = DEPTH.min(rows.cols - start);
        let mut weights = [panels.cast_const(); SPAN_MAX];
        for (group, weights) in weights.iter_mut().enumerate().take(span.len) {
            // SAFETY: a panel has room for `DEPTH` columns, and these columns are in the group.
            *weights = unsafe { panel(span.part, span.first + group, start, len, panels.add(group * DEPTH * LANES)) };
        }
        let mut row = 0;
        while row < rows.num_rows {
            let left = rows.num_rows - row;
            let x = rows.x[row * rows.cols + start..].as_ptr();
            let stripe = Stripe { x, x_stride: rows.cols, weights, len, sums, row, to, is_first: start == 0 };
            // SAFETY: the stripe has this many rows, groups and columns.
            row += unsafe {
                match (left, span.len) {
                    (8.., 1) => stripe.run::<8, 1>(),
                    (8.., 2) => stripe.run::<8, 2>(),
                    (4.., 1) => stripe.run::<4, 1>(),
                    (4.., 2) => stripe.run::<4, 2>(),
                    (2.., 1) => stripe.run::<2, 1>(),
                    (2.., 2) => stripe.run::<2, 2>(),
                    (2.., 3) => stripe.run::<2, 3>(),
                    (2.., _) => stripe.run::<2, 4>(),
                    (_, 1) => stripe.run::<1, 1>(),
                    (_, 2) => stripe.run::<1, 2>(),
                    (_, 3) => stripe.run::<1, 3>(),
                    (_, _) => stripe.run::<1, 4>(),
                }
            };
        }
    }
}

/// A few rows times a few panels.
struct Stripe {
    x: *const f32,
    x_stride: usize,
    weights: [*const f32; SPAN_MAX],
    len: usize,
    sums: Sums,
    row: usize,
    to: usize,
    is_first: bool,
}

impl Stripe {
    /// Returns `R`.
    ///
    /// # Safety
    /// `R` rows of `x`, `G` panels, `len` columns; `sums` has room for them.
    #[target_feature(enable = "avx512f")]
    unsafe fn run<const R: usize, const G: usize>(&self) -> usize {
        let mut products = [[_mm512_setzero_ps(); G]; R];
        let weights = self.weights;
        for col in 0..self.len {
            // SAFETY: inside rows and panels, by the caller's promise.
            unsafe {
                let mut w = [_mm512_setzero_ps(); G];
                unrolled!(4; G, |group| {
                    let weights = weights[group].add(col * LANES);
                    // Few rows wait for memory; with many, the panel is near.
                    if R <= 2 {
                        prefetch(weights.cast());
                    }
                    w[group] = _mm512_loadu_ps(weights);
                });
                unrolled!(R, |row| {
                    let x = _mm512_set1_ps(*self.x.add(row * self.x_stride + col));
                    unrolled!(4; G, |group| { products[row][group] = _mm512_fmadd_ps(x, w[group], products[row][group]) });
                });
            }
        }
        unrolled!(R, |row| {
            unrolled!(4; G, |group| {
                // SAFETY: by the caller's promise; sums of the first stretch of columns are written, later ones added to.
                unsafe {
                    let total = self.sums.at(self.to + group, self.row + row);
                    let sum = products[row][group];
                    let sum = if self.is_first { sum } else { _mm512_add_ps(_mm512_loadu_ps(total), sum) };
                    _mm512_storeu_ps(total, sum);
                }
            });
        });
        R
    }
}

/// Columns `start..start + len` of a group as f32 `[column][lane]`: where they are, or written to `room`.
///
/// # Safety
/// The columns are in the group; `room` holds `len` columns.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn panel(part: &Part, index: usize, start: usize, len: usize, room: *mut f32) -> *const f32 {
    let group = Group::new(part, index);
    // SAFETY: the columns are in the group, and fit into `room`.
    unsafe {
        let columns = group.codes.add(start * group.code_bytes);
        match part.dtype {
            StoredType::F32 => return columns.cast(),
            StoredType::F16 => {
                for col in 0..len {
                    prefetch(columns.add(col * 2 * LANES));
                    _mm512_storeu_ps(room.add(col * LANES), halves(columns.add(col * 2 * LANES)));
                }
            }
            StoredType::BF16 => {
                for col in 0..len {
                    prefetch(columns.add(col * 2 * LANES));
                    let bits = _mm256_loadu_si256(columns.add(col * 2 * LANES).cast());
                    let bits = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits));
                    _mm512_storeu_ps(room.add(col * LANES), _mm512_castsi512_ps(bits));
                }
            }
            _ => {
                if let Some(format) = part.layout.format {
                    let blocks = start / BLOCK..(start + len) / BLOCK;
                    let offset = _mm512_set1_epi32(i32::from(format.offset));
                    macro_rules! call {
                        ($codes:ty, $scales:ty) => {
                            dequantize::<$codes, $scales>(group, blocks, offset, room)
                        };
                    }
                    with_format!(format, call);
                }
            }
        }
    }
    room.cast_const()
}

/// # Safety
/// The blocks are in the group, of this format; `room` holds them.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn dequantize<U: Unpack, S: Scale>(
    group: Group,
    blocks: std::ops::Range<usize>,
    offset: __m512i,
    mut room: *mut f32,
) {
    let low_byte = _mm512_set1_epi32(255);
    for block in blocks {
        // SAFETY: the group has this block, and `room` has 32 columns for it.
        unsafe {
            let codes = U::unpack(group.codes.add(block * group.code_bytes));
            let (scales, minimum) = S::scale(group.records, block);
            unrolled!(8, |c| {
                let shifted = [
                    codes[c],
                    _mm512_srli_epi32::<8>(codes[c]),
                    _mm512_srli_epi32::<16>(codes[c]),
                    _mm512_srli_epi32::<24>(codes[c]),
                ];
                unrolled!(4, |byte| {
                    let level = _mm512_sub_epi32(_mm512_and_si512(shifted[byte], low_byte), offset);
                    let level = _mm512_cvtepi32_ps(level);
                    _mm512_storeu_ps(room.add((4 * c + byte) * LANES), _mm512_fmadd_ps(level, scales[c / 4], minimum));
                });
            });
            room = room.add(BLOCK * LANES);
        }
    }
}
