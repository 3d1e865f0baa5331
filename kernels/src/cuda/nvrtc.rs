//! Compiling device code on this machine.
//!
//! Owns the table of NVRTC and what is asked of it. The result depends on nothing but what the key is made of.

use std::ffi::{CString, c_char, c_int, c_void};
use std::fs;
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::OnceLock;

use sha2::{Digest, Sha256};

use super::error::CudaError;
use super::library::{FoundLibrary, Library, LibraryReport, function_table, open_file};

/// Name in reports.
const NAME: &str = "NVRTC";
/// Folders where toolkits keep their headers.
const INCLUDE_FOLDERS: [&str; 3] = [
    "/usr/local/cuda/include",
    "/usr/local/cuda/targets/x86_64-linux/include",
    "/usr/local/cuda/targets/sbsa-linux/include",
];
/// Most of a compiler's log that an error carries.
const LOG_BYTES_MAX: usize = 4000;

type Program = *mut c_void;

function_table! {
    /// The compiler.
    Nvrtc {
        version = c"nvrtcVersion"(*mut c_int, *mut c_int) -> c_int;
        num_architectures = c"nvrtcGetNumSupportedArchs"(*mut c_int) -> c_int;
        architectures = c"nvrtcGetSupportedArchs"(*mut c_int) -> c_int;
        create = c"nvrtcCreateProgram"(
            *mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char,
        ) -> c_int;
        destroy = c"nvrtcDestroyProgram"(*mut Program) -> c_int;
        compile = c"nvrtcCompileProgram"(Program, c_int, *const *const c_char) -> c_int;
        log_size = c"nvrtcGetProgramLogSize"(Program, *mut usize) -> c_int;
        log = c"nvrtcGetProgramLog"(Program, *mut c_char) -> c_int;
        cubin_size = c"nvrtcGetCUBINSize"(Program, *mut usize) -> c_int;
        cubin = c"nvrtcGetCUBIN"(Program, *mut c_char) -> c_int;
        ptx_size = c"nvrtcGetPTXSize"(Program, *mut usize) -> c_int;
        ptx = c"nvrtcGetPTX"(Program, *mut c_char) -> c_int;
    }
    optional {}
}

impl Nvrtc {
    fn open() -> Result<&'static Self, CudaError> {
        static NVRTC: OnceLock<Result<Nvrtc, CudaError>> = OnceLock::new();
        NVRTC.get_or_init(Self::open_once).as_ref().map_err(Clone::clone)
    }

    fn open_once() -> Result<Self, CudaError> {
        let nvrtc = Self::load(&Library::open(NAME, &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"])?)?;
        nvrtc.open_builtins();
        Ok(nvrtc)
    }

    /// NVRTC opens its second library by name alone when it first compiles; one that is open already is found.
    fn open_builtins(&self) {
        let beside = self.path.parent().and_then(|folder| fs::read_dir(folder).ok());
        for entry in beside.into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so") {
                // Where this fails, NVRTC's own search may still succeed, and its log says so if not.
                let _ = open_file(&entry.path());
            }
        }
    }

    fn version(&self) -> Result<(i32, i32), CudaError> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two ints.
        check("nvrtcVersion", unsafe { (self.version)(&raw mut major, &raw mut minor) })?;
        Ok((major, minor))
    }

    /// Architectures that it compiles for, as `90`.
    fn supported(&self) -> Result<Vec<i32>, CudaError> {
        let mut count = 0;
        // SAFETY: writes one int.
        check("nvrtcGetNumSupportedArchs", unsafe { (self.num_architectures)(&raw mut count) })?;
        let mut list = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: writes as many ints as it said.
        check("nvrtcGetSupportedArchs", unsafe { (self.architectures)(list.as_mut_ptr()) })?;
        Ok(list)
    }
}

pub(super) fn report() -> LibraryReport {
    let found = Nvrtc::open().and_then(|nvrtc| {
        let (major, minor) = nvrtc.version()?;
        Ok(FoundLibrary { path: nvrtc.path.clone(), version: format!("{major}.{minor}") })
    });
    let purpose = "compiling kernels on devices that this program holds no image for";
    LibraryReport { name: NAME, purpose, found: found.map_err(|error| error.to_string()) }
}

/// A compilation.
pub(super) struct Request<'a> {
    nvrtc: &'static Nvrtc,
    version: (i32, i32),
    name: &'a str,
    text: &'a str,
    headers: &'a [(&'a str, &'a str)],
    target: Target,
    options: Vec<String>,
}

/// What the compiler makes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    /// `sm_90a`, or `compute_90` where the compiler does not know the device.
    architecture: String,
    /// Whether that is the device's machine code.
    is_machine_code: bool,
}

impl<'a> Request<'a> {
    /// Opens the compiler and settles what it is asked for.
    pub(super) fn new(
        name: &'a str,
        text: &'a str,
        headers: &'a [(&'a str, &'a str)],
        capability: (u32, u32),
        include_dirs: &[PathBuf],
    ) -> Result<Self, CudaError> {
        let nvrtc = Nvrtc::open()?;
        let target = target(capability, &nvrtc.supported()?)?;
        let mut options = vec!["--std=c++17".into(), format!("--gpu-architecture={}", target.architecture)];
        let usual = INCLUDE_FOLDERS.iter().map(Path::new);
        let folder =
            include_dirs.iter().map(PathBuf::as_path).chain(usual).find(|dir| dir.join("cuda_fp16.h").is_file());
        options.extend(folder.map(|folder| format!("--include-path={}", folder.display())));
        Ok(Self { nvrtc, version: nvrtc.version()?, name, text, headers, target, options })
    }

    /// Name of the source.
    pub(super) fn name(&self) -> &str {
        self.name
    }

    /// Everything that the result depends on, as one word.
    pub(super) fn key(&self) -> String {
        key(self.version, &self.options, self.text, self.headers)
    }

    /// Compiles.
    pub(super) fn compile(&self) -> Result<Vec<u8>, CudaError> {
        let program = self.program()?;
        let options = c_strings(self.options.iter().map(String::as_str))?;
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: a live program and as many C strings as counted.
        let code = unsafe { (self.nvrtc.compile)(program.handle, pointers.len() as c_int, pointers.as_ptr()) };
        if code != 0 {
            let log = program.text(self.nvrtc.log_size, self.nvrtc.log).unwrap_or_default();
            let mut log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
            if log.is_empty() {
                log = format!("nvrtcCompileProgram: {} ({code})", name_of(code));
            }
            log.truncate(log.floor_char_boundary(LOG_BYTES_MAX));
            return Err(CudaError::Compile { module: self.name.into(), arch: self.target.architecture.clone(), log });
        }
        if self.target.is_machine_code {
            program.text(self.nvrtc.cubin_size, self.nvrtc.cubin)
        } else {
            program.text(self.nvrtc.ptx_size, self.nvrtc.ptx)
        }
    }

    fn program(&self) -> Result<OpenProgram<'_>, CudaError> {
        let [text, name] = c_strings([self.text, &format!("{}.cu", self.name)])?
            .try_into()
            .map_err(|_| CudaError::refused("nvrtcCreateProgram", "two strings"))?;
        let names = c_strings(self.headers.iter().map(|(name, _)| *name))?;
        let texts = c_strings(self.headers.iter().map(|(_, text)| *text))?;
        let pointers = |list: &[CString]| list.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
        let (name_pointers, text_pointers) = (pointers(&names), pointers(&texts));
        let mut handle = null_mut();
        // SAFETY: writes one handle; as many headers as counted, all C strings that live through the call.
        let code = unsafe {
            (self.nvrtc.create)(
                &raw mut handle,
                text.as_ptr(),
                name.as_ptr(),
                names.len() as c_int,
                text_pointers.as_ptr(),
                name_pointers.as_ptr(),
            )
        };
        check("nvrtcCreateProgram", code)?;
        Ok(OpenProgram { nvrtc: self.nvrtc, handle })
    }
}

struct OpenProgram<'a> {
    nvrtc: &'a Nvrtc,
    handle: Program,
}

impl OpenProgram<'_> {
    /// One of the program's results: its size is asked for first.
    fn text(
        &self,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        fill: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, CudaError> {
        let mut num_bytes = 0;
        // SAFETY: writes one size; the program is live.
        check("nvrtcGetProgramResult", unsafe { size(self.handle, &raw mut num_bytes) })?;
        let mut bytes = vec![0_u8; num_bytes];
        // SAFETY: writes as many bytes as it said.
        check("nvrtcGetProgramResult", unsafe { fill(self.handle, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

impl Drop for OpenProgram<'_> {
    fn drop(&mut self) {
        // SAFETY: created in `program`, destroyed once.
        unsafe { (self.nvrtc.destroy)(&raw mut self.handle) };
    }
}

fn c_strings<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Vec<CString>, CudaError> {
    let zero = |_| CudaError::refused("nvrtcCreateProgram", "a text with a zero byte");
    texts.into_iter().map(|text| CString::new(text).map_err(zero)).collect()
}

/// Machine code for the device if the compiler knows it, else code that the driver translates.
fn target((major, minor): (u32, u32), supported: &[i32]) -> Result<Target, CudaError> {
    let wanted = i32::try_from(major * 10 + minor).unwrap_or(i32::MAX);
    if supported.contains(&wanted) {
        // Only for 9.0 the kernels use what is of that architecture alone.
        let suffix = if wanted == 90 { "a" } else { "" };
        return Ok(Target { architecture: format!("sm_{wanted}{suffix}"), is_machine_code: true });
    }
    let nearest = supported.iter().filter(|known| **known < wanted).max();
    let nearest = nearest.ok_or_else(|| {
        CudaError::refused("compile", format!("this NVRTC has left devices of capability {major}.{minor} behind"))
    })?;
    Ok(Target { architecture: format!("compute_{nearest}"), is_machine_code: false })
}

fn key(version: (i32, i32), options: &[String], text: &str, headers: &[(&str, &str)]) -> String {
    let mut hash = Sha256::new();
    let mut add = |part: &str| {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    };
    add(&format!("{}.{}", version.0, version.1));
    add(&options.len().to_string());
    options.iter().for_each(|option| add(option));
    add(text);
    for (name, text) in headers {
        add(name);
        add(text);
    }
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

fn check(call: &'static str, code: c_int) -> Result<(), CudaError> {
    if code == 0 {
        return Ok(());
    }
    Err(CudaError::Call { call, code, name: name_of(code).into(), device: None, kernel: None })
}

fn name_of(code: c_int) -> &'static str {
    match code {
        1 => "NVRTC_ERROR_OUT_OF_MEMORY",
        2 => "NVRTC_ERROR_PROGRAM_CREATION_FAILURE",
        3 => "NVRTC_ERROR_INVALID_INPUT",
        4 => "NVRTC_ERROR_INVALID_PROGRAM",
        5 => "NVRTC_ERROR_INVALID_OPTION",
        6 => "NVRTC_ERROR_COMPILATION",
        7 => "NVRTC_ERROR_BUILTIN_OPERATION_FAILURE",
        11 => "NVRTC_ERROR_INTERNAL_ERROR",
        _ => "a code of NVRTC",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_changes_with_everything_that_it_covers() {
        let options = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        let base = key((13, 0), &options(&["-a", "-b"]), "text", &[("h", "x")]);
        assert_eq!(base.len(), 32);
        assert_eq!(base, key((13, 0), &options(&["-a", "-b"]), "text", &[("h", "x")]));
        for other in [
            key((13, 1), &options(&["-a", "-b"]), "text", &[("h", "x")]),
            key((13, 0), &options(&["-a-b"]), "text", &[("h", "x")]),
            key((13, 0), &options(&["-a", "-c"]), "text", &[("h", "x")]),
            key((13, 0), &options(&["-a", "-b"]), "texth", &[("", "x")]),
            key((13, 0), &options(&["-a", "-b"]), "text", &[("h", "y")]),
            key((13, 0), &options(&["-a", "-b"]), "text", &[]),
        ] {
            assert_ne!(other, base);
        }
    }

    #[test]
    fn a_device_gets_its_own_code_or_the_nearest_below() {
        let check = |capability, expected: Option<(&str, bool)>| {
            let found = target(capability, &[75, 80, 90, 100]).ok();
            assert_eq!(found.as_ref().map(|t| (t.architecture.as_str(), t.is_machine_code)), expected);
        };
        check((9, 0), Some(("sm_90a", true)));
        check((8, 0), Some(("sm_80", true)));
        check((8, 9), Some(("compute_80", false)));
        check((12, 0), Some(("compute_100", false)));
        check((7, 0), None);
    }
}
