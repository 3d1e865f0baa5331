//! The header of a GGUF file: metadata and where tensors lie.
//!
//! **Invariant:** tensors of a header that was accepted lie inside the file, apart, and have unique names.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::reader::Reader;
use super::value::{Value, read_value};
use crate::dtype::Described;
use crate::{ModelError, StoredType};

const MAGIC: &[u8; 4] = b"GGUF";
const METADATA_MAX: u64 = 1 << 16;
const TENSORS_MAX: u64 = 1 << 17;
const DIMS_MAX: u32 = 4;
const ALIGNMENT_DEFAULT: usize = 32;
const ALIGNMENT_MAX: usize = 1 << 20;
/// Key, type and a byte of value.
const METADATA_BYTES_MIN: usize = 8 + 4 + 1;
/// Name, count of dimensions, one dimension, type, offset.
const TENSOR_BYTES_MIN: usize = 8 + 4 + 8 + 4 + 8;

/// What a GGUF file says about itself.
#[derive(Debug)]
pub(crate) struct Header {
    /// By key.
    pub metadata: HashMap<String, Value>,
    /// In the order of the file.
    pub tensors: Vec<Described>,
}

/// A tensor before the start of the data is known.
struct Raw {
    name: String,
    type_id: u32,
    shape: Vec<usize>,
    offset: u64,
}

/// Whether a file begins as GGUF files do.
pub(crate) fn is_gguf(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// Reads the header of a whole file.
///
/// # Errors
/// The file is cut, its header lies, or it is of a version that is not supported.
pub(crate) fn read_header(path: &Path, bytes: &[u8]) -> Result<Header, ModelError> {
    let mut reader = Reader::new(path, bytes, 0);
    if reader.take(MAGIC.len(), "the mark of a GGUF file")? != MAGIC {
        return Err(ModelError::NotAModel { path: path.to_owned(), reason: "it is no GGUF file".to_owned() });
    }
    match reader.u32("the version")? {
        2 | 3 => {}
        1 => return Err(reader.error("it is of GGUF version 1; convert the model again, to version 3")),
        swapped if swapped.swap_bytes() <= 3 => return Err(reader.error("it is big-endian, which is not supported")),
        version => return Err(reader.error(format!("it is of GGUF version {version}; known are 2 and 3"))),
    }
    let num_tensors = reader.count(TENSOR_BYTES_MIN, TENSORS_MAX, "a number of tensors")?;
    let num_metadata = reader.count(METADATA_BYTES_MIN, METADATA_MAX, "a number of metadata entries")?;
    let metadata = read_metadata(&mut reader, num_metadata)?;
    let mut raw = Vec::new();
    for _ in 0..num_tensors {
        raw.push(read_tensor(&mut reader)?);
    }
    let data_start = reader.position().next_multiple_of(alignment(&reader, &metadata)?);
    let tensors = place_tensors(&reader, raw, data_start, bytes.len())?;
    Ok(Header { metadata, tensors })
}

fn read_metadata(reader: &mut Reader<'_>, count: usize) -> Result<HashMap<String, Value>, ModelError> {
    let mut metadata = HashMap::new();
    for _ in 0..count {
        let key = reader.string("a metadata key")?;
        let value = read_value(reader, &key)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(reader.error(format!("{key} is there twice")));
        }
    }
    Ok(metadata)
}

fn alignment(reader: &Reader<'_>, metadata: &HashMap<String, Value>) -> Result<usize, ModelError> {
    let value = match metadata.get("general.alignment") {
        None => return Ok(ALIGNMENT_DEFAULT),
        Some(Value::Integer(value)) => usize::try_from(*value).ok(),
        Some(_) => None,
    };
    value
        .filter(|value| value.is_power_of_two() && *value <= ALIGNMENT_MAX)
        .ok_or_else(|| reader.error("general.alignment is no power of two within reason"))
}

fn read_tensor(reader: &mut Reader<'_>) -> Result<Raw, ModelError> {
    let name = reader.string("a tensor's name")?;
    let num_dims = reader.u32(&name)?;
    if num_dims == 0 || num_dims > DIMS_MAX {
        return Err(reader.error(format!("tensor {name} has {num_dims} dimensions")));
    }
    let mut shape = Vec::new();
    for _ in 0..num_dims {
        let dim = reader.u64(&name)?;
        match usize::try_from(dim) {
            Ok(dim) if dim > 0 => shape.push(dim),
            _ => return Err(reader.error(format!("tensor {name} has a dimension of {dim}"))),
        }
    }
    // The file counts dimensions from the innermost one.
    shape.reverse();
    Ok(Raw { type_id: reader.u32(&name)?, offset: reader.u64(&name)?, name, shape })
}

fn place_tensors(
    reader: &Reader<'_>,
    raw: Vec<Raw>,
    data_start: usize,
    file_len: usize,
) -> Result<Vec<Described>, ModelError> {
    let mut names = HashSet::new();
    let mut tensors = Vec::with_capacity(raw.len());
    for tensor in raw {
        if !names.insert(tensor.name.clone()) {
            return Err(reader.error(format!("tensor {} is described twice", tensor.name)));
        }
        tensors.push(place_tensor(reader, tensor, data_start, file_len)?);
    }
    let mut ordered: Vec<&Described> = tensors.iter().collect();
    ordered.sort_unstable_by_key(|tensor| (tensor.range.start, tensor.range.end));
    if let Some([a, b]) = ordered.array_windows().find(|[a, b]| a.range.end > b.range.start) {
        return Err(reader.error(format!("tensors {} and {} overlap", a.name, b.name)));
    }
    Ok(tensors)
}

fn place_tensor(reader: &Reader<'_>, raw: Raw, data_start: usize, file_len: usize) -> Result<Described, ModelError> {
    let Raw { name, type_id, shape, offset } = raw;
    let dtype = stored_type(type_id);
    let bytes = match dtype {
        Ok(dtype) => match tensor_bytes(&shape, dtype) {
            Some(bytes) => bytes,
            None => return Err(reader.error(format!("tensor {name} of shape {shape:?} cannot be stored as {dtype:?}"))),
        },
        Err(_) => 0,
    };
    let start = usize::try_from(offset).ok().and_then(|offset| data_start.checked_add(offset));
    let end = start.and_then(|start| start.checked_add(bytes));
    match (start, end) {
        (Some(start), Some(end)) if end <= file_len => {
            Ok(Described { name, dtype: dtype.map_err(str::to_owned), shape, range: start..end })
        }
        _ => {
            let reason = format!(
                "tensor {name} needs {bytes} bytes from {offset} after byte {data_start}, but the file has {file_len}: it is cut"
            );
            Err(reader.error(reason))
        }
    }
}

fn tensor_bytes(shape: &[usize], dtype: StoredType) -> Option<usize> {
    let (cols, outer) = shape.split_last()?;
    let rows = outer.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim))?;
    dtype.row_bytes(*cols)?.checked_mul(rows)
}

/// Types by their number in the file; those that are not supported by their names.
fn stored_type(id: u32) -> Result<StoredType, &'static str> {
    Ok(match id {
        0 => StoredType::F32,
        1 => StoredType::F16,
        2 => StoredType::Q4_0,
        3 => StoredType::Q4_1,
        6 => StoredType::Q5_0,
        7 => StoredType::Q5_1,
        8 => StoredType::Q8_0,
        12 => StoredType::Q4K,
        13 => StoredType::Q5K,
        14 => StoredType::Q6K,
        20 => StoredType::IQ4NL,
        30 => StoredType::BF16,
        10 => return Err("Q2_K"),
        11 => return Err("Q3_K"),
        15 => return Err("Q8_K"),
        16 => return Err("IQ2_XXS"),
        17 => return Err("IQ2_XS"),
        18 => return Err("IQ3_XXS"),
        19 => return Err("IQ1_S"),
        21 => return Err("IQ3_S"),
        22 => return Err("IQ2_S"),
        23 => return Err("IQ4_XS"),
        24 => return Err("I8"),
        25 => return Err("I16"),
        26 => return Err("I32"),
        27 => return Err("I64"),
        28 => return Err("F64"),
        29 => return Err("IQ1_M"),
        34 => return Err("TQ1_0"),
        35 => return Err("TQ2_0"),
        39 => return Err("MXFP4"),
        _ => return Err("of an unknown number"),
    })
}
