//! Kernels for AVX-512 with VNNI: one lane of a vector is one output.
//!
//! Reads packed groups and quantised tiles as `packed` and `scratch` lay them out; repeats the arithmetic of `scalar`.

use std::arch::x86_64::*;

use super::{
    format::TABLE,
    memory::LINE_BYTES,
    packed::{GroupLayout, LANES, Part, SUPER},
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

mod float;
mod int8;

pub(super) use float::float_stretch;
pub(super) use int8::{int8_tile, quantize_block};
