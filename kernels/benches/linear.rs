//! Matrices of a small model (hidden 576, inner 1536, 30 layers, vocabulary 49152), by format and batch.
//!
//! `cargo bench -p phalanx-kernels --bench linear -- [threads] [formats..] [m1 m16 ..] [float] [tiers]`, formats as `q4_1`, `bf16`. Prints medians
//! and minimums of many short runs: on a shared machine compare within one run only.

use std::time::{Duration, Instant};

use phalanx_formats::StoredType;
use phalanx_kernels::{
    GateActivation, HostMatrix, KernelError,
    cpu::{Activations, CpuMatrix, Isa, Pool, Scratch, Waiting, gate_up, linear},
};

const HIDDEN: usize = 576;
const INNER: usize = 1536;
const QKV: usize = 960;
const LAYERS: usize = 30;
const VOCABULARY: usize = 49152;

const FORMATS: [(&str, StoredType); 12] = [
    ("q4_1", StoredType::Q4_1),
    ("q8_0", StoredType::Q8_0),
    ("q4_0", StoredType::Q4_0),
    ("q5_0", StoredType::Q5_0),
    ("q5_1", StoredType::Q5_1),
    ("iq4_nl", StoredType::IQ4NL),
    ("f16", StoredType::F16),
    ("bf16", StoredType::BF16),
    ("f32", StoredType::F32),
    ("q4_k", StoredType::Q4K),
    ("q5_k", StoredType::Q5K),
    ("q6_k", StoredType::Q6K),
];

/// Random codes, and scales and elements of ordinary size: numbers near zero would be slow by themselves.
fn matrix(dtype: StoredType, rows: usize, cols: usize) -> HostMatrix {
    let len = rows * dtype.row_bytes(cols).unwrap_or(0);
    let mut state = 88_172_645_463_325_252u64;
    let mut data = Vec::with_capacity(len + 8);
    // Keeps sign and fraction, and sets an exponent of about 2^-5.
    let (keep, set) = match dtype {
        StoredType::F32 => (0x807f_ffff_807f_ffff, 0x3d00_0000_3d00_0000),
        StoredType::BF16 => (0x807f_807f_807f_807f, 0x3d00_3d00_3d00_3d00),
        _ => (0x83ff_83ff_83ff_83ff, 0x2800_2800_2800_2800),
    };
    while data.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend((state & keep | set).to_le_bytes());
    }
    data.truncate(len);
    HostMatrix { dtype, rows, cols, data }
}

struct Layer {
    qkv: CpuMatrix,
    o: CpuMatrix,
    gate_up: CpuMatrix,
    down: CpuMatrix,
}

struct Model {
    layers: Vec<Layer>,
    head: CpuMatrix,
    hidden: usize,
    inner: usize,
}

impl Model {
    fn new(dtype: StoredType, head: StoredType, activations: Activations) -> Result<Self, KernelError> {
        // Formats with blocks of 256 do not divide 576: their model is a little smaller.
        let hidden = HIDDEN / dtype.block_len() * dtype.block_len();
        let pack = |rows, cols| CpuMatrix::pack(vec![matrix(dtype, rows, cols)], activations);
        let layers = (0..LAYERS)
            .map(|_| {
                let (gate, up) = (matrix(dtype, INNER, hidden), matrix(dtype, INNER, hidden));
                Ok(Layer {
                    qkv: pack(QKV, hidden)?,
                    o: pack(hidden, hidden)?,
                    gate_up: CpuMatrix::pack_gate_up(gate, up, activations)?,
                    down: pack(hidden, INNER)?,
                })
            })
            .collect::<Result<_, KernelError>>()?;
        let head = CpuMatrix::pack(vec![matrix(head, VOCABULARY, hidden)], activations)?;
        Ok(Self { layers, head, hidden, inner: INNER })
    }

    fn layers_bytes(&self) -> u64 {
        self.layers.iter().map(|l| l.qkv.bytes() + l.o.bytes() + l.gate_up.bytes() + l.down.bytes()).sum()
    }

    /// All products of one step: layers over `rows`, the head over `head_rows`.
    fn step(
        &self,
        pool: &Pool,
        scratch: &mut Scratch,
        buffers: &mut Buffers,
        rows: usize,
        head_rows: usize,
    ) -> Result<(), KernelError> {
        let (x, inner) = (&buffers.x, &mut buffers.inner[..rows * self.inner]);
        for layer in &self.layers {
            let hidden = &x[..rows * self.hidden];
            linear(pool, scratch, hidden, &layer.qkv, None, &mut buffers.out[..rows * QKV])?;
            linear(pool, scratch, hidden, &layer.o, None, &mut buffers.out[..rows * self.hidden])?;
            gate_up(pool, scratch, hidden, &layer.gate_up, GateActivation::Silu, inner)?;
            linear(pool, scratch, inner, &layer.down, None, &mut buffers.out[..rows * self.hidden])?;
        }
        let hidden = &x[..head_rows * self.hidden];
        linear(pool, scratch, hidden, &self.head, None, &mut buffers.logits[..head_rows * VOCABULARY])
    }
}

struct Buffers {
    x: Vec<f32>,
    inner: Vec<f32>,
    out: Vec<f32>,
    logits: Vec<f32>,
}

/// What one run cost.
#[derive(Debug, Clone, Copy)]
struct Cost {
    wall: Duration,
    /// Of all threads: the fairer number where others use the machine.
    cpu: Duration,
}

fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one `timespec`.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// Median wall time, and the smallest of each.
fn costs(rounds: usize, mut run: impl FnMut() -> Result<(), KernelError>) -> Result<(Duration, Cost), KernelError> {
    run()?;
    let mut costs = Vec::new();
    for _ in 0..rounds {
        let (wall, cpu) = (Instant::now(), cpu_time());
        run()?;
        costs.push(Cost { wall: wall.elapsed(), cpu: cpu_time() - cpu });
    }
    costs.sort_by_key(|cost| cost.wall);
    let cpu = costs.iter().map(|cost| cost.cpu).min().unwrap_or_default();
    Ok((costs[rounds / 2].wall, Cost { wall: costs[0].wall, cpu }))
}

fn bench(pool: &Pool, isa: Isa, name: &str, model: &Model, activations: Activations) -> Result<(), KernelError> {
    const ROWS_MAX: usize = 512;
    let mut scratch = Scratch::with_isa(ROWS_MAX, INNER, activations, isa)?;
    let mut buffers = Buffers {
        x: (0..ROWS_MAX * HIDDEN).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect(),
        inner: vec![0.5; ROWS_MAX * INNER],
        out: vec![0.0; ROWS_MAX * QKV],
        logits: vec![0.0; 16 * VOCABULARY],
    };
    let layers_mb = model.layers_bytes() as f64 / 1e6;
    let head_mb = model.head.bytes() as f64 / 1e6;
    println!(
        "{name} {activations:?} {isa:?} {} threads: layers {layers_mb:.1} MB, head {head_mb:.1} MB",
        pool.num_threads()
    );
    let batches =
        std::env::args().skip(1).filter_map(|arg| arg.strip_prefix('m')?.parse().ok()).collect::<Vec<usize>>();
    for (rows, head_rows, rounds) in
        [(1, 1, 60), (1, 0, 60), (4, 4, 20), (8, 8, 20), (16, 16, 20), (64, 0, 10), (512, 0, 5)]
    {
        if !batches.is_empty() && !batches.contains(&rows) {
            continue;
        }
        let (median, min) = costs(rounds, || model.step(pool, &mut scratch, &mut buffers, rows, head_rows))?;
        let per_s = |time: Duration| rows as f64 / time.as_secs_f64();
        let bytes = layers_mb + if head_rows > 0 { head_mb } else { 0.0 };
        println!(
            "  M {rows:3} head {head_rows:2}: median {:8.3} ms, min {:8.3} ms, cpu {:8.3} ms; {:7.1} / {:7.1} rows/s; {:5.1} GB/s",
            median.as_secs_f64() * 1e3,
            min.wall.as_secs_f64() * 1e3,
            min.cpu.as_secs_f64() * 1e3,
            per_s(median),
            per_s(min.wall),
            bytes / 1e3 / min.wall.as_secs_f64(),
        );
    }
    Ok(())
}

fn main() -> Result<(), KernelError> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let num_threads = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(2);
    let all_tiers = args.iter().any(|arg| arg == "tiers");
    let float = args.iter().any(|arg| arg == "float");
    let mut names: Vec<&str> =
        args.iter().map(String::as_str).filter(|arg| FORMATS.iter().any(|f| f.0 == *arg)).collect();
    if names.is_empty() {
        names = vec!["q4_1", "q8_0", "bf16", "f32"];
    }
    let activations = if float { Activations::Float32 } else { Activations::Int8 };
    let pool = Pool::new(num_threads, Waiting::SpinThenSleep)?;
    for (name, dtype) in FORMATS.iter().filter(|format| names.contains(&format.0)) {
        let head = if *dtype == StoredType::Q4_1 { StoredType::Q8_0 } else { *dtype };
        let model = Model::new(*dtype, head, activations)?;
        let tiers = if all_tiers { Isa::available() } else { vec![Isa::detect()] };
        for isa in tiers {
            bench(&pool, isa, name, &model, activations)?;
        }
    }
    Ok(())
}
