//! How a product is cut into units of work, and what happens to a finished tile.
//!
//! A unit is a span of groups (of 16 weight rows) times a stretch of batch rows: its sums stay in the first-level cache until they
//! are written out.

use std::mem::MaybeUninit;

use super::{
    Activations, CpuMatrix, Scratch,
    activation::act_mul,
    isa::Tier,
    packed::{LANES, Part},
    scalar,
    scratch::{QuantTile, tiles},
};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::GateActivation;
use crate::cpu::disjoint::Disjoint;
use crate::{KernelError, cpu::Pool};

/// Batch rows of a unit.
pub(super) const STRETCH: usize = 64;
/// Groups of a unit at most.
pub(super) const SPAN_MAX: usize = 4;
/// Columns whose products are summed before the sum joins the total (f32 activations).
pub(super) const DEPTH: usize = 256;

/// Neighbouring groups of a part.
#[derive(Clone, Copy)]
pub(super) struct Span<'a> {
    pub(super) part: &'a Part,
    pub(super) first: usize,
    pub(super) len: usize,
}

/// Sums of a unit: `[group][row][lane]`, `STRETCH` rows each.
#[derive(Clone, Copy)]
pub(super) struct Sums(*mut f32);

impl Sums {
    /// Where the sums of a group's row are.
    ///
    /// # Safety
    /// `group < SPAN_MAX`, `row < STRETCH`.
    #[inline(always)]
    pub(super) unsafe fn at(self, group: usize, row: usize) -> *mut f32 {
        debug_assert!(group < SPAN_MAX && row < STRETCH);
        // SAFETY: inside the array by the caller's promise.
        unsafe { self.0.add((group * STRETCH + row) * LANES) }
    }

    /// The finished sums of a group's row.
    ///
    /// # Safety
    /// As `at`; and they have been written.
    unsafe fn row<'a>(self, group: usize, row: usize) -> &'a [f32; LANES] {
        // SAFETY: by the caller's promise.
        unsafe { &*self.at(group, row).cast() }
    }
}

/// Rows `x` `[num_rows, cols]` of a stretch of the batch.
#[derive(Clone, Copy)]
pub(super) struct FloatRows<'a> {
    pub(super) x: &'a [f32],
    pub(super) num_rows: usize,
    pub(super) cols: usize,
}

/// `out = x W^T + bias`; `x` `[M, K]`, `out` `[M, N]`. Not collective.
///
/// # Errors
/// Shapes that do not fit, or a batch larger than the scratch was planned for.
pub fn linear(
    pool: &Pool,
    scratch: &mut Scratch,
    x: &[f32],
    w: &CpuMatrix,
    bias: Option<&[f32]>,
    out: &mut [f32],
) -> Result<(), KernelError> {
    if bias.is_some_and(|bias| bias.len() != w.rows) {
        return Err(shape(x, w, out));
    }
    let product = Product::new(pool, scratch, x, w, w.rows, out)?;
    let spans = Spans::new(w, 0, w.parts.len(), product.span_len());
    let out = Disjoint::new(out);
    pool.run(product.num_stretches() * spans.total, |unit| {
        let (stretch, span) = (unit / spans.total, unit % spans.total);
        let (column, span) = spans.at(span);
        let mut sums = MaybeUninit::<[f32; SPAN_MAX * STRETCH * LANES]>::uninit();
        let sums = Sums(sums.as_mut_ptr().cast());
        let rows = product.compute(stretch, span, 0, sums);
        let width = (span.part.rows - span.first * LANES).min(span.len * LANES);
        for row in 0..rows.len() {
            // SAFETY: units differ in their rows or in their columns of `out`.
            let out = unsafe { out.slice((rows.start + row) * w.rows + column, width) };
            for (group, out) in out.chunks_mut(LANES).enumerate() {
                // SAFETY: `compute` has written `span.len` groups of these rows.
                let sums = unsafe { sums.row(group, row) };
                match bias {
                    Some(bias) => add(sums, &bias[column + group * LANES..], out),
                    None => out.copy_from_slice(&sums[..out.len()]),
                }
            }
        }
    });
    Ok(())
}

/// `out = act(x G^T) * (x U^T)`; `x` `[M, K]`, `w` from `CpuMatrix::pack_gate_up`, `out` `[M, inner]`. Not collective.
///
/// # Errors
/// As `linear`, or a matrix that is not gate and up.
pub fn gate_up(
    pool: &Pool,
    scratch: &mut Scratch,
    x: &[f32],
    w: &CpuMatrix,
    activation: GateActivation,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let inner = w.rows / 2;
    if !w.is_gate_up {
        let reason = "the matrix was not packed as gate and up".to_owned();
        return Err(KernelError::Shape { op: "gate_up_act", reason });
    }
    let product = Product::new(pool, scratch, x, w, inner, out)?;
    let half = SPAN_MAX / 2;
    let gates = Spans::new(w, 0, 1, product.span_len().min(half));
    let ups = Spans::new(w, 1, 2, product.span_len().min(half));
    let tier = product.scratch.isa().tier();
    let out = Disjoint::new(out);
    pool.run(product.num_stretches() * gates.total, |unit| {
        let (stretch, span) = (unit / gates.total, unit % gates.total);
        let ((column, gate), (_, up)) = (gates.at(span), ups.at(span));
        let mut sums = MaybeUninit::<[f32; SPAN_MAX * STRETCH * LANES]>::uninit();
        let sums = Sums(sums.as_mut_ptr().cast());
        let rows = product.compute(stretch, gate, 0, sums);
        product.compute(stretch, up, half, sums);
        let width = (inner - gate.first * LANES).min(gate.len * LANES);
        for row in 0..rows.len() {
            // SAFETY: units differ in their rows or in their columns of `out`.
            let out = unsafe { out.slice((rows.start + row) * inner + column, width) };
            for (group, out) in out.chunks_mut(LANES).enumerate() {
                // SAFETY: `compute` has written the groups of gate from 0 on, those of up from `half` on.
                let (gate, up) = unsafe { (sums.row(group, row), sums.row(half + group, row)) };
                act_mul(tier, activation, gate, up, out);
            }
        }
    });
    Ok(())
}

fn add(sums: &[f32; LANES], bias: &[f32], out: &mut [f32]) {
    for ((out, sum), bias) in out.iter_mut().zip(sums).zip(bias) {
        *out = sum + bias;
    }
}

fn shape(x: &[f32], w: &CpuMatrix, out: &[f32]) -> KernelError {
    let reason = format!("{} values through {} x {} into {} values", x.len(), w.rows, w.cols, out.len());
    KernelError::Shape { op: "linear", reason }
}

/// A product whose operands fit each other and whose activations are ready.
struct Product<'a> {
    scratch: &'a Scratch,
    x: &'a [f32],
    num_rows: usize,
    cols: usize,
    activations: Activations,
}

impl<'a> Product<'a> {
    fn new(
        pool: &Pool,
        scratch: &'a mut Scratch,
        x: &'a [f32],
        w: &CpuMatrix,
        width: usize,
        out: &[f32],
    ) -> Result<Self, KernelError> {
        let num_rows = x.len() / w.cols;
        if x.len() != num_rows * w.cols || out.len() != num_rows * width {
            return Err(shape(x, w, out));
        }
        let has_codes = w.parts.iter().any(|part| part.layout.format.is_some());
        if w.activations == Activations::Int8 && has_codes {
            scratch.quantize(pool, x, num_rows, w.cols)?;
        }
        Ok(Self { scratch, x, num_rows, cols: w.cols, activations: w.activations })
    }

    fn num_stretches(&self) -> usize {
        self.num_rows.div_ceil(STRETCH)
    }

    /// Groups of a unit: more where few rows give too little to do at once.
    fn span_len(&self) -> usize {
        if self.num_rows <= 2 { SPAN_MAX } else { 2 }
    }

    /// Fills `sums`, from group `to` on, with a span's products for a stretch of rows. Returns the rows.
    fn compute(&self, stretch: usize, span: Span<'_>, to: usize, sums: Sums) -> std::ops::Range<usize> {
        let (first, end) = (stretch * STRETCH, self.num_rows.min((stretch + 1) * STRETCH));
        if span.part.layout.format.is_some() && self.activations == Activations::Int8 {
            for group in 0..span.len {
                for tile in tiles(first, end) {
                    let quantized = self.scratch.tile(tile);
                    // SAFETY: a span has at most `SPAN_MAX - to` groups, a stretch at most `STRETCH` rows.
                    unsafe { self.int8_tile(span, group, quantized, sums.at(to + group, tile.first - first)) };
                }
            }
        } else {
            let rows =
                FloatRows { x: &self.x[first * self.cols..end * self.cols], num_rows: end - first, cols: self.cols };
            self.float_stretch(span, rows, to, sums);
        }
        first..end
    }

    /// # Safety
    /// `out` has room for the tile's rows, `LANES` values each.
    unsafe fn int8_tile(&self, span: Span<'_>, group: usize, tile: QuantTile, out: *mut f32) {
        match self.scratch.isa().tier() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this tier exists only where the CPU has its instructions; the rest is passed on.
            Tier::Avx512 => unsafe { avx512::int8_tile(span.part, span.first + group, tile, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Tier::Avx2 => unsafe { avx2::int8_tile(span.part, span.first + group, tile, out) },
            // SAFETY: passed on.
            _ => unsafe { scalar::int8_tile(span.part, span.first + group, tile, out) },
        }
    }

    fn float_stretch(&self, span: Span<'_>, rows: FloatRows<'_>, to: usize, sums: Sums) {
        match self.scratch.isa().tier() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this tier exists only where the CPU has its instructions; a span has at most `SPAN_MAX - to` groups, a
            // stretch at most `STRETCH` rows.
            Tier::Avx512 => unsafe { avx512::float_stretch(span, rows, to, sums) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Tier::Avx2 => unsafe { avx2::float_stretch(span, rows, to, sums) },
            _ => scalar::float_stretch(span, rows, to, sums),
        }
    }
}

/// The spans of some parts of a matrix, one after the other.
struct Spans<'a> {
    w: &'a CpuMatrix,
    first_part: usize,
    end_part: usize,
    len: usize,
    total: usize,
}

impl<'a> Spans<'a> {
    fn new(w: &'a CpuMatrix, first_part: usize, end_part: usize, len: usize) -> Self {
        let total = w.parts[first_part..end_part].iter().map(|part| part.num_groups().div_ceil(len)).sum();
        Self { w, first_part, end_part, len, total }
    }

    /// Span `index`, and its first output column.
    fn at(&self, mut index: usize) -> (usize, Span<'a>) {
        let mut column = 0;
        let parts = &self.w.parts[self.first_part..self.end_part];
        for part in parts {
            let num_spans = part.num_groups().div_ceil(self.len);
            if index < num_spans {
                let first = index * self.len;
                let len = self.len.min(part.num_groups() - first);
                return (column + first * LANES, Span { part, first, len });
            }
            index -= num_spans;
            column += part.rows;
        }
        unreachable!("a unit's span is one of the matrix")
    }
}
