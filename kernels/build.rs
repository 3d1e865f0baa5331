//! Compiles the device code where there is an nvcc, and embeds its sources in any case.
//!
//! Each `cuda/*.cu` becomes one compressed fatbin with machine code for `ARCHITECTURES` and, for devices to come, PTX.
//! Without nvcc the same sources are compiled by NVRTC on the machine that runs them.
//!
//! `PHALANX_NVCC` names the compiler, or is `none`; otherwise it is looked for in `CUDA_HOME`, in `PATH` and in
//! `/usr/local/cuda`. `PHALANX_CUDA_ARCHS`, for example `90a`, makes quick builds for one device.

#![expect(clippy::disallowed_methods, reason = "a build script has no other configuration than its environment")]

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// Architectures of the machine code; `ptx90` is PTX that the driver translates for devices that none of them fits.
const ARCHITECTURES: &str = "80,90a,100,ptx90";

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let folder = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("cuda");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for name in ["PHALANX_NVCC", "PHALANX_CUDA_ARCHS", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rerun-if-changed={}", folder.display());
    let mut sources = files(&folder, "cu")?;
    let headers = files(&folder, "cuh")?;
    for file in sources.iter().chain(&headers) {
        println!("cargo::rerun-if-changed={}", file.display());
    }
    sources.sort();
    let compiler = Compiler::find()?;
    if let Some(compiler) = &compiler {
        compiler.compile_all(&folder, &sources, &headers, &out)?;
    }
    fs::write(out.join("cuda_sources.rs"), listing(&sources, &headers, compiler.as_ref())?)?;
    Ok(())
}

/// Files of the folder with this ending, in order.
fn files(folder: &Path, ending: &str) -> Result<Vec<PathBuf>, Failure> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == ending) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// The Rust text that `src/cuda/module.rs` includes.
fn listing(sources: &[PathBuf], headers: &[PathBuf], compiler: Option<&Compiler>) -> Result<String, Failure> {
    let mut text = String::from("/// Every `.cu` file.\npub(super) static SOURCES: &[Source] = &[\n");
    for source in sources {
        let name = stem(source);
        let fatbin = match compiler {
            Some(_) => format!(r#"Some(&Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/{name}.fatbin"))))"#),
            None => "None".into(),
        };
        let body = format!(r#"include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/{name}.cu"))"#);
        writeln!(text, "    Source {{ name: {name:?}, text: {body}, fatbin: {fatbin} }},")?;
    }
    text.push_str(
        "];\n/// Every `.cuh` file: its name and its text.\npub(super) static HEADERS: &[(&str, &str)] = &[\n",
    );
    for header in headers {
        let name = format!("{}.cuh", stem(header));
        writeln!(text, r#"    ({name:?}, include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/{name}"))),"#)?;
    }
    let built = match compiler {
        Some(compiler) => format!("device code for {} by nvcc {}", compiler.architectures.join(", "), compiler.version),
        None => "device code is compiled on the machine that runs it: there was no nvcc".into(),
    };
    writeln!(text, "];\nconst BUILT: &str = {built:?};")?;
    Ok(text)
}

/// The nvcc of this build.
struct Compiler {
    program: PathBuf,
    version: String,
    /// As in `ARCHITECTURES`, those that it knows.
    architectures: Vec<String>,
}

impl Compiler {
    fn find() -> Result<Option<Self>, Failure> {
        let Some(program) = program()? else { return Ok(None) };
        let said = run(Command::new(&program).arg("--version"))?;
        let version = said.split("release ").nth(1).and_then(|rest| rest.split(',').next()).unwrap_or("?").to_owned();
        let known = run(Command::new(&program).arg("--list-gpu-arch"))?;
        let wanted = env::var("PHALANX_CUDA_ARCHS").unwrap_or_else(|_| ARCHITECTURES.into());
        let mut architectures = Vec::new();
        for name in wanted.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            let number = name.trim_start_matches("ptx").trim_end_matches(|c: char| c.is_ascii_alphabetic());
            if number.parse::<u32>().is_err() {
                return Err(format!("PHALANX_CUDA_ARCHS: {name:?} is not like 80, 90a or ptx90").into());
            }
            if known.lines().any(|line| line.trim() == format!("compute_{number}")) {
                architectures.push(name.to_owned());
            } else {
                println!("cargo::warning=nvcc {version} does not know architecture {name}; it is left out");
            }
        }
        if architectures.is_empty() {
            println!("cargo::warning=nvcc {version} knows none of {wanted}; device code is compiled where it runs");
            return Ok(None);
        }
        Ok(Some(Self { program, version, architectures }))
    }

    /// One process per source, as many at a time as the build may have.
    fn compile_all(&self, folder: &Path, sources: &[PathBuf], headers: &[PathBuf], out: &Path) -> Result<(), Failure> {
        let num_jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1_usize).max(1);
        let queue = Mutex::new(sources.iter());
        let worker = || -> Result<(), Failure> {
            loop {
                let next = queue.lock().map_err(|_| "another compilation failed")?.next();
                let Some(source) = next else { return Ok(()) };
                self.compile(folder, source, headers, out)?;
            }
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..num_jobs.min(sources.len())).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a thread of the build ended")?)
        })
    }

    /// Compiles one source, unless what is there was made of the same.
    fn compile(&self, folder: &Path, source: &Path, headers: &[PathBuf], out: &Path) -> Result<(), Failure> {
        let target = out.join(stem(source)).with_extension("fatbin");
        let stamp = out.join(stem(source)).with_extension("stamp");
        let mut hash = DefaultHasher::new();
        (&self.version, &self.architectures, fs::read(source)?).hash(&mut hash);
        for header in headers {
            (header, fs::read(header)?).hash(&mut hash);
        }
        let sum = format!("{:016x}", hash.finish());
        if target.is_file() && fs::read_to_string(&stamp).is_ok_and(|kept| kept == sum) {
            return Ok(());
        }
        let mut command = Command::new(&self.program);
        command.args(["--fatbin", "-O3", "--std=c++17", "-Xfatbin=-compress-all", "-Xptxas=-v"]);
        for name in &self.architectures {
            let number = name.trim_start_matches("ptx");
            let code = if number.len() < name.len() { "compute" } else { "sm" };
            command.arg("-gencode").arg(format!("arch=compute_{number},code={code}_{number}"));
        }
        command.arg("-I").arg(folder).arg("-o").arg(&target).arg(source);
        warn_of_spills(&stem(source), &run(&mut command)?);
        fs::write(stamp, sum)?;
        Ok(())
    }
}

/// Where nvcc is: as said, or where it usually is.
fn program() -> Result<Option<PathBuf>, Failure> {
    if let Some(said) = env::var_os("PHALANX_NVCC") {
        return match said.to_string_lossy().as_ref() {
            "none" => Ok(None),
            path if Path::new(path).is_file() => Ok(Some(path.into())),
            path => Err(format!("PHALANX_NVCC: there is no file {path}; `none` builds without").into()),
        };
    }
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = home.into_iter().chain(env::split_paths(&path)).chain([PathBuf::from("/usr/local/cuda/bin")]);
    Ok(folders.map(|folder| folder.join("nvcc")).find(|file| file.is_file()))
}

/// Runs a program and gives all that it said.
fn run(command: &mut Command) -> Result<String, Failure> {
    let output = command.output().map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        return Err(format!("{command:?} ended with {}:\n{said}", output.status).into());
    }
    Ok(said)
}

/// Kernels that the compiler could not fit into registers are slow: the build says which.
fn warn_of_spills(source: &str, said: &str) {
    let mut kernel = "";
    for line in said.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            kernel = rest.split('\'').next().unwrap_or_default();
        }
        let spilled = line.split(" bytes spill stores").next().and_then(|head| head.rsplit(' ').next());
        if line.contains("bytes spill stores") && spilled != Some("0") {
            println!("cargo::warning={source}.cu: {kernel}: {}", line.trim());
        }
    }
}
