//! Rotary embedding, the cache and attention in plain tensors.
//!
//! **Invariant:** every sequence and head is computed alone, over its whole context at once.

use candle_core::{D, DType, Device, Tensor};
use half::f16;
use phalanx_formats::StoredType;

use super::ReferenceKvLayer;
use crate::{AttentionShape, KernelError, KvShape, RopeTable, SeqInputs, StepInputs, ops::fit};

/// An empty layer.
pub(super) fn kv_layer(shape: KvShape) -> Result<ReferenceKvLayer, KernelError> {
    if !matches!(shape.dtype, StoredType::F32 | StoredType::F16) {
        let what = format!("{:?}", shape.dtype);
        return Err(KernelError::Unsupported { backend: "reference", op: "kv_layer", what });
    }
    let len = shape.num_kv_heads * shape.num_blocks * shape.block_size * shape.head_dim;
    Ok(ReferenceKvLayer { shape, k: vec![0.0; len], v: vec![0.0; len] })
}

/// `qkv` `[tokens, (kv * group + 2 kv) * head_dim]` with q and k rotated.
pub(super) fn rotate(
    step: &StepInputs,
    shape: &AttentionShape,
    rope: &RopeTable,
    qkv: &Tensor,
) -> Result<Tensor, KernelError> {
    let (tokens, half) = (step.positions.len(), shape.head_dim / 2);
    let rotated = shape.num_kv_heads * (shape.group + 1);
    let heads = qkv.reshape((tokens, rotated + shape.num_kv_heads, shape.head_dim))?;
    let positions = Tensor::from_slice(&step.positions, tokens, &Device::Cpu)?;
    let of_tokens = |table: &[f32]| -> Result<Tensor, KernelError> {
        let table = Tensor::from_slice(table, (table.len() / half, half), &Device::Cpu)?;
        Ok(table.index_select(&positions, 0)?.unsqueeze(1)?)
    };
    let (cos, sin) = (of_tokens(&rope.cos)?, of_tokens(&rope.sin)?);
    let qk = heads.narrow(1, 0, rotated)?;
    let (a, b) = (qk.narrow(2, 0, half)?, qk.narrow(2, half, half)?);
    let low = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let high = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let qk = Tensor::cat(&[low, high], 2)?;
    let v = heads.narrow(1, rotated, shape.num_kv_heads)?;
    Ok(Tensor::cat(&[qk, v], 1)?.reshape(qkv.shape())?)
}

/// Stores the k and v columns of `qkv`.
pub(super) fn store(
    step: &StepInputs,
    shape: &AttentionShape,
    qkv: &Tensor,
    kv: &mut ReferenceKvLayer,
) -> Result<(), KernelError> {
    let (dim, slots) = (shape.head_dim, kv.shape.num_blocks * kv.shape.block_size);
    let first_k = shape.num_kv_heads * shape.group * dim;
    let dtype = kv.shape.dtype;
    let stored = |x: &f32| if dtype == StoredType::F16 { f16::from_f32(*x).to_f32() } else { *x };
    for (row, &slot) in qkv.to_vec2::<f32>()?.iter().zip(&step.kv_slots) {
        fit("rope_store", (slot as usize) < slots, || format!("slot {slot} of {slots}"))?;
        let (k, v) = row[first_k..].split_at(shape.num_kv_heads * dim);
        for head in 0..shape.num_kv_heads {
            let at = (head * slots + slot as usize) * dim;
            let from = head * dim..(head + 1) * dim;
            kv.k[at..at + dim].iter_mut().zip(&k[from.clone()]).for_each(|(to, x)| *to = stored(x));
            kv.v[at..at + dim].iter_mut().zip(&v[from]).for_each(|(to, x)| *to = stored(x));
        }
    }
    Ok(())
}

/// The owned heads' outputs, `[tokens, num_heads_owned * head_dim]`.
pub(super) fn attend(
    step: &StepInputs,
    shape: &AttentionShape,
    qkv: &Tensor,
    kv: &ReferenceKvLayer,
) -> Result<Tensor, KernelError> {
    let mut sequences = Vec::with_capacity(step.seqs.len());
    for seq in &step.seqs {
        let queries = qkv.narrow(0, seq.query_start as usize, seq.query_len as usize)?;
        let mask = mask(seq, shape.window)?;
        let mut heads = Vec::with_capacity(shape.num_heads_owned);
        for head in 0..shape.num_heads_owned {
            let (k, v) = context(step, seq, &kv.shape, (&kv.k, &kv.v), head / shape.group)?;
            let q = queries.narrow(1, head * shape.head_dim, shape.head_dim)?;
            let mut scores = (q.matmul(&k.t()?)? * f64::from(shape.scale))?;
            if let Some(cap) = shape.soft_cap.map(f64::from) {
                scores = ((scores / cap)?.tanh()? * cap)?;
            }
            let scores = (scores + &mask)?;
            heads.push(softmax(&scores)?.matmul(&v)?);
        }
        sequences.push(Tensor::cat(&heads, 1)?);
    }
    Ok(Tensor::cat(&sequences, 0)?)
}

/// 0 where a query sees a position, -inf elsewhere: `[queries, context]`.
fn mask(seq: &SeqInputs, window: Option<usize>) -> Result<Tensor, KernelError> {
    let (queries, context) = (seq.query_len as usize, seq.context_len as usize);
    let seen = |query: usize, position: usize| {
        let own = context - queries + query;
        position <= own && window.is_none_or(|window| position + window > own)
    };
    let values: Vec<f32> =
        (0..queries * context).map(|i| if seen(i / context, i % context) { 0.0 } else { f32::NEG_INFINITY }).collect();
    Ok(Tensor::from_vec(values, (queries, context), &Device::Cpu)?)
}

fn softmax(scores: &Tensor) -> Result<Tensor, KernelError> {
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    Ok(weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?.to_dtype(DType::F32)?)
}

/// K and V of a sequence's context for one head, `[context, head_dim]` each.
fn context(
    step: &StepInputs,
    seq: &SeqInputs,
    shape: &KvShape,
    (k, v): (&[f32], &[f32]),
    head: usize,
) -> Result<(Tensor, Tensor), KernelError> {
    let dim = shape.head_dim;
    let mut both = (Vec::new(), Vec::new());
    for position in 0..seq.context_len as usize {
        let block = step.block_tables.get(seq.table_start as usize + position / shape.block_size);
        let block = block.map(|&b| b as usize).filter(|&b| b < shape.num_blocks);
        let Some(block) = block else {
            return Err(KernelError::Shape { op: "attend", reason: format!("{seq:?} has no block for {position}") });
        };
        let slot = block * shape.block_size + position % shape.block_size;
        let at = (head * shape.num_blocks * shape.block_size + slot) * dim;
        both.0.extend_from_slice(&k[at..at + dim]);
        both.1.extend_from_slice(&v[at..at + dim]);
    }
    let tensor = |values| Tensor::from_vec(values, (seq.context_len as usize, dim), &Device::Cpu);
    Ok((tensor(both.0)?, tensor(both.1)?))
}
