//! Metadata values. Arrays stay in the file: only their place is kept.

use std::ops::Range;
use std::path::Path;

use super::reader::Reader;
use crate::ModelError;

/// Arrays inside arrays, at most.
const DEPTH_MAX: usize = 4;
/// Most elements of an array that is decoded.
const DECODED_MAX: usize = 1 << 24;

/// Types of metadata values, by their number in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn from_id(id: u32) -> Option<Self> {
        const ALL: [Kind; 13] = [
            Kind::U8,
            Kind::I8,
            Kind::U16,
            Kind::I16,
            Kind::U32,
            Kind::I32,
            Kind::F32,
            Kind::Bool,
            Kind::String,
            Kind::Array,
            Kind::U64,
            Kind::I64,
            Kind::F64,
        ];
        ALL.get(id as usize).copied()
    }

    /// Bytes of a value, or the least that one can have.
    const fn bytes_min(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::String | Self::U64 | Self::I64 | Self::F64 => 8,
            Self::Array => 12,
        }
    }
}

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    /// Any integer.
    Integer(i128),
    /// Any float.
    Float(f64),
    /// A switch.
    Bool(bool),
    /// A text.
    Text(String),
    /// An array, still in the file.
    Array(Array),
}

/// An array in the file: it was walked once, so reading it again cannot fail.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Array {
    /// Type of its elements.
    pub kind: Kind,
    /// How many.
    pub len: usize,
    /// Their bytes.
    pub range: Range<usize>,
}

/// Reads a value after its type.
///
/// # Errors
/// The file is cut, or the value lies.
pub(crate) fn read_value(reader: &mut Reader<'_>, key: &str) -> Result<Value, ModelError> {
    match read_kind(reader, key)? {
        Kind::Array => read_array(reader, key, 1).map(Value::Array),
        kind => read_scalar(reader, kind, key),
    }
}

fn read_kind(reader: &mut Reader<'_>, key: &str) -> Result<Kind, ModelError> {
    let id = reader.u32(key)?;
    Kind::from_id(id).ok_or_else(|| reader.error(format!("{key} has the type {id}, which does not exist")))
}

fn read_scalar(reader: &mut Reader<'_>, kind: Kind, key: &str) -> Result<Value, ModelError> {
    Ok(match kind {
        Kind::U8 => Value::Integer(reader.u8(key)?.into()),
        Kind::I8 => Value::Integer(reader.u8(key)?.cast_signed().into()),
        Kind::U16 => Value::Integer(reader.u16(key)?.into()),
        Kind::I16 => Value::Integer(reader.u16(key)?.cast_signed().into()),
        Kind::U32 => Value::Integer(reader.u32(key)?.into()),
        Kind::I32 => Value::Integer(reader.u32(key)?.cast_signed().into()),
        Kind::U64 => Value::Integer(reader.u64(key)?.into()),
        Kind::I64 => Value::Integer(reader.u64(key)?.cast_signed().into()),
        Kind::F32 => Value::Float(f32::from_bits(reader.u32(key)?).into()),
        Kind::F64 => Value::Float(f64::from_bits(reader.u64(key)?)),
        Kind::Bool => Value::Bool(reader.u8(key)? != 0),
        Kind::String => Value::Text(reader.string(key)?),
        Kind::Array => return Err(reader.error(format!("{key} has an array where a value should be"))),
    })
}

fn read_array(reader: &mut Reader<'_>, key: &str, depth: usize) -> Result<Array, ModelError> {
    if depth > DEPTH_MAX {
        return Err(reader.error(format!("{key} has arrays inside arrays, {depth} deep")));
    }
    let kind = read_kind(reader, key)?;
    let len = reader.count(kind.bytes_min(), u64::MAX, key)?;
    let start = reader.position();
    match kind {
        Kind::String => {
            for _ in 0..len {
                reader.string_bytes(key)?;
            }
        }
        Kind::Array => {
            for _ in 0..len {
                read_array(reader, key, depth + 1)?;
            }
        }
        // `count` has checked that they fit.
        fixed => drop(reader.take(len * fixed.bytes_min(), key)?),
    }
    Ok(Array { kind, len, range: start..reader.position() })
}

impl Array {
    /// Whether it can be decoded as numbers or strings.
    fn is_decodable(&self) -> bool {
        self.kind != Kind::Array && self.len <= DECODED_MAX
    }

    /// Its elements one after the other; none where they are arrays or absurdly many.
    pub(crate) fn values<'a>(
        &self,
        path: &'a Path,
        bytes: &'a [u8],
    ) -> impl Iterator<Item = Result<Value, ModelError>> + 'a {
        let mut reader = Reader::new(path, bytes, self.range.start);
        let kind = self.kind;
        let len = if self.is_decodable() { self.len } else { 0 };
        (0..len).map(move |_| read_scalar(&mut reader, kind, "an array"))
    }
}
