//! Products against f64, and bit for bit against themselves.

use candle_core::{
    Device,
    quantized::{GgmlDType, QStorage, QTensor},
};
use half::{bf16, f16};
use phalanx_formats::StoredType;

use super::{Activations, CpuMatrix, Isa, Scratch, gate_up, linear};
use crate::GateActivation;
use crate::{
    HostMatrix,
    cpu::{Pool, Waiting},
};

/// A small generator (xorshift), so that cases repeat.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// From -1 to 1.
    fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }

    /// A matrix of random blocks: any codes, scales of either sign.
    fn matrix(&mut self, dtype: StoredType, rows: usize, cols: usize) -> HostMatrix {
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

    fn block(&mut self, dtype: StoredType, data: &mut Vec<u8>) {
        let start = data.len();
        data.extend((0..dtype.block_bytes()).map(|_| 0));
        let block = &mut data[start..];
        for byte in block.iter_mut() {
            *byte = (self.bits() >> 33) as u8;
        }
        let places: &[usize] = match dtype {
            StoredType::Q4_1 | StoredType::Q5_1 | StoredType::Q4K | StoredType::Q5K => &[0, 2],
            StoredType::Q6K => &[208],
            _ => &[0],
        };
        for place in places {
            block[*place..][..2].copy_from_slice(&f16::from_f32(self.float() * 0.1).to_le_bytes());
        }
    }
}

fn weights(matrix: &HostMatrix) -> Vec<f32> {
    let packed = CpuMatrix::pack(vec![matrix.clone()], Activations::Float32).unwrap();
    let mut values = vec![0.0; matrix.rows * matrix.cols];
    for (index, row) in values.chunks_exact_mut(matrix.cols).enumerate() {
        packed.row(index, row).unwrap();
    }
    values
}

fn product(pool: &Pool, isa: Isa, x: &[f32], w: &CpuMatrix, bias: Option<&[f32]>) -> Vec<f32> {
    let num_rows = x.len() / w.cols();
    let mut scratch = Scratch::with_isa(num_rows, w.cols(), w.activations, isa).unwrap();
    let mut out = vec![f32::NAN; num_rows * w.rows()];
    linear(pool, &mut scratch, x, w, bias, &mut out).unwrap();
    out
}

fn one_thread() -> Pool {
    Pool::new(1, Waiting::Sleep).unwrap()
}

#[test]
fn rows_are_those_of_the_reference_library() {
    let mut random = Random(7);
    for dtype in StoredType::ALL {
        let reference = match dtype {
            StoredType::F32 => GgmlDType::F32,
            StoredType::F16 => GgmlDType::F16,
            StoredType::BF16 => GgmlDType::BF16,
            StoredType::Q4_0 => GgmlDType::Q4_0,
            StoredType::Q4_1 => GgmlDType::Q4_1,
            StoredType::Q5_0 => GgmlDType::Q5_0,
            StoredType::Q5_1 => GgmlDType::Q5_1,
            StoredType::Q8_0 => GgmlDType::Q8_0,
            StoredType::Q4K => GgmlDType::Q4K,
            StoredType::Q5K => GgmlDType::Q5K,
            StoredType::Q6K => GgmlDType::Q6K,
            StoredType::IQ4NL => continue,
        };
        let matrix = random.matrix(dtype, 21, 512);
        let storage = QStorage::from_data((&matrix.data).into(), &Device::Cpu, reference).unwrap();
        let tensor = QTensor::new(storage, (matrix.rows, matrix.cols)).unwrap();
        let expected = tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(weights(&matrix), expected, "{dtype:?}");
    }
}

/// The format that the reference library lacks, by its definition.
#[test]
fn rows_of_iq4_nl_follow_its_table() {
    const TABLE: [f32; 16] = [-127., -104., -83., -65., -49., -35., -22., -10., 1., 13., 25., 38., 53., 69., 89., 113.];
    let matrix = Random(9).matrix(StoredType::IQ4NL, 5, 64);
    let values = weights(&matrix);
    for (block, values) in matrix.data.chunks_exact(18).zip(values.chunks_exact(32)) {
        let scale = f16::from_le_bytes([block[0], block[1]]).to_f32();
        for (index, byte) in block[2..].iter().enumerate() {
            assert_eq!(values[index], scale * TABLE[usize::from(byte & 15)]);
            assert_eq!(values[index + 16], scale * TABLE[usize::from(byte >> 4)]);
        }
    }
}

/// Activations as int8 blocks see them.
fn rounded(x: &[f32]) -> Vec<f64> {
    let mut values = Vec::new();
    for block in x.chunks_exact(32) {
        let largest = block.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let scale = f64::from(largest / 127.0);
        values.extend(block.iter().map(|x| f64::from((x * (127.0 / largest)).round_ties_even()) * scale));
    }
    values
}

fn check_accuracy(isa: Isa, dtype: StoredType, activations: Activations, cols: usize) {
    let mut random = Random(11 + cols as u64);
    let (num_rows, rows) = (5, 37);
    let matrix = random.matrix(dtype, rows, cols);
    let (x, bias) = (random.floats(num_rows * cols), random.floats(rows));
    let seen: Vec<f64> = if activations == Activations::Int8 && dtype.block_len() > 1 {
        rounded(&x)
    } else {
        x.iter().copied().map(f64::from).collect()
    };
    let values = weights(&matrix);
    let w = CpuMatrix::pack(vec![matrix], activations).unwrap();
    let out = product(&one_thread(), isa, &x, &w, Some(&bias));
    for (row, x) in seen.chunks_exact(cols).enumerate() {
        for (column, w) in values.chunks_exact(cols).enumerate() {
            let terms = || x.iter().zip(w).map(|(x, w)| x * f64::from(*w));
            let expected = terms().sum::<f64>() + f64::from(bias[column]);
            let size = terms().map(|term| term * term).sum::<f64>().sqrt();
            let error = (f64::from(out[row * rows + column]) - expected).abs();
            // What is summed has minimums of the same size as the weights: a few times f32's half unit of 6e-8.
            assert!(error <= 2e-6 * size.max(1e-3), "{isa:?} {dtype:?} {activations:?} {cols}: {error:e} of {size}");
        }
    }
}

#[test]
fn products_agree_with_f64() {
    for isa in Isa::available() {
        for activations in [Activations::Float32, Activations::Int8] {
            for dtype in StoredType::ALL {
                check_accuracy(isa, dtype, activations, 256);
                check_accuracy(isa, dtype, activations, 1536);
            }
            for dtype in [StoredType::F32, StoredType::F16, StoredType::BF16] {
                check_accuracy(isa, dtype, activations, 333);
            }
        }
    }
}

/// Each row alone, and every batch of the first M rows, must give the same bits, on any number of threads.
fn check_batches(isa: Isa, parts: Vec<HostMatrix>, activations: Activations, batches: &[usize]) {
    let name = format!("{isa:?} {activations:?} {:?}", parts.iter().map(|part| part.dtype).collect::<Vec<_>>());
    let mut random = Random(13);
    let w = CpuMatrix::pack(parts, activations).unwrap();
    let num_rows = batches.iter().copied().max().unwrap();
    let (x, bias) = (random.floats(num_rows * w.cols()), random.floats(w.rows()));
    let pools = [1, 2, 3].map(|num_threads| Pool::new(num_threads, Waiting::Sleep).unwrap());
    let mut expected = Vec::new();
    for x in x.chunks_exact(w.cols()) {
        expected.extend(product(&pools[0], isa, x, &w, Some(&bias)).iter().map(|value| value.to_bits()));
    }
    for (round, batch) in batches.iter().enumerate() {
        let pool = &pools[round % pools.len()];
        let out = product(pool, isa, &x[..batch * w.cols()], &w, Some(&bias));
        let same = out.iter().zip(&expected).all(|(out, expected)| out.to_bits() == *expected);
        assert!(same, "{name}: batch of {batch} on {} threads", pool.num_threads());
    }
}

#[test]
fn rows_do_not_depend_on_their_batch() {
    let every: Vec<usize> = (1..=300).collect();
    let some: Vec<usize> = (1..=20).chain([31, 63, 64, 65, 79, 129]).collect();
    let mut random = Random(17);
    for isa in Isa::available() {
        for dtype in StoredType::ALL {
            for activations in [Activations::Float32, Activations::Int8] {
                let parts = vec![random.matrix(dtype, 39, 512)];
                let batches = if isa == Isa::detect() { &every } else { &some };
                check_batches(isa, parts, activations, batches);
            }
        }
    }
}

#[test]
fn rows_do_not_depend_on_their_batch_at_odd_sizes() {
    let batches: Vec<usize> = (1..=35).chain([64, 65, 300]).collect();
    let mut random = Random(19);
    for isa in Isa::available() {
        for activations in [Activations::Float32, Activations::Int8] {
            for (rows, cols) in [(1, 1), (15, 31), (17, 257), (130, 333)] {
                for dtype in [StoredType::F32, StoredType::F16, StoredType::BF16] {
                    check_batches(isa, vec![random.matrix(dtype, rows, cols)], activations, &batches);
                }
            }
            for (rows, cols) in [(1, 32), (7, 96), (131, 288)] {
                let parts = [StoredType::Q4_1, StoredType::Q8_0, StoredType::F16, StoredType::Q5_0, StoredType::IQ4NL]
                    .map(|dtype| random.matrix(dtype, rows, cols));
                check_batches(isa, parts.to_vec(), activations, &batches);
            }
            let parts = [StoredType::Q4K, StoredType::Q6K, StoredType::Q4_0].map(|dtype| random.matrix(dtype, 33, 768));
            check_batches(isa, parts.to_vec(), activations, &batches);
        }
    }
}

#[test]
fn tiers_compute_the_same_bits() {
    let mut random = Random(23);
    let pool = one_thread();
    for dtype in StoredType::ALL {
        for activations in [Activations::Float32, Activations::Int8] {
            let w = CpuMatrix::pack(vec![random.matrix(dtype, 50, 768)], activations).unwrap();
            let gate = random.matrix(dtype, 50, 768);
            let gated = CpuMatrix::pack_gate_up(gate, random.matrix(StoredType::F32, 50, 768), activations).unwrap();
            let x = random.floats(27 * 768);
            let mut results = Vec::new();
            for isa in Isa::available() {
                let mut bits: Vec<u32> = product(&pool, isa, &x, &w, None).iter().map(|x| x.to_bits()).collect();
                let mut scratch = Scratch::with_isa(27, 768, activations, isa).unwrap();
                let mut out = vec![f32::NAN; 27 * 50];
                gate_up(&pool, &mut scratch, &x, &gated, GateActivation::Silu, &mut out).unwrap();
                bits.extend(out.iter().map(|x| x.to_bits()));
                results.push(bits);
            }
            assert!(results.iter().all(|bits| *bits == results[0]), "{dtype:?} {activations:?}");
        }
    }
}

fn exact(activation: GateActivation, x: f64) -> f64 {
    match activation {
        GateActivation::Silu => x / (1.0 + (-x).exp()),
        GateActivation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            // The sum of one and a tanh near -1 would lose its digits.
            x / (1.0 + (-2.0 * inner).exp())
        }
    }
}

#[test]
fn gate_up_is_the_activation_of_gate_times_up() {
    for activation in [GateActivation::Silu, GateActivation::GeluTanh] {
        check_gate_up(activation);
    }
}

fn check_gate_up(activation: GateActivation) {
    let mut random = Random(29);
    let pools = [1, 2, 3].map(|num_threads| Pool::new(num_threads, Waiting::SpinThenSleep).unwrap());
    for isa in Isa::available() {
        for (inner, activations) in [(16, Activations::Int8), (41, Activations::Float32), (192, Activations::Int8)] {
            let gate = random.matrix(StoredType::Q4_1, inner, 288);
            let up = random.matrix(StoredType::Q8_0, inner, 288);
            let w = CpuMatrix::pack_gate_up(gate.clone(), up.clone(), activations).unwrap();
            let both = CpuMatrix::pack(vec![gate, up], activations).unwrap();
            let x: Vec<f32> = random.floats(70 * 288).iter().map(|x| x * 3.0).collect();
            let sums = product(&pools[0], isa, &x, &both, None);
            let mut alone = Vec::new();
            for (round, num_rows) in [1, 2, 3, 16, 70].into_iter().enumerate() {
                let mut scratch = Scratch::with_isa(num_rows, 288, activations, isa).unwrap();
                let mut out = vec![f32::NAN; num_rows * inner];
                gate_up(&pools[round % 3], &mut scratch, &x[..num_rows * 288], &w, activation, &mut out).unwrap();
                alone.truncate(num_rows * inner);
                assert_eq!(out[..alone.len()], alone, "batch of {num_rows}");
                for (out, sums) in out.chunks_exact(inner).zip(sums.chunks_exact(2 * inner)) {
                    for (index, out) in out.iter().enumerate() {
                        let expected = exact(activation, f64::from(sums[index])) * f64::from(sums[inner + index]);
                        let error = (f64::from(*out) - expected).abs();
                        // An error of the exponent is one of the exponential, and GELU's is a cubic in f32.
                        let slack = if activation == GateActivation::Silu { 5e-7 } else { 2e-5 };
                        assert!(error <= slack * expected.abs() + 1e-30, "{out} for {expected}");
                    }
                }
                alone = out;
            }
        }
    }
}

#[test]
fn values_that_are_not_finite_are_seen_in_the_output() {
    let mut random = Random(31);
    for isa in Isa::available() {
        for activations in [Activations::Float32, Activations::Int8] {
            let w = CpuMatrix::pack(vec![random.matrix(StoredType::Q8_0, 20, 64)], activations).unwrap();
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = random.floats(2 * 64);
                x[64 + 40] = bad;
                let out = product(&one_thread(), isa, &x, &w, None);
                assert!(out[..20].iter().all(|x| x.is_finite()), "{isa:?} {activations:?}: the other row is untouched");
                assert!(out[20..].iter().all(|x| !x.is_finite()), "{isa:?} {activations:?} {bad}");
            }
        }
    }
}

#[test]
fn zeros_and_tiny_values_stay_finite() {
    let w = CpuMatrix::pack(vec![Random(37).matrix(StoredType::Q4_1, 16, 64)], Activations::Int8).unwrap();
    for value in [0.0, -0.0, 1e-45, 1e-38] {
        for isa in Isa::available() {
            let out = product(&one_thread(), isa, &[value; 64], &w, None);
            assert!(out.iter().all(|x| x.is_finite() && x.abs() < 1e-35), "{value:e}");
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let mut random = Random(41);
    let matrix = random.matrix(StoredType::Q8_0, 4, 64);
    let short = HostMatrix { data: matrix.data[1..].to_vec(), ..matrix.clone() };
    assert!(CpuMatrix::pack(vec![], Activations::Int8).is_err());
    assert!(CpuMatrix::pack(vec![short], Activations::Int8).is_err());
    assert!(CpuMatrix::pack(vec![matrix.clone(), random.matrix(StoredType::F32, 4, 32)], Activations::Int8).is_err());
    let w = CpuMatrix::pack(vec![matrix], Activations::Int8).unwrap();
    assert_eq!((w.rows(), w.cols()), (4, 64));
    let pool = one_thread();
    let mut scratch = Scratch::new(2, 64, Activations::Int8).unwrap();
    for (x_len, out_len) in [(63, 4), (64, 5), (3 * 64, 12)] {
        assert!(linear(&pool, &mut scratch, &vec![0.0; x_len], &w, None, &mut vec![0.0; out_len]).is_err());
    }
    assert!(linear(&pool, &mut scratch, &[0.0; 64], &w, Some(&[0.0; 3]), &mut [0.0; 4]).is_err());
    assert!(gate_up(&pool, &mut scratch, &[0.0; 64], &w, GateActivation::Silu, &mut [0.0; 2]).is_err());
    assert!(w.row(4, &mut [0.0; 64]).is_err());
    assert!(w.row(0, &mut [0.0; 63]).is_err());
    assert!(linear(&pool, &mut scratch, &[], &w, None, &mut []).is_ok());
}
