//! Packed weights: 16 rows side by side, so that one vector lane is one output.
//!
//! A group holds 16 rows. Elements: `[cols][16]`. Quantised: code blocks `[blocks][vectors][16][4 bytes]`, then scales.
//! Byte `4 i + t` of a row's block is in lane `row` of vector `i`: for codes of four bits its low half is code `4 i + t`, its high
//! half code `16 + 4 i + t`. Fifth bits: bit `8 t + c` of one vector is that of code `4 c + t`. Pairs: bits `8 t + 2 (c % 4)` of vector `c / 4`.
//!
//! **Invariant:** rows past the end of a part are zero, and no larger than what fills the last group.

use phalanx_formats::StoredType;

use super::{
    format::{BLOCK, BlockScales, Codes, FileBlock, FileScales, Format, Scales, read_block},
    memory::{AlignedBytes, LINE_BYTES},
};
use crate::{HostMatrix, KernelError};

/// Rows in a group: lanes of the widest vector.
pub(super) const LANES: usize = 16;
/// Blocks that share the f16 scales of [`Scales::Super`].
pub(super) const SUPER: usize = 8;

/// Rows of one format.
pub(super) struct Part {
    pub(super) dtype: StoredType,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) layout: GroupLayout,
    data: AlignedBytes,
}

/// Where things are in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GroupLayout {
    /// `None`: elements.
    pub(super) format: Option<Format>,
    /// Blocks in a row; columns for elements.
    pub(super) num_blocks: usize,
    /// Bytes of a block's codes in all lanes; of a column for elements.
    pub(super) code_bytes: usize,
    /// Where scales begin.
    pub(super) scales_at: usize,
    /// Bytes of a scale record: of one block, or of eight for [`Scales::Super`] and [`Scales::SuperHalves`].
    pub(super) record_bytes: usize,
    /// Bytes from group to group.
    pub(super) stride: usize,
}

impl GroupLayout {
    fn new(dtype: StoredType, cols: usize) -> Self {
        let Some(format) = Format::of(dtype) else {
            let code_bytes = LANES * dtype.block_bytes();
            let len = cols * code_bytes;
            let stride = len.next_multiple_of(LINE_BYTES);
            return Self { format: None, num_blocks: cols, code_bytes, scales_at: len, record_bytes: 0, stride };
        };
        let code_bytes = LANES
            * match format.codes {
                Codes::Four | Codes::Table => 16,
                Codes::Five => 20,
                Codes::Six => 24,
                Codes::Eight => 32,
            };
        let num_blocks = cols / BLOCK;
        let (record_bytes, num_records) = match format.scales {
            Scales::Half => (2 * LANES, num_blocks),
            Scales::HalfMinimum => (4 * LANES, num_blocks),
            Scales::Super => ((4 + 2 * SUPER) * LANES, num_blocks / SUPER),
            Scales::SuperHalves => ((2 + 2 * SUPER) * LANES, num_blocks / SUPER),
        };
        let scales_at = num_blocks * code_bytes;
        let stride = (scales_at + num_records * record_bytes).next_multiple_of(LINE_BYTES);
        Self { format: Some(format), num_blocks, code_bytes, scales_at, record_bytes, stride }
    }
}

impl Part {
    /// Packs rows of one format.
    pub(super) fn pack(matrix: &HostMatrix) -> Result<Self, KernelError> {
        let (dtype, rows, cols) = (matrix.dtype, matrix.rows, matrix.cols);
        let row_bytes = dtype
            .row_bytes(cols)
            .filter(|bytes| Some(matrix.data.len()) == bytes.checked_mul(rows))
            .ok_or_else(|| KernelError::Shape {
                op: "matrix",
                reason: format!("{} bytes are no {rows} x {cols} matrix of {dtype:?}", matrix.data.len()),
            })?;
        let layout = GroupLayout::new(dtype, cols);
        let mut data = AlignedBytes::zeroed(rows.div_ceil(LANES) * layout.stride)?;
        if row_bytes > 0 {
            let groups = data.as_mut_slice().chunks_exact_mut(layout.stride);
            for (group, source) in groups.zip(matrix.data.chunks(LANES * row_bytes)) {
                for (lane, row) in source.chunks_exact(row_bytes).enumerate() {
                    layout.put_row(dtype, group, lane, row);
                }
            }
        }
        Ok(Self { dtype, rows, cols, layout, data })
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> u64 {
        self.data.as_slice().len() as u64
    }

    /// Groups of 16 rows.
    pub(super) fn num_groups(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// One group.
    pub(super) fn group(&self, index: usize) -> &[u8] {
        &self.data.as_slice()[index * self.layout.stride..][..self.layout.stride]
    }

    /// Writes the exact weights of a row.
    pub(super) fn row(&self, index: usize, out: &mut [f32]) {
        let (group, lane) = (self.group(index / LANES), index % LANES);
        let Some(format) = self.layout.format else {
            for (col, value) in out.iter_mut().enumerate() {
                *value = self.layout.element(self.dtype, group, col, lane);
            }
            return;
        };
        for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
            let codes = self.layout.codes(format, group, block, lane);
            out.copy_from_slice(&format.weights(&codes, self.layout.scales(format, group, block, lane)));
        }
    }
}

impl GroupLayout {
    fn put_row(&self, dtype: StoredType, group: &mut [u8], lane: usize, row: &[u8]) {
        let Some(format) = self.format else {
            let width = dtype.block_bytes();
            for (column, element) in group.chunks_exact_mut(self.code_bytes).zip(row.chunks_exact(width)) {
                column[lane * width..][..width].copy_from_slice(element);
            }
            return;
        };
        for block in 0..self.num_blocks {
            let FileBlock { codes, scales } = read_block(dtype, row, block);
            let place = &mut group[block * self.code_bytes..][..self.code_bytes];
            put_codes(format.codes, place, lane, &codes);
            self.put_scales(format, group, block, lane, scales);
        }
    }

    fn put_scales(&self, format: Format, group: &mut [u8], block: usize, lane: usize, raw: FileScales) {
        let (record, within) = self.record(format, block);
        let record = &mut group[record..][..self.record_bytes];
        put16(record, lane, raw.scale);
        match format.scales {
            Scales::Half => {}
            Scales::HalfMinimum => put16(record, LANES + lane, raw.minimum),
            Scales::Super => {
                put16(record, LANES + lane, raw.minimum);
                record[(4 + within) * LANES + lane] = raw.factors[0];
                record[(4 + SUPER + within) * LANES + lane] = raw.minimum_factor;
            }
            Scales::SuperHalves => {
                record[(2 + 2 * within) * LANES + lane] = raw.factors[0];
                record[(3 + 2 * within) * LANES + lane] = raw.factors[1];
            }
        }
    }

    /// Where the scale record of a block begins, and which of its blocks this is.
    fn record(&self, format: Format, block: usize) -> (usize, usize) {
        let per_record = match format.scales {
            Scales::Half | Scales::HalfMinimum => 1,
            Scales::Super | Scales::SuperHalves => SUPER,
        };
        (self.scales_at + block / per_record * self.record_bytes, block % per_record)
    }

    /// Scales of a lane's block.
    pub(super) fn scales(&self, format: Format, group: &[u8], block: usize, lane: usize) -> BlockScales {
        let (record, within) = self.record(format, block);
        let record = &group[record..][..self.record_bytes];
        let mut raw = FileScales { scale: at16(record, lane), minimum: 0, factors: [1; 2], minimum_factor: 1 };
        match format.scales {
            Scales::Half => {}
            Scales::HalfMinimum => raw.minimum = at16(record, LANES + lane),
            Scales::Super => {
                raw.minimum = at16(record, LANES + lane);
                raw.factors = [record[(4 + within) * LANES + lane]; 2];
                raw.minimum_factor = record[(4 + SUPER + within) * LANES + lane];
            }
            Scales::SuperHalves => {
                raw.factors = [0, 1].map(|half| record[(2 + half + 2 * within) * LANES + lane]);
            }
        }
        format.block_scales(raw)
    }

    /// Codes of a lane's block.
    pub(super) fn codes(&self, format: Format, group: &[u8], block: usize, lane: usize) -> [u8; BLOCK] {
        let place = &group[block * self.code_bytes..][..self.code_bytes];
        let mut codes = [0; BLOCK];
        for (index, code) in codes.iter_mut().enumerate() {
            *code = code_at(format.codes, place, lane, index);
        }
        codes
    }

    /// A lane's element in a column.
    pub(super) fn element(&self, dtype: StoredType, group: &[u8], col: usize, lane: usize) -> f32 {
        let width = dtype.block_bytes();
        let bytes = &group[col * self.code_bytes + lane * width..][..width];
        match dtype {
            StoredType::F16 => half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            StoredType::BF16 => half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            _ => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        }
    }
}

fn at16(record: &[u8], index: usize) -> u16 {
    u16::from_le_bytes([record[2 * index], record[2 * index + 1]])
}

fn put16(record: &mut [u8], index: usize, bits: u16) {
    record[2 * index..][..2].copy_from_slice(&bits.to_le_bytes());
}

/// Byte `4 i + t` of a lane: lane `lane` of vector `i`.
fn lane_byte(lane: usize, byte: usize) -> usize {
    byte / 4 * (4 * LANES) + 4 * lane + byte % 4
}

fn put_codes(kind: Codes, place: &mut [u8], lane: usize, codes: &[u8; BLOCK]) {
    if kind == Codes::Eight {
        for (index, code) in codes.iter().enumerate() {
            place[lane_byte(lane, index)] = *code;
        }
        return;
    }
    let (low, high) = codes.split_at(BLOCK / 2);
    for (index, (low, high)) in low.iter().zip(high).enumerate() {
        place[lane_byte(lane, index)] = low & 15 | high << 4;
    }
    for (index, code) in codes.iter().enumerate() {
        let (chunk, byte) = (index / 4, index % 4);
        match kind {
            Codes::Four | Codes::Table | Codes::Eight => {}
            Codes::Five => place[lane_byte(lane, 16 + byte)] |= (code >> 4) << chunk,
            Codes::Six => place[lane_byte(lane, 16 + chunk / 4 * 4 + byte)] |= (code >> 4) << (2 * (chunk % 4)),
        }
    }
}

fn code_at(kind: Codes, place: &[u8], lane: usize, index: usize) -> u8 {
    if kind == Codes::Eight {
        return place[lane_byte(lane, index)];
    }
    let half = index / (BLOCK / 2);
    let low = place[lane_byte(lane, index % (BLOCK / 2))] >> (4 * half) & 15;
    let (chunk, byte) = (index / 4, index % 4);
    low | match kind {
        Codes::Four | Codes::Table | Codes::Eight => 0,
        Codes::Five => (place[lane_byte(lane, 16 + byte)] >> chunk & 1) << 4,
        Codes::Six => (place[lane_byte(lane, 16 + chunk / 4 * 4 + byte)] >> (2 * (chunk % 4)) & 3) << 4,
    }
}
