//! Two devices, two processes: sums over ranks, the fused block op, gathers of the sampler, by kernels of our own and by NCCL; and
//! what becomes of a rank that waits for one that never comes.
//!
//! The test starts itself once more as rank 1; the ranks set their group up over a socket. All of it runs only where two
//! devices are visible, and says so where it does not.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use phalanx_kernels::cuda::{CudaOps, CudaSettings, Dtype, devices};
use phalanx_kernels::reference::ReferenceOps;
use phalanx_kernels::{Collective, CollectiveError, KernelError, Ops, Partial, SamplerKind, VocabSlice};

use crate::bench::{Bench, Findings, Random, SOME_HEADS, open, settings, tolerance, turn};
use crate::edits::{self, Edited};
use crate::sampling::{Case, compare_scores, program, scores};
use crate::steps::RunCase;

/// Names the socket to the process that plays rank 1.
const SOCKET: &str = "PHALANX_TEST_SOCKET";
/// Longest wait of one rank for the other.
const PATIENCE: Duration = Duration::from_secs(120);
const WIDTH: usize = 576;
/// The limit of a kernel that waits, and what may pass until it is known.
const LIMIT: Duration = Duration::from_secs(10);
const SLACK: Duration = Duration::from_secs(2);

/// The host's collectives of two ranks.
struct Pair {
    rank: usize,
    peer: UnixStream,
}

impl Collective for Pair {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        2
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        let part: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut all = vec![0; 2 * part.len()];
        self.all_gather(&part, &mut all)?;
        let (first, second) = all.split_at(part.len());
        let value = |bytes: &[u8], index: usize| f32::from_le_bytes(*bytes[index * 4..].first_chunk().unwrap());
        data.iter_mut().enumerate().for_each(|(index, sum)| *sum = value(first, index) + value(second, index));
        Ok(())
    }

    fn all_gather(&mut self, part: &[u8], out: &mut [u8]) -> Result<(), CollectiveError> {
        let (first, second) = out.split_at_mut(part.len());
        let (own, other) = if self.rank == 0 { (first, second) } else { (second, first) };
        own.copy_from_slice(part);
        // Both send and receive at once: no buffer of the socket need hold a whole part.
        let (mut to, mut from) = (&self.peer, &self.peer);
        let exchanged = std::thread::scope(|scope| {
            let sent = scope.spawn(move || to.write_all(part));
            let received = from.read_exact(other);
            received.and(sent.join().unwrap())
        });
        let gone =
            |e: std::io::Error| CollectiveError::PeerGone { op: "gather", peer: 1 - self.rank, reason: e.to_string() };
        exchanged.map_err(gone)
    }
}

impl Pair {
    fn again(&self) -> Box<Self> {
        Box::new(Self { rank: self.rank, peer: self.peer.try_clone().unwrap() })
    }

    /// Waits until the other rank is here.
    fn meet(&mut self) {
        self.all_gather(&[0], &mut [0; 2]).unwrap();
    }

    /// Whether both ranks hold the same bits.
    fn agree(&mut self, values: &[f32]) -> bool {
        let own: Vec<u8> = values.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect();
        let mut all = vec![0; 2 * own.len()];
        self.all_gather(&own, &mut all).unwrap();
        all[..own.len()] == all[own.len()..]
    }
}

/// The other process; it does not outlive the test.
struct Other(Child);

impl Drop for Other {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.0.kill();
        }
        let ended = self.0.wait();
        assert!(std::thread::panicking() || ended.unwrap().success(), "rank 1 failed: its words are above");
    }
}

/// By kernels of our own.
pub fn check(dtype: Dtype) {
    on_both_ranks("two_ranks", dtype, |pair| compare(pair, dtype, false));
}

/// By NCCL, which steps record as well.
pub fn check_nccl(dtype: Dtype) {
    on_both_ranks("two_ranks_nccl", dtype, |pair| {
        compare(pair, dtype, true);
        let mut run = |enforce_eager| {
            let settings = CudaSettings { enforce_eager, ..of_rank(pair, dtype, true) };
            let mut bench = Bench::new(open(&settings, pair.again()), SOME_HEADS);
            let cases = crate::steps::through_runs(&mut bench, dtype);
            // Whoever leaves first would break off what the other is still at.
            pair.meet();
            cases
        };
        let (recorded, eager) = (run(false), run(true));
        let same = |(recorded, eager): (&RunCase, &RunCase)| recorded.outputs == eager.outputs;
        assert!(
            recorded.iter().zip(&eager).all(same),
            "rank {}: recorded steps give other values than eager ones",
            pair.rank
        );
    });
}

/// A rank whose peer never comes: the limit of a kernel ends its wait and names all; a group that ends before ends it at once.
pub fn check_late(dtype: Dtype) {
    let terms = vec![1.0; 16 * WIDTH];
    on_both_ranks("two_ranks_late", dtype, |pair| {
        for only_nccl in [false, true] {
            let settings = of_rank(pair, dtype, only_nccl);
            let start = |pair: &Pair| {
                let mut bench = Bench::new(open(&settings, pair.again()), SOME_HEADS);
                // Once together: NCCL connects with the first sum.
                assert!(sum(&mut bench, &terms).unwrap().iter().all(|x| *x == 2.0));
                bench
            };
            let mut bench = start(pair);
            if pair.rank == 0 && !only_nccl {
                check_limit(&mut bench, &terms);
            }
            pair.meet();
            drop(bench);
            let bench = start(pair);
            if pair.rank == 0 {
                check_end(bench, &terms);
                pair.meet();
            } else {
                pair.meet();
            }
        }
    });
}

/// The other rank takes no part: an error names who waited, where and for whom.
fn check_limit(bench: &mut Bench<CudaOps>, terms: &[f32]) {
    let began = Instant::now();
    let error = sum(bench, terms).unwrap_err();
    println!("after {:.1?}: {error}", began.elapsed());
    let KernelError::Collective(CollectiveError::DeviceWait { rank: 0, peer: 1, limit_ms: Some(_), .. }) = error else {
        panic!("another error: {error}");
    };
    assert!((LIMIT..LIMIT + SLACK).contains(&began.elapsed()), "{:?}", began.elapsed());
}

/// The same, and the backend ends meanwhile.
fn check_end(mut bench: Bench<CudaOps>, terms: &[f32]) {
    let launched = launch_sum(&mut bench, terms).unwrap();
    let began = Instant::now();
    // The backend goes first: freeing memory waits for the device.
    drop(bench);
    println!("a backend whose device waits ends in {:.1?}", began.elapsed());
    assert!(began.elapsed() < SLACK, "{:?}", began.elapsed());
    drop(launched);
}

type Buffer = <CudaOps as Ops>::Buffer;

/// Puts the sum of all ranks' terms into an empty residual stream.
fn launch_sum(bench: &mut Bench<CudaOps>, terms: &[f32]) -> Result<(Partial<Buffer>, Buffer), KernelError> {
    let rows = terms.len() / WIDTH;
    let mut partial = bench.terms(terms, WIDTH);
    let mut stream = bench.ops.wide_buffer(rows, WIDTH)?;
    bench.load_rows(rows);
    let Bench { ops, inputs, .. } = bench;
    ops.reduce(inputs, &mut partial, &mut stream)?;
    Ok((partial, stream))
}

fn sum(bench: &mut Bench<CudaOps>, terms: &[f32]) -> Result<Vec<f32>, KernelError> {
    let (_partial, stream) = launch_sum(bench, terms)?;
    bench.ops.read(&stream, terms.len() / WIDTH).map(<[f32]>::to_vec)
}

/// Runs something as two ranks, this process and another one.
fn on_both_ranks(test: &str, dtype: Dtype, run: impl Fn(&mut Pair)) {
    let _turn = turn();
    #[expect(clippy::disallowed_methods, reason = "how the test tells itself to be rank 1")]
    let socket = std::env::var_os(SOCKET).map(PathBuf::from);
    if let Some(socket) = socket {
        return run(&mut Pair { rank: 1, peer: patient(UnixStream::connect(socket).unwrap()) });
    }
    let found = devices().unwrap_or_else(|e| panic!("these tests need an NVIDIA device: {e}")).len();
    if found < 2 {
        println!("NOT RUN: two ranks need two devices, and {found} is visible");
        return;
    }
    let socket = std::env::temp_dir().join(format!("phalanx-{test}-{}-{dtype:?}", std::process::id()));
    let listener = UnixListener::bind(&socket).unwrap();
    let name = format!("{test}::{}", format!("{dtype:?}").to_lowercase());
    let mut command = Command::new(std::env::current_exe().unwrap());
    let other = Other(command.args(["--exact", &name, "--nocapture"]).env(SOCKET, &socket).spawn().unwrap());
    let peer = accept(&listener);
    std::fs::remove_file(&socket).unwrap();
    run(&mut Pair { rank: 0, peer: patient(peer) });
    drop(other);
}

fn accept(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    for _ in 0..PATIENCE.as_millis() / 10 {
        if let Ok((peer, _)) = listener.accept() {
            return peer;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("rank 1 did not come within {PATIENCE:?}");
}

fn patient(stream: UnixStream) -> UnixStream {
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn of_rank(pair: &Pair, dtype: Dtype, only_nccl: bool) -> CudaSettings {
    CudaSettings { ordinal: pair.rank as u32, hidden_size: WIDTH, only_nccl, ..settings(dtype, SOME_HEADS) }
}

fn compare(pair: &mut Pair, dtype: Dtype, only_nccl: bool) {
    let mut device = Bench::new(open(&of_rank(pair, dtype, only_nccl), pair.again()), SOME_HEADS);
    let mut reference = Bench::new(ReferenceOps::new(pair.again()), SOME_HEADS);
    let mut findings = Findings::default();
    check_sums(pair, &mut device, &mut reference, dtype, &mut findings);
    check_sampling(pair, &mut device, &mut reference, dtype, &mut findings);
    check_edits(pair, &mut device, &mut reference, dtype, &mut findings);
    findings.finish(&format!("rank {}", pair.rank));
}

/// `reduce` into the residual stream, then `reduce_add_norm`: rows of every algorithm.
fn sums<O: Ops>(bench: &mut Bench<O>, terms: &[f32], again: &[f32], weight: &[f32]) -> Vec<f32> {
    let (rows, width) = (terms.len() / weight.len(), weight.len());
    let (mut partial, mut second) = (bench.terms(terms, width), bench.terms(again, width));
    let mut stream = bench.ops.wide_buffer(rows, width).unwrap();
    let mut normed = bench.ops.buffer(rows, width).unwrap();
    let weight = bench.ops.vector(weight).unwrap();
    bench.load_rows(rows);
    let Bench { ops, inputs, .. } = bench;
    ops.reduce(inputs, &mut partial, &mut stream).unwrap();
    let mut values = bench.read(&stream, rows);
    let Bench { ops, inputs, .. } = bench;
    ops.reduce_add_norm(inputs, &mut second, &mut stream, &weight, 1e-5, &mut normed).unwrap();
    values.extend(bench.read(&stream, rows));
    values.extend(bench.read(&normed, rows));
    values
}

fn check_sums(
    pair: &mut Pair,
    device: &mut Bench<CudaOps>,
    reference: &mut Bench<ReferenceOps>,
    dtype: Dtype,
    findings: &mut Findings,
) {
    for rows in [1, 2, 3, 7, 16, 33, 64, 100, 257, 512, 513, 600, 1] {
        let mut random = Random::new((rows * 2 + pair.rank) as u64, dtype);
        let (terms, again) = (random.floats(rows * WIDTH, 1.0), random.floats(rows * WIDTH, 1.0));
        let weight = Random::new(9, dtype).floats(WIDTH, 1.0);
        let got = sums(device, &terms, &again, &weight);
        let expected = sums(reference, &terms, &again, &weight);
        findings.close(&format!("{rows} rows"), &got, &expected, tolerance(dtype));
        findings.holds(pair.agree(&got), || format!("{rows} rows: the ranks differ"));
    }
}

/// A vocabulary in two parts: what the sampler gathers, in every kind, and scores of an odd and an even number of rows.
fn check_sampling(
    pair: &mut Pair,
    device: &mut Bench<CudaOps>,
    reference: &mut Bench<ReferenceOps>,
    dtype: Dtype,
    findings: &mut Findings,
) {
    for (index, vocab) in [1003, 20_011].into_iter().enumerate() {
        for kind in [SamplerKind::Greedy, SamplerKind::NoCut, SamplerKind::Cut] {
            for rows in [1, 2, 7, 40] {
                // What is drawn must be the same on both ranks, and the logits must not.
                let mut shared = Random::new((index * 100 + rows) as u64, dtype);
                let mut own = Random::new((index * 100 + rows * 2 + pair.rank) as u64 + 7000, dtype);
                let mut case = Case::new(&mut own, rows, vocab, kind);
                let first_id = 5 + (pair.rank * (vocab - 2)) as u32;
                case.slice = VocabSlice { columns: 1..vocab - 1, first_id };
                case.scores = scores(&mut shared, rows, rows, 2 * (vocab - 2));
                (0..4).for_each(|step| case.draw(&mut shared, step));
                let got = program(device, &case, dtype);
                let expected = program(reference, &case, dtype);
                let label = format!("{kind:?} {rows} rows of 2 x {vocab}");
                compare_scores(&label, &got, &expected, findings);
                let tokens: Vec<f32> =
                    got.iter().flat_map(|step| &step.tokens).map(|t| t.map_or(-1.0, |t| t as f32)).collect();
                findings.holds(pair.agree(&tokens), || format!("{label}: the ranks sampled other tokens"));
            }
        }
    }
}

/// Masks and edits of a vocabulary in two parts. Rows that may draw nothing on one rank draw on the other.
fn check_edits(
    pair: &mut Pair,
    device: &mut Bench<CudaOps>,
    reference: &mut Bench<ReferenceOps>,
    dtype: Dtype,
    findings: &mut Findings,
) {
    for (index, vocab) in [35, 20_011].into_iter().enumerate() {
        for rows in [1, 7, 40] {
            let mut shared = Random::new((index * 100 + rows) as u64, dtype);
            let mut own = Random::new((index * 100 + rows * 2 + pair.rank) as u64 + 9000, dtype);
            let mut case = Case::new(&mut own, rows, vocab, SamplerKind::Greedy);
            case.slice = VocabSlice { columns: 1..vocab - 1, first_id: 5 + (pair.rank * (vocab - 2)) as u32 };
            case.scores = scores(&mut shared, rows, rows, 2 * (vocab - 2));
            let edited = Edited::new(case, &mut shared, 5 + 2 * (vocab - 2));
            let got = edits::program(device, &edited, dtype, false);
            let expected = edits::program(reference, &edited, dtype, false);
            let label = format!("edits, {rows} rows of 2 x {vocab}");
            compare_scores(&label, &got, &expected, findings);
            let tokens: Vec<f32> =
                got.iter().flat_map(|step| &step.tokens).map(|t| t.map_or(-1.0, |t| t as f32)).collect();
            findings.holds(pair.agree(&tokens), || format!("{label}: the ranks sampled other tokens"));
        }
    }
}
