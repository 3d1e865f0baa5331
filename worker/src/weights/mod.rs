//! Checkpoint to this rank's part of each tensor, in host memory.
//!
//! Owns which bytes of a tensor a rank takes and where the padding is. Each page of a file is touched once, in order, and given
//! back when its tensor was taken. Does not know devices: they take the matrices from here.
//!
//! **Invariant:** what a rank does not own is zero, except the columns of a quantisation block that it owns only a part of:
//! there the block is kept whole, and the engine feeds zeros.

mod dummy;
mod source;

#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::ops::Range;

use phalanx_formats::{Geometry, ModelError, ModelFiles, ShardPlan, Split, StoredType};
use phalanx_kernels::MatrixSource;

use dummy::DummyModel;
use source::{Source, SourceTensor};

/// Source pages are given back after this many bytes, so that a large tensor is not held twice.
const RELEASE_BYTES: usize = 16 << 20;

/// Rows of a local matrix, from top to bottom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rows {
    /// These rows of the tensor.
    Take(Range<usize>),
    /// So many rows of zeros.
    Zero(usize),
}

/// Takes this rank's parts out of a model.
pub struct ShardLoader<'a> {
    source: Source<'a>,
    geometry: &'a Geometry,
    plan: &'a ShardPlan,
    progress: Option<Box<dyn Fn(f32) + 'a>>,
    bytes_total: u64,
    bytes_taken: Cell<u64>,
}

impl<'a> ShardLoader<'a> {
    /// Reads from a model's files.
    pub fn new(files: &'a ModelFiles, plan: &'a ShardPlan) -> Self {
        Self::with_source(Source::Files(files), files, plan)
    }

    /// Makes weights up: small random numbers that depend on the seed, the tensor's name and the place in it, so that every
    /// world size gets parts of the same model. Norms are 1. Quantised models get 16-bit floats.
    pub fn dummy(files: &'a ModelFiles, plan: &'a ShardPlan, seed: u64) -> Self {
        Self::with_source(Source::Dummy(DummyModel::new(files.geometry(), files.main_dtype(), seed)), files, plan)
    }

    fn with_source(source: Source<'a>, files: &'a ModelFiles, plan: &'a ShardPlan) -> Self {
        let bytes_total = files.weight_bytes(plan);
        Self { source, geometry: files.geometry(), plan, progress: None, bytes_total, bytes_taken: Cell::new(0) }
    }

    /// Calls `progress` after each tensor with the fraction that is done, from 0 to 1.
    pub fn on_progress(mut self, progress: impl Fn(f32) + 'a) -> Self {
        self.progress = Some(Box::new(progress));
        self
    }

    /// Whether the model has a tensor.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.source.has_tensor(name)
    }

    /// Local rows of Q: `[local_kv_heads * group * head_dim]`.
    pub fn query_rows(&self) -> Vec<Rows> {
        let (plan, head_dim) = (self.plan, self.geometry.head_dim);
        let owned = plan.heads.start * head_dim..plan.heads.end * head_dim;
        placed(owned, 0, plan.local_kv_heads * plan.group * head_dim)
    }

    /// Local rows of K, and of V: `[local_kv_heads * head_dim]`.
    pub fn kv_rows(&self) -> Vec<Rows> {
        let (plan, head_dim) = (self.plan, self.geometry.head_dim);
        let owned = plan.kv_heads.start * head_dim..plan.kv_heads.end * head_dim;
        placed(owned, 0, plan.local_kv_heads * head_dim)
    }

    /// Local rows of gate, and of up: `[inner.padded]`.
    pub fn inner_rows(&self) -> Vec<Rows> {
        placed_as(&self.plan.inner)
    }

    /// Local rows of the embedding, and of the output head: `[vocab.padded]`.
    pub fn vocab_rows(&self) -> Vec<Rows> {
        placed_as(&self.plan.vocab)
    }

    /// Takes rows of a matrix, whole. They are read when the device wants them.
    ///
    /// # Errors
    /// The tensor is absent, or has no such rows.
    pub fn rows(&self, name: &str, rows: &[Rows]) -> Result<MatrixSource<'_>, ModelError> {
        let tensor = self.source.tensor(name)?;
        let (count, cols, dtype) = (num_rows(&tensor, name, rows)?, tensor.cols(), tensor.dtype());
        self.taken(count * tensor.row_bytes());
        let rows = rows.to_vec();
        Ok(MatrixSource::new(dtype, count, cols, move |range, out| copy_rows(&tensor, &rows, range, out)))
    }

    /// Takes a vector, as floats.
    ///
    /// # Errors
    /// As `rows`; or the tensor is quantised, as no vector is.
    pub fn vector(&self, name: &str, rows: &[Rows]) -> Result<Vec<f32>, ModelError> {
        let tensor = self.source.tensor(name)?;
        if tensor.cols() != 1 {
            return Err(ModelError::tensor(name, format!("has {} columns, but should be a vector", tensor.cols())));
        }
        let count = num_rows(&tensor, name, rows)?;
        let mut bytes = vec![0; count * tensor.row_bytes()];
        copy_rows(&tensor, rows, 0..count, &mut bytes);
        let floats = to_floats(name, tensor.dtype(), &bytes)?;
        self.taken(size_of_val(floats.as_slice()));
        Ok(floats)
    }

    /// Takes columns of a matrix: all quantisation blocks that overlap `split.owned`, placed so that local column
    /// `split.lead + i` is column `split.owned.start + i`, with zeros around them up to `split.padded`.
    ///
    /// # Errors
    /// The tensor is absent or has no such columns, or its blocks do not fit into the split.
    pub fn cols(&self, name: &str, split: &Split) -> Result<MatrixSource<'_>, ModelError> {
        let tensor = self.source.tensor(name)?;
        let place = Placement::new(name, &tensor, split)?;
        let (rows, dtype) = (tensor.num_rows(), tensor.dtype());
        self.taken(rows * place.row_bytes);
        Ok(MatrixSource::new(dtype, rows, split.padded, move |range, out| {
            let mut release = Release::default();
            for (row, out) in range.zip(out.chunks_exact_mut(place.row_bytes)) {
                let (before, rest) = out.split_at_mut(place.to);
                let (taken, behind) = rest.split_at_mut(place.from.len());
                before.fill(0);
                behind.fill(0);
                if !taken.is_empty() {
                    tensor.copy_part(row, place.from.clone(), taken);
                    release.touched(&tensor, row);
                }
            }
            release.finish(&tensor);
        }))
    }

    fn taken(&self, bytes: usize) {
        let taken = self.bytes_taken.get().saturating_add(bytes as u64);
        self.bytes_taken.set(taken);
        if let Some(progress) = &self.progress {
            progress((taken as f64 / self.bytes_total.max(1) as f64).min(1.0) as f32);
        }
    }
}

fn placed_as(split: &Split) -> Vec<Rows> {
    placed(split.owned.clone(), split.lead, split.padded)
}

/// Rows of a dimension of which a rank owns `owned`, placed at `lead` in a local dimension of `padded` rows.
fn placed(owned: Range<usize>, lead: usize, padded: usize) -> Vec<Rows> {
    let behind = padded - lead - owned.len();
    let mut rows = Vec::with_capacity(3);
    if lead > 0 {
        rows.push(Rows::Zero(lead));
    }
    if !owned.is_empty() {
        rows.push(Rows::Take(owned));
    }
    if behind > 0 {
        rows.push(Rows::Zero(behind));
    }
    rows
}

fn num_rows(tensor: &SourceTensor<'_>, name: &str, rows: &[Rows]) -> Result<usize, ModelError> {
    let mut count = 0;
    for part in rows {
        count += match part {
            Rows::Zero(zeros) => *zeros,
            Rows::Take(range) if range.end <= tensor.num_rows() => range.len(),
            Rows::Take(range) => {
                let reason = format!("has {} rows, but rows {range:?} are wanted", tensor.num_rows());
                return Err(ModelError::tensor(name, reason));
            }
        };
    }
    Ok(count)
}

/// Writes the local rows of `range`; `out` holds their bytes.
fn copy_rows(tensor: &SourceTensor<'_>, rows: &[Rows], range: Range<usize>, out: &mut [u8]) {
    let row_bytes = tensor.row_bytes();
    let mut first = 0;
    for part in rows {
        let count = match part {
            Rows::Zero(count) => *count,
            Rows::Take(taken) => taken.len(),
        };
        // What of this part lies in the range, in local rows.
        let (begin, end) = (range.start.max(first), range.end.min(first + count));
        if begin < end {
            let out = &mut out[(begin - range.start) * row_bytes..(end - range.start) * row_bytes];
            match part {
                Rows::Zero(_) => out.fill(0),
                Rows::Take(taken) => {
                    copy_run(tensor, taken.start + begin - first..taken.start + end - first, row_bytes, out);
                }
            }
        }
        first += count;
    }
}

/// Writes whole rows of a tensor and gives their pages back.
fn copy_run(tensor: &SourceTensor<'_>, rows: Range<usize>, row_bytes: usize, out: &mut [u8]) {
    let mut release = Release::default();
    for (row, out) in rows.zip(out.chunks_exact_mut(row_bytes)) {
        tensor.copy_part(row, 0..row_bytes, out);
        release.touched(tensor, row);
    }
    release.finish(tensor);
}

/// Where a row's bytes go when columns are taken.
struct Placement {
    /// Bytes of a stored row.
    from: Range<usize>,
    /// Where they begin in a local row.
    to: usize,
    /// Bytes of a local row.
    row_bytes: usize,
}

impl Placement {
    fn new(name: &str, tensor: &SourceTensor<'_>, split: &Split) -> Result<Self, ModelError> {
        let dtype = tensor.dtype();
        let (block, block_bytes) = (dtype.block_len(), dtype.block_bytes());
        let does_not_fit = || {
            let reason = format!("of {} columns of {dtype:?} does not fit into {split:?}", tensor.cols());
            ModelError::tensor(name, reason)
        };
        let row_bytes = dtype.row_bytes(split.padded).ok_or_else(does_not_fit)?;
        if split.owned.is_empty() {
            return Ok(Self { from: 0..0, to: 0, row_bytes });
        }
        if split.owned.end > tensor.cols() {
            return Err(does_not_fit());
        }
        let (first, last) = (split.owned.start / block, split.owned.end.div_ceil(block));
        let Some(column) = split.lead.checked_sub(split.owned.start - first * block) else {
            return Err(does_not_fit());
        };
        if !column.is_multiple_of(block) || column + (last - first) * block > split.padded {
            return Err(does_not_fit());
        }
        Ok(Self { from: first * block_bytes..last * block_bytes, to: column / block * block_bytes, row_bytes })
    }
}

/// Gives source pages back behind the reader.
#[derive(Default)]
struct Release {
    rows: Option<Range<usize>>,
}

impl Release {
    fn touched(&mut self, tensor: &SourceTensor<'_>, row: usize) {
        let start = self.rows.as_ref().map_or(row, |rows| rows.start);
        self.rows = Some(start..row + 1);
        if (row + 1 - start) * tensor.row_bytes() >= RELEASE_BYTES {
            self.finish(tensor);
        }
    }

    fn finish(&mut self, tensor: &SourceTensor<'_>) {
        if let Some(rows) = self.rows.take() {
            tensor.release(rows);
        }
    }
}

fn to_floats(name: &str, dtype: StoredType, bytes: &[u8]) -> Result<Vec<f32>, ModelError> {
    let halves = || bytes.as_chunks::<2>().0.iter();
    match dtype {
        StoredType::F32 => Ok(bytes.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect()),
        StoredType::F16 => Ok(halves().map(|value| half::f16::from_le_bytes(*value).to_f32()).collect()),
        StoredType::BF16 => Ok(halves().map(|value| half::bf16::from_le_bytes(*value).to_f32()).collect()),
        quantised => Err(ModelError::tensor(name, format!("is a vector of {quantised:?}; only floats are supported"))),
    }
}
