//! cuBLASLt itself: its table of functions, its structs and codes.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::OnceLock;

use crate::cuda::context::Context;
use crate::cuda::error::CudaError;
use crate::cuda::library::{FoundLibrary, Library, LibraryReport, function_table};

/// Name in reports.
const NAME: &str = "cuBLASLt";
const PREFERENCE_WORKSPACE: c_int = 1;
const PREFERENCE_REDUCTION: c_int = 3;
/// Split products add in the compute type, in workspace; adding in the output's type would round more than once.
const REDUCTION_IN_F32: u32 = 2;
/// An algorithm that cannot run here after all.
pub(super) const NOT_SUPPORTED: c_int = 15;

pub(super) type Handle = *mut c_void;

/// `cublasLtMatmulAlgo_t`: the library's own notes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Algorithm([u64; 8]);

impl Algorithm {
    /// None yet.
    pub(super) const NOTHING: Self = Self([0; 8]);
}

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    /// What to run.
    pub algorithm: Algorithm,
    /// What it needs.
    pub workspace_bytes: usize,
    /// 0 where it can run.
    pub state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

pub(super) const NO_CANDIDATE: Candidate =
    Candidate { algorithm: Algorithm::NOTHING, workspace_bytes: 0, state: 0, waves: 0.0, reserved: [0; 4] };

function_table! {
    /// The library.
    Lt {
        version = c"cublasLtGetVersion"() -> usize;
        create = c"cublasLtCreate"(*mut Handle) -> c_int;
        destroy = c"cublasLtDestroy"(Handle) -> c_int;
        desc_create = c"cublasLtMatmulDescCreate"(*mut Handle, c_int, c_int) -> c_int;
        desc_set = c"cublasLtMatmulDescSetAttribute"(Handle, c_int, *const c_void, usize) -> c_int;
        desc_destroy = c"cublasLtMatmulDescDestroy"(Handle) -> c_int;
        layout_create = c"cublasLtMatrixLayoutCreate"(*mut Handle, c_int, u64, u64, i64) -> c_int;
        layout_destroy = c"cublasLtMatrixLayoutDestroy"(Handle) -> c_int;
        preference_create = c"cublasLtMatmulPreferenceCreate"(*mut Handle) -> c_int;
        preference_set = c"cublasLtMatmulPreferenceSetAttribute"(Handle, c_int, *const c_void, usize) -> c_int;
        preference_destroy = c"cublasLtMatmulPreferenceDestroy"(Handle) -> c_int;
        heuristic = c"cublasLtMatmulAlgoGetHeuristic"(
            Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Candidate, *mut c_int,
        ) -> c_int;
        matmul = c"cublasLtMatmul"(
            Handle, Handle, *const c_void, *const c_void, Handle, *const c_void, Handle, *const c_void, *const c_void,
            Handle, *mut c_void, Handle, *const Algorithm, *mut c_void, usize, Handle,
        ) -> c_int;
    }
    optional {}
}

impl Lt {
    /// Opens it, once for the process.
    pub(super) fn open() -> Result<&'static Self, CudaError> {
        static LT: OnceLock<Result<Lt, CudaError>> = OnceLock::new();
        let open = || Self::load(&Library::open(NAME, &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"])?);
        LT.get_or_init(open).as_ref().map_err(Clone::clone)
    }
}

/// Whether it is there, and where.
pub fn report() -> LibraryReport {
    let found = Lt::open().map(|lt| {
        // SAFETY: takes nothing, gives a number.
        let version = unsafe { (lt.version)() };
        FoundLibrary { path: lt.path.clone(), version: version_text(version) }
    });
    let purpose = "matrix products of many rows";
    LibraryReport { name: NAME, purpose, found: found.map_err(|error| error.to_string()) }
}

/// `130100` as `13.1.0`.
fn version_text(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

impl std::fmt::Debug for Lt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Lt").field(&self.path).finish()
    }
}

/// What algorithms are asked for.
pub(super) struct Preference {
    lt: &'static Lt,
    /// To be given to `heuristic`.
    pub handle: Handle,
}

impl Preference {
    /// At most so much workspace, sums in f32.
    pub(super) fn new(context: &Context, lt: &'static Lt, workspace_bytes: usize) -> Result<Self, CudaError> {
        let mut handle = null_mut();
        // SAFETY: writes one handle.
        check(context, "cublasLtMatmulPreferenceCreate", unsafe { (lt.preference_create)(&raw mut handle) })?;
        let preference = Self { lt, handle };
        let set = |attribute, value: *const c_void, size| {
            // SAFETY: reads `size` bytes of the value.
            let code = unsafe { (lt.preference_set)(handle, attribute, value, size) };
            check(context, "cublasLtMatmulPreferenceSetAttribute", code)
        };
        set(PREFERENCE_WORKSPACE, (&raw const workspace_bytes).cast(), size_of::<usize>())?;
        let reduction: c_uint = REDUCTION_IN_F32;
        set(PREFERENCE_REDUCTION, (&raw const reduction).cast(), size_of::<c_uint>())?;
        Ok(preference)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        unsafe { (self.lt.preference_destroy)(self.handle) };
    }
}

/// An error where a call's code is one.
pub(super) fn check(context: &Context, call: &'static str, code: c_int) -> Result<(), CudaError> {
    if code == 0 {
        return Ok(());
    }
    let device = Some(context.ordinal());
    Err(CudaError::Call { call, code, name: name_of(code).into(), device, kernel: context.last_launch() })
}

fn name_of(code: c_int) -> &'static str {
    match code {
        1 => "CUBLAS_STATUS_NOT_INITIALIZED",
        3 => "CUBLAS_STATUS_ALLOC_FAILED",
        7 => "CUBLAS_STATUS_INVALID_VALUE",
        8 => "CUBLAS_STATUS_ARCH_MISMATCH",
        11 => "CUBLAS_STATUS_MAPPING_ERROR",
        13 => "CUBLAS_STATUS_EXECUTION_FAILED",
        14 => "CUBLAS_STATUS_INTERNAL_ERROR",
        15 => "CUBLAS_STATUS_NOT_SUPPORTED",
        16 => "CUBLAS_STATUS_LICENSE_ERROR",
        _ => "a code of cuBLAS",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_have_the_sizes_of_the_header() {
        assert_eq!(size_of::<Algorithm>(), 64);
        assert_eq!(size_of::<Candidate>(), 96);
        assert_eq!(std::mem::offset_of!(Candidate, state), 72);
    }

    #[test]
    fn a_version_reads_as_the_vendor_writes_it() {
        assert_eq!(version_text(130_100), "13.1.0");
        assert_eq!(version_text(120_805), "12.8.5");
    }
}
