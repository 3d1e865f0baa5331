//! Products whose results are exact, and one that is tuned.

use std::time::Instant;

use half::bf16;

use super::{Bench, DEADLINE, Found, require};
use crate::cuda::{BlasLt, Context, CudaError, DeviceMemory, MatmulOperands, MatmulShape, Scalar, Stream};

impl Bench {
    /// Of small multiples of an eighth, written, added to and recorded.
    pub(super) fn matmul(&self, input: Scalar, output: Scalar, has_bias: bool) -> Found {
        let shape = MatmulShape { rows: 128, n: 256, k: 512, input, output, has_bias };
        let started = Instant::now();
        let lt = BlasLt::new(&self.context)?;
        let plan = lt.plan(shape)?;
        let planned = started.elapsed();
        let case = MatmulCase::new(&self.context, &self.stream, shape)?;
        let operands = case.operands(false);
        lt.matmul(&self.stream, &plan, &operands)?;
        case.compare(&self.stream, 1.0)?;
        let mut said = String::new();
        if output == Scalar::F32 && !has_bias {
            lt.matmul(&self.stream, &plan, &case.operands(true))?;
            case.compare(&self.stream, 2.0)?;
            said = ", added to".into();
        }
        self.stream.fill(case.y.span(), 0xFF)?;
        let graph = self.stream.capture("matmul", || lt.matmul(&self.stream, &plan, &operands))?;
        // SAFETY: all that is recorded still lives.
        unsafe { graph.launch(&self.stream)? };
        case.compare(&self.stream, 1.0)?;
        Ok(format!("exact{said}, recorded; library and plan {planned:.1?}"))
    }

    /// The rate of a large one.
    pub(super) fn matmul_tuned(&self) -> Found {
        let input = Scalar::Bf16;
        let shape = MatmulShape { rows: 256, n: 4096, k: 4096, input, output: input, has_bias: false };
        let lt = BlasLt::new(&self.context)?;
        let cases = (0..4).map(|_| MatmulCase::empty(&self.context, shape)).collect::<Result<Vec<_>, _>>()?;
        let operands: Vec<_> = cases.iter().map(|case| case.operands(false)).collect();
        for case in &cases {
            [&case.x, &case.w].into_iter().try_for_each(|memory| self.stream.fill(memory.span(), 0x3C))?;
        }
        let started = Instant::now();
        let time = lt.tune(&self.stream, shape, &operands, DEADLINE)?;
        let flops = 2.0 * 256.0 * 4096.0 * 4096.0 / time.as_secs_f64() / 1e12;
        Ok(format!("256x4096x4096 in {time:.1?}, {flops:.0} TFLOP/s, found in {:.1?}", started.elapsed()))
    }
}

/// A product whose result is exact: small multiples of an eighth.
struct MatmulCase {
    shape: MatmulShape,
    x: DeviceMemory,
    w: DeviceMemory,
    bias: DeviceMemory,
    y: DeviceMemory,
}

impl MatmulCase {
    fn empty(context: &Context, shape: MatmulShape) -> Result<Self, CudaError> {
        let alloc = |count: usize, scalar: Scalar| DeviceMemory::alloc(context, count * scalar.bytes());
        Ok(Self {
            shape,
            x: alloc(shape.rows * shape.k, shape.input)?,
            w: alloc(shape.n * shape.k, shape.input)?,
            bias: alloc(shape.n, shape.output)?,
            y: alloc(shape.rows * shape.n, shape.output)?,
        })
    }

    fn new(context: &Context, stream: &Stream, shape: MatmulShape) -> Result<Self, CudaError> {
        let case = Self::empty(context, shape)?;
        for (memory, scalar, salt) in
            [(&case.x, shape.input, 1), (&case.w, shape.input, 2), (&case.bias, shape.output, 3)]
        {
            let bytes = encode((0..memory.len() / scalar.bytes()).map(|index| sample(index, salt)), scalar);
            stream.upload(&bytes, memory.span(), DEADLINE)?;
        }
        stream.fill(case.y.span(), 0xFF)?;
        Ok(case)
    }

    fn operands(&self, accumulate: bool) -> MatmulOperands {
        MatmulOperands {
            x: self.x.span(),
            w: self.w.span(),
            bias: self.shape.has_bias.then(|| self.bias.span()),
            y: self.y.span(),
            accumulate,
        }
    }

    /// Whether `y` is `factor` times the product, to the bit.
    fn compare(&self, stream: &Stream, factor: f32) -> Result<(), CudaError> {
        let MatmulShape { rows, n, k, output, has_bias, .. } = self.shape;
        let mut found = vec![0; self.y.len()];
        stream.download(self.y.span(), &mut found, DEADLINE)?;
        let expected = (0..rows * n).map(|index| {
            let (row, column) = (index / n, index % n);
            let sum: f32 = (0..k).map(|i| sample(row * k + i, 1) * sample(column * k + i, 2)).sum();
            factor * sum + if has_bias { sample(column, 3) } else { 0.0 }
        });
        let expected = encode(expected, output);
        let pairs = found.chunks(output.bytes()).zip(expected.chunks(output.bytes()));
        let wrong = pairs.filter(|(found, expected)| found != expected).count();
        require(wrong == 0, || format!("{wrong} of {} values are wrong", rows * n))
    }
}

/// Multiples of an eighth from -1 to 1, well mixed.
fn sample(index: usize, salt: u32) -> f32 {
    let mixed = (index as u32).wrapping_mul(0x9E37_79B1).wrapping_add(salt.wrapping_mul(0x85EB_CA6B));
    ((mixed ^ mixed >> 15) % 17) as f32 / 8.0 - 1.0
}

fn encode(values: impl Iterator<Item = f32>, scalar: Scalar) -> Vec<u8> {
    match scalar {
        Scalar::F32 => values.flat_map(f32::to_le_bytes).collect(),
        Scalar::F16 => values.flat_map(|value| half::f16::from_f32(value).to_le_bytes()).collect(),
        Scalar::Bf16 => values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
    }
}
