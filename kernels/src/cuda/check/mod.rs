//! Does this layer work on this machine: one line for each thing that a rank will rely on.
//!
//! Owns the list of checks; each is independent, none stops the others. Needs no more than some hundred MiB of a device.

mod matmul;

use std::fs;
use std::time::{Duration, Instant};

use super::{
    Context, CudaError, DeviceMemory, Event, IpcHandle, Kernel, LaunchConfig, ModuleSet, ModuleSettings, Origin,
    PinnedMemory, PinnedRing, Priority, Rows, Scalar, Stream, build_line, devices, driver_version, libraries,
};
use crate::kernel_args;

/// Longest wait of one check.
const DEADLINE: Duration = Duration::from_secs(20);
/// Memory that is filled and looked at.
const POISON_BYTES: usize = 256 << 20;
/// Memory that is copied.
const COPY_BYTES: usize = 64 << 20;
const SEED: u32 = 0x5EED_0001;

/// One line of a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckLine {
    /// What was looked at.
    pub name: &'static str,
    /// What was found, or what is wrong.
    pub outcome: Result<String, String>,
}

type Found = Result<String, CudaError>;

/// Says what is found on this machine and runs every check on one device; each line is given out when it is known.
pub fn self_check(ordinal: u32, settings: &ModuleSettings, mut report: impl FnMut(CheckLine)) {
    for library in libraries() {
        let outcome = library.found.map(|found| format!("{} at {}", found.version, found.path.display()));
        report(CheckLine { name: library.name, outcome });
    }
    let mut report = |name, found: Found| {
        report(CheckLine { name, outcome: found.map_err(|error| error.to_string()) });
    };
    report("build", Ok(build_line().into()));
    report("driver", driver_version());
    match Bench::open(ordinal, settings) {
        Ok(bench) => bench.run(settings, &mut report),
        Err(error) => report("device", Err(error)),
    }
}

/// A device under test.
struct Bench {
    stream: Stream,
    modules: ModuleSet,
    context: Context,
}

impl Bench {
    fn open(ordinal: u32, settings: &ModuleSettings) -> Result<Self, CudaError> {
        let context = Context::open(ordinal)?;
        let modules = ModuleSet::new(&context, settings.clone());
        Ok(Self { stream: Stream::new(&context, Priority::Normal)?, modules, context })
    }

    fn run(&self, settings: &ModuleSettings, report: &mut impl FnMut(&'static str, Found)) {
        report("device", self.describe());
        report("modules", self.modules());
        report("modules compiled here", self.compiled_modules(settings));
        report("poison", self.poison());
        report("refused launches", self.refused_launches());
        report("copies", self.copies());
        report("pinned copies", self.pinned_copies());
        report("graph", self.graph());
        report("failed capture", self.failed_capture());
        report("deadline", self.deadline());
        report("matmul bf16", self.matmul(Scalar::Bf16, Scalar::Bf16, true));
        report("matmul bf16 to f32", self.matmul(Scalar::Bf16, Scalar::F32, false));
        report("matmul f16", self.matmul(Scalar::F16, Scalar::F16, true));
        report("matmul f32", self.matmul(Scalar::F32, Scalar::F32, true));
        report("matmul tuned", self.matmul_tuned());
        report("out of memory", self.out_of_memory());
        report("ipc handle", self.ipc());
        report("peers", self.peers());
    }

    fn describe(&self) -> Found {
        let (device, memory) = (self.context.device(), self.context.memory()?);
        Ok(format!("{device:?}, {} of {} bytes free", memory.free, memory.total))
    }

    fn modules(&self) -> Found {
        let mut said = Vec::new();
        for name in ModuleSet::names() {
            let started = Instant::now();
            let origin = self.modules.load(name)?.origin();
            said.push(format!("{name} {origin:?} {:.1} ms", started.elapsed().as_secs_f64() * 1e3));
        }
        Ok(said.join(", "))
    }

    /// Compiles every source here, as a machine without images does, and takes it from the cache the second time.
    fn compiled_modules(&self, settings: &ModuleSettings) -> Found {
        let Some(folder) = settings.cache_dir.as_ref().map(|dir| dir.join(format!("check-{}", std::process::id())))
        else {
            return Ok("not looked at: no folder for a cache".into());
        };
        let here = ModuleSettings { cache_dir: Some(folder.clone()), ignore_images: true, ..settings.clone() };
        let said = [Origin::Compiled, Origin::Cached].map(|expected| self.compiled_round(here.clone(), expected));
        // Nothing else is in it, and a folder that stays does no harm.
        let _ = fs::remove_dir_all(folder);
        let [compiled, cached] = said;
        Ok(format!("{}; again {}", compiled?, cached?))
    }

    fn compiled_round(&self, settings: ModuleSettings, expected: Origin) -> Found {
        let modules = ModuleSet::new(&self.context, settings);
        let mut said = Vec::new();
        for name in ModuleSet::names() {
            let started = Instant::now();
            let module = modules.load(name)?;
            require(module.origin() == expected, || format!("{name} is {:?}", module.origin()))?;
            said.push(format!("{name} {:.1} ms", started.elapsed().as_secs_f64() * 1e3));
        }
        // The kernel that was compiled here does what the other one does.
        let memory = DeviceMemory::alloc(&self.context, 1 << 20)?;
        self.fill(&modules.kernel("poison", "poison_fill")?, &memory, SEED)?;
        require(self.num_wrong(&memory, SEED)? == 0, || "it fills in another way".into())?;
        Ok(said.join(", "))
    }

    fn fill(&self, kernel: &Kernel, memory: &DeviceMemory, seed: u32) -> Result<(), CudaError> {
        let words = memory.len() as u64 / 4;
        let config = LaunchConfig::linear(512, 256).dependent();
        // SAFETY: the kernel writes `words` words of `memory`, which lives until the stream was waited for.
        unsafe { self.stream.launch(kernel, &config, kernel_args![memory, words, seed]) }
    }

    fn count(&self, memory: &DeviceMemory, seed: u32, wrong: &DeviceMemory) -> Result<(), CudaError> {
        let kernel = self.modules.kernel("poison", "poison_count")?;
        let words = memory.len() as u64 / 4;
        let config = LaunchConfig::linear(512, 256).dependent();
        // SAFETY: the kernel reads `words` words of `memory` and adds to the one of `wrong`; both live as above.
        unsafe { self.stream.launch(&kernel, &config, kernel_args![memory, words, seed, wrong]) }
    }

    /// Words that differ from the pattern.
    fn num_wrong(&self, memory: &DeviceMemory, seed: u32) -> Result<u32, CudaError> {
        let wrong = DeviceMemory::alloc(&self.context, 4)?;
        self.stream.fill(wrong.span(), 0)?;
        self.count(memory, seed, &wrong)?;
        self.word(&wrong)
    }

    fn word(&self, memory: &DeviceMemory) -> Result<u32, CudaError> {
        let mut bytes = [0; 4];
        self.stream.download(memory.span(), &mut bytes, DEADLINE)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn poison(&self) -> Found {
        let memory = DeviceMemory::alloc(&self.context, POISON_BYTES)?;
        let kernel = self.modules.kernel("poison", "poison_fill")?;
        let (from, to) = (Event::timing(&self.context)?, Event::timing(&self.context)?);
        self.fill(&kernel, &memory, 1)?;
        from.record(&self.stream)?;
        self.fill(&kernel, &memory, SEED)?;
        to.record(&self.stream)?;
        to.wait(DEADLINE, "a fill")?;
        let (right, wrong) = (self.num_wrong(&memory, SEED)?, self.num_wrong(&memory, SEED ^ 1)?);
        require(right == 0, || format!("{right} words are wrong"))?;
        require(wrong as usize == POISON_BYTES / 4, || format!("only {wrong} words differ from another pattern"))?;
        self.stream.fill_words(memory.part(4096..4100)?, !SEED)?;
        let found = self.num_wrong(&memory, SEED)?;
        require(found == 1, || format!("{found} words are wrong where one is"))?;
        let blocks = kernel.blocks_per_multiprocessor(256, 0)?;
        Ok(format!(
            "{}, {:?}, {blocks} blocks of 256 resident",
            rate(POISON_BYTES, to.since(&from)?),
            kernel.attributes()?
        ))
    }

    fn refused_launches(&self) -> Found {
        let kernel = self.modules.kernel("poison", "poison_fill")?;
        if kernel.parameters().is_none() {
            return Ok("not looked at: this driver does not tell what a kernel takes".into());
        }
        let memory = DeviceMemory::alloc(&self.context, 1024)?;
        let plain = LaunchConfig::linear(1, 32);
        let mut said = Vec::new();
        // SAFETY: none of these runs: each is refused, or else writes no word.
        let tries = unsafe {
            [
                self.stream.launch(&kernel, &plain, kernel_args![&memory, 0_u64]),
                self.stream.launch(&kernel, &plain, kernel_args![&memory, 0_u32, 0_u32]),
                self.stream.launch(&kernel, &LaunchConfig::linear(0, 32), kernel_args![&memory, 0_u64, 0_u32]),
                self.stream.launch(&kernel, &LaunchConfig::linear(1, 4096), kernel_args![&memory, 0_u64, 0_u32]),
            ]
        };
        for refused in tries {
            let words = refused.err().map(|error| error.to_string()).unwrap_or_default();
            require(words.contains("poison_fill"), || format!("a launch that cannot be was taken: {words:?}"))?;
            said.push(words);
        }
        let missing = self.modules.kernel("poison", "absent").err().map(|error| error.to_string()).unwrap_or_default();
        require(missing.contains("absent"), || "a kernel that is not there was found".into())?;
        said.push(missing);
        Ok(said.join(" | "))
    }

    fn copies(&self) -> Found {
        let source: Vec<u8> = (0..64 * 96).map(|index: u32| (index * 7 + index / 251) as u8).collect();
        let (a, b) =
            (DeviceMemory::alloc(&self.context, source.len())?, DeviceMemory::alloc(&self.context, source.len())?);
        self.stream.upload(&source, a.span(), DEADLINE)?;
        self.stream.fill(b.span(), 0)?;
        // The middle 32 columns of 64 rows of 96 bytes, packed.
        let (from, to) = (Rows { span: a.part(32..source.len())?, pitch: 96 }, Rows { span: b.span(), pitch: 32 });
        self.stream.copy_rows(from, to, 32, 64)?;
        let mut packed = vec![0; 64 * 32];
        self.stream.download(b.part(0..packed.len())?, &mut packed, DEADLINE)?;
        let expected: Vec<u8> = source.chunks(96).flat_map(|row| row[32..64].to_vec()).collect();
        require(packed == expected, || "rows were copied wrong".into())?;
        self.stream.copy(a.span(), b.span())?;
        let mut back = vec![0; source.len()];
        self.stream.download(b.span(), &mut back, DEADLINE)?;
        require(back == source, || "a copy differs".into())?;
        let outside =
            self.stream.copy_rows(from, to, 32, 65).is_err() && self.stream.copy(a.part(0..8)?, b.span()).is_err();
        require(outside, || "a copy past the end was taken".into())?;
        Ok("there, packed and back".into())
    }

    fn pinned_copies(&self) -> Found {
        let memory = DeviceMemory::alloc(&self.context, COPY_BYTES)?;
        let mut ring = PinnedRing::new(&self.context, 2, COPY_BYTES)?;
        let mut took = Duration::ZERO;
        for round in 0..4_u8 {
            let mut entry = ring.entry(DEADLINE)?;
            entry.bytes_mut().fill(round);
            self.stream.synchronize(DEADLINE, "an upload")?;
            let started = Instant::now();
            entry.send(&self.stream, &[(0..COPY_BYTES, memory.span())])?;
            self.stream.synchronize(DEADLINE, "an upload")?;
            took = started.elapsed();
        }
        let started = Instant::now();
        let pinned = PinnedMemory::alloc(&self.context, COPY_BYTES)?;
        let pinning = started.elapsed();
        let started = Instant::now();
        let pinned = self.stream.read_back(memory.span(), pinned)?.wait(DEADLINE, "a download")?;
        let back = started.elapsed();
        require(pinned.slice::<u8>().iter().all(|byte| *byte == 3), || "what came back differs".into())?;
        // Kernels write host memory in place.
        let words = PinnedMemory::alloc(&self.context, 4096)?;
        let kernel = self.modules.kernel("poison", "poison_fill")?;
        // SAFETY: writes 1024 words of pinned memory that is looked at only after the wait.
        unsafe {
            self.stream.launch(&kernel, &LaunchConfig::linear(1, 256), kernel_args![words.span(), 1024_u64, SEED])?;
        }
        self.stream.synchronize(DEADLINE, "a kernel")?;
        let second = words.words()[1].load(std::sync::atomic::Ordering::Acquire);
        require(second == SEED ^ 0x9E37_79B9, || format!("a kernel wrote {second:#x} into host memory"))?;
        Ok(format!("to {}, from {}, pinning 64 MiB {pinning:.1?}", rate(COPY_BYTES, took), rate(COPY_BYTES, back)))
    }

    fn graph(&self) -> Found {
        let memory = DeviceMemory::alloc(&self.context, 1 << 20)?;
        let wrong = DeviceMemory::alloc(&self.context, 4)?;
        let fill = self.modules.kernel("poison", "poison_fill")?;
        self.num_wrong(&memory, SEED)?;
        self.stream.fill(wrong.span(), 0)?;
        self.stream.fill(memory.span(), 0)?;
        let graph = self.stream.capture("check", || {
            self.fill(&fill, &memory, SEED)?;
            (0..100).try_for_each(|_| self.count(&memory, SEED ^ 1, &wrong))
        })?;
        self.stream.synchronize(DEADLINE, "a capture")?;
        require(self.word(&wrong)? == 0, || "a capture ran".into())?;
        graph.upload(&self.stream)?;
        let (from, to) = (Event::timing(&self.context)?, Event::timing(&self.context)?);
        from.record(&self.stream)?;
        for _ in 0..3 {
            // SAFETY: all that is recorded still lives.
            unsafe { graph.launch(&self.stream)? };
        }
        to.record(&self.stream)?;
        to.wait(DEADLINE, "a graph")?;
        let counted = self.word(&wrong)?;
        require(counted == 300 << 18, || format!("{counted} words were counted"))?;
        let each = to.since(&from)?.as_secs_f64() * 1e6 / (3.0 * graph.num_nodes() as f64);
        Ok(format!("{} nodes, {each:.2} us each", graph.num_nodes()))
    }

    fn failed_capture(&self) -> Found {
        let mut said = Vec::new();
        // What the caller fails with, and what the driver refuses to record.
        let own = self.stream.capture("check", || Err::<(), _>(CudaError::refused("check", "as wanted"))).err();
        said.extend(own.map(|error| error.to_string()));
        let waits = self.stream.capture("check", || self.stream.synchronize(DEADLINE, "nothing")).err();
        said.extend(waits.map(|error| error.to_string()));
        require(said.len() == 2, || format!("a capture went through: {said:?}"))?;
        self.stream.synchronize(DEADLINE, "a stream after a failed capture")?;
        let memory = DeviceMemory::alloc(&self.context, 4096)?;
        self.fill(&self.modules.kernel("poison", "poison_fill")?, &memory, SEED)?;
        require(self.num_wrong(&memory, SEED)? == 0, || "the stream does not work any more".into())?;
        Ok(said.join(" | "))
    }

    fn deadline(&self) -> Found {
        let kernel = self.modules.kernel("poison", "poison_delay")?;
        let event = Event::new(&self.context)?;
        // SAFETY: touches no memory.
        unsafe { self.stream.launch(&kernel, &LaunchConfig::linear(1, 32), kernel_args![300_000_000_u64])? };
        event.record(&self.stream)?;
        let started = Instant::now();
        let late = event.wait(Duration::from_millis(30), "a kernel of 300 ms");
        let waited = started.elapsed();
        let Err(error @ CudaError::Deadline { .. }) = late else {
            return Err(CudaError::refused("check", format!("no deadline passed: {late:?}")));
        };
        event.wait(DEADLINE, "a kernel of 300 ms")?;
        Ok(format!("{error}; seen after {waited:.1?}, ended after {:.1?}", started.elapsed()))
    }

    fn out_of_memory(&self) -> Found {
        let bytes = self.context.device().total_bytes as usize * 2;
        match DeviceMemory::alloc(&self.context, bytes) {
            Err(error @ CudaError::OutOfMemory { .. }) => Ok(error.to_string()),
            other => Err(CudaError::refused("check", format!("twice the memory: {other:?}"))),
        }
    }

    fn ipc(&self) -> Found {
        let memory = DeviceMemory::alloc(&self.context, 2 << 20)?;
        let IpcHandle { bytes, len } = memory.ipc_handle()?;
        require(bytes.iter().any(|byte| *byte != 0) && len == 2 << 20, || "an empty handle".into())?;
        Ok("given out".into())
    }

    fn peers(&self) -> Found {
        let matrix = super::peer_matrix()?;
        let mut said = Vec::new();
        for other in devices()?.into_iter().filter(|other| other.ordinal != self.context.ordinal()) {
            let access = matrix.get(self.context.ordinal() as usize).and_then(|row| row.get(other.ordinal as usize));
            if access.is_none_or(|access| !access.access) {
                said.push(format!("{}: no access", other.ordinal));
                continue;
            }
            said.push(self.peer(other.ordinal)?);
        }
        Ok(if said.is_empty() { "no other device".into() } else { said.join(", ") })
    }

    /// Fills another device's memory from here and copies it over.
    fn peer(&self, ordinal: u32) -> Found {
        let peer = Context::open(ordinal)?;
        self.context.enable_peer_access(&peer)?;
        let (there, here) = (DeviceMemory::alloc(&peer, COPY_BYTES)?, DeviceMemory::alloc(&self.context, COPY_BYTES)?);
        self.fill(&self.modules.kernel("poison", "poison_fill")?, &there, SEED)?;
        let (from, to) = (Event::timing(&self.context)?, Event::timing(&self.context)?);
        self.stream.copy(there.span(), here.span())?;
        from.record(&self.stream)?;
        self.stream.copy(there.span(), here.span())?;
        to.record(&self.stream)?;
        to.wait(DEADLINE, "a copy from a peer")?;
        require(self.num_wrong(&here, SEED)? == 0, || format!("what came from device {ordinal} differs"))?;
        Ok(format!("{ordinal}: {}", rate(COPY_BYTES, to.since(&from)?)))
    }
}

fn require(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), CudaError> {
    if holds { Ok(()) } else { Err(CudaError::refused("check", otherwise())) }
}

fn rate(bytes: usize, time: Duration) -> String {
    format!("{:.1} GB/s", bytes as f64 / time.as_secs_f64().max(1e-9) / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_device_says_so() {
        let mut lines = Vec::new();
        self_check(u32::MAX, &ModuleSettings::default(), |line| lines.push(line));
        let device = lines.last().unwrap();
        assert_eq!(device.name, "device");
        assert!(device.outcome.is_err(), "{device:?}");
    }
}
