//! Device code: from what the build embedded, or compiled on this machine, to kernels that can be launched.
//!
//! Owns loaded modules and what is known of their kernels. Where the build had an nvcc, the binary holds images for the
//! architectures of `build.rs`; a device that none of them fits, and a build without nvcc, get the same sources through
//! NVRTC, kept on disk by `cache`.
//!
//! **Invariant:** a module stays loaded as long as one of its kernels is held.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CString, c_int};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::rc::Rc;

use super::cache;
use super::context::Context;
use super::driver::{self, Handle};
use super::error::CudaError;
use super::launch::{ARGS_MAX, LaunchConfig};
use super::nvrtc;

/// Shared memory that any kernel may have without being asked for more.
const SHARED_BYTES_PLAIN: u32 = 48 * 1024;
/// Blocks in a cluster that any kernel may have.
const CLUSTER_BLOCKS_PLAIN: u32 = 8;

/// Bytes at an address that any image may have.
#[repr(C, align(64))]
pub(super) struct Aligned<T: ?Sized>(T);

/// One `.cu` file.
pub(super) struct Source {
    /// File name without its ending.
    pub(super) name: &'static str,
    /// Its text.
    pub(super) text: &'static str,
    /// Compiled at build time.
    pub(super) fatbin: Option<&'static Aligned<[u8]>>,
}

include!(concat!(env!("OUT_DIR"), "/cuda_sources.rs"));

/// What the build knows of its device code: the compiler and the architectures, or that there was no compiler.
pub fn build_line() -> &'static str {
    BUILT
}

/// Whether this program holds images of all its device code, so that nothing is compiled where it runs.
pub fn has_images() -> bool {
    SOURCES.iter().all(|source| source.fatbin.is_some())
}

/// Where device code is compiled on this machine, if it must be.
#[derive(Debug, Clone, Default)]
pub struct ModuleSettings {
    /// Folder that keeps what was compiled; without one it is compiled at each start.
    pub cache_dir: Option<PathBuf>,
    /// Folders with `cuda_fp16.h`, looked at before the usual ones.
    pub include_dirs: Vec<PathBuf>,
    /// Compiles even what the program holds an image of: to see that a machine can.
    pub ignore_images: bool,
}

impl ModuleSettings {
    /// The usual: a folder that keeps what was compiled, and the toolkit that the user has named.
    pub fn new(cache_dir: PathBuf, cuda_home: Option<&Path>) -> Self {
        let include_dirs = cuda_home.map(|home| home.join("include")).into_iter().collect();
        Self { cache_dir: Some(cache_dir), include_dirs, ignore_images: false }
    }
}

/// How a module came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// From the binary.
    Embedded,
    /// Compiled by NVRTC just now.
    Compiled,
    /// Compiled by NVRTC by an earlier process.
    Cached,
}

/// The device code of one device.
#[derive(Debug)]
pub struct ModuleSet {
    context: Context,
    settings: ModuleSettings,
    loaded: RefCell<HashMap<String, Module>>,
}

impl ModuleSet {
    /// Nothing is loaded yet.
    pub fn new(context: &Context, settings: ModuleSettings) -> Self {
        Self { context: context.clone(), settings, loaded: RefCell::default() }
    }

    /// Names of all modules: the `.cu` files.
    pub fn names() -> impl Iterator<Item = &'static str> {
        SOURCES.iter().map(|source| source.name)
    }

    /// A module by the name of its `.cu` file; loaded once.
    ///
    /// # Errors
    /// No such file, no image and no NVRTC for this device, or a source that does not compile.
    pub fn load(&self, name: &str) -> Result<Module, CudaError> {
        if let Some(module) = self.loaded.borrow().get(name) {
            return Ok(module.clone());
        }
        let source = SOURCES.iter().find(|source| source.name == name);
        let source = source.ok_or_else(|| CudaError::refused("load", format!("no module {name}")))?;
        match self.find(source)? {
            Found::Loaded(module) => Ok(self.insert(module)),
            Found::Missing(request) => self.keep(&request, &request.compile()?),
        }
    }

    /// A kernel by the name of its module and its own.
    ///
    /// # Errors
    /// As `load` and `Module::kernel`.
    pub fn kernel(&self, module: &str, kernel: &str) -> Result<Kernel, CudaError> {
        self.load(module)?.kernel(kernel)
    }

    /// From the program, else from the cache.
    fn find<'a>(&self, source: &'a Source) -> Result<Found<'a>, CudaError> {
        let mut refusal = None;
        if let Some(fatbin) = source.fatbin.filter(|_| !self.settings.ignore_images) {
            match Module::from_image(&self.context, source.name, &fatbin.0, Origin::Embedded) {
                Ok(module) => return Ok(Found::Loaded(module)),
                Err(error) if error.code().is_some_and(is_no_image_for_this_device) => refusal = Some(error),
                Err(error) => return Err(error),
            }
        }
        let capability = self.context.device().capability;
        let request = nvrtc::Request::new(source.name, source.text, HEADERS, capability, &self.settings.include_dirs);
        let request = request.map_err(|error| match refusal {
            None => error,
            Some(refusal) => {
                let reason =
                    format!("{}: the image in this program does not load ({refusal}), and {error}", source.name);
                CudaError::refused("load", reason)
            }
        })?;
        let cached = self.settings.cache_dir.as_deref().and_then(|dir| cache::read(dir, source.name, &request.key()));
        match cached.map(|image| Module::from_image(&self.context, source.name, &image, Origin::Cached)) {
            Some(Ok(module)) => Ok(Found::Loaded(module)),
            // An entry that the driver does not take is made anew.
            _ => Ok(Found::Missing(request)),
        }
    }

    /// Loads what was compiled, and keeps it for the next start.
    fn keep(&self, request: &nvrtc::Request<'_>, image: &[u8]) -> Result<Module, CudaError> {
        let module = Module::from_image(&self.context, request.name(), image, Origin::Compiled)?;
        if let Some(dir) = &self.settings.cache_dir {
            // A cache that cannot be written costs the next start some seconds, nothing else.
            let _ = cache::write(dir, request.name(), &request.key(), image);
        }
        Ok(self.insert(module))
    }

    fn insert(&self, module: Module) -> Module {
        self.loaded.borrow_mut().insert(module.0.name.clone(), module.clone());
        module
    }
}

/// Where a module stands before it is loaded.
enum Found<'a> {
    Loaded(Module),
    Missing(nvrtc::Request<'a>),
}

/// Codes that say: there is an image, but not for this device or this driver.
fn is_no_image_for_this_device(code: c_int) -> bool {
    matches!(
        code,
        driver::INVALID_IMAGE
            | driver::NO_BINARY_FOR_GPU
            | driver::INVALID_PTX
            | driver::JIT_COMPILER_NOT_FOUND
            | driver::UNSUPPORTED_PTX_VERSION
            | driver::JIT_DISABLED
    )
}

/// Loaded device code. Clones are the same module.
#[derive(Debug, Clone)]
pub struct Module(Rc<Loaded>);

#[derive(Debug)]
struct Loaded {
    context: Context,
    handle: Handle,
    name: String,
    origin: Origin,
}

impl Module {
    fn from_image(context: &Context, name: &str, image: &[u8], origin: Origin) -> Result<Self, CudaError> {
        let mut handle = null_mut();
        context.call("cuModuleLoadData", |driver| {
            // SAFETY: writes one handle. Images carry their own length; PTX is kept with its final zero.
            unsafe { (driver.module_load)(&raw mut handle, image.as_ptr().cast()) }
        })?;
        Ok(Self(Rc::new(Loaded { context: context.clone(), handle, name: name.to_owned(), origin })))
    }

    /// How it came to be.
    pub fn origin(&self) -> Origin {
        self.0.origin
    }

    /// A kernel by its name.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn kernel(&self, name: &str) -> Result<Kernel, CudaError> {
        let symbol = CString::new(name).map_err(|_| CudaError::refused("kernel", "a name with a zero byte"))?;
        let mut handle = null_mut();
        let context = &self.0.context;
        context.bind()?;
        // SAFETY: writes one handle; the module is live and the name a C string.
        let code = unsafe { (context.driver().module_function)(&raw mut handle, self.0.handle, symbol.as_ptr()) };
        if code != driver::SUCCESS {
            let wanted = format!("{name} of module {}", self.0.name);
            return Err(context.error("cuModuleGetFunction", code, Some(&wanted)));
        }
        let mut kernel = Kernel {
            module: self.clone(),
            handle,
            name: name.into(),
            parameters: None,
            limits: Rc::new(Limits { shared_bytes: Cell::new(0), wide_clusters: Cell::new(false) }),
        };
        kernel.parameters = kernel.ask_parameters();
        let fixed = kernel.attribute(driver::FUNCTION_SHARED_BYTES)?;
        kernel.limits.shared_bytes.set(SHARED_BYTES_PLAIN.saturating_sub(fixed));
        Ok(kernel)
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // SAFETY: loaded in `from_image`, unloaded once; every kernel of it held this.
        self.context.call_in_drop(|driver| unsafe { (driver.module_unload)(self.handle) });
    }
}

/// A kernel. Clones are the same kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    module: Module,
    handle: Handle,
    name: Rc<str>,
    parameters: Option<Rc<[usize]>>,
    limits: Rc<Limits>,
}

/// What the driver was told that the kernel may have.
#[derive(Debug)]
struct Limits {
    shared_bytes: Cell<u32>,
    wide_clusters: Cell<bool>,
}

/// What the compiler made of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelAttributes {
    /// Registers of a thread.
    pub registers: u32,
    /// Local memory of a thread: spills and arrays.
    pub local_bytes: u32,
    /// Static shared memory of a block.
    pub shared_bytes: u32,
    /// Threads that a block may have.
    pub threads_max: u32,
}

impl Kernel {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the compiler made of it.
    ///
    /// # Errors
    /// A device that is lost.
    pub fn attributes(&self) -> Result<KernelAttributes, CudaError> {
        Ok(KernelAttributes {
            registers: self.attribute(driver::FUNCTION_REGISTERS)?,
            local_bytes: self.attribute(driver::FUNCTION_LOCAL_BYTES)?,
            shared_bytes: self.attribute(driver::FUNCTION_SHARED_BYTES)?,
            threads_max: self.attribute(driver::FUNCTION_MAX_THREADS)?,
        })
    }

    /// Lets a block have this much dynamic shared memory. Launches do it by themselves; made before a capture it is out of the way.
    ///
    /// # Errors
    /// More than the device has.
    pub fn allow_shared(&self, bytes: u32) -> Result<(), CudaError> {
        if bytes > self.limits.shared_bytes.get() {
            self.set_attribute(driver::FUNCTION_DYNAMIC_SHARED_BYTES, bytes)?;
            self.limits.shared_bytes.set(bytes);
        }
        Ok(())
    }

    /// Blocks that one multiprocessor holds at the same time.
    ///
    /// # Errors
    /// A launch of that size cannot be.
    pub fn blocks_per_multiprocessor(&self, num_threads: u32, shared_bytes: u32) -> Result<u32, CudaError> {
        self.allow_shared(shared_bytes)?;
        let mut blocks = 0;
        let threads = c_int::try_from(num_threads).unwrap_or(c_int::MAX);
        self.context().call("cuOccupancyMaxActiveBlocksPerMultiprocessor", |driver| {
            // SAFETY: writes one int; the function is live.
            unsafe { (driver.occupancy)(&raw mut blocks, self.handle, threads, shared_bytes as usize) }
        })?;
        Ok(u32::try_from(blocks).unwrap_or(0))
    }

    /// Tells the driver what this launch needs beyond what every kernel may have.
    pub(super) fn prepare(&self, config: &LaunchConfig) -> Result<(), CudaError> {
        self.allow_shared(config.shared_bytes)?;
        let is_wide = config.cluster.is_some_and(|[x, y, z]| x * y * z > CLUSTER_BLOCKS_PLAIN);
        if is_wide && !self.limits.wide_clusters.get() {
            self.set_attribute(driver::FUNCTION_NON_PORTABLE_CLUSTER, 1)?;
            self.limits.wide_clusters.set(true);
        }
        Ok(())
    }

    pub(super) fn parameters(&self) -> Option<&[usize]> {
        self.parameters.as_deref()
    }

    pub(super) fn handle(&self) -> Handle {
        self.handle
    }

    pub(super) fn shared_name(&self) -> &Rc<str> {
        &self.name
    }

    fn context(&self) -> &Context {
        &self.module.0.context
    }

    /// Sizes of its parameters, where the driver can tell.
    fn ask_parameters(&self) -> Option<Rc<[usize]>> {
        let ask = self.context().driver().function_parameter?;
        let size = |index| {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: writes two sizes; an index past the end is refused.
            let code = unsafe { ask(self.handle, index, &raw mut offset, &raw mut size) };
            (code == driver::SUCCESS).then_some(size)
        };
        Some((0..=ARGS_MAX).map_while(size).collect())
    }

    fn attribute(&self, which: c_int) -> Result<u32, CudaError> {
        let mut value = 0;
        self.context().bind()?;
        // SAFETY: writes one int; the function is live.
        let code = unsafe { (self.context().driver().function_attribute)(&raw mut value, which, self.handle) };
        match code {
            driver::SUCCESS => Ok(u32::try_from(value).unwrap_or(0)),
            code => Err(self.context().error("cuFuncGetAttribute", code, Some(&self.name))),
        }
    }

    fn set_attribute(&self, which: c_int, value: u32) -> Result<(), CudaError> {
        self.context().bind()?;
        let value = c_int::try_from(value).unwrap_or(c_int::MAX);
        // SAFETY: the function is live.
        let code = unsafe { (self.context().driver().function_set_attribute)(self.handle, which, value) };
        match code {
            driver::SUCCESS => Ok(()),
            code => Err(self.context().error("cuFuncSetAttribute", code, Some(&self.name))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_device_code_is_in_the_program() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
        let mut expected: Vec<String> = Vec::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|ending| ending == "cu") {
                expected.push(path.file_stem().unwrap().to_string_lossy().into_owned());
            }
        }
        expected.sort();
        assert_eq!(ModuleSet::names().collect::<Vec<_>>(), expected);
        assert!(expected.contains(&"poison".to_owned()));
        for source in SOURCES {
            assert!(!source.text.is_empty(), "{}", source.name);
            assert_eq!(source.fatbin.is_some(), BUILT.contains("nvcc 1"), "{}: {BUILT}", source.name);
            // The magic number of a fatbin, at an address that the driver can read numbers from.
            let image = source.fatbin.map(|image| &image.0);
            assert!(image.is_none_or(|image| image.starts_with(&[0x50, 0xED, 0x55, 0xBA])), "{}", source.name);
            assert!(image.is_none_or(|image| image.as_ptr().addr() % 64 == 0), "{}", source.name);
        }
    }

    #[test]
    fn only_a_missing_image_leads_to_compilation() {
        assert!(is_no_image_for_this_device(driver::NO_BINARY_FOR_GPU));
        assert!(!is_no_image_for_this_device(2), "exhausted memory is no reason");
        assert!(!is_no_image_for_this_device(700));
    }
}
