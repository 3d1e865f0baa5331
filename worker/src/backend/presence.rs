//! Which devices this machine has, asked of the drivers without making any device ours.

use std::ffi::{CStr, c_int, c_void};
use std::sync::mpsc;
use std::time::Duration;

use phalanx_proto::DeviceKind;

/// Whether this version can compute on a kind of device.
pub fn serves(kind: DeviceKind) -> bool {
    matches!(kind, DeviceKind::Cpu | DeviceKind::Cuda)
}

/// Counts the devices of a kind, as the driver's library sees them (its `..._VISIBLE_DEVICES` are respected).
///
/// # Errors
/// A sentence: no library, a driver that refuses, or one that does not answer within `deadline`.
pub fn count(kind: DeviceKind, deadline: Duration) -> Result<u32, String> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let asked = std::thread::Builder::new().name("probe".into()).spawn(move || {
        // Nobody listens any more where the deadline has passed.
        let _ = sender.send(match kind {
            DeviceKind::Cpu => Ok(1),
            DeviceKind::Cuda => ask(&[c"libcuda.so.1", c"libcuda.so"], Some(c"cuInit"), c"cuDeviceGetCount"),
            DeviceKind::Rocm => {
                ask(&[c"libamdhip64.so", c"libamdhip64.so.6", c"libamdhip64.so.5"], None, c"hipGetDeviceCount")
            }
        });
    });
    asked.map_err(|error| format!("the driver cannot be asked: {error}"))?;
    receiver.recv_timeout(deadline).unwrap_or_else(|_| Err(format!("the driver does not answer within {deadline:?}")))
}

/// Opens the first library that is there, initialises it, and asks it for its number of devices.
fn ask(libraries: &[&CStr], init: Option<&CStr>, count: &CStr) -> Result<u32, String> {
    // SAFETY: loading a driver's library runs its initialisers, which is what it is for; the handle is never closed.
    let handle =
        libraries.iter().map(|name| unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) }).find(|h| !h.is_null());
    let handle = handle.ok_or_else(|| format!("{} cannot be opened", libraries[0].to_string_lossy()))?;
    if let Some(init) = init {
        let address = symbol(handle, init)?;
        // SAFETY: the driver API declares `CUresult cuInit(unsigned int)`, and result codes are ints.
        let init: extern "C" fn(u32) -> c_int = unsafe { std::mem::transmute(address) };
        match init(0) {
            0 => {}
            // CUDA_ERROR_NO_DEVICE.
            100 => return Ok(0),
            code => return Err(format!("the driver refuses with code {code}")),
        }
    }
    let address = symbol(handle, count)?;
    // SAFETY: both APIs declare `int f(int *count)`.
    let ask: extern "C" fn(*mut c_int) -> c_int = unsafe { std::mem::transmute(address) };
    let mut number: c_int = 0;
    match ask(&raw mut number) {
        0 => Ok(u32::try_from(number).unwrap_or(0)),
        100 => Ok(0),
        code => Err(format!("the driver refuses with code {code}")),
    }
}

fn symbol(handle: *mut c_void, name: &CStr) -> Result<*mut c_void, String> {
    // SAFETY: a live handle and a C string.
    let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
    if address.is_null() { Err(format!("the driver has no {}", name.to_string_lossy())) } else { Ok(address) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_answers_for_each_kind() {
        assert_eq!(count(DeviceKind::Cpu, Duration::from_secs(5)), Ok(1));
        for kind in [DeviceKind::Cuda, DeviceKind::Rocm] {
            if let Err(reason) = count(kind, Duration::from_secs(20)) {
                assert!(reason.contains("driver") || reason.contains("cannot be opened"), "{reason}");
            }
        }
    }
}
