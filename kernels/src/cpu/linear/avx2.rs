//! Kernels for AVX2, FMA and F16C: a group is two halves of eight lanes.
//!
//! Reads packed groups and quantised tiles as `packed` and `scratch` lay them out; repeats the arithmetic of `scalar`.

use std::arch::x86_64::*;

use phalanx_formats::StoredType;

use super::{
    driver::{DEPTH, FloatRows, Span, Sums},
    format::{BLOCK, Codes, Format, Scales, TABLE},
    packed::{GroupLayout, LANES, Part, SUPER},
    scratch::{QuantBlock, QuantTile, scale_of},
};

/// Lanes of a vector: half a group.
const HALF: usize = LANES / 2;
/// Bytes of a packed vector of codes: all lanes of a group.
const VECTOR: usize = 4 * LANES;

/// How a group is read by eight lanes.
#[derive(Clone, Copy)]
struct HalfGroup {
    codes: *const u8,
    code_bytes: usize,
    records: *const u8,
    num_blocks: usize,
    /// First lane.
    lane: usize,
}

impl HalfGroup {
    fn new(part: &Part, index: usize, half: usize) -> Self {
        let GroupLayout { num_blocks, code_bytes, scales_at, .. } = part.layout;
        let bytes = part.group(index);
        Self { codes: bytes.as_ptr(), code_bytes, records: bytes[scales_at..].as_ptr(), num_blocks, lane: half * HALF }
    }

    /// Vector `index` of a block's codes: four bytes of each lane.
    ///
    /// # Safety
    /// The group has this block, the block this vector.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn vector(self, block: usize, index: usize) -> __m256i {
        // SAFETY: by the caller's promise.
        unsafe {
            let codes = self.codes.add(block * self.code_bytes + index * VECTOR + 4 * self.lane);
            _mm256_loadu_si256(codes.cast())
        }
    }

    /// A block's codes as bytes: vector `c` holds codes `4 c` to `4 c + 3` of the lanes.
    ///
    /// # Safety
    /// The group has this block, in codes of kind `CODES`.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn unpack<const CODES: u8>(self, block: usize) -> [__m256i; 8] {
        let mut bytes = [_mm256_setzero_si256(); 8];
        if CODES == Codes::Eight as u8 {
            for (c, bytes) in bytes.iter_mut().enumerate() {
                // SAFETY: a block of bytes is eight vectors.
                *bytes = unsafe { self.vector(block, c) };
            }
            return bytes;
        }
        for i in 0..4 {
            // SAFETY: four vectors of nibbles begin the block.
            let packed = unsafe { self.vector(block, i) };
            bytes[i] = _mm256_and_si256(packed, _mm256_set1_epi8(15));
            bytes[4 + i] = _mm256_and_si256(_mm256_srli_epi32::<4>(packed), _mm256_set1_epi8(15));
        }
        if CODES == Codes::Table as u8 {
            // SAFETY: the table has 16 bytes.
            let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(TABLE.as_ptr().cast()) });
            for bytes in &mut bytes {
                *bytes = _mm256_shuffle_epi8(table, *bytes);
            }
        }
        if CODES == Codes::Five as u8 {
            // SAFETY: the vector of fifth bits follows.
            let high = unsafe { self.vector(block, 4) };
            for (c, bytes) in bytes.iter_mut().enumerate() {
                // Bit `c` of each byte, moved to bit 4.
                let bit = _mm256_and_si256(high, _mm256_set1_epi8((1u8 << c).cast_signed()));
                let set = _mm256_cmpeq_epi8(bit, _mm256_setzero_si256());
                *bytes = _mm256_or_si256(*bytes, _mm256_andnot_si256(set, _mm256_set1_epi8(16)));
            }
        }
        if CODES == Codes::Six as u8 {
            for i in 0..2 {
                // SAFETY: two vectors of pairs follow.
                let high = unsafe { self.vector(block, 4 + i) };
                let pairs =
                    [_mm256_slli_epi32::<4>(high), _mm256_slli_epi32::<2>(high), high, _mm256_srli_epi32::<2>(high)];
                for (c, pair) in pairs.into_iter().enumerate() {
                    let pair = _mm256_and_si256(pair, _mm256_set1_epi8(48));
                    bytes[4 * i + c] = _mm256_or_si256(bytes[4 * i + c], pair);
                }
            }
        }
        bytes
    }

    /// A block's scales by half, and its minimum.
    ///
    /// # Safety
    /// The group has this block, with scales of kind `SCALES`.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn scales<const SCALES: u8>(self, block: usize) -> ([__m256; 2], __m256) {
        let zero = _mm256_setzero_ps();
        let within = block % SUPER;
        // SAFETY: records lie as `packed` says.
        unsafe {
            let unsigned = |record: *const u8, at: usize| {
                let factors = _mm_loadl_epi64(record.add(at * LANES + self.lane).cast());
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(factors))
            };
            let signed = |record: *const u8, at: usize| {
                let factors = _mm_loadl_epi64(record.add(at * LANES + self.lane).cast());
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(factors))
            };
            if SCALES == Scales::Half as u8 {
                ([self.f16s(self.records.add(2 * LANES * block)); 2], zero)
            } else if SCALES == Scales::HalfMinimum as u8 {
                let record = self.records.add(4 * LANES * block);
                ([self.f16s(record); 2], self.f16s(record.add(2 * LANES)))
            } else if SCALES == Scales::Super as u8 {
                let record = self.records.add(block / SUPER * (4 + 2 * SUPER) * LANES);
                let scale = _mm256_mul_ps(self.f16s(record), unsigned(record, 4 + within));
                let minimum = _mm256_mul_ps(self.f16s(record.add(2 * LANES)), unsigned(record, 4 + SUPER + within));
                ([scale; 2], minimum)
            } else {
                let record = self.records.add(block / SUPER * (2 + 2 * SUPER) * LANES);
                let scale = self.f16s(record);
                let first = _mm256_mul_ps(scale, signed(record, 2 + 2 * within));
                ([first, _mm256_mul_ps(scale, signed(record, 3 + 2 * within))], zero)
            }
        }
    }

    /// This half's eight of 16 f16.
    ///
    /// # Safety
    /// 32 bytes can be read.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn f16s(self, bytes: *const u8) -> __m256 {
        // SAFETY: by the caller's promise.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(bytes.add(2 * self.lane).cast()) })
    }
}

/// The kernel of a format, by the constants of its codes and scales.
macro_rules! with_format {
    ($format:expr, $call:ident) => {
        match ($format.codes, $format.scales) {
            (Codes::Four, Scales::Half) => $call!(Codes::Four, Scales::Half),
            (Codes::Four, Scales::HalfMinimum) => $call!(Codes::Four, Scales::HalfMinimum),
            (Codes::Four, Scales::Super) => $call!(Codes::Four, Scales::Super),
            (Codes::Five, Scales::Half) => $call!(Codes::Five, Scales::Half),
            (Codes::Five, Scales::HalfMinimum) => $call!(Codes::Five, Scales::HalfMinimum),
            (Codes::Five, Scales::Super) => $call!(Codes::Five, Scales::Super),
            (Codes::Six, Scales::SuperHalves) => $call!(Codes::Six, Scales::SuperHalves),
            (Codes::Table, Scales::Half) => $call!(Codes::Table, Scales::Half),
            (Codes::Eight, Scales::Half) => $call!(Codes::Eight, Scales::Half),
            (codes, scales) => unreachable!("no format has {codes:?} with {scales:?}"),
        }
    };
}

/// Products of a tile of quantised activations with one group; `out` `[rows][16]`.
///
/// # Safety
/// The CPU has AVX2, FMA, F16C; the tile's planes hold as many blocks as the part has; `out` has room for `tile.rows` rows.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn int8_tile(part: &Part, group: usize, tile: QuantTile, out: *mut f32) {
    let Some(format) = part.layout.format else { return };
    for half in 0..2 {
        let group = HalfGroup::new(part, group, half);
        let mut row = 0;
        while row < tile.rows {
            macro_rules! call {
                ($codes:expr, $scales:expr) => {
                    // SAFETY: passed on; the tile has these rows.
                    unsafe {
                        match tile.rows - row {
                            4.. => int8_rows::<{ $codes as u8 }, { $scales as u8 }, 4>(group, format, tile, row, out),
                            2.. => int8_rows::<{ $codes as u8 }, { $scales as u8 }, 2>(group, format, tile, row, out),
                            _ => int8_rows::<{ $codes as u8 }, { $scales as u8 }, 1>(group, format, tile, row, out),
                        }
                    }
                };
            }
            row += with_format!(format, call);
        }
    }
}

/// Rows `row..row + R` of a tile with half a group. Returns `R`.
///
/// # Safety
/// As `int8_tile`; the tile has these rows; the group is of this format.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn int8_rows<const CODES: u8, const SCALES: u8, const R: usize>(
    group: HalfGroup,
    format: Format,
    tile: QuantTile,
    row: usize,
    out: *mut f32,
) -> usize {
    let has_minimum = SCALES == Scales::HalfMinimum as u8 || SCALES == Scales::Super as u8;
    let has_halves = SCALES == Scales::SuperHalves as u8;
    let offset = _mm256_set1_epi32(i32::from(format.offset) / 8);
    let mut totals = [_mm256_setzero_ps(); R];
    for block in 0..group.num_blocks {
        // SAFETY: the group has this block.
        let (codes, (scales, minimum)) = unsafe { (group.unpack::<CODES>(block), group.scales::<SCALES>(block)) };
        for (index, total) in totals.iter_mut().enumerate() {
            let at = block * tile.rows + row + index;
            // SAFETY: the tile has this row in this block.
            unsafe {
                let x = tile.codes.add(at * BLOCK).cast::<i32>();
                let x_scale = _mm256_set1_ps(*tile.scales.add(at));
                if has_halves {
                    for half in 0..2 {
                        let offset = *tile.half_offsets.add((2 * block + half) * tile.rows + row + index);
                        let codes = [codes[4 * half], codes[4 * half + 1], codes[4 * half + 2], codes[4 * half + 3]];
                        let product =
                            _mm256_add_epi32(dot::<CODES, 4>(codes, x.add(4 * half)), _mm256_set1_epi32(offset));
                        let product = _mm256_mul_ps(_mm256_cvtepi32_ps(product), x_scale);
                        *total = _mm256_fmadd_ps(product, scales[half], *total);
                    }
                    continue;
                }
                let mut product = dot::<CODES, 8>(codes, x);
                if !has_minimum && !is_signed::<CODES>() {
                    let eights = _mm256_set1_epi32(*tile.offsets.add(at));
                    product = _mm256_add_epi32(product, _mm256_mullo_epi32(eights, offset));
                }
                let product = _mm256_mul_ps(_mm256_cvtepi32_ps(product), x_scale);
                *total = _mm256_fmadd_ps(product, scales[0], *total);
                if has_minimum {
                    *total = _mm256_fmadd_ps(minimum, _mm256_set1_ps(*tile.sums.add(at)), *total);
                }
            }
        }
    }
    for (index, total) in totals.into_iter().enumerate() {
        // SAFETY: `out` has room for this row.
        unsafe { _mm256_storeu_ps(out.add((row + index) * LANES + group.lane), total) };
    }
    R
}

/// Codes of eight bits meet activations with their offset of 128 taken away: their products fit 16 bits only so.
const fn is_signed<const CODES: u8>() -> bool {
    CODES == Codes::Eight as u8 || CODES == Codes::Table as u8
}

/// Sums of products of `C` vectors of codes with as many groups of four activations, exact.
///
/// # Safety
/// `x` holds `C` groups of four.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dot<const CODES: u8, const C: usize>(codes: [__m256i; C], x: *const i32) -> __m256i {
    // How many products of two pairs fit in 16 bits one on the other: 2 * 15 * 127 eight times, 2 * 31 * 127 four times,
    // 2 * 63 * 127 twice, 2 * 128 * 127 once.
    let deep = if CODES == Codes::Four as u8 {
        8
    } else if CODES == Codes::Five as u8 {
        4
    } else if CODES == Codes::Six as u8 {
        2
    } else {
        1
    };
    let ones = _mm256_set1_epi16(1);
    let mut product = _mm256_setzero_si256();
    let mut c = 0;
    while c < C {
        let mut pairs = _mm256_setzero_si256();
        for (c, codes) in codes.iter().enumerate().skip(c).take(deep) {
            // SAFETY: `x` has this group.
            let x = _mm256_set1_epi32(unsafe { *x.add(c) });
            let next = if is_signed::<CODES>() {
                let level = _mm256_xor_si256(*codes, _mm256_set1_epi8(-128));
                _mm256_maddubs_epi16(_mm256_abs_epi8(level), _mm256_sign_epi8(x, level))
            } else {
                _mm256_maddubs_epi16(*codes, x)
            };
            pairs = _mm256_add_epi16(pairs, next);
        }
        product = _mm256_add_epi32(product, _mm256_madd_epi16(pairs, ones));
        c += deep;
    }
    product
}

/// Products of a stretch of rows with a span, into `sums` from group `to` on.
///
/// # Safety
/// The CPU has AVX2, FMA, F16C; `to + span.len <= SPAN_MAX`, `rows.num_rows <= STRETCH`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn float_stretch(span: Span<'_>, rows: FloatRows<'_>, to: usize, sums: Sums) {
    let mut room = std::mem::MaybeUninit::<[f32; DEPTH * LANES]>::uninit();
    let room = room.as_mut_ptr().cast::<f32>();
    for group in 0..span.len {
        for start in (0..rows.cols).step_by(DEPTH) {
            let len = DEPTH.min(rows.cols - start);
            // SAFETY: `room` holds `DEPTH` columns, and these columns are in the group.
            let weights = unsafe { panel(span.part, span.first + group, start, len, room) };
            let mut row = 0;
            while row < rows.num_rows {
                let x = rows.x[row * rows.cols + start..].as_ptr();
                // SAFETY: `sums` has room for these rows, which `x` and the panel have.
                row += unsafe {
                    let sums = sums.at(to + group, row);
                    match rows.num_rows - row {
                        4.. => stripe::<4>(x, rows.cols, weights, len, sums, start == 0),
                        2.. => stripe::<2>(x, rows.cols, weights, len, sums, start == 0),
                        _ => stripe::<1>(x, rows.cols, weights, len, sums, start == 0),
                    }
                };
            }
        }
    }
}

/// `R` rows times a panel. Returns `R`.
///
/// # Safety
/// `x` has `R` rows, `x` and the panel `len` columns, `sums` room for `R` rows.
#[target_feature(enable = "avx2,fma")]
unsafe fn stripe<const R: usize>(
    x: *const f32,
    x_stride: usize,
    weights: *const f32,
    len: usize,
    sums: *mut f32,
    is_first: bool,
) -> usize {
    let mut products = [[_mm256_setzero_ps(); 2]; R];
    for col in 0..len {
        // SAFETY: by the caller's promise.
        unsafe {
            let w = [_mm256_loadu_ps(weights.add(col * LANES)), _mm256_loadu_ps(weights.add(col * LANES + HALF))];
            for (row, products) in products.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*x.add(row * x_stride + col));
                products[0] = _mm256_fmadd_ps(x, w[0], products[0]);
                products[1] = _mm256_fmadd_ps(x, w[1], products[1]);
            }
        }
    }
    for (row, products) in products.into_iter().enumerate() {
        for (half, sum) in products.into_iter().enumerate() {
            // SAFETY: by the caller's promise; sums of the first stretch of columns are written, later ones added to.
            unsafe {
                let total = sums.add(row * LANES + half * HALF);
                let sum = if is_first { sum } else { _mm256_add_ps(_mm256_loadu_ps(total), sum) };
                _mm256_storeu_ps(total, sum);
            }
        }
    }
    R
}

/// Columns `start..start + len` of a group as f32 `[column][lane]`: where they are, or written to `room`.
///
/// # Safety
/// The columns are in the group; `room` holds `len` columns.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn panel(part: &Part, index: usize, start: usize, len: usize, room: *mut f32) -> *const f32 {
    if part.dtype == StoredType::F32 {
        // SAFETY: the columns are in the group.
        return unsafe { part.group(index).as_ptr().add(start * 4 * LANES).cast() };
    }
    for half in 0..2 {
        let group = HalfGroup::new(part, index, half);
        // SAFETY: the columns are in the group, and fit into `room`.
        unsafe {
            let room = room.add(group.lane);
            let columns = group.codes.add(start * group.code_bytes);
            match part.dtype {
                StoredType::F16 => {
                    for col in 0..len {
                        _mm256_storeu_ps(room.add(col * LANES), group.f16s(columns.add(col * 2 * LANES)));
                    }
                }
                StoredType::BF16 => {
                    for col in 0..len {
                        let bits = _mm_loadu_si128(columns.add(2 * (col * LANES + group.lane)).cast());
                        let bits = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits));
                        _mm256_storeu_ps(room.add(col * LANES), _mm256_castsi256_ps(bits));
                    }
                }
                _ => {
                    if let Some(format) = part.layout.format {
                        let blocks = start / BLOCK..(start + len) / BLOCK;
                        macro_rules! call {
                            ($codes:expr, $scales:expr) => {
                                dequantize::<{ $codes as u8 }, { $scales as u8 }>(group, format, blocks, room)
                            };
                        }
                        with_format!(format, call);
                    }
                }
            }
        }
    }
    room.cast_const()
}

/// # Safety
/// The blocks are in the group, of this format; `room` holds them.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dequantize<const CODES: u8, const SCALES: u8>(
    group: HalfGroup,
    format: Format,
    blocks: std::ops::Range<usize>,
    mut room: *mut f32,
) {
    let offset = _mm256_set1_epi32(i32::from(format.offset));
    let low_byte = _mm256_set1_epi32(255);
    for block in blocks {
        // SAFETY: the group has this block, and `room` has 32 columns for it.
        unsafe {
            let codes = group.unpack::<CODES>(block);
            let (scales, minimum) = group.scales::<SCALES>(block);
            for (c, codes) in codes.into_iter().enumerate() {
                let shifted = [
                    codes,
                    _mm256_srli_epi32::<8>(codes),
                    _mm256_srli_epi32::<16>(codes),
                    _mm256_srli_epi32::<24>(codes),
                ];
                for (byte, shifted) in shifted.into_iter().enumerate() {
                    let level = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(shifted, low_byte), offset));
                    let weights = _mm256_fmadd_ps(level, scales[c / 4], minimum);
                    _mm256_storeu_ps(room.add((4 * c + byte) * LANES), weights);
                }
            }
            room = room.add(BLOCK * LANES);
        }
    }
}

/// Quantises a block, as `scratch::quantize_block` does.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn quantize_block(x: &[f32; BLOCK]) -> QuantBlock {
    let mut values = [_mm256_setzero_ps(); 4];
    for (value, x) in values.iter_mut().zip(x.chunks_exact(HALF)) {
        // SAFETY: eight values are one vector.
        *value = unsafe { _mm256_loadu_ps(x.as_ptr()) };
    }
    let magnitude = |x| _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fff_ffff));
    let [a, b, c, d] = values.map(magnitude);
    let largest = _mm256_max_epu32(_mm256_max_epu32(a, b), _mm256_max_epu32(c, d));
    let largest = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256::<1>(largest));
    let largest = _mm_max_epu32(largest, _mm_shuffle_epi32::<0b01_00_11_10>(largest));
    let largest = _mm_max_epu32(largest, _mm_shuffle_epi32::<0b10_11_00_01>(largest));
    let (scale, factor) = scale_of(f32::from_bits(_mm_cvtsi128_si32(largest).cast_unsigned()));
    let factor = _mm256_set1_ps(factor);
    // Nearest, ties to even. What is not finite is outside 32 bits, and its low byte zero.
    let low_byte = _mm256_set1_epi32(255);
    let levels = values.map(|x| _mm256_cvtps_epi32(_mm256_mul_ps(x, factor)));
    let [a, b, c, d] = levels.map(|level| _mm256_and_si256(level, low_byte));
    // Packing works on 128-bit lanes: the order of the fours is put right at the end.
    let packed = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    let packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    let sums = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), packed), _mm256_set1_epi16(1));
    let sum = |sums| {
        let sums = _mm_add_epi32(sums, _mm_shuffle_epi32::<0b01_00_11_10>(sums));
        _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_shuffle_epi32::<0b10_11_00_01>(sums)))
    };
    let half_sums = [sum(_mm256_castsi256_si128(sums)), sum(_mm256_extracti128_si256::<1>(sums))];
    let mut codes = [0; BLOCK];
    // SAFETY: the codes are 32 bytes.
    unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), packed) };
    QuantBlock { codes, scale, half_sums }
}
