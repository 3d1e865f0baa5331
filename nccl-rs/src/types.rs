//! The values that cross the interface, and what the library calls them.

use std::ffi::c_void;
use std::fmt;

/// Whose library it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Vendor {
    /// NVIDIA's NCCL: streams are those of CUDA.
    Nccl,
    /// AMD's RCCL: streams are those of HIP.
    Rccl,
}

impl Vendor {
    /// The names under which the library is looked for, the most exact first.
    pub fn file_names(self) -> &'static [&'static str] {
        match self {
            Self::Nccl => &["libnccl.so.2", "libnccl.so"],
            Self::Rccl => &["librccl.so.1", "librccl.so"],
        }
    }
}

impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nccl => "NCCL",
            Self::Rccl => "RCCL",
        })
    }
}

/// A library's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Major.
    pub major: u32,
    /// Minor.
    pub minor: u32,
    /// Patch.
    pub patch: u32,
}

impl Version {
    /// Reads the library's code: thousands up to 2.8, ten thousands from 2.9 on.
    pub(crate) fn from_code(code: i32) -> Self {
        let code = code.max(0).unsigned_abs();
        let unit = if code < 10_000 { 1_000 } else { 10_000 };
        Self { major: code / unit, minor: code % unit / 100, patch: code % 100 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// What names a communicator among its ranks. Rank 0 makes it, the others get it by other means.
///
/// It carries an address and a secret of the rank that made it: pass it over a channel that you trust.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId {
    bytes: [u8; Self::BYTES],
}

impl UniqueId {
    /// Length of an id.
    pub const BYTES: usize = 128;

    /// Takes an id that `as_bytes` gave.
    pub fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self { bytes }
    }

    /// The id as it travels.
    pub fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.bytes
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId(..)")
    }
}

/// An address in a device's memory. Whether it is one is the caller's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    pub(crate) fn as_raw(self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.0 as usize)
    }
}

/// A stream's handle (`cudaStream_t`, `CUstream` or `hipStream_t`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(*mut c_void);

impl Stream {
    /// Takes the handle of whatever binding made the stream.
    pub fn from_raw(handle: *mut c_void) -> Self {
        Self(handle)
    }

    /// The device's default stream.
    pub fn null() -> Self {
        Self(std::ptr::null_mut())
    }

    pub(crate) fn as_raw(self) -> *mut c_void {
        self.0
    }
}

/// The type of an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DataType {
    /// 8 bits, no sign.
    U8,
    /// 32 bits, no sign.
    U32,
    /// IEEE half.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// IEEE single.
    F32,
}

impl DataType {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::F32 => 4,
        }
    }

    pub(crate) fn code(self) -> i32 {
        match self {
            Self::U8 => 1,
            Self::U32 => 3,
            Self::F16 => 6,
            Self::F32 => 7,
            Self::Bf16 => 9,
        }
    }
}

/// How elements of different ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReduceOp {
    /// Their sum, in an order and with roundings that the library chooses.
    Sum,
    /// The largest.
    Max,
}

impl ReduceOp {
    pub(crate) fn code(self) -> i32 {
        match self {
            Self::Sum => 0,
            Self::Max => 2,
        }
    }
}

/// How many elements of which type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Elements {
    /// How many.
    pub count: usize,
    /// Of which type.
    pub data_type: DataType,
}

impl Elements {
    /// `count` elements of `data_type`.
    pub fn new(count: usize, data_type: DataType) -> Self {
        Self { count, data_type }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_in_both_codes() {
        let check = |code, expected: &str| assert_eq!(Version::from_code(code).to_string(), expected);
        check(2708, "2.7.8");
        check(2804, "2.8.4");
        check(20906, "2.9.6");
        check(21805, "2.18.5");
        check(22809, "2.28.9");
        check(-1, "0.0.0");
    }
}
