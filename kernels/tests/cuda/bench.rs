//! What all tests need: random inputs that every type holds exactly, both backends, comparison.

use std::sync::{Mutex, MutexGuard, PoisonError};

use half::{bf16, f16};
use phalanx_formats::StoredType;
use phalanx_kernels::cuda::{CudaOps, CudaSettings, Dtype, ModuleSettings, PEER_WAIT};
use phalanx_kernels::reference::ReferenceOps;
use phalanx_kernels::{
    AttentionLimits, Collective, CollectiveError, HostMatrix, InputLimits, Ops, Partial, SeqInputs, StepInputs,
};

/// A group of one.
pub struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }
    fn world_size(&self) -> usize {
        1
    }
    fn all_reduce_sum(&mut self, _: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }
    fn all_gather(&mut self, part: &[u8], out: &mut [u8]) -> Result<(), CollectiveError> {
        out.copy_from_slice(part);
        Ok(())
    }
}

/// A small generator (xorshift), so that cases repeat. Its floats are values of `dtype`: what is left to differ is arithmetic.
pub struct Random {
    state: u64,
    dtype: Dtype,
}

impl Random {
    pub fn new(seed: u64, dtype: Dtype) -> Self {
        Self { state: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1, dtype }
    }

    pub fn bits(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.bits() >> 33) as usize % end
    }

    /// From `-scale` to `scale`.
    pub fn float(&mut self, scale: f32) -> f32 {
        let value = ((self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale;
        rounded(self.dtype, value)
    }

    pub fn floats(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.float(scale)).collect()
    }

    /// A weight: sums over its columns stay near 1.
    pub fn matrix(&mut self, rows: usize, cols: usize) -> HostMatrix {
        let values = self.floats(rows * cols, 1.7 / (cols as f32).sqrt());
        stored(&values, cols, self.dtype)
    }
}

pub fn rounded(dtype: Dtype, value: f32) -> f32 {
    match dtype {
        Dtype::F32 => value,
        Dtype::F16 => f16::from_f32(value).to_f32(),
        Dtype::Bf16 => bf16::from_f32(value).to_f32(),
    }
}

/// A matrix of these values as a checkpoint of this type stores it.
pub fn stored(values: &[f32], cols: usize, dtype: Dtype) -> HostMatrix {
    let data = match dtype {
        Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
    };
    HostMatrix { dtype: dtype.stored(), rows: values.len() / cols, cols, data }
}

/// Largest difference that may be, over the largest value.
///
/// f32: sums of a few thousand terms in another order. f16 and bf16: one rounding to the type is 2^-11 or 2^-8 of a value; a
/// fused op and its parts differ by up to four of them.
pub fn tolerance(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => 5e-6,
        Dtype::F16 => 2e-3,
        Dtype::Bf16 => 2e-2,
    }
}

/// Limits with room for everything here.
pub fn limits(attention: AttentionLimits) -> InputLimits {
    InputLimits {
        tokens_max: 1100,
        seqs_max: 70,
        table_entries_max: 2000,
        logit_rows_max: 130,
        slots_max: 80,
        positions_max: 2048,
        steps_max: 3,
        vocab_size: 50_000,
        attention,
    }
}

/// Heads that no test looks at.
pub const SOME_HEADS: AttentionLimits =
    AttentionLimits { num_kv_heads: 2, group: 2, head_dim: 64, block_size: 16, window: None };

/// What an op is given, on a backend.
pub struct Bench<O: Ops> {
    pub ops: O,
    pub inputs: O::Inputs,
    pub step: StepInputs,
}

/// A device, one test at a time: what is said of memory and time is then the test's own.
pub struct OnDevice {
    pub bench: Bench<CudaOps>,
    _turn: MutexGuard<'static, ()>,
}

static TURN: Mutex<()> = Mutex::new(());

/// The right to use devices.
pub fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How the device is opened.
pub fn settings(dtype: Dtype, attention: AttentionLimits) -> CudaSettings {
    CudaSettings {
        ordinal: 0,
        dtype,
        hidden_size: 4096,
        head_dim: attention.head_dim,
        group: attention.group,
        enforce_eager: false,
        only_nccl: false,
        peer_wait_max: PEER_WAIT,
        modules: ModuleSettings::default(),
    }
}

/// Opens a device for a group.
pub fn open(settings: &CudaSettings, collective: Box<dyn Collective>) -> CudaOps {
    CudaOps::open(settings, collective).unwrap_or_else(|e| panic!("these tests need an NVIDIA device: {e}"))
}

/// The first device, alone.
pub fn device(dtype: Dtype, attention: AttentionLimits) -> OnDevice {
    device_with(&settings(dtype, attention), attention)
}

/// The same, opened in another way.
pub fn device_with(settings: &CudaSettings, attention: AttentionLimits) -> OnDevice {
    let turn = turn();
    let bench = Bench::new(open(settings, Box::new(Alone)), attention);
    OnDevice { bench, _turn: turn }
}

/// The reference, alone.
pub fn reference(attention: AttentionLimits) -> Bench<ReferenceOps> {
    Bench::new(ReferenceOps::new(Box::new(Alone)), attention)
}

impl<O: Ops> Bench<O> {
    pub fn new(mut ops: O, attention: AttentionLimits) -> Self {
        let inputs = ops.inputs(limits(attention)).unwrap();
        Self { ops, inputs, step: StepInputs::default() }
    }

    /// Tokens 0, 1, 2 and so on of one sequence.
    pub fn step_of(rows: usize) -> StepInputs {
        let all: Vec<u32> = (0..rows as u32).collect();
        let seqs = vec![SeqInputs { query_start: 0, query_len: rows as u32, context_len: rows as u32, table_start: 0 }];
        let block_tables = vec![0; rows.div_ceil(16)];
        StepInputs {
            token_ids: all.clone(),
            positions: all.clone(),
            kv_slots: all,
            seqs,
            block_tables,
            ..StepInputs::default()
        }
    }

    pub fn load(&mut self, step: StepInputs) {
        self.ops.load_inputs(&step, &mut self.inputs).unwrap();
        self.step = step;
    }

    /// A step of as many rows.
    pub fn load_rows(&mut self, rows: usize) {
        self.load(Self::step_of(rows));
    }

    /// Runs `work` within a step of `rows` rows.
    fn within(&mut self, rows: usize, work: impl FnOnce(&mut O, &O::Inputs)) {
        self.ops.load_inputs(&Self::step_of(rows), &mut self.inputs).unwrap();
        work(&mut self.ops, &self.inputs);
        self.ops.load_inputs(&self.step, &mut self.inputs).unwrap();
    }

    /// Terms that are `values` `[rows, width]`: embedded from a table, so that the contract suffices.
    pub fn terms(&mut self, values: &[f32], width: usize) -> Partial<O::Buffer> {
        let rows = values.len() / width;
        let data = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let table = self.ops.matrix(vec![HostMatrix { dtype: StoredType::F32, rows, cols: width, data }]).unwrap();
        let mut terms = Partial::new(self.ops.buffer(rows, width).unwrap());
        self.within(rows, |ops, inputs| ops.embed(inputs, &table, 0, &mut terms).unwrap());
        terms
    }

    /// A buffer that holds `values`, in a group of one.
    pub fn filled(&mut self, values: &[f32], width: usize) -> O::Buffer {
        let rows = values.len() / width;
        let out = self.ops.buffer(rows, width).unwrap();
        self.fill(values, width, out)
    }

    /// The same of the residual stream's type.
    pub fn filled_wide(&mut self, values: &[f32], width: usize) -> O::Buffer {
        let rows = values.len() / width;
        let out = self.ops.wide_buffer(rows, width).unwrap();
        self.fill(values, width, out)
    }

    fn fill(&mut self, values: &[f32], width: usize, mut out: O::Buffer) -> O::Buffer {
        let mut terms = self.terms(values, width);
        let rows = values.len() / width;
        self.within(rows, |ops, inputs| ops.reduce(inputs, &mut terms, &mut out).unwrap());
        out
    }

    pub fn poisoned(&mut self, rows: usize, width: usize) -> O::Buffer {
        self.filled(&vec![f32::NAN; rows * width], width)
    }

    pub fn poisoned_wide(&mut self, rows: usize, width: usize) -> O::Buffer {
        self.filled_wide(&vec![f32::NAN; rows * width], width)
    }

    pub fn poisoned_terms(&mut self, rows: usize, width: usize) -> Partial<O::Buffer> {
        self.terms(&vec![f32::NAN; rows * width], width)
    }

    pub fn read(&mut self, buffer: &O::Buffer, rows: usize) -> Vec<f32> {
        self.ops.read(buffer, rows).unwrap().to_vec()
    }

    /// The sum over ranks of terms.
    pub fn read_terms(&mut self, mut terms: Partial<O::Buffer>, rows: usize, width: usize) -> Vec<f32> {
        let mut out = self.ops.buffer(rows, width).unwrap();
        self.ops.reduce(&self.inputs, &mut terms, &mut out).unwrap();
        self.read(&out, rows)
    }
}

/// What did not agree: all of it is told at the end, since time on a device is dear.
#[derive(Default)]
pub struct Findings {
    failures: Vec<String>,
    num_checked: usize,
    worst: f32,
}

impl Findings {
    /// Both are as near as the type allows.
    pub fn close(&mut self, label: &str, got: &[f32], expected: &[f32], tolerance: f32) {
        let worst = worst(got, expected);
        self.num_checked += 1;
        self.worst = self.worst.max(worst / tolerance);
        if worst > tolerance || worst.is_nan() {
            self.failures.push(format!("{label}: {worst:.2e}, not below {tolerance:.0e}"));
        }
    }

    /// Something holds.
    pub fn holds(&mut self, holds: bool, label: impl FnOnce() -> String) {
        self.num_checked += 1;
        if !holds {
            self.failures.push(label());
        }
    }

    /// Prints what was checked, and fails where something did not hold.
    pub fn finish(self, what: &str) {
        println!("{what}: {} checks, the worst at {:.2} of its tolerance", self.num_checked, self.worst);
        let Self { failures, num_checked, .. } = self;
        assert!(num_checked > 0, "{what}: nothing was checked");
        assert!(failures.is_empty(), "{what}: {} of {num_checked}:\n{}", failures.len(), failures.join("\n"));
    }
}

/// Largest difference, over the largest value of `expected`; NaN must stand at the same places.
fn worst(got: &[f32], expected: &[f32]) -> f32 {
    if got.len() != expected.len() {
        return f32::INFINITY;
    }
    let largest = expected.iter().filter(|x| x.is_finite()).fold(1e-6f32, |a, b| a.max(b.abs()));
    let far = |(a, b): (&f32, &f32)| match (a.is_nan(), b.is_nan()) {
        (true, true) => 0.0,
        (false, false) => (a - b).abs() / largest,
        _ => f32::INFINITY,
    };
    got.iter().zip(expected).map(far).fold(0.0, f32::max)
}
