//! Memory arithmetic: what a rank's weights and KV blocks take.

use crate::{Geometry, ShardPlan, Sharding, StoredType};

/// Bytes of one KV block of all layers on one rank, padding included.
pub fn kv_block_bytes(geometry: &Geometry, plan: &ShardPlan, block_size: usize, kv_dtype: StoredType) -> u64 {
    let row = geometry.head_dim.div_ceil(kv_dtype.block_len()) as u64 * kv_dtype.block_bytes() as u64;
    [2, geometry.num_layers as u64, plan.local_kv_heads as u64, block_size as u64]
        .into_iter()
        .fold(row, u64::saturating_mul)
}

/// Bytes of one rank's weights as they are stored, padding included.
///
/// `stored` says how a tensor is stored, by its Hugging Face name. A backend that repacks may need a little more.
pub fn weight_bytes(geometry: &Geometry, plan: &ShardPlan, stored: impl Fn(&str) -> StoredType) -> u64 {
    let mut total = 0u64;
    for spec in geometry.tensors() {
        let (rows, cols) = local_shape(geometry, plan, spec.sharding, spec.rows, spec.cols.unwrap_or(1));
        // Vectors are floats on every device.
        let dtype = if spec.cols.is_some() { stored(&spec.name) } else { StoredType::F32 };
        let row = cols.div_ceil(dtype.block_len()) as u64 * dtype.block_bytes() as u64;
        total = total.saturating_add(row.saturating_mul(rows as u64));
    }
    total
}

fn local_shape(geometry: &Geometry, plan: &ShardPlan, sharding: Sharding, rows: usize, cols: usize) -> (usize, usize) {
    match sharding {
        Sharding::Whole => (rows, cols),
        Sharding::QueryRows => (plan.local_kv_heads * plan.group * geometry.head_dim, cols),
        Sharding::KvRows => (plan.local_kv_heads * geometry.head_dim, cols),
        Sharding::InnerRows => (plan.inner.padded, cols),
        Sharding::VocabRows => (plan.vocab.padded, cols),
        Sharding::AttentionCols => (rows, plan.attention.padded),
        Sharding::InnerCols => (rows, plan.inner.padded),
    }
}
