//! How tensors are stored in files, and what a file says of one.

use std::ops::Range;

/// Element or block type of a stored tensor. Block layouts are those of GGML.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoredType {
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// bfloat16.
    BF16,
    /// 32 values: f16 scale, 16 bytes of nibbles, offset -8.
    Q4_0,
    /// 32 values: f16 scale, f16 minimum, 16 bytes of nibbles.
    Q4_1,
    /// 32 values: f16 scale, 4 bytes of fifth bits, 16 bytes of nibbles, offset -16.
    Q5_0,
    /// 32 values: f16 scale, f16 minimum, 4 bytes of fifth bits, 16 bytes of nibbles.
    Q5_1,
    /// 32 values: f16 scale, 32 signed bytes.
    Q8_0,
    /// 256 values: f16 d, f16 dmin, 12 bytes of 6-bit scales and minimums, 128 bytes of nibbles.
    Q4K,
    /// 256 values: as `Q4K` with 32 bytes of fifth bits.
    Q5K,
    /// 256 values: 128 bytes low nibbles, 64 bytes high pairs, 16 signed scales, f16 d.
    Q6K,
    /// 32 values: f16 scale, 16 bytes of nibbles into a table of 16 values.
    IQ4NL,
}

impl StoredType {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::IQ4NL,
    ];

    /// Values in one block along a row.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::IQ4NL => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 | Self::IQ4NL => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Bytes of a row of `len` values, or `None` where blocks do not divide it or no memory could hold it.
    pub const fn row_bytes(self, len: usize) -> Option<usize> {
        if len.is_multiple_of(self.block_len()) {
            (len / self.block_len()).checked_mul(self.block_bytes())
        } else {
            None
        }
    }
}

/// A tensor as a file's header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Described {
    /// Its name in the file.
    pub name: String,
    /// Its type, or the word for a type that is not known.
    pub dtype: Result<StoredType, String>,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Bytes of the file, and inside it; of a type that is not known, GGUF tells the first one only.
    pub range: Range<usize>,
}
