//! One of the processes that measure.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use phalanx_kernels::Collective;
use phalanx_kernels::cuda::{self, ModuleSettings, ReduceBench, ReduceWay};
use phalanx_proto::DeviceKind;

use super::{BenchError, BenchLaunch, BenchLine, Timing, Ways};
use crate::collective::{Place, prepare_between, prepare_here};

/// Longest wait for the other processes to begin.
const CONNECT_DEADLINE: Duration = Duration::from_secs(60);
/// Longest wait of one call: others may compile device code meanwhile.
const CALL_DEADLINE: Duration = Duration::from_secs(180);
/// Bytes that an address is sent in.
const ADDRESS_BYTES: usize = 64;
/// Sums that are timed on CPUs: bytes that they move at most, and how many.
const CPU_BYTES: usize = 256 << 20;
const CPU_SUMS: (usize, usize) = (5, 500);
/// Values of the pattern whose sum is looked at.
const PATTERN: usize = 29;

/// Measures, and says what was found on standard output.
///
/// # Errors
/// Standard output is gone; everything else is said there.
pub fn run(launch: &BenchLaunch) -> io::Result<()> {
    let mut said = say;
    match measure(launch, &mut said) {
        Ok(()) => say(&BenchLine::Done),
        Err(error) => say(&BenchLine::Failed(error.to_string())),
    }
}

fn say(line: &BenchLine) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{}", serde_json::to_string(line)?)?;
    stdout.flush()
}

type Say<'a> = &'a mut dyn FnMut(&BenchLine) -> io::Result<()>;

fn measure(launch: &BenchLaunch, say: Say<'_>) -> Result<(), BenchError> {
    let place = Place { rank: launch.rank, world_size: launch.world_size };
    let pending = prepare_here(&launch.group_key, place)?.with_call_deadline(CALL_DEADLINE);
    let group = pending.connect(&[], CONNECT_DEADLINE)?;
    match launch.device {
        DeviceKind::Cpu => on_cpus(launch, place, group, say),
        DeviceKind::Cuda => on_cuda(launch, group, say),
        DeviceKind::Rocm => Err(BenchError::Device(launch.device)),
    }
}

fn on_cuda(launch: &BenchLaunch, group: Box<dyn Collective>, say: Say<'_>) -> Result<(), BenchError> {
    if let Some(home) = &launch.cuda_home {
        cuda::search_also(cuda::toolkit_folders(home));
    }
    let modules = ModuleSettings::new(launch.kernel_cache_dir.clone(), launch.cuda_home.as_deref());
    let bytes_max = launch.sizes.iter().copied().max().unwrap_or_default();
    let mut bench = ReduceBench::open(&modules, group, bytes_max)?;
    if !bench.has_peers() {
        say(&BenchLine::Note("the devices do not reach each other's memory: no own kernels, NCCL serves".into()))?;
    }
    if let Some(reason) = bench.nccl_missing() {
        say(&BenchLine::Note(format!("NCCL takes no part: {reason}")))?;
    }
    let served = |way: &ReduceWay| matches!(way, ReduceWay::Planned | ReduceWay::Nccl);
    for way in ReduceWay::ALL.into_iter().filter(|way| launch.ways == Ways::All || served(way)) {
        for bytes in launch.sizes.iter().copied() {
            if !bench.can(way, bytes) {
                continue;
            }
            let found = bench.measure(way, bytes)?;
            let (us, right) = (found.seconds * 1e6, found.is_right);
            say(&BenchLine::Timing(Timing { way: way.name().into(), blocks: way.blocks(), bytes, us, right }))?;
        }
    }
    Ok(())
}

fn on_cpus(launch: &BenchLaunch, place: Place, mut group: Box<dyn Collective>, say: Say<'_>) -> Result<(), BenchError> {
    let listening = prepare_between(&launch.group_key, place, "127.0.0.1", (0, 0))?;
    let mut own = listening.address().into_bytes();
    own.resize(ADDRESS_BYTES, 0);
    let mut all = vec![0; ADDRESS_BYTES * place.world_size];
    group.all_gather(&own, &mut all)?;
    let text = |part: &[u8]| String::from_utf8_lossy(part).trim_end_matches('\0').to_owned();
    let addresses: Vec<String> = all.chunks(ADDRESS_BYTES).map(text).collect();
    let tcp = listening.with_call_deadline(CALL_DEADLINE).connect(&addresses, CONNECT_DEADLINE)?;
    for (way, mut group) in [("shm", group), ("tcp", tcp)] {
        for bytes in launch.sizes.iter().copied() {
            let (us, right) = sums(group.as_mut(), bytes)?;
            say(&BenchLine::Timing(Timing { way: way.into(), blocks: 0, bytes, us, right }))?;
        }
    }
    Ok(())
}

/// Microseconds of one sum on the slowest rank, and whether a pattern was summed right on all.
fn sums(group: &mut dyn Collective, bytes: usize) -> Result<(f64, bool), BenchError> {
    let (rank, world_size) = (group.rank(), group.world_size());
    let value = |index: usize, rank: usize| ((index * 7 + rank * 3) % PATTERN) as f32;
    let mut data: Vec<f32> = (0..bytes / 4).map(|index| value(index, rank)).collect();
    group.all_reduce_sum(&mut data)?;
    let sum = |index| (0..world_size).map(|rank| value(index, rank)).sum::<f32>();
    let right = data.iter().enumerate().all(|(index, found)| *found == sum(index));
    data.fill(0.0);
    let num = (CPU_BYTES / bytes.max(1)).clamp(CPU_SUMS.0, CPU_SUMS.1);
    group.all_reduce_sum(&mut data)?;
    let started = Instant::now();
    for _ in 0..num {
        group.all_reduce_sum(&mut data)?;
    }
    let mine = started.elapsed().as_secs_f64() * 1e6 / num as f64;
    let mut all = vec![0; 9 * world_size];
    group.all_gather(&[&mine.to_le_bytes()[..], &[u8::from(right)]].concat(), &mut all)?;
    let figures = all.chunks(9).filter_map(|part| part.split_first_chunk());
    Ok(figures
        .fold((0.0, true), |(us, right), (figure, flag)| (f64::from_le_bytes(*figure).max(us), right && flag == [1])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_measured_by_both_transports() {
        let key = uuid::Uuid::new_v4().into_bytes().to_vec();
        let launch = |rank| BenchLaunch {
            parent_pid: 0,
            group_key: key.clone(),
            rank,
            world_size: 2,
            device: DeviceKind::Cpu,
            ways: Ways::Served,
            sizes: vec![8192, 65536],
            kernel_cache_dir: "unused".into(),
            cuda_home: None,
        };
        let run = |rank| {
            let mut lines = Vec::new();
            measure(&launch(rank), &mut |line: &BenchLine| Ok(lines.push(line.clone()))).map(|()| lines)
        };
        let (first, second) = std::thread::scope(|scope| {
            let other = scope.spawn(|| run(1));
            (run(0).unwrap(), other.join().unwrap().unwrap())
        });
        let told: Vec<(String, usize)> = first
            .iter()
            .map(|line| match line {
                BenchLine::Timing(timing) if timing.right && timing.us > 0.0 => (timing.way.clone(), timing.bytes),
                other => panic!("{other:?}"),
            })
            .collect();
        let expected = [("shm", 8192), ("shm", 65536), ("tcp", 8192), ("tcp", 65536)];
        assert_eq!(told, expected.map(|(way, bytes)| (way.to_owned(), bytes)));
        assert_eq!(first, second, "the slowest rank's figures are everybody's");
    }
}
