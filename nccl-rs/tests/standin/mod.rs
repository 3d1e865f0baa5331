//! Builds the stand-in library and turns its knobs.

use std::ffi::{CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A folder with a library in it, removed at the end.
pub struct StandIn {
    folder: tempfile::TempDir,
    file: PathBuf,
}

impl StandIn {
    /// Compiles the stand-in under a file name, with further options. Each call makes a library with knobs of its own.
    pub fn build(name: &str, options: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join(name);
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/standin.c");
        let output = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"])
            .args(options)
            .arg("-o")
            .args([&file, &source])
            .output()
            .expect("a C compiler named cc");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self { folder, file }
    }

    pub fn folder(&self) -> PathBuf {
        self.folder.path().to_path_buf()
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Opens it as a program does that does not know this crate.
    pub fn open_raw(&self) -> *mut c_void {
        let name = CString::new(self.file.as_os_str().as_bytes()).expect("no zeros");
        // SAFETY: the name ends in a zero; the library is ours.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
        assert!(!handle.is_null(), "{} does not open", self.file.display());
        handle
    }

    fn symbol(&self, name: &str) -> *mut c_void {
        let name = CString::new(name).expect("no zeros");
        // SAFETY: the handle is open and the name ends in a zero.
        let address = unsafe { libc::dlsym(self.open_raw(), name.as_ptr()) };
        assert!(!address.is_null());
        address
    }

    pub fn set(&self, knob: &str, value: i32) {
        let knob = CString::new(knob).expect("no zeros");
        // SAFETY: the stand-in gives the function this type.
        let set: unsafe extern "C" fn(*const c_char, c_int) =
            unsafe { std::mem::transmute(self.symbol("standin_set")) };
        // SAFETY: the name ends in a zero.
        unsafe { set(knob.as_ptr(), value) }
    }

    pub fn get(&self, counter: &str) -> i32 {
        let counter = CString::new(counter).expect("no zeros");
        // SAFETY: the stand-in gives the function this type.
        let get: unsafe extern "C" fn(*const c_char) -> c_int =
            unsafe { std::mem::transmute(self.symbol("standin_get")) };
        // SAFETY: the name ends in a zero.
        unsafe { get(counter.as_ptr()) }
    }
}
