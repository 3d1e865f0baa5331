//! Opens the libraries of CUDA at run time and says which were found.
//!
//! Owns the search order, the handles and the tables of functions. Knows no device.
//!
//! **Invariant:** symbols are taken from the very handle that was opened, a missing library or symbol is a value, and
//! every result code crosses as an integer, so that no answer of a newer library is undefined behaviour.
//! Handles are never closed: what a library has started (threads, contexts) outlives any owner of ours.

use std::ffi::{CStr, CString, c_void};
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::error::CudaError;

/// Where installations keep their libraries when the loader's own search does not know them.
const FOLDERS: [&str; 5] = [
    "/usr/local/cuda/lib64",
    "/usr/local/cuda/targets/x86_64-linux/lib",
    "/usr/local/cuda/targets/sbsa-linux/lib",
    "/usr/local/nvidia/lib64",
    "/usr/lib/wsl/lib",
];

/// What the loader says of a file that is not there.
const ABSENT: &str = "cannot open shared object file: No such file or directory";

static EXTRA_FOLDERS: OnceLock<Vec<PathBuf>> = OnceLock::new();

/// Adds folders in which libraries are looked for, before the usual ones; only the first call, made before any device is used, counts.
pub fn search_also(folders: Vec<PathBuf>) {
    // A second call changes nothing: libraries may be open already.
    let _ = EXTRA_FOLDERS.set(folders);
}

/// Where a toolkit keeps its libraries.
pub fn toolkit_folders(home: &Path) -> Vec<PathBuf> {
    ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|folder| home.join(folder)).into()
}

/// One library of CUDA: was it found, where, and which version says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibraryReport {
    /// What people call it.
    pub name: &'static str,
    /// What it is needed for.
    pub purpose: &'static str,
    /// Path and version, or why it cannot be used.
    pub found: Result<FoundLibrary, String>,
}

/// A library that was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundLibrary {
    /// The file.
    pub path: PathBuf,
    /// As the library says it, for example `13.0`.
    pub version: String,
}

/// An open library.
pub(super) struct Library {
    name: &'static str,
    handle: *mut c_void,
}

impl Library {
    /// Opens the first of `names` that can be opened: by the loader's search, then in the known folders.
    pub(super) fn open(name: &'static str, names: &[&str]) -> Result<Self, CudaError> {
        let extra = EXTRA_FOLDERS.get().map(Vec::as_slice).unwrap_or_default();
        let folders = extra.iter().map(PathBuf::as_path).chain(FOLDERS.iter().map(Path::new));
        let below = folders.flat_map(|folder| names.iter().map(|file| folder.join(file))).filter(|path| path.is_file());
        let mut reasons = Vec::new();
        for file in names.iter().map(PathBuf::from).chain(below) {
            match open_file(&file) {
                Ok(handle) => return Ok(Self { name, handle }),
                // What is only not there is said once, below.
                Err(reason) if reason == format!("{}: {ABSENT}", file.display()) => {}
                Err(reason) => reasons.push(reason),
            }
        }
        if reasons.is_empty() {
            reasons.push(format!("no {} where the loader looks, nor in {}", names.join(" or "), FOLDERS.join(", ")));
        }
        Err(CudaError::Missing { library: name, reason: reasons.join("; ") })
    }

    /// Address of a function.
    pub(super) fn symbol(&self, symbol: &CStr) -> Result<*mut c_void, CudaError> {
        // SAFETY: a live handle, never closed, and a C string.
        let address = unsafe { libc::dlsym(self.handle, symbol.as_ptr()) };
        if address.is_null() {
            let reason = format!("the library found has no {}", symbol.to_string_lossy());
            return Err(CudaError::Missing { library: self.name, reason });
        }
        Ok(address)
    }

    /// The file, found by the functions that were taken from it.
    pub(super) fn path(&self, symbols: &[&CStr]) -> PathBuf {
        let Some(address) = symbols.iter().find_map(|symbol| self.symbol(symbol).ok()) else {
            return PathBuf::from(self.name);
        };
        let mut found = MaybeUninit::<libc::Dl_info>::zeroed();
        // SAFETY: `dladdr` fills the struct when it returns non-zero; zeroes are a valid `Dl_info`.
        let (ok, found) = unsafe { (libc::dladdr(address, found.as_mut_ptr()), found.assume_init()) };
        if ok == 0 || found.dli_fname.is_null() {
            return PathBuf::from(self.name);
        }
        // SAFETY: `dladdr` points to the loader's own C string, which lives as long as the library: for ever.
        PathBuf::from(unsafe { CStr::from_ptr(found.dli_fname) }.to_string_lossy().into_owned())
    }
}

/// Opens one file or soname; the error is the loader's sentence.
pub(super) fn open_file(file: &Path) -> Result<*mut c_void, String> {
    let name = CString::new(file.as_os_str().as_encoded_bytes()).map_err(|_| "a name with a zero byte".to_string())?;
    // SAFETY: loading a library runs its initialisers, which is what it is for; the handle is never closed.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if !handle.is_null() {
        return Ok(handle);
    }
    // SAFETY: `dlerror` gives null or a C string that is valid until this thread's next call.
    let said = unsafe { libc::dlerror() };
    if said.is_null() {
        return Err(format!("{} cannot be opened", file.display()));
    }
    // SAFETY: as above, not null.
    Err(unsafe { CStr::from_ptr(said) }.to_string_lossy().into_owned())
}

/// A struct of functions taken from one library: each field has a symbol and a signature; `optional` ones may be absent.
macro_rules! function_table {
    (
        $(#[$meta:meta])* $name:ident {
            $( $field:ident = $symbol:literal ( $($arg:ty),* $(,)? ) -> $ret:ty; )*
        }
        optional { $( $maybe:ident = $maybe_symbol:literal ( $($maybe_arg:ty),* $(,)? ) -> $maybe_ret:ty; )* }
    ) => {
        $(#[$meta])*
        pub(super) struct $name {
            $( pub(super) $field: unsafe extern "C" fn($($arg),*) -> $ret, )*
            $( pub(super) $maybe: Option<unsafe extern "C" fn($($maybe_arg),*) -> $maybe_ret>, )*
            /// The file.
            pub(super) path: std::path::PathBuf,
        }

        impl $name {
            pub(super) fn load(library: &$crate::cuda::library::Library) -> Result<Self, $crate::cuda::error::CudaError> {
                $(
                    let address = library.symbol($symbol)?;
                    // SAFETY: the signature is the one in the library's header for this symbol.
                    let $field = unsafe {
                        std::mem::transmute::<*mut std::ffi::c_void, unsafe extern "C" fn($($arg),*) -> $ret>(address)
                    };
                )*
                $(
                    let $maybe = library.symbol($maybe_symbol).ok().map(|address| {
                        // SAFETY: as above.
                        unsafe {
                            std::mem::transmute::<*mut std::ffi::c_void, unsafe extern "C" fn($($maybe_arg),*) -> $maybe_ret>(address)
                        }
                    });
                )*
                Ok(Self { $($field,)* $($maybe,)* path: library.path(&[$($symbol),*]) })
            }
        }
    };
}
pub(super) use function_table;

/// What was found of everything that CUDA needs. Initialises the driver; touches no device.
pub fn libraries() -> Vec<LibraryReport> {
    vec![super::driver::report(), super::blaslt::report(), super::nvrtc::report()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_a_sentence() {
        let Err(error) = Library::open("no such library", &["libphalanx_absent.so.9", "libphalanx_absent.so"]) else {
            panic!("it cannot be there");
        };
        let words = error.to_string();
        assert!(words.starts_with("no such library cannot be used: no libphalanx_absent.so.9 or "), "{words}");
    }

    #[test]
    fn a_missing_symbol_is_a_sentence() {
        let library = Library::open("C library", &["libc.so.6"]).unwrap();
        assert!(library.symbol(c"strlen").is_ok());
        let words = library.symbol(c"phalanx_absent").unwrap_err().to_string();
        assert!(words.contains("has no phalanx_absent"), "{words}");
    }

    #[test]
    fn every_library_is_reported() {
        let reports = libraries();
        assert_eq!(reports.iter().map(|report| report.name).collect::<Vec<_>>(), ["CUDA driver", "cuBLASLt", "NVRTC"]);
        for report in reports {
            if let Err(reason) = report.found {
                assert!(reason.contains("lib"), "{reason}");
            }
        }
    }
}
