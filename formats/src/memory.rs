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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Architecture;
    use crate::test_support::small_geometry;

    #[test]
    fn a_kv_block_counts_both_sides_of_all_layers() {
        let geometry = small_geometry(Architecture::Llama);
        let check = |world_size, dtype, expected| {
            let plan = ShardPlan::new(&geometry, world_size, world_size - 1, 1, 1);
            assert_eq!(kv_block_bytes(&geometry, &plan, 16, dtype), expected);
        };
        check(1, StoredType::F32, 2 * 3 * 3 * 16 * 32 * 4);
        check(2, StoredType::F16, 2 * 3 * 2 * 16 * 32 * 2);
        check(5, StoredType::F16, 2 * 3 * 16 * 32 * 2);
    }

    #[test]
    fn weights_are_counted_as_they_are_stored_and_padded() {
        let geometry = small_geometry(Architecture::Llama);
        let plan = ShardPlan::new(&geometry, 2, 0, 32, 32);
        let (hidden, inner, vocab) = (96, plan.inner.padded as u64, plan.vocab.padded as u64);
        assert_eq!((inner, vocab, plan.attention.padded), (128, 64, 192));
        // Q, K, V, gate, up have `hidden` columns; O and down have that many rows. 34 bytes hold 32 values.
        let layer = (192 + 64 + 64 + 2 * inner) * hidden + hidden * (192 + inner);
        let expected = (3 * layer + 2 * vocab * hidden) / 32 * 34 + (3 * 2 + 1) * hidden * 4;
        assert_eq!(weight_bytes(&geometry, &plan, |_| StoredType::Q8_0), expected);
    }
}
