//! Headers of safetensors files.
//!
//! Owns the check that every tensor lies inside the file, alone. Does not know what the tensors are for.

use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::dtype::Described;
use crate::{ModelError, StoredType};

/// Longest header that is read.
const HEADER_BYTES_MAX: u64 = 100 << 20;
/// Most dimensions of a tensor.
const DIMS_MAX: usize = 8;

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The header's object in the order of the file, so that a name that comes twice is seen.
struct RawHeader(Vec<(String, RawTensor)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        entries.push((name, map.next_value::<RawTensor>()?));
                    }
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Reads the header of a whole file.
///
/// # Errors
/// The file is cut, or its header lies.
pub(crate) fn read_header(path: &Path, bytes: &[u8]) -> Result<Vec<Described>, ModelError> {
    let (header, data_start) = split_header(path, bytes)?;
    let raw: RawHeader = serde_json::from_slice(header)
        .map_err(|error| ModelError::damaged(path, format!("its header is not what safetensors has: {error}")))?;
    let data_len = (bytes.len() - data_start) as u64;
    let mut tensors = Vec::with_capacity(raw.0.len());
    for (name, tensor) in raw.0 {
        tensors.push(describe(path, name, &tensor, data_start, data_len)?);
    }
    check_layout(path, &tensors, data_start, bytes.len())?;
    Ok(tensors)
}

fn split_header<'a>(path: &Path, bytes: &'a [u8]) -> Result<(&'a [u8], usize), ModelError> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(ModelError::damaged(path, format!("it has only {} bytes", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > HEADER_BYTES_MAX {
        let reason = format!("its header claims {length} bytes; at most {HEADER_BYTES_MAX} are believed");
        return Err(ModelError::damaged(path, reason));
    }
    let length = length as usize;
    let Some(header) = rest.get(..length) else {
        let reason = format!("its header claims {length} bytes, but only {} follow: the file is cut", rest.len());
        return Err(ModelError::damaged(path, reason));
    };
    Ok((header, 8 + length))
}

fn describe(
    path: &Path,
    name: String,
    tensor: &RawTensor,
    data_start: usize,
    data_len: u64,
) -> Result<Described, ModelError> {
    let [begin, end] = tensor.data_offsets;
    if begin > end || end > data_len {
        let reason =
            format!("tensor {name} lies at {begin}..{end} of {data_len} bytes of data: the file is cut or lies");
        return Err(ModelError::damaged(path, reason));
    }
    if tensor.shape.len() > DIMS_MAX {
        return Err(ModelError::damaged(path, format!("tensor {name} has {} dimensions", tensor.shape.len())));
    }
    let dtype = match tensor.dtype.as_str() {
        "F32" => Ok(StoredType::F32),
        "F16" => Ok(StoredType::F16),
        "BF16" => Ok(StoredType::BF16),
        other => Err(other.to_owned()),
    };
    let values = tensor.shape.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim));
    if let Ok(dtype) = dtype {
        let wanted = values.and_then(|values| values.checked_mul(dtype.block_bytes() as u64));
        if wanted != Some(end - begin) {
            let reason = format!("tensor {name} of shape {:?} cannot have {} bytes", tensor.shape, end - begin);
            return Err(ModelError::damaged(path, reason));
        }
    } else if values.is_none() {
        return Err(ModelError::damaged(path, format!("tensor {name} has the shape {:?}", tensor.shape)));
    }
    let shape = tensor.shape.iter().map(|dim| *dim as usize).collect();
    let range = data_start + begin as usize..data_start + end as usize;
    Ok(Described { name, dtype, shape, range })
}

/// Names are unique, and the data has neither overlaps nor holes, as the format demands.
fn check_layout(path: &Path, tensors: &[Described], data_start: usize, file_len: usize) -> Result<(), ModelError> {
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    if let Some([name, _]) = names.array_windows().find(|[a, b]| a == b) {
        return Err(ModelError::damaged(path, format!("tensor {name} is described twice")));
    }
    let mut ordered: Vec<&Described> = tensors.iter().collect();
    ordered.sort_unstable_by_key(|tensor| (tensor.range.start, tensor.range.end));
    let mut at = data_start;
    for tensor in ordered {
        if tensor.range.start != at {
            let reason = format!("tensor {} begins at byte {}, not at {at}", tensor.name, tensor.range.start);
            return Err(ModelError::damaged(path, reason));
        }
        at = tensor.range.end;
    }
    if at != file_len {
        return Err(ModelError::damaged(path, format!("its tensors end at byte {at}, but it has {file_len} bytes")));
    }
    Ok(())
}
