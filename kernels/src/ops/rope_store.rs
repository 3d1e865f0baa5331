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

#[cfg(test)]
mod tests {
    use half::f16;
    use phalanx_formats::StoredType;

    use super::*;
    use crate::{
        KvShape,
        cpu::{Waiting, kv::TILE},
        ops::test_random::{Random, same_bits},
    };

    const POSITIONS: usize = 50;

    fn kv(shape: &AttentionShape, dtype: StoredType) -> CpuKvLayer {
        let (num_kv_heads, head_dim) = (shape.num_kv_heads, shape.head_dim);
        CpuKvLayer::new(KvShape { num_blocks: 4, block_size: 32, num_kv_heads, head_dim, dtype }).unwrap()
    }

    /// K and V of a slot, `[kv head][head_dim]` each.
    fn stored(kv: &CpuKvLayer, slot: usize) -> (Vec<f32>, Vec<f32>) {
        let (dim, slots) = (kv.shape.head_dim, num_slots(&kv.shape));
        let at = |head: usize, d: usize| {
            let (k, v) = ((slot / TILE * dim + d) * TILE + slot % TILE, slot * dim + d);
            let head = head * slots * dim;
            match &kv.store {
                KvStore::F32(heads) => (heads.k[head + k], heads.v[head + v]),
                KvStore::F16(heads) => (heads.k[head + k].to_f32(), heads.v[head + v].to_f32()),
            }
        };
        (0..kv.shape.num_kv_heads).flat_map(|head| (0..dim).map(move |d| at(head, d))).unzip()
    }

    /// The plain form: one row, rotated.
    fn reference(row: &[f32], shape: &AttentionShape, rope: &RopeTable, position: usize) -> Vec<f32> {
        let half = shape.head_dim / 2;
        let mut out = row.to_vec();
        for head in out.chunks_exact_mut(shape.head_dim).take(shape.num_kv_heads * (shape.group + 1)) {
            for i in 0..half {
                let (cos, sin) = (rope.cos[position * half + i], rope.sin[position * half + i]);
                let (a, b) = (head[i], head[half + i]);
                (head[i], head[half + i]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
        out
    }

    #[test]
    fn rows_are_rotated_and_stored_the_same_in_any_batch() {
        let mut random = Random(11);
        for (num_kv_heads, group, head_dim) in [(3, 3, 64), (1, 2, 8), (2, 1, 40)] {
            let shape = AttentionShape {
                num_kv_heads,
                group,
                num_heads_owned: 1,
                head_dim,
                out_column: 0,
                scale: 1.0,
                window: None,
                soft_cap: None,
            };
            let table = random.floats(2 * POSITIONS * head_dim / 2);
            let (cos, sin) = table.split_at(POSITIONS * head_dim / 2);
            let rope = RopeTable { cos: cos.to_vec(), sin: sin.to_vec(), head_dim };
            let rows = POSITIONS;
            let slots = random.permutation(128);
            let step = StepInputs {
                positions: random.permutation(POSITIONS),
                kv_slots: slots[..rows].to_vec(),
                ..StepInputs::default()
            };
            let qkv = random.floats(rows * qkv_width(&shape));
            let rotated = |simd, num_threads, dtype, kv: &mut CpuKvLayer| {
                let pool = Pool::new(num_threads, Waiting::Sleep).unwrap();
                let mut qkv = qkv.clone();
                assert_eq!(kv.shape.dtype, dtype);
                rope_store(simd, &pool, &step, &shape, &rope, &mut qkv, kv).unwrap();
                qkv
            };
            for dtype in [StoredType::F32, StoredType::F16] {
                let mut layer = kv(&shape, dtype);
                let got = rotated(Simd::best(), 3, dtype, &mut layer);
                for simd in Simd::all() {
                    assert!(same_bits(&got, &rotated(simd, 1, dtype, &mut kv(&shape, dtype))), "{simd:?}");
                }
                let width = qkv_width(&shape);
                for row in 0..rows {
                    let position = step.positions[row] as usize;
                    let expected = reference(&qkv[row * width..][..width], &shape, &rope, position);
                    assert!(same_bits(&got[row * width..][..width], &expected), "row {row}");
                    let round = |x: &f32| if dtype == StoredType::F16 { f16::from_f32(*x).to_f32() } else { *x };
                    let kv: Vec<f32> = expected[num_kv_heads * group * head_dim..].iter().map(round).collect();
                    let (k, v) = stored(&layer, step.kv_slots[row] as usize);
                    assert_eq!((&kv[..k.len()], &kv[k.len()..]), (&k[..], &v[..]), "row {row}");
                }
            }
        }
    }

    #[test]
    fn slots_and_positions_outside_are_refused() {
        let shape = AttentionShape {
            num_kv_heads: 1,
            group: 1,
            num_heads_owned: 1,
            head_dim: 8,
            out_column: 0,
            scale: 1.0,
            window: None,
            soft_cap: None,
        };
        let rope = RopeTable { cos: vec![1.0; 40], sin: vec![0.0; 40], head_dim: 8 };
        for (position, slot, fits) in [(9, 127, true), (10, 127, false), (9, 128, false)] {
            let step = StepInputs { positions: vec![position], kv_slots: vec![slot], ..StepInputs::default() };
            let pool = Pool::new(1, Waiting::Sleep).unwrap();
            let mut layer = kv(&shape, StoredType::F32);
            let result = rope_store(Simd::best(), &pool, &step, &shape, &rope, &mut [0.5; 24], &mut layer);
            assert_eq!(result.is_ok(), fits, "{position} {slot}");
        }
    }
}
