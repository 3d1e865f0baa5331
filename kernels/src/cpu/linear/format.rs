//! What stored blocks hold: codes, scales, minimums. The one place that reads the file layouts of quantised formats.
//!
//! A weight is `scale * (code - offset) + minimum`; all formats are brought to this form, in blocks of 32 along a row.
//! Layouts: GGML's `ggml-common.h`.
//!
//! **Invariant:** nothing is rounded here: codes, scales and minimums are those of the file.

use half::f16;
use phalanx_formats::StoredType;

/// Weights that share a scale, and activations that share one.
pub(super) const BLOCK: usize = 32;

/// How codes are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codes {
    /// Four bits.
    Four,
    /// Four bits that index [`TABLE`].
    Table,
    /// Five bits: nibbles, and a plane of fifth bits.
    Five,
    /// Six bits: nibbles, and a plane of pairs.
    Six,
    /// Bytes.
    Eight,
}

/// How scales are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scales {
    /// f16 scale a block.
    Half,
    /// f16 scale and f16 minimum a block.
    HalfMinimum,
    /// f16 scale and f16 negated minimum of 256 weights, a factor of each a block.
    Super,
    /// f16 scale of 256 weights, a signed factor for each 16.
    SuperHalves,
}

/// A quantised format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Format {
    pub(super) codes: Codes,
    pub(super) scales: Scales,
    /// Taken from every code.
    pub(super) offset: u8,
}

/// Values of `IQ4_NL`, plus 128.
pub(super) const TABLE: [u8; 16] = [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];

impl Format {
    /// The format of quantised types; `None` for elements.
    pub(super) const fn of(dtype: StoredType) -> Option<Self> {
        let (codes, scales, offset) = match dtype {
            StoredType::F32 | StoredType::F16 | StoredType::BF16 => return None,
            StoredType::Q4_0 => (Codes::Four, Scales::Half, 8),
            StoredType::Q4_1 => (Codes::Four, Scales::HalfMinimum, 0),
            StoredType::Q5_0 => (Codes::Five, Scales::Half, 16),
            StoredType::Q5_1 => (Codes::Five, Scales::HalfMinimum, 0),
            StoredType::Q8_0 => (Codes::Eight, Scales::Half, 128),
            StoredType::Q4K => (Codes::Four, Scales::Super, 0),
            StoredType::Q5K => (Codes::Five, Scales::Super, 0),
            StoredType::Q6K => (Codes::Six, Scales::SuperHalves, 32),
            StoredType::IQ4NL => (Codes::Table, Scales::Half, 128),
        };
        Some(Self { codes, scales, offset })
    }
}

/// One block of 32 weights as the file has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileBlock {
    pub(super) codes: [u8; BLOCK],
    pub(super) scales: FileScales,
}

/// Scales of a block, as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileScales {
    /// f16 scale of the block or of its 256 weights.
    pub(super) scale: u16,
    /// f16 minimum, negated where it is taken away.
    pub(super) minimum: u16,
    /// Factors on the scale: of the block (first) or of its halves.
    pub(super) factors: [u8; 2],
    /// Factor on the minimum.
    pub(super) minimum_factor: u8,
}

/// Reads block `index` of a row of type `dtype`.
pub(super) fn read_block(dtype: StoredType, row: &[u8], index: usize) -> FileBlock {
    let per_unit = dtype.block_len() / BLOCK;
    let unit_bytes = dtype.block_bytes();
    let unit = &row[index / per_unit * unit_bytes..][..unit_bytes];
    let within = index % per_unit;
    let mut codes = [0; BLOCK];
    let plain = |minimum| FileScales { scale: bits16(unit, 0), minimum, factors: [1; 2], minimum_factor: 1 };
    let scales = match dtype {
        StoredType::F32 | StoredType::F16 | StoredType::BF16 => plain(0),
        StoredType::Q4_0 | StoredType::IQ4NL => {
            nibbles(&unit[2..], &mut codes);
            plain(0)
        }
        StoredType::Q4_1 => {
            nibbles(&unit[4..], &mut codes);
            plain(bits16(unit, 2))
        }
        StoredType::Q5_0 => {
            nibbles(&unit[6..], &mut codes);
            fifth_bits(&unit[2..6], &mut codes);
            plain(0)
        }
        StoredType::Q5_1 => {
            nibbles(&unit[8..], &mut codes);
            fifth_bits(&unit[4..8], &mut codes);
            plain(bits16(unit, 2))
        }
        StoredType::Q8_0 => {
            for (code, byte) in codes.iter_mut().zip(&unit[2..]) {
                *code = byte ^ 0x80;
            }
            plain(0)
        }
        StoredType::Q4K => {
            half_bytes(&unit[16 + within / 2 * BLOCK..], within % 2, &mut codes);
            super_scales(unit, within)
        }
        StoredType::Q5K => {
            half_bytes(&unit[48 + within / 2 * BLOCK..], within % 2, &mut codes);
            for (code, high) in codes.iter_mut().zip(&unit[16..48]) {
                *code |= (high >> within & 1) << 4;
            }
            super_scales(unit, within)
        }
        StoredType::Q6K => {
            let (low, high) = unit.split_at(128);
            let (half, quarter) = (within / 4, within % 4);
            half_bytes(&low[half * 64 + quarter % 2 * BLOCK..], quarter / 2, &mut codes);
            for (code, high) in codes.iter_mut().zip(&high[half * BLOCK..]) {
                *code |= (high >> (2 * quarter) & 3) << 4;
            }
            let factors = [unit[192 + 2 * within], unit[193 + 2 * within]];
            FileScales { scale: bits16(unit, 208), minimum: 0, factors, minimum_factor: 1 }
        }
    };
    FileBlock { codes, scales }
}

fn bits16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Low halves of 16 bytes are codes 0 to 15, high halves 16 to 31.
fn nibbles(bytes: &[u8], codes: &mut [u8; BLOCK]) {
    let (low, high) = codes.split_at_mut(BLOCK / 2);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        *low = byte & 15;
        *high = byte >> 4;
    }
}

/// Low (0) or high (1) halves of 32 bytes.
fn half_bytes(bytes: &[u8], which: usize, codes: &mut [u8; BLOCK]) {
    for (code, byte) in codes.iter_mut().zip(bytes) {
        *code = byte >> (4 * which) & 15;
    }
}

fn fifth_bits(bytes: &[u8], codes: &mut [u8; BLOCK]) {
    for (index, code) in codes.iter_mut().enumerate() {
        *code |= (bytes[index / 8] >> (index % 8) & 1) << 4;
    }
}

/// Scales of `Q4_K` and `Q5_K`: eight pairs of 6-bit factors in 12 bytes.
fn super_scales(unit: &[u8], within: usize) -> FileScales {
    let packed = &unit[4..16];
    let (scale, minimum) = if within < 4 {
        (packed[within] & 63, packed[within + 4] & 63)
    } else {
        (packed[within + 4] & 15 | packed[within - 4] >> 6 << 4, packed[within + 4] >> 4 | packed[within] >> 6 << 4)
    };
    const SIGN: u16 = 0x8000;
    FileScales { scale: bits16(unit, 0), minimum: bits16(unit, 2) ^ SIGN, factors: [scale; 2], minimum_factor: minimum }
}

/// Scales and minimum of a block as numbers: `weight = scales[half] * (code - offset) + minimum`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct BlockScales {
    pub(super) scales: [f32; 2],
    pub(super) minimum: f32,
}

impl Format {
    /// The exact scales.
    pub(super) fn block_scales(self, raw: FileScales) -> BlockScales {
        let scale = f16::from_bits(raw.scale).to_f32();
        let minimum = f16::from_bits(raw.minimum).to_f32();
        match self.scales {
            Scales::Half => BlockScales { scales: [scale; 2], minimum: 0.0 },
            Scales::HalfMinimum => BlockScales { scales: [scale; 2], minimum },
            Scales::Super => BlockScales {
                scales: raw.factors.map(|factor| scale * f32::from(factor)),
                minimum: minimum * f32::from(raw.minimum_factor),
            },
            Scales::SuperHalves => {
                BlockScales { scales: raw.factors.map(|factor| scale * f32::from(factor.cast_signed())), minimum: 0.0 }
            }
        }
    }

    /// Whether blocks have a minimum.
    pub(super) const fn has_minimum(self) -> bool {
        matches!(self.scales, Scales::HalfMinimum | Scales::Super)
    }

    /// The number that a code stands for, before the offset.
    pub(super) fn value(self, code: u8) -> u8 {
        if self.codes == Codes::Table { TABLE[usize::from(code & 15)] } else { code }
    }

    /// A block's weights.
    pub(super) fn weights(self, codes: &[u8; BLOCK], scales: BlockScales) -> [f32; BLOCK] {
        let mut weights = [0.0; BLOCK];
        for (index, (weight, code)) in weights.iter_mut().zip(codes).enumerate() {
            let level = f32::from(i16::from(self.value(*code)) - i16::from(self.offset));
            // The product is exact in f32, so that a fused multiply-add gives the same.
            *weight = level * scales.scales[index / (BLOCK / 2)] + scales.minimum;
        }
        weights
    }
}
