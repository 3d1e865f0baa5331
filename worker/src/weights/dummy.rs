//! Weights that are made up, for benchmarks: random, small, and quick to write.
//!
//! A row is a run of one table of random values, begun at a place that depends on the tensor and the row. That copies at the
//! speed of memory and gives every world size the same model.

use std::collections::HashMap;
use std::ops::Range;

use half::{bf16, f16};
use phalanx_formats::{Geometry, ModelError, StoredType, TensorSpec};

/// Values in the table: a prime, so that rows of common widths do not fall into step.
const TABLE_LEN: usize = 65_521;
/// Largest weight: a uniform distribution up to here has a standard deviation of 0.02.
const WEIGHT_MAX: f32 = 0.034_64;

/// A made-up model.
pub(super) struct DummyModel {
    dtype: StoredType,
    seed: u64,
    specs: HashMap<String, TensorSpec>,
    table: Vec<u8>,
    ones: Vec<u8>,
}

impl DummyModel {
    /// Plans the model: the tensors of the architecture, in `dtype` where that is a float.
    pub(super) fn new(geometry: &Geometry, dtype: StoredType, seed: u64) -> Self {
        let dtype = if dtype.block_len() == 1 { dtype } else { StoredType::F16 };
        let specs = geometry.tensors().into_iter().map(|spec| (spec.name.clone(), spec)).collect();
        let mut table = Vec::with_capacity(TABLE_LEN * dtype.block_bytes());
        for index in 0..TABLE_LEN {
            let uniform = (mix(seed ^ index as u64) >> 40) as f32 / (1u64 << 24) as f32;
            push(&mut table, dtype, (uniform * 2.0 - 1.0) * WEIGHT_MAX);
        }
        let mut ones = Vec::new();
        push(&mut ones, dtype, 1.0);
        Self { dtype, seed, specs, table, ones }
    }

    /// Whether the architecture has this tensor.
    pub(super) fn has_tensor(&self, name: &str) -> bool {
        self.specs.contains_key(name)
    }

    /// A tensor of the architecture.
    pub(super) fn tensor(&self, name: &str) -> Result<DummyTensor<'_>, ModelError> {
        let spec = self.specs.get(name).ok_or_else(|| ModelError::tensor(name, "is not part of this architecture"))?;
        let seed = name.bytes().fold(self.seed, |hash, byte| mix(hash ^ u64::from(byte)));
        Ok(DummyTensor { model: self, spec, seed })
    }
}

/// A made-up tensor.
pub(super) struct DummyTensor<'a> {
    model: &'a DummyModel,
    spec: &'a TensorSpec,
    seed: u64,
}

impl DummyTensor<'_> {
    /// A float type.
    pub(super) fn dtype(&self) -> StoredType {
        self.model.dtype
    }

    /// Rows; of a vector, its elements.
    pub(super) fn num_rows(&self) -> usize {
        self.spec.rows
    }

    /// Values in a row.
    pub(super) fn cols(&self) -> usize {
        self.spec.cols.unwrap_or(1)
    }

    /// Writes these bytes of a row.
    pub(super) fn copy_part(&self, row: usize, bytes: Range<usize>, out: &mut [u8]) {
        if self.spec.name.ends_with("norm.weight") {
            for (at, byte) in bytes.zip(out) {
                *byte = self.model.ones[at % self.model.ones.len()];
            }
            return;
        }
        let table = &self.model.table;
        let first = (mix(self.seed ^ row as u64) % TABLE_LEN as u64) as usize * self.model.dtype.block_bytes();
        let mut from = (first + bytes.start) % table.len();
        let mut rest = out;
        while !rest.is_empty() {
            let run = rest.len().min(table.len() - from);
            let (now, later) = rest.split_at_mut(run);
            now.copy_from_slice(&table[from..from + run]);
            (from, rest) = (0, later);
        }
    }
}

fn push(out: &mut Vec<u8>, dtype: StoredType, value: f32) {
    match dtype {
        StoredType::F32 => out.extend(value.to_le_bytes()),
        StoredType::BF16 => out.extend(bf16::from_f32(value).to_le_bytes()),
        _ => out.extend(f16::from_f32(value).to_le_bytes()),
    }
}

/// Scrambles 64 bits (SplitMix64's finaliser; Steele, Lea, Flood 2014).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
