//! Finds and opens a library.
//!
//! Owns the search order and what is said of a library: vendor, version, file. Never closes one: it may have started threads.

use std::ffi::{CStr, CString, c_int};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{NcclError, SUCCESS, code_name};
use crate::table::{Handle, RawComm, Table};
use crate::types::{UniqueId, Vendor, Version};

/// Where to look, and for whose library. By default: NCCL, then RCCL, by the system's loader.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Search {
    /// Whose library; both, NCCL first, if not given.
    pub vendor: Option<Vendor>,
    /// Folders to look in before the loader's own.
    pub folders: Vec<PathBuf>,
}

impl Search {
    /// What to try, in order.
    fn candidates(&self) -> Vec<(Vendor, PathBuf)> {
        let vendors: &[Vendor] = match &self.vendor {
            Some(vendor) => std::slice::from_ref(vendor),
            None => &[Vendor::Nccl, Vendor::Rccl],
        };
        let bare = PathBuf::new();
        let mut candidates = Vec::new();
        for folder in self.folders.iter().chain([&bare]) {
            for vendor in vendors {
                candidates.extend(vendor.file_names().iter().map(|name| (*vendor, folder.join(name))));
            }
        }
        candidates
    }
}

/// An open library. Clones share it; any thread may use it.
#[derive(Clone)]
pub struct Library {
    open: Arc<Open>,
}

struct Open {
    table: Table,
    vendor: Vendor,
    version: Version,
    path: PathBuf,
}

impl Library {
    /// Opens the first library that can be opened.
    ///
    /// It trusts files of the names of [`Vendor::file_names`] as linking against them would.
    ///
    /// # Errors
    /// [`NcclError::NotFound`] with everything that was tried: the caller may go on without. [`NcclError::Symbol`] where a file was
    /// opened that is no such library; nothing further is tried then, so that no library is passed over in silence.
    pub fn open(search: &Search) -> Result<Self, NcclError> {
        let mut tried = Vec::new();
        for (vendor, path) in search.candidates() {
            match open_file(&path) {
                Ok(handle) => return Self::from_handle(vendor, &Handle { raw: handle, path: &path }),
                Err(reason) => tried.push(reason),
            }
        }
        Err(NcclError::NotFound { tried })
    }

    fn from_handle(vendor: Vendor, handle: &Handle<'_>) -> Result<Self, NcclError> {
        let table = Table::take(handle)?;
        let path = handle.file().unwrap_or_else(|| handle.path.to_path_buf());
        let mut code: c_int = 0;
        // SAFETY: `code` has room for the answer.
        let result = unsafe { (table.get_version)(&raw mut code) };
        let open = Open { table, vendor, version: Version::from_code(code), path };
        let library = Self { open: Arc::new(open) };
        library.check("ncclGetVersion", result)?;
        Ok(library)
    }

    /// Whose library it is, by the name under which it was found.
    pub fn vendor(&self) -> Vendor {
        self.open.vendor
    }

    /// Its version, as it says.
    pub fn version(&self) -> Version {
        self.open.version
    }

    /// The file that its functions come from.
    pub fn path(&self) -> &Path {
        &self.open.path
    }

    /// Makes the name of a new communicator. One rank calls it and gives the others the bytes.
    ///
    /// # Errors
    /// [`NcclError::Call`], for example where no network interface can be used.
    pub fn unique_id(&self) -> Result<UniqueId, NcclError> {
        let mut id = UniqueId::from_bytes([0; UniqueId::BYTES]);
        // SAFETY: `id` has the layout of `ncclUniqueId` and room for it.
        let result = unsafe { (self.table().get_unique_id)(&raw mut id) };
        self.check("ncclGetUniqueId", result)?;
        Ok(id)
    }

    pub(crate) fn table(&self) -> &Table {
        &self.open.table
    }

    /// An error unless `code` is success.
    pub(crate) fn check(&self, function: &'static str, code: i32) -> Result<(), NcclError> {
        if code == SUCCESS { Ok(()) } else { Err(self.error(function, code, std::ptr::null_mut())) }
    }

    /// What a code means. `comm`: null, or a communicator that has not been destroyed.
    pub(crate) fn error(&self, function: &'static str, code: i32, comm: RawComm) -> NcclError {
        let table = self.table();
        // SAFETY: takes any code and answers with a constant string.
        let mut said = vec![text(unsafe { (table.get_error_string)(code) })];
        if let Some(last_error) = table.get_last_error {
            // SAFETY: null is allowed; otherwise the communicator is alive.
            said.push(text(unsafe { last_error(comm) }));
        }
        said.retain(|part| !part.is_empty());
        NcclError::Call { function, version: self.version(), code, name: code_name(code), detail: said.join(": ") }
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({})", self.vendor(), self.version(), self.path().display())
    }
}

/// The text of a C string; nothing if there is none.
fn text(string: *const std::ffi::c_char) -> String {
    if string.is_null() {
        return String::new();
    }
    // SAFETY: not null, so a string of the library or the loader that lives until the next call into it on this thread.
    unsafe { CStr::from_ptr(string) }.to_string_lossy().trim().to_owned()
}

/// Opens a file, or says why not.
fn open_file(path: &Path) -> Result<*mut std::ffi::c_void, String> {
    let name =
        CString::new(path.as_os_str().as_bytes()).map_err(|_| format!("{}: a zero in the name", path.display()))?;
    // SAFETY: the name ends in a zero; what the library runs as it is opened is trusted as if it were linked.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if !handle.is_null() {
        return Ok(handle);
    }
    // SAFETY: has no precondition; the answer is this thread's last error.
    let reason = text(unsafe { libc::dlerror() });
    Err(if reason.is_empty() { format!("{}: no reason given", path.display()) } else { reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_before_the_loader_and_nccl_before_rccl() {
        let names = |search: Search| {
            let shown = search.candidates().into_iter().map(|(_, path)| path.display().to_string());
            shown.collect::<Vec<_>>().join(" ")
        };
        assert_eq!(names(Search::default()), "libnccl.so.2 libnccl.so librccl.so.1 librccl.so");
        let search = Search { vendor: None, folders: vec![PathBuf::from("/a")] };
        let expected = "/a/libnccl.so.2 /a/libnccl.so /a/librccl.so.1 /a/librccl.so libnccl.so.2 libnccl.so librccl.so.1 librccl.so";
        assert_eq!(names(search), expected);
        let search = Search { vendor: Some(Vendor::Rccl), folders: vec![PathBuf::from("/a")] };
        assert_eq!(names(search), "/a/librccl.so.1 /a/librccl.so librccl.so.1 librccl.so");
    }
}
