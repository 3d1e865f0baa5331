//! Weight matrices on their way to a device.

use std::fmt;
use std::ops::Range;

use phalanx_formats::StoredType;

/// A weight matrix `[rows, cols]`, row-major, in its stored format, on its way to a device.
///
/// A fused matrix is a list of these, one below the other, each in its own format.
#[derive(Debug, Clone)]
pub struct HostMatrix {
    /// Stored format.
    pub dtype: StoredType,
    /// Output width N.
    pub rows: usize,
    /// Input width K.
    pub cols: usize,
    /// `rows * dtype.row_bytes(cols)` bytes.
    pub data: Vec<u8>,
}

/// Writes the bytes of a range of rows.
type ReadBytes<'a> = dyn Fn(Range<usize>, &mut [u8]) + Sync + 'a;

/// A weight matrix `[rows, cols]` that is read when a device wants it: by ranges of rows, from several threads at once.
pub struct MatrixSource<'a> {
    /// Stored format.
    pub dtype: StoredType,
    /// Output width N.
    pub rows: usize,
    /// Input width K.
    pub cols: usize,
    read: Box<ReadBytes<'a>>,
}

impl<'a> MatrixSource<'a> {
    /// A matrix whose rows `read` writes, in the stored format; it is given the range's bytes.
    pub fn new(
        dtype: StoredType,
        rows: usize,
        cols: usize,
        read: impl Fn(Range<usize>, &mut [u8]) + Sync + 'a,
    ) -> Self {
        Self { dtype, rows, cols, read: Box::new(read) }
    }

    /// Bytes of a row; 0 where the width is no whole number of blocks.
    pub fn row_bytes(&self) -> usize {
        self.dtype.row_bytes(self.cols).unwrap_or(0)
    }

    /// Reads rows; `out` holds their bytes.
    pub fn read(&self, rows: Range<usize>, out: &mut [u8]) {
        (self.read)(rows, out);
    }

    /// Reads some rows as a matrix of their own.
    pub fn load_rows(&self, rows: Range<usize>) -> HostMatrix {
        let mut data = vec![0; rows.len() * self.row_bytes()];
        self.read(rows.clone(), &mut data);
        HostMatrix { dtype: self.dtype, rows: rows.len(), cols: self.cols, data }
    }

    /// Reads all of it.
    pub fn load(&self) -> HostMatrix {
        self.load_rows(0..self.rows)
    }
}

impl fmt::Debug for MatrixSource<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MatrixSource({} x {} of {:?})", self.rows, self.cols, self.dtype)
    }
}

impl From<HostMatrix> for MatrixSource<'static> {
    fn from(matrix: HostMatrix) -> Self {
        let HostMatrix { dtype, rows, cols, data } = matrix;
        // Bytes that are no such matrix read as they lie: the backend that loads it sees that they are too few.
        let row_bytes = data.len().checked_div(rows).unwrap_or(0);
        Self::new(dtype, rows, cols, move |range, out| {
            let from = data.get(range.start * row_bytes..range.end * row_bytes).unwrap_or_default();
            let len = from.len().min(out.len());
            out[..len].copy_from_slice(&from[..len]);
        })
    }
}
