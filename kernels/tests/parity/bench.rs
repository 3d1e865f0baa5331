//! A backend on a bench: what ops are given, what they answer, and how far that is from the reference.

use half::{bf16, f16};
use phalanx_formats::StoredType;
use phalanx_kernels::{
    Collective, CollectiveError, HostMatrix, InputLimits, Ops, Partial, SeqInputs, StepInputs,
    cpu::{Activations, CpuOps, Pool, Waiting},
    reference::ReferenceOps,
};

/// A group in which the other ranks' terms are those of this rank, times their rank.
pub struct Echo {
    world_size: usize,
}

impl Collective for Echo {
    fn rank(&self) -> usize {
        1 % self.world_size
    }
    fn world_size(&self) -> usize {
        self.world_size
    }
    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        let ranks = (0..self.world_size).map(|rank| if rank == self.rank() { 1.0 } else { rank as f32 });
        let factor: f32 = ranks.sum();
        data.iter_mut().for_each(|x| *x *= factor);
        Ok(())
    }
    fn all_gather(&mut self, part: &[u8], out: &mut [u8]) -> Result<(), CollectiveError> {
        out.chunks_exact_mut(part.len()).for_each(|out| out.copy_from_slice(part));
        Ok(())
    }
}

/// A small generator (xorshift), so that cases repeat.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// From -1 to 1.
    pub fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }

    /// Random blocks: any codes, scales of either sign. `cols` is rounded up to whole blocks.
    pub fn matrix(&mut self, dtype: StoredType, rows: usize, cols: usize) -> HostMatrix {
        let cols = cols.next_multiple_of(dtype.block_len());
        let mut data = Vec::new();
        for _ in 0..rows * cols / dtype.block_len() {
            match dtype {
                StoredType::F32 => data.extend(self.float().to_le_bytes()),
                StoredType::F16 => data.extend(f16::from_f32(self.float()).to_le_bytes()),
                StoredType::BF16 => data.extend(bf16::from_f32(self.float()).to_le_bytes()),
                _ => self.block(dtype, &mut data),
            }
        }
        HostMatrix { dtype, rows, cols, data }
    }

    pub fn block(&mut self, dtype: StoredType, data: &mut Vec<u8>) {
        let mut block: Vec<u8> = (0..dtype.block_bytes()).map(|_| (self.bits() >> 33) as u8).collect();
        let scales: &[usize] = match dtype {
            StoredType::Q4_1 | StoredType::Q5_1 | StoredType::Q4K | StoredType::Q5K => &[0, 2],
            StoredType::Q6K => &[208],
            _ => &[0],
        };
        for place in scales {
            block[*place..][..2].copy_from_slice(&f16::from_f32(self.float() * 0.01).to_le_bytes());
        }
        data.extend(block);
    }
}

pub fn cpu(activations: Activations, num_threads: usize, world_size: usize) -> CpuOps {
    let pool = Pool::new(num_threads, Waiting::Sleep).unwrap();
    CpuOps::new(pool, activations, Box::new(Echo { world_size })).unwrap()
}

pub fn reference(world_size: usize) -> ReferenceOps {
    ReferenceOps::new(Box::new(Echo { world_size }))
}

pub fn plain(values: &[f32], width: usize) -> HostMatrix {
    let data = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    HostMatrix { dtype: StoredType::F32, rows: values.len() / width, cols: width, data }
}

/// What an op is given, on a backend.
pub struct Bench<O: Ops> {
    pub ops: O,
    pub inputs: O::Inputs,
    pub step: StepInputs,
}

impl<O: Ops> Bench<O> {
    /// Tokens 0, 1, 2 and so on of one sequence.
    pub fn step_of(rows: usize) -> StepInputs {
        let all: Vec<u32> = (0..rows as u32).collect();
        let seqs = vec![SeqInputs { query_start: 0, query_len: rows as u32, context_len: rows as u32, table_start: 0 }];
        StepInputs { token_ids: all.clone(), positions: all.clone(), kv_slots: all, seqs, ..StepInputs::default() }
    }

    pub fn new(ops: O, rows: usize) -> Self {
        Self::with_step(ops, Self::step_of(rows))
    }

    pub fn with_step(mut ops: O, step: StepInputs) -> Self {
        let limits = InputLimits {
            tokens_max: 2000,
            seqs_max: 20,
            table_entries_max: 1000,
            logit_rows_max: 70,
            ..InputLimits::default()
        };
        let mut inputs = ops.inputs(limits).unwrap();
        ops.load_inputs(&step, &mut inputs).unwrap();
        Self { ops, inputs, step }
    }

    pub fn load(&mut self, step: StepInputs) {
        self.ops.load_inputs(&step, &mut self.inputs).unwrap();
        self.step = step;
    }

    /// Runs `work` within a step of `rows` rows.
    pub fn within(&mut self, rows: usize, work: impl FnOnce(&mut O, &O::Inputs)) {
        self.ops.load_inputs(&Self::step_of(rows), &mut self.inputs).unwrap();
        work(&mut self.ops, &self.inputs);
        self.ops.load_inputs(&self.step, &mut self.inputs).unwrap();
    }

    /// Terms that are `values` `[rows, width]`: embedded from a table, so that the contract suffices.
    pub fn terms(&mut self, values: &[f32], width: usize) -> Partial<O::Buffer> {
        let rows = values.len() / width;
        let table = self.ops.matrix(vec![plain(values, width)]).unwrap();
        let mut terms = Partial::new(self.ops.buffer(rows, width).unwrap());
        self.within(rows, |ops, inputs| ops.embed(inputs, &table, 0, &mut terms).unwrap());
        terms
    }

    /// A buffer that holds `values`, in a group of one.
    pub fn filled(&mut self, values: &[f32], width: usize) -> O::Buffer {
        let rows = values.len() / width;
        let mut terms = self.terms(values, width);
        let mut out = self.ops.buffer(rows, width).unwrap();
        self.within(rows, |ops, inputs| ops.reduce(inputs, &mut terms, &mut out).unwrap());
        out
    }

    pub fn poisoned(&mut self, rows: usize, width: usize) -> O::Buffer {
        self.filled(&vec![f32::NAN; rows * width], width)
    }

    pub fn poisoned_terms(&mut self, rows: usize, width: usize) -> Partial<O::Buffer> {
        self.terms(&vec![f32::NAN; rows * width], width)
    }

    pub fn read(&mut self, buffer: &O::Buffer, rows: usize) -> Vec<f32> {
        self.ops.read(buffer, rows).unwrap().to_vec()
    }

    pub fn read_terms(&mut self, mut terms: Partial<O::Buffer>, rows: usize, width: usize) -> Vec<f32> {
        let mut out = self.poisoned(rows, width);
        self.ops.reduce(&self.inputs, &mut terms, &mut out).unwrap();
        self.read(&out, rows)
    }
}

/// Largest difference, over the largest value of `expected`.
pub fn worst(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().filter(|x| !x.is_nan()).fold(1e-6f32, |a, b| a.max(b.abs()));
    let far = |(a, b): (&f32, &f32)| if a.is_nan() && b.is_nan() { 0.0 } else { (a - b).abs() / largest };
    let mut worst = 0.0f32;
    for difference in got.iter().zip(expected).map(far) {
        assert!(!difference.is_nan(), "NaN on one side only");
        worst = worst.max(difference);
    }
    worst
}

/// Root mean square of the difference, over that of `expected`.
pub fn typical(got: &[f32], expected: &[f32]) -> f32 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let far: f64 = got.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
    (far / expected.iter().map(|b| square(*b)).sum::<f64>().max(1e-12)).sqrt() as f32
}
