//! Quantised activations: made, and multiplied with packed codes.

use std::arch::x86_64::*;

use super::{
    super::{
        format::{BLOCK, Codes, Scales},
        packed::{LANES, Part},
        scratch::{QuantBlock, QuantTile, scale_of},
    },
    Eight, Five, Four, Group, Half, HalfMinimum, Scale, Six, Super, SuperHalves, Table, Unpack,
};

/// Quantises a block, as `scratch::quantize_block` does.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(in super::super) fn quantize_block(x: &[f32; BLOCK]) -> QuantBlock {
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

/// Products of a tile of quantised activations with one group; `out` `[rows][16]`.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL, VNNI; the tile's planes hold as many blocks as the part has; `out` has room for
/// `tile.rows` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(in super::super) unsafe fn int8_tile(part: &Part, group: usize, tile: QuantTile, out: *mut f32) {
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
