//! Rotates q and k in place and stores k and v. Halves are rotated. Source: arXiv:2104.09864.

use crate::{
    AttentionShape, KernelError, RopeTable, StepInputs,
    cpu::{
        CpuKvLayer, Pool,
        disjoint::Disjoint,
        kv::{KvElement, KvHeads, KvStore, head_of, num_slots, store_k, store_v},
        lanes::{Kernel, Lanes, Simd},
    },
    ops::fit,
};

/// Below this many values the caller works alone.
const ALONE_MAX: usize = 16_384;

/// Rotates and stores. `qkv` `[tokens, (kv * group + 2 kv) * head_dim]`.
pub(crate) fn rope_store(
    simd: Simd,
    pool: &Pool,
    step: &StepInputs,
    shape: &AttentionShape,
    rope: &RopeTable,
    qkv: &mut [f32],
    kv: &mut CpuKvLayer,
) -> Result<(), KernelError> {
    check(step, shape, rope, qkv.len(), kv)?;
    let job = Job { simd, step, shape, rope, kv_shape: kv.shape };
    match &mut kv.store {
        KvStore::F32(heads) => job.run(pool, qkv, heads),
        KvStore::F16(heads) => job.run(pool, qkv, heads),
    }
    Ok(())
}

/// Values of a row of q, k and v.
pub(crate) fn qkv_width(shape: &AttentionShape) -> usize {
    shape.num_kv_heads * (shape.group + 2) * shape.head_dim
}

fn check(
    step: &StepInputs,
    shape: &AttentionShape,
    rope: &RopeTable,
    num_values: usize,
    kv: &CpuKvLayer,
) -> Result<(), KernelError> {
    let op = "rope_store";
    let rows = step.positions.len();
    fit(op, num_values == rows * qkv_width(shape), || format!("{shape:?}, {rows} rows in {num_values} values"))?;
    let same = kv.shape.num_kv_heads == shape.num_kv_heads && kv.shape.head_dim == shape.head_dim;
    fit(op, same && rope.head_dim == shape.head_dim, || {
        format!("{shape:?}, {:?}, rotary head width {}", kv.shape, rope.head_dim)
    })?;
    let positions = rope.cos.len().min(rope.sin.len()) / (shape.head_dim / 2);
    let far = step.positions.iter().find(|&&p| p as usize >= positions);
    fit(op, far.is_none(), || format!("position {far:?} in rotary tables of {positions}"))?;
    let slots = num_slots(&kv.shape);
    let past = step.kv_slots.iter().find(|&&slot| slot as usize >= slots);
    fit(op, past.is_none(), || format!("slot {past:?} of {slots}"))
}

struct Job<'a> {
    simd: Simd,
    step: &'a StepInputs,
    shape: &'a AttentionShape,
    rope: &'a RopeTable,
    kv_shape: crate::KvShape,
}

impl Job<'_> {
    /// A part is a head of q, k or v over all rows: parts share no column of `qkv` and no head of the cache.
    fn run<E: KvElement>(&self, pool: &Pool, qkv: &mut [f32], heads: &mut KvHeads<E>) {
        let num_parts = self.shape.num_kv_heads * (self.shape.group + 2);
        let alone = qkv.len() < ALONE_MAX;
        let qkv = Disjoint::new(qkv);
        let (k, v) = (Disjoint::new(&mut heads.k[..]), Disjoint::new(&mut heads.v[..]));
        let part = |part| self.head(part, &qkv, &k, &v);
        if alone { (0..num_parts).for_each(part) } else { pool.run(num_parts, part) }
    }

    fn head<E: KvElement>(&self, part: usize, qkv: &Disjoint<'_, f32>, k: &Disjoint<'_, E>, v: &Disjoint<'_, E>) {
        let dim = self.shape.head_dim;
        let width = qkv_width(self.shape);
        let (first_k, first_v) =
            (self.shape.num_kv_heads * self.shape.group, self.shape.num_kv_heads * (self.shape.group + 1));
        // SAFETY: a part has its head to itself.
        let mut k_head =
            (first_k..first_v).contains(&part).then(|| unsafe { head_of(k, &self.kv_shape, part - first_k) });
        // SAFETY: as for K.
        let mut v_head = (part >= first_v).then(|| unsafe { head_of(v, &self.kv_shape, part - first_v) });
        for row in 0..self.step.positions.len() {
            // SAFETY: parts differ in their columns.
            let x = unsafe { qkv.slice(row * width + part * dim, dim) };
            let slot = self.step.kv_slots[row] as usize;
            if let Some(head) = &mut v_head {
                store_v(head, slot, x);
                continue;
            }
            let at = self.step.positions[row] as usize * (dim / 2);
            let (cos, sin) = (&self.rope.cos[at..at + dim / 2], &self.rope.sin[at..at + dim / 2]);
            self.simd.run(Rotate { x, cos, sin });
            if let Some(head) = &mut k_head {
                store_k(head, slot, x);
            }
        }
    }
}

/// Rotates one head.
struct Rotate<'a> {
    x: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        let (low, high) = self.x.split_at_mut(self.cos.len());
        for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(self.cos).zip(self.sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}
