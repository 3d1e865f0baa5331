//! The functions that this crate uses, as one opened library has them.
//!
//! **Invariant:** every function of a table comes from the same handle, and the library is never closed, so the table's
//! functions stay callable.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

use crate::error::NcclError;
use crate::types::UniqueId;

/// A communicator's handle.
pub(crate) type RawComm = *mut c_void;

/// What `ncclCommInitRankConfig` reads. The oldest layout (2.14): newer libraries take what `size` and `version` say and fill the rest.
#[repr(C)]
pub(crate) struct RawConfig {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    /// Lies where newer layouts have a field; holds the interface's "not given".
    unset: c_int,
}

impl RawConfig {
    pub(crate) fn non_blocking() -> Self {
        Self { size: size_of::<Self>(), magic: 0xcafe_beef, version: 21400, blocking: 0, unset: c_int::MIN }
    }
}

type Reduce = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> c_int;
type Gather = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, RawComm, *mut c_void) -> c_int;
type Send = unsafe extern "C" fn(*const c_void, usize, c_int, c_int, RawComm, *mut c_void) -> c_int;
type Recv = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> c_int;
type OnComm = unsafe extern "C" fn(RawComm) -> c_int;
type InitConfig = unsafe extern "C" fn(*mut RawComm, c_int, UniqueId, c_int, *mut RawConfig) -> c_int;

/// The functions of one library. An `Option` is one that older versions lack.
pub(crate) struct Table {
    pub(crate) get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    pub(crate) get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    pub(crate) get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    pub(crate) get_last_error: Option<unsafe extern "C" fn(RawComm) -> *const c_char>,
    pub(crate) comm_init_rank: unsafe extern "C" fn(*mut RawComm, c_int, UniqueId, c_int) -> c_int,
    pub(crate) comm_init_rank_config: Option<InitConfig>,
    pub(crate) comm_finalize: Option<OnComm>,
    pub(crate) comm_destroy: OnComm,
    pub(crate) comm_abort: OnComm,
    pub(crate) comm_get_async_error: unsafe extern "C" fn(RawComm, *mut c_int) -> c_int,
    pub(crate) all_reduce: Reduce,
    pub(crate) all_gather: Gather,
    pub(crate) reduce_scatter: Reduce,
    pub(crate) broadcast: Reduce,
    pub(crate) send: Send,
    pub(crate) recv: Recv,
    pub(crate) group_start: unsafe extern "C" fn() -> c_int,
    pub(crate) group_end: unsafe extern "C" fn() -> c_int,
}

/// An open handle, and the file that was asked for.
pub(crate) struct Handle<'a> {
    pub(crate) raw: *mut c_void,
    pub(crate) path: &'a Path,
}

impl Handle<'_> {
    /// The address of a function, if the library has it.
    fn find(&self, symbol: &'static CStr) -> Option<*mut c_void> {
        // SAFETY: the handle is open and the name ends in a zero.
        let address = unsafe { libc::dlsym(self.raw, symbol.as_ptr()) };
        (!address.is_null()).then_some(address)
    }

    fn need(&self, symbol: &'static CStr) -> Result<*mut c_void, NcclError> {
        self.find(symbol).ok_or_else(|| NcclError::Symbol {
            path: self.path.to_path_buf(),
            symbol: symbol.to_str().unwrap_or("a function"),
        })
    }

    /// The file that the handle's functions come from, as the loader resolved it.
    pub(crate) fn file(&self) -> Option<PathBuf> {
        let address = self.find(c"ncclGetVersion")?;
        let mut found = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
        // SAFETY: the address is that of a function, and `found` has room for the answer.
        let known = unsafe { libc::dladdr(address, found.as_mut_ptr()) };
        // SAFETY: zeroed, it is a valid value in any case.
        let found = unsafe { found.assume_init() };
        if known == 0 || found.dli_fname.is_null() {
            return None;
        }
        // SAFETY: the loader's own string, which lives as long as the library is open: for ever.
        let name = unsafe { CStr::from_ptr(found.dli_fname) };
        Some(PathBuf::from(name.to_str().ok()?))
    }
}

/// An address as the function that lies there.
///
/// # Safety
/// `F` is a function pointer, and a function of that type lies at `address`, for as long as the program runs.
unsafe fn function<F: Copy>(address: *mut c_void) -> F {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>(), "not a function pointer") };
    // SAFETY: sizes agree, and the caller vouches for the type.
    unsafe { std::mem::transmute_copy(&address) }
}

/// Takes one function of a handle as the type of the field that it goes to.
macro_rules! function {
    ($handle:expr, $name:literal) => {
        // SAFETY: the interface gives the function of this name this type, in every version that has it.
        unsafe { function($handle.need($name)?) }
    };
    ($handle:expr, optional $name:literal) => {
        // SAFETY: as above.
        $handle.find($name).map(|address| unsafe { function(address) })
    };
}

impl Table {
    /// Takes all functions.
    pub(crate) fn take(handle: &Handle<'_>) -> Result<Self, NcclError> {
        Ok(Self {
            get_version: function!(handle, c"ncclGetVersion"),
            get_unique_id: function!(handle, c"ncclGetUniqueId"),
            get_error_string: function!(handle, c"ncclGetErrorString"),
            get_last_error: function!(handle, optional c"ncclGetLastError"),
            comm_init_rank: function!(handle, c"ncclCommInitRank"),
            comm_init_rank_config: function!(handle, optional c"ncclCommInitRankConfig"),
            comm_finalize: function!(handle, optional c"ncclCommFinalize"),
            comm_destroy: function!(handle, c"ncclCommDestroy"),
            comm_abort: function!(handle, c"ncclCommAbort"),
            comm_get_async_error: function!(handle, c"ncclCommGetAsyncError"),
            all_reduce: function!(handle, c"ncclAllReduce"),
            all_gather: function!(handle, c"ncclAllGather"),
            reduce_scatter: function!(handle, c"ncclReduceScatter"),
            broadcast: function!(handle, c"ncclBroadcast"),
            send: function!(handle, c"ncclSend"),
            recv: function!(handle, c"ncclRecv"),
            group_start: function!(handle, c"ncclGroupStart"),
            group_end: function!(handle, c"ncclGroupEnd"),
        })
    }
}
