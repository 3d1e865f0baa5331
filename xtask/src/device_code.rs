//! `cargo xtask device-code`: all device code compiles, for every architecture that is shipped, and spills no register in silence.
//!
//! nvcc compiles each `kernels/cuda/*.cu` for NVIDIA's architectures, hipcc each portable one for AMD's. That code compiles for
//! AMD is all that is claimed: it was run on no such card.
//!
//! **Invariant:** a compiler that cannot be had fails the check; only `PHALANX_HIPCC=none`, said aloud, leaves hipcc out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, bail};

use crate::fetch;
use crate::process::{cache, check, root};

/// Machine code is made for these.
const NVIDIA: [&str; 3] = ["80", "90a", "100"];
/// And for these of AMD.
const AMD: [&str; 2] = ["gfx906", "gfx90a"];
/// Sources in which every op has its portable way.
const PORTABLE: [&str; 5] = ["attention_portable", "edit", "elementwise", "linear", "sample"];
/// Compilers that run at the same time.
const NUM_JOBS: usize = 2;

/// Compiles everything and prints a line for each source.
pub fn run() -> anyhow::Result<()> {
    let nvcc = nvcc()?;
    let hipcc = hipcc()?;
    let folder = root().join("kernels/cuda");
    let out = cache().join("device-code");
    std::fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let declared = declared(&std::fs::read_to_string(folder.join("spills.txt")).context("kernels/cuda/spills.txt")?)?;
    let mut jobs: Vec<Job> = sources(&folder)?.into_iter().map(|source| Job::Nvidia { source }).collect();
    if hipcc.is_some() {
        jobs.extend(PORTABLE.map(|name| Job::Amd { source: folder.join(name).with_extension("cu") }));
    }
    let bench = Bench { nvcc, hipcc, folder, out };
    let found = bench.run_all(jobs)?;
    judge(&found, &declared)
}

/// One run of a compiler.
enum Job {
    Nvidia { source: PathBuf },
    Amd { source: PathBuf },
}

/// What the compilers need.
struct Bench {
    nvcc: PathBuf,
    hipcc: Option<PathBuf>,
    folder: PathBuf,
    out: PathBuf,
}

impl Bench {
    /// Runs all jobs, some at a time; every failure is printed before the first one is given back.
    fn run_all(&self, jobs: Vec<Job>) -> anyhow::Result<Vec<Kernel>> {
        let queue = Mutex::new(jobs.into_iter());
        let found = Mutex::new((Vec::new(), 0_usize));
        let worker = || {
            loop {
                let Some(job) = queue.lock().ok().and_then(|mut queue| queue.next()) else { return };
                let outcome = self.run(&job);
                let Ok(mut found) = found.lock() else { return };
                match outcome {
                    Ok(kernels) => found.0.extend(kernels),
                    Err(error) => {
                        eprintln!("{error:#}");
                        found.1 += 1;
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..NUM_JOBS {
                scope.spawn(worker);
            }
        });
        match found.into_inner() {
            Ok((kernels, 0)) => Ok(kernels),
            Ok((_, failed)) => bail!("{failed} sources of device code do not compile; the compilers' words are above"),
            Err(_) => bail!("a thread that compiles device code ended early"),
        }
    }

    fn run(&self, job: &Job) -> anyhow::Result<Vec<Kernel>> {
        let started = Instant::now();
        match (job, &self.hipcc) {
            (Job::Nvidia { source }, _) => {
                let kernels = kernels(&said(&mut self.nvidia(source))?);
                eprintln!("{}", line(&name(source), &kernels, started.elapsed().as_secs_f64()));
                if kernels.is_empty() {
                    bail!("{}: the compiler told nothing of its kernels", source.display());
                }
                Ok(kernels)
            }
            (Job::Amd { source }, Some(hipcc)) => {
                said(&mut self.amd(hipcc, source))?;
                let seconds = started.elapsed().as_secs_f64();
                eprintln!("{:<24} {}; compiles, not run; {seconds:.0} s", name(source), AMD.join(", "));
                Ok(Vec::new())
            }
            (Job::Amd { .. }, None) => Ok(Vec::new()),
        }
    }

    fn nvidia(&self, source: &Path) -> Command {
        let mut command = Command::new(&self.nvcc);
        command.args(["--fatbin", "-O3", "--std=c++17", "-Xptxas=-v"]);
        for number in NVIDIA {
            command.arg("-gencode").arg(format!("arch=compute_{number},code=sm_{number}"));
        }
        command
            .arg("-I")
            .arg(&self.folder)
            .arg("-o")
            .arg(self.out.join(name(source)).with_extension("fatbin"))
            .arg(source);
        command
    }

    fn amd(&self, hipcc: &Path, source: &Path) -> Command {
        let mut command = Command::new(hipcc);
        command.args(["--cuda-device-only", "-c", "-O3", "-std=c++17", "-Werror"]);
        command.args(AMD.map(|name| format!("--offload-arch={name}")));
        command.arg("-I").arg(&self.folder).args(["-x", "hip"]).arg(source);
        command.arg("-o").arg(self.out.join(name(source)).with_extension("hip.o"));
        command
    }
}

fn name(source: &Path) -> String {
    source.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Every `.cu` file, those that take longest first, so that the compilers end together.
fn sources(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut sources = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "cu") {
            sources.push((path.metadata()?.len(), path));
        }
    }
    sources.sort_by(|a, b| b.cmp(a));
    Ok(sources.into_iter().map(|(_, path)| path).collect())
}

/// Runs a compiler to its end and gives all that it said.
fn said(command: &mut Command) -> anyhow::Result<String> {
    let line = format!("{command:?}");
    let output = command.output().with_context(|| format!("cannot start {line}"))?;
    let said = [String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)].concat();
    if !output.status.success() {
        bail!("{line} ended with {}:\n{said}", output.status);
    }
    Ok(said)
}

// ---- what the compiler says of registers ----

/// A kernel for one architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Kernel {
    name: String,
    /// As in `sm_90a`.
    architecture: String,
    registers: u32,
    /// Bytes of stores and loads.
    spilled: u32,
}

/// Reads the lines of `ptxas -v`.
fn kernels(said: &str) -> Vec<Kernel> {
    let mut found: Vec<Kernel> = Vec::new();
    for line in said.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let mut words = rest.split('\'');
            let (name, architecture) = (words.next().unwrap_or_default(), words.nth(1).unwrap_or_default());
            let (name, architecture) = (name.to_owned(), architecture.to_owned());
            found.push(Kernel { name, architecture, registers: 0, spilled: 0 });
        }
        let Some(kernel) = found.last_mut() else { continue };
        // Functions that are not kernels are counted with the kernel before them.
        kernel.spilled += number_before(line, " bytes spill stores") + number_before(line, " bytes spill loads");
        if line.contains(": Used ") {
            kernel.registers = kernel.registers.max(number_before(line, " registers"));
        }
    }
    found
}

fn number_before(line: &str, words: &str) -> u32 {
    let Some((before, _)) = line.split_once(words) else { return 0 };
    before.rsplit([' ', ',']).next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

fn line(name: &str, kernels: &[Kernel], seconds: f64) -> String {
    let registers = kernels.iter().map(|kernel| kernel.registers).max().unwrap_or_default();
    let spilled: u32 = kernels.iter().map(|kernel| kernel.spilled).sum();
    let names = NVIDIA.map(|number| format!("sm_{number}")).join(", ");
    format!(
        "{name:<24} {names}; {} kernels, at most {registers} registers, {spilled} bytes spilled; {seconds:.0} s",
        kernels.len()
    )
}

type Declared = BTreeMap<(String, String), u32>;

/// Reads `spills.txt`.
fn declared(text: &str) -> anyhow::Result<Declared> {
    let mut declared = Declared::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [kernel, architecture, bytes] = words[..] else {
            bail!("spills.txt: {line:?} is not a kernel, an architecture and a number of bytes");
        };
        let bytes = bytes.parse().with_context(|| format!("spills.txt: {line:?} ends in no number"))?;
        declared.insert((kernel.to_owned(), architecture.to_owned()), bytes);
    }
    Ok(declared)
}

/// What spills is declared, and what is declared spills.
fn judge(kernels: &[Kernel], declared: &Declared) -> anyhow::Result<()> {
    let mut wrong = Vec::new();
    let mut left = declared.clone();
    for kernel in kernels {
        let allowed = left.remove(&(kernel.name.clone(), kernel.architecture.clone())).unwrap_or(0);
        if kernel.spilled > allowed {
            let (name, architecture) = (&kernel.name, &kernel.architecture);
            wrong.push(format!("{name} spills {} bytes on {architecture}, {allowed} are declared", kernel.spilled));
        } else if kernel.spilled == 0 && allowed > 0 {
            wrong.push(format!("{} no longer spills on {}: its line can go", kernel.name, kernel.architecture));
        }
    }
    wrong.extend(left.keys().map(|(name, architecture)| format!("there is no kernel {name} for {architecture}")));
    if wrong.is_empty() { Ok(()) } else { bail!("kernels/cuda/spills.txt: {}", wrong.join("; ")) }
}

// ---- the compilers ----

/// An nvcc that knows all architectures: one that is here, else the one that is obtained.
fn nvcc() -> anyhow::Result<PathBuf> {
    let named = variable("PHALANX_NVCC").filter(|name| name != "none").map(PathBuf::from);
    let home = variable("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/nvcc"));
    let usual = [on_path("nvcc"), Some(PathBuf::from("/usr/local/cuda/bin/nvcc"))];
    let candidates = [named, home].into_iter().chain(usual).flatten();
    for candidate in candidates.filter(|file| file.is_file()) {
        if knows_all(&candidate) {
            return Ok(candidate);
        }
        eprintln!("{} does not know all of sm_{}", candidate.display(), NVIDIA.join(", sm_"));
    }
    let obtained = fetch::nvcc()?;
    if knows_all(&obtained) { Ok(obtained) } else { bail!("{} cannot be used", obtained.display()) }
}

fn knows_all(nvcc: &Path) -> bool {
    let Ok(known) = said(Command::new(nvcc).arg("--list-gpu-arch")) else { return false };
    let number = |name: &str| name.trim_end_matches(|c: char| c.is_ascii_alphabetic()).to_owned();
    NVIDIA.iter().all(|name| known.lines().any(|line| line.trim() == format!("compute_{}", number(name))))
}

/// The hipcc that is here or named, else the one of Debian's package; `None` only where it was said to be left out.
fn hipcc() -> anyhow::Result<Option<PathBuf>> {
    match variable("PHALANX_HIPCC") {
        Some(name) if name == "none" => {
            eprintln!("PHALANX_HIPCC is none: whether device code compiles for AMD is NOT looked at");
            return Ok(None);
        }
        Some(path) => return Ok(Some(path.into())),
        None => {}
    }
    if let Some(here) = on_path("hipcc") {
        return Ok(Some(here));
    }
    let help = "install the package hipcc, or let PHALANX_HIPCC name one (`none` leaves this out)";
    let install = || {
        let apt = || {
            let mut command = Command::new("apt-get");
            command.env("DEBIAN_FRONTEND", "noninteractive");
            command
        };
        check(apt().args(["update", "-qq"]))?;
        check(apt().args(["install", "-y", "-qq", "--no-install-recommends", "hipcc"]))
    };
    install().with_context(|| format!("there is no hipcc, and apt-get does not bring it (only root can): {help}"))?;
    on_path("hipcc").map(Some).with_context(|| format!("the package brought no hipcc: {help}"))
}

#[expect(clippy::disallowed_methods, reason = "a tool for developers has its configuration from its environment")]
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = variable("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a_f16' for 'sm_80'
ptxas info    : Function properties for a_f16
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 146 registers, used 1 barriers, 432 bytes cmem[0]
ptxas info    : Compiling entry function 'a_f16' for 'sm_90a'
ptxas info    : Function properties for a_f16
    24 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
";

    fn kernel(architecture: &str, registers: u32, spilled: u32) -> Kernel {
        Kernel { name: "a_f16".into(), architecture: architecture.into(), registers, spilled }
    }

    #[test]
    fn spills_are_read_per_kernel_and_architecture() {
        assert_eq!(kernels(SAID), [kernel("sm_80", 146, 0), kernel("sm_90a", 255, 32)]);
        assert!(line("a.cu", &kernels(SAID), 2.0).contains("2 kernels, at most 255 registers, 32 bytes spilled"));
    }

    #[test]
    fn a_spill_is_declared_or_fails() {
        let check = |table: &str, expected: &str| {
            let words = judge(&kernels(SAID), &declared(table).unwrap()).err().map(|error| error.to_string());
            assert!(words.as_deref().unwrap_or_default().contains(expected), "{table:?}: {words:?}");
            assert_eq!(words.is_none(), expected.is_empty());
        };
        check("# nothing\n", "a_f16 spills 32 bytes on sm_90a, 0 are declared");
        check("a_f16 sm_90a 31", "31 are declared");
        check("a_f16 sm_90a 32", "");
        check("a_f16 sm_90a 32\na_f16 sm_80 4", "no longer spills on sm_80");
        check("a_f16 sm_90a 32\nb sm_80 4", "there is no kernel b");
        assert!(declared("a sm_80").is_err() && declared("a sm_80 x").is_err());
    }
}
