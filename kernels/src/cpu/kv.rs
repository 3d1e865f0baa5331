//! K and V of one layer, by block.
//!
//! V lies as `[kv head][slot][head_dim]`. K lies as `[kv head][tile][head_dim][16]`, a tile being 16 slots: a block holds
//! whole tiles, so blocks are contiguous as in any other layout, and 16 scores come out of one run of multiply-adds.
//!
//! **Invariant:** what is read back is what was stored, rounded to the element type once.

use half::f16;
use half::slice::HalfFloatSliceExt;
use phalanx_formats::StoredType;

use super::{
    disjoint::Disjoint,
    lanes::{HALF, LANES, Lanes},
    memory::{AlignedVec, Plain},
};
use crate::{KernelError, KvShape};

/// Slots of a tile of K.
pub(crate) const TILE: usize = LANES;

/// How K and V are stored.
pub(crate) trait KvElement: Plain + Send + Sync + Default {
    fn load<S: Lanes>(simd: S, x: &[Self; LANES]) -> S::V;
    fn load_half<S: Lanes>(simd: S, x: &[Self; HALF]) -> S::V;
    fn from_f32(x: f32) -> Self;
    fn convert(values: &[f32], out: &mut [Self]);
}

impl KvElement for f32 {
    #[inline(always)]
    fn load<S: Lanes>(simd: S, x: &[Self; LANES]) -> S::V {
        simd.load(x)
    }
    #[inline(always)]
    fn load_half<S: Lanes>(simd: S, x: &[Self; HALF]) -> S::V {
        simd.load_half(x)
    }
    fn from_f32(x: f32) -> Self {
        x
    }
    fn convert(values: &[f32], out: &mut [Self]) {
        out.copy_from_slice(values);
    }
}

impl KvElement for f16 {
    #[inline(always)]
    fn load<S: Lanes>(simd: S, x: &[Self; LANES]) -> S::V {
        simd.load_f16(x)
    }
    #[inline(always)]
    fn load_half<S: Lanes>(simd: S, x: &[Self; HALF]) -> S::V {
        simd.load_f16_half(x)
    }
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
    fn convert(values: &[f32], out: &mut [Self]) {
        out.convert_from_f32_slice(values);
    }
}

/// K and V of one layer.
pub struct CpuKvLayer {
    pub(crate) shape: KvShape,
    pub(crate) store: KvStore,
}

/// The layer's memory, in its element type.
pub(crate) enum KvStore {
    F32(KvHeads<f32>),
    F16(KvHeads<f16>),
}

/// K and V of all heads.
pub(crate) struct KvHeads<E> {
    pub(crate) k: AlignedVec<E>,
    pub(crate) v: AlignedVec<E>,
}

impl<E: KvElement> KvHeads<E> {
    fn zeroed(shape: &KvShape) -> Result<Self, KernelError> {
        let len = shape.num_kv_heads * num_slots(shape) * shape.head_dim;
        Ok(Self { k: AlignedVec::zeroed(len)?, v: AlignedVec::zeroed(len)? })
    }
}

impl CpuKvLayer {
    /// Allocates a layer.
    ///
    /// # Errors
    /// A shape or a type that the kernels lack, or no memory.
    pub(crate) fn new(shape: KvShape) -> Result<Self, KernelError> {
        if !shape.block_size.is_multiple_of(TILE) || !shape.head_dim.is_multiple_of(HALF) || shape.head_dim == 0 {
            let reason = format!("blocks of {} slots, heads of width {}", shape.block_size, shape.head_dim);
            return Err(KernelError::Shape { op: "kv_layer", reason });
        }
        let store = match shape.dtype {
            StoredType::F32 => KvStore::F32(KvHeads::zeroed(&shape)?),
            StoredType::F16 => KvStore::F16(KvHeads::zeroed(&shape)?),
            other => {
                return Err(KernelError::Unsupported { backend: "cpu", op: "kv_layer", what: format!("{other:?}") });
            }
        };
        Ok(Self { shape, store })
    }
}

/// Slots of a layer.
pub(crate) fn num_slots(shape: &KvShape) -> usize {
    shape.num_blocks * shape.block_size
}

/// Writes one token's K for one head, whose K is `head`.
pub(crate) fn store_k<E: KvElement>(head: &mut [E], slot: usize, values: &[f32]) {
    let tile = slot / TILE * TILE * values.len();
    let (columns, _) = head[tile..tile + TILE * values.len()].as_chunks_mut::<TILE>();
    for (column, &value) in columns.iter_mut().zip(values) {
        column[slot % TILE] = E::from_f32(value);
    }
}

/// Writes one token's V for one head, whose V is `head`.
pub(crate) fn store_v<E: KvElement>(head: &mut [E], slot: usize, values: &[f32]) {
    E::convert(values, &mut head[slot * values.len()..(slot + 1) * values.len()]);
}

/// One head of K or V.
///
/// # Safety
/// A head is handed out to one thread at a time.
#[expect(clippy::mut_from_ref, reason = "the caller promises that heads are handed out once")]
pub(crate) unsafe fn head_of<'a, E: KvElement>(all: &'a Disjoint<'_, E>, shape: &KvShape, head: usize) -> &'a mut [E] {
    let len = num_slots(shape) * shape.head_dim;
    // SAFETY: heads do not overlap, and the caller hands each out once.
    unsafe { all.slice(head * len, len) }
}
