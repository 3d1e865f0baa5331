//! What NVIDIA's management library adds for people: the driver's release, and how many NVLinks of a device are up.
//!
//! Owns the table of its functions. Nothing that serves depends on it: a machine without it only says less.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use super::error::CudaError;
use super::library::{FoundLibrary, Library, function_table};

const NAME: &str = "NVML";
/// Links that a device can have.
const LINKS_MAX: c_uint = 18;
const SUCCESS: c_int = 0;

type Handle = *mut c_void;

function_table! {
    /// The management library.
    Nvml {
        init = c"nvmlInit_v2"() -> c_int;
        driver_version = c"nvmlSystemGetDriverVersion"(*mut c_char, c_uint) -> c_int;
        handle_by_uuid = c"nvmlDeviceGetHandleByUUID"(*const c_char, *mut Handle) -> c_int;
        link_state = c"nvmlDeviceGetNvLinkState"(Handle, c_uint, *mut c_uint) -> c_int;
    }
    optional {}
}

impl Nvml {
    fn open() -> Result<&'static Self, CudaError> {
        static NVML: OnceLock<Result<Nvml, CudaError>> = OnceLock::new();
        let open = || {
            let nvml = Self::load(&Library::open(NAME, &["libnvidia-ml.so.1", "libnvidia-ml.so"])?)?;
            // SAFETY: takes nothing.
            let code = unsafe { (nvml.init)() };
            check("nvmlInit", code).map(|()| nvml)
        };
        NVML.get_or_init(open).as_ref().map_err(Clone::clone)
    }
}

fn check(call: &'static str, code: c_int) -> Result<(), CudaError> {
    if code == SUCCESS { Ok(()) } else { Err(CudaError::refused(call, format!("it answers with code {code}"))) }
}

/// The library and the driver's release, for example `580.159.03`.
///
/// # Errors
/// No such library, or one that refuses.
pub fn driver_release() -> Result<FoundLibrary, CudaError> {
    let nvml = Nvml::open()?;
    let mut text = [0_u8; 96];
    // SAFETY: writes at most the given number of bytes, a terminating zero included.
    let code = unsafe { (nvml.driver_version)(text.as_mut_ptr().cast(), text.len() as c_uint - 1) };
    check("nvmlSystemGetDriverVersion", code)?;
    let version = CStr::from_bytes_until_nul(&text).map(|text| text.to_string_lossy().into_owned());
    Ok(FoundLibrary { path: nvml.path.clone(), version: version.unwrap_or_default() })
}

/// NVLinks of a device that are up.
///
/// # Errors
/// No such library, or it does not know the device.
pub fn num_nvlinks(uuid: &str) -> Result<u32, CudaError> {
    let nvml = Nvml::open()?;
    let name = CString::new(uuid).map_err(|_| CudaError::refused("nvml", "a name with a zero byte"))?;
    let mut handle: Handle = std::ptr::null_mut();
    // SAFETY: reads a C string, writes one handle.
    let code = unsafe { (nvml.handle_by_uuid)(name.as_ptr(), &raw mut handle) };
    check("nvmlDeviceGetHandleByUUID", code)?;
    let is_up = |link: &c_uint| {
        let mut state = 0;
        // SAFETY: the handle is the library's; writes one number. A link that the device lacks is refused with a code.
        let code = unsafe { (nvml.link_state)(handle, *link, &raw mut state) };
        code == SUCCESS && state == 1
    };
    Ok((0..LINKS_MAX).filter(is_up).count() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_the_library_says_so() {
        match driver_release() {
            Ok(found) => assert!(found.version.contains('.'), "{found:?}"),
            Err(error) => assert!(error.to_string().contains("NVML") || error.to_string().contains("nvml"), "{error}"),
        }
        assert!(num_nvlinks("GPU-absent").is_err());
    }
}
