//! Where tensors come from: files, or nowhere.

use std::ops::Range;

use phalanx_formats::{ModelError, ModelFiles, StoredType, TensorView};

use super::dummy::{DummyModel, DummyTensor};

/// A model to take tensors from.
pub(super) enum Source<'a> {
    /// Its files.
    Files(&'a ModelFiles),
    /// Made up.
    Dummy(DummyModel),
}

impl Source<'_> {
    /// Whether there is a tensor of this name.
    pub(super) fn has_tensor(&self, name: &str) -> bool {
        match self {
            Self::Files(files) => files.has_tensor(name),
            Self::Dummy(model) => model.has_tensor(name),
        }
    }

    /// A tensor by name.
    pub(super) fn tensor(&self, name: &str) -> Result<SourceTensor<'_>, ModelError> {
        match self {
            Self::Files(files) => Ok(SourceTensor::Stored(files.tensor(name)?)),
            Self::Dummy(model) => Ok(SourceTensor::Dummy(model.tensor(name)?)),
        }
    }
}

/// One tensor, row by row.
pub(super) enum SourceTensor<'a> {
    /// In a file.
    Stored(TensorView<'a>),
    /// Made up.
    Dummy(DummyTensor<'a>),
}

impl SourceTensor<'_> {
    /// How it is stored.
    pub(super) fn dtype(&self) -> StoredType {
        match self {
            Self::Stored(view) => view.dtype,
            Self::Dummy(tensor) => tensor.dtype(),
        }
    }

    /// Rows; of a vector, its elements.
    pub(super) fn num_rows(&self) -> usize {
        match self {
            Self::Stored(view) => view.num_rows(),
            Self::Dummy(tensor) => tensor.num_rows(),
        }
    }

    /// Values in a row.
    pub(super) fn cols(&self) -> usize {
        match self {
            Self::Stored(view) => view.cols(),
            Self::Dummy(tensor) => tensor.cols(),
        }
    }

    /// Bytes of a row.
    pub(super) fn row_bytes(&self) -> usize {
        match self {
            Self::Stored(view) => view.row_bytes(),
            Self::Dummy(tensor) => tensor.cols() * tensor.dtype().block_bytes(),
        }
    }

    /// Copies these bytes of a row; `out` has their length.
    pub(super) fn copy_part(&self, row: usize, bytes: Range<usize>, out: &mut [u8]) {
        match self {
            Self::Stored(view) => out.copy_from_slice(&view.row(row)[bytes]),
            Self::Dummy(tensor) => tensor.copy_part(row, bytes, out),
        }
    }

    /// Gives the memory of these rows back.
    pub(super) fn release(&self, rows: Range<usize>) {
        match self {
            Self::Stored(view) => view.release(rows),
            Self::Dummy(_) => {}
        }
    }
}
