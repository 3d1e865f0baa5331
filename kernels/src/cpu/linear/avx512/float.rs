//! Activations in f32: weights become f32 where they are used, or in a panel for many rows.

use std::arch::x86_64::*;

use phalanx_formats::StoredType;

use super::{
    super::{
        driver::{DEPTH, FloatRows, SPAN_MAX, Span, Sums},
        format::{BLOCK, Codes, Scales},
        packed::{LANES, Part},
    },
    Eight, Five, Four, Group, Half, HalfMinimum, Scale, Six, Super, SuperHalves, Table, Unpack, halves, prefetch,
};

/// Rows up to which elements are turned into f32 where they are used; with more, once for all rows.
const DIRECT_MAX: usize = 32;

/// How an element type is read.
trait Element {
    const BYTES: usize;

    /// Sixteen elements as f32.
    ///
    /// # Safety
    /// They can be read.
    unsafe fn load(elements: *const u8) -> __m512;
}

struct F32;
struct F16;
struct Bf16;

impl Element for F32 {
    const BYTES: usize = 4;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(elements: *const u8) -> __m512 {
        // SAFETY: by the caller's promise.
        unsafe { _mm512_loadu_ps(elements.cast()) }
    }
}

impl Element for F16 {
    const BYTES: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(elements: *const u8) -> __m512 {
        // SAFETY: by the caller's promise.
        unsafe { halves(elements) }
    }
}

impl Element for Bf16 {
    const BYTES: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(elements: *const u8) -> __m512 {
        // SAFETY: by the caller's promise.
        let bits = unsafe { _mm256_loadu_si256(elements.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
    }
}

/// Products of a stretch of rows with a span, into `sums` from group `to` on.
///
/// # Safety
/// The CPU has AVX-512 F and BW; `to + span.len <= SPAN_MAX`, `rows.num_rows <= STRETCH`.
#[target_feature(enable = "avx512f,avx512bw")]
pub(in super::super) unsafe fn float_stretch(span: Span<'_>, rows: FloatRows<'_>, to: usize, sums: Sums) {
    let mut panels = std::mem::MaybeUninit::<[f32; SPAN_MAX * DEPTH * LANES]>::uninit();
    let panels = panels.as_mut_ptr().cast::<f32>();
    let is_direct = rows.num_rows <= DIRECT_MAX;
    for start in (0..rows.cols).step_by(DEPTH) {
        let len = DEPTH.min(rows.cols - start);
        let mut weights = [panels.cast_const().cast(); SPAN_MAX];
        let mut dtype = StoredType::F32;
        for (group, weights) in weights.iter_mut().enumerate().take(span.len) {
            let layout = &span.part.layout;
            if layout.format.is_none() && (is_direct || span.part.dtype == StoredType::F32) {
                *weights = span.part.group(span.first + group)[start * layout.code_bytes..].as_ptr();
                dtype = span.part.dtype;
            } else {
                // SAFETY: a panel has room for `DEPTH` columns, and these columns are in the group.
                unsafe {
                    let room = panels.add(group * DEPTH * LANES);
                    fill_panel(span.part, span.first + group, start, len, room);
                    *weights = room.cast_const().cast();
                }
            }
        }
        let panels = Panels { weights, num_groups: span.len, len, sums, to, is_first: start == 0 };
        // SAFETY: the panels are of this type, have `len` columns, and `sums` has room for the rows.
        unsafe {
            match dtype {
                StoredType::F16 => panels.run::<F16>(rows, start),
                StoredType::BF16 => panels.run::<Bf16>(rows, start),
                _ => panels.run::<F32>(rows, start),
            }
        }
    }
}

/// Columns of a few groups, `[column][lane]` each, and where the products go.
struct Panels {
    weights: [*const u8; SPAN_MAX],
    num_groups: usize,
    len: usize,
    sums: Sums,
    to: usize,
    is_first: bool,
}

impl Panels {
    /// All rows, from column `start` on, a few at a time.
    ///
    /// # Safety
    /// Panels of elements `E` with `len` columns; rows with as many from `start` on; `sums` has room for them.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn run<E: Element>(&self, rows: FloatRows<'_>, start: usize) {
        let mut row = 0;
        while row < rows.num_rows {
            let x = rows.x[row * rows.cols + start..].as_ptr();
            let stride = rows.cols;
            // SAFETY: `x` has this many rows, `weights` this many groups.
            row += unsafe {
                match (rows.num_rows - row, self.num_groups) {
                    (8.., 1) => self.stripe::<E, 8, 1>(x, stride, row),
                    (8.., 2) => self.stripe::<E, 8, 2>(x, stride, row),
                    (4.., 1) => self.stripe::<E, 4, 1>(x, stride, row),
                    (4.., 2) => self.stripe::<E, 4, 2>(x, stride, row),
                    (2.., 1) => self.stripe::<E, 2, 1>(x, stride, row),
                    (2.., 2) => self.stripe::<E, 2, 2>(x, stride, row),
                    (2.., 3) => self.stripe::<E, 2, 3>(x, stride, row),
                    (2.., _) => self.stripe::<E, 2, 4>(x, stride, row),
                    (_, 1) => self.stripe::<E, 1, 1>(x, stride, row),
                    (_, 2) => self.stripe::<E, 1, 2>(x, stride, row),
                    (_, 3) => self.stripe::<E, 1, 3>(x, stride, row),
                    (_, _) => self.stripe::<E, 1, 4>(x, stride, row),
                }
            };
        }
    }

    /// `R` rows, which begin at `x`, times `G` groups. Returns `R`.
    ///
    /// # Safety
    /// As `run`, with `R` rows and `G` groups.
    #[target_feature(enable = "avx512f")]
    unsafe fn stripe<E: Element, const R: usize, const G: usize>(
        &self,
        x: *const f32,
        x_stride: usize,
        first_row: usize,
    ) -> usize {
        let mut products = [[_mm512_setzero_ps(); G]; R];
        let weights = self.weights;
        for col in 0..self.len {
            // SAFETY: inside rows and panels, by the caller's promise.
            unsafe {
                let mut w = [_mm512_setzero_ps(); G];
                unrolled!(4; G, |group| {
                    let weights = weights[group].add(col * E::BYTES * LANES);
                    prefetch(weights);
                    w[group] = E::load(weights);
                });
                unrolled!(R, |row| {
                    let x = _mm512_set1_ps(*x.add(row * x_stride + col));
                    unrolled!(4; G, |group| { products[row][group] = _mm512_fmadd_ps(x, w[group], products[row][group]) });
                });
            }
        }
        unrolled!(R, |row| {
            unrolled!(4; G, |group| {
                // SAFETY: by the caller's promise; sums of the first stretch of columns are written, later ones added to.
                unsafe {
                    let total = self.sums.at(self.to + group, first_row + row);
                    let sum = products[row][group];
                    let sum = if self.is_first { sum } else { _mm512_add_ps(_mm512_loadu_ps(total), sum) };
                    _mm512_storeu_ps(total, sum);
                }
            });
        });
        R
    }
}

/// Writes columns `start..start + len` of a group as f32 `[column][lane]`.
///
/// # Safety
/// The columns are in the group; `room` holds `len` columns.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn fill_panel(part: &Part, index: usize, start: usize, len: usize, room: *mut f32) {
    let group = Group::new(part, index);
    let blocks = start / BLOCK..(start + len) / BLOCK;
    // SAFETY: the columns are in the group, and fit into `room`.
    unsafe {
        let columns = group.codes.add(start * group.code_bytes);
        match (part.layout.format, part.dtype) {
            (None, StoredType::F16) => convert::<F16>(columns, len, room),
            (None, StoredType::BF16) => convert::<Bf16>(columns, len, room),
            (None, _) => convert::<F32>(columns, len, room),
            (Some(format), _) => {
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

/// # Safety
/// There are `len` columns of elements `E`; `room` holds them.
#[target_feature(enable = "avx512f")]
unsafe fn convert<E: Element>(columns: *const u8, len: usize, room: *mut f32) {
    for col in 0..len {
        // SAFETY: by the caller's promise.
        unsafe { _mm512_storeu_ps(room.add(col * LANES), E::load(columns.add(col * E::BYTES * LANES))) };
    }
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
