//! What the driver says of its devices, without making any device ours.
//!
//! Owns the list of devices, their properties and who can read whose memory. `CUDA_VISIBLE_DEVICES` is the driver's own
//! affair: ordinals here are those that it leaves visible.

use std::ffi::{CStr, c_char, c_int};

use super::driver::{self, Driver, NO_DEVICE, RawDevice};
use super::error::CudaError;

/// A device and its properties.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Position among the visible devices.
    pub ordinal: u32,
    /// As `nvidia-smi -L` writes it: `GPU-...`.
    pub uuid: String,
    /// Product name.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Memory of the device.
    pub total_bytes: u64,
    /// Streaming multiprocessors.
    pub num_multiprocessors: u32,
    /// Second-level cache.
    pub l2_bytes: u64,
    /// Shared memory that a block may ask for.
    pub shared_bytes_max: u32,
    /// Address on the PCI bus, `0000:1b:00.0`.
    pub pci_bus_id: String,
}

impl Device {
    /// Whether kernels may use bfloat16 arithmetic.
    pub fn has_bfloat16(&self) -> bool {
        self.capability >= (8, 0)
    }
}

/// Whether one device reaches another's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerAccess {
    /// Loads and stores reach it.
    pub access: bool,
    /// Atomic operations do too: NVLink, not PCI.
    pub native_atomics: bool,
}

/// All visible devices, in the driver's order; an empty list where the driver has none.
///
/// # Errors
/// No driver, or one that refuses.
pub fn devices() -> Result<Vec<Device>, CudaError> {
    let driver = Driver::open()?;
    (0..count(driver)?).map(|ordinal| device(driver, ordinal)).collect()
}

/// Version of the driver's API, for example `13.0`.
///
/// # Errors
/// No driver.
pub fn driver_version() -> Result<String, CudaError> {
    Ok(driver::version_text(Driver::open()?.version()?))
}

/// `matrix[a][b]`: what device `a` may do with the memory of device `b`; itself it reaches always.
///
/// # Errors
/// No driver, or one that refuses.
pub fn peer_matrix() -> Result<Vec<Vec<PeerAccess>>, CudaError> {
    let driver = Driver::open()?;
    let count = count(driver)?;
    let row = |from| (0..count).map(|to| peer_access(driver, from, to)).collect::<Result<Vec<_>, _>>();
    (0..count).map(row).collect()
}

fn peer_access(driver: &Driver, from: u32, to: u32) -> Result<PeerAccess, CudaError> {
    if from == to {
        return Ok(PeerAccess { access: true, native_atomics: true });
    }
    let (source, target) = (raw(driver, from)?, raw(driver, to)?);
    let ask = |attribute| {
        let mut value = 0;
        // SAFETY: writes one int; both devices come from the driver.
        let code = unsafe { (driver.device_p2p_attribute)(&raw mut value, attribute, source, target) };
        driver.check("cuDeviceGetP2PAttribute", code, Some(from)).map(|()| value != 0)
    };
    let mut access = 0;
    // SAFETY: as above.
    let code = unsafe { (driver.can_access_peer)(&raw mut access, source, target) };
    driver.check("cuDeviceCanAccessPeer", code, Some(from))?;
    Ok(PeerAccess {
        access: access != 0 && ask(driver::P2P_ACCESS_SUPPORTED)?,
        native_atomics: ask(driver::P2P_NATIVE_ATOMICS)?,
    })
}

fn count(driver: &Driver) -> Result<u32, CudaError> {
    let mut count = 0;
    // SAFETY: writes one int.
    let code = unsafe { (driver.device_count)(&raw mut count) };
    if matches!(code, NO_DEVICE | driver::NOT_INITIALIZED) {
        // A driver without devices refuses to initialise, and says so here once more.
        return Ok(0);
    }
    driver.check("cuDeviceGetCount", code, None)?;
    Ok(u32::try_from(count).unwrap_or(0))
}

/// The driver's handle of a device.
pub(super) fn raw(driver: &Driver, ordinal: u32) -> Result<RawDevice, CudaError> {
    let mut device = 0;
    // An ordinal past `c_int` is past every device.
    let index = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
    // SAFETY: writes one int.
    let code = unsafe { (driver.device)(&raw mut device, index) };
    driver.check("cuDeviceGet", code, Some(ordinal)).map(|()| device)
}

/// Properties of one device.
pub(super) fn device(driver: &Driver, ordinal: u32) -> Result<Device, CudaError> {
    let handle = raw(driver, ordinal)?;
    let attribute = |which| {
        let mut value = 0;
        // SAFETY: writes one int; the device comes from the driver.
        let code = unsafe { (driver.device_attribute)(&raw mut value, which, handle) };
        driver.check("cuDeviceGetAttribute", code, Some(ordinal)).map(|()| u32::try_from(value).unwrap_or(0))
    };
    let mut total = 0;
    // SAFETY: writes one size.
    let code = unsafe { (driver.device_memory)(&raw mut total, handle) };
    driver.check("cuDeviceTotalMem", code, Some(ordinal))?;
    let mut uuid = [0; 16];
    // SAFETY: writes the 16 bytes of a `CUuuid`.
    let code = unsafe { (driver.device_uuid)(&raw mut uuid, handle) };
    driver.check("cuDeviceGetUuid", code, Some(ordinal))?;
    Ok(Device {
        ordinal,
        uuid: uuid_text(&uuid),
        name: text(driver, "cuDeviceGetName", driver.device_name, handle, ordinal)?,
        capability: (attribute(driver::ATTRIBUTE_CAPABILITY_MAJOR)?, attribute(driver::ATTRIBUTE_CAPABILITY_MINOR)?),
        total_bytes: total as u64,
        num_multiprocessors: attribute(driver::ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        l2_bytes: u64::from(attribute(driver::ATTRIBUTE_L2_BYTES)?),
        shared_bytes_max: attribute(driver::ATTRIBUTE_SHARED_BYTES_OPTIN)?,
        pci_bus_id: text(driver, "cuDeviceGetPCIBusId", driver.device_bus_id, handle, ordinal)?,
    })
}

type AskText = unsafe extern "C" fn(*mut c_char, c_int, RawDevice) -> c_int;

fn text(
    driver: &Driver,
    call: &'static str,
    ask: AskText,
    handle: RawDevice,
    ordinal: u32,
) -> Result<String, CudaError> {
    let mut buffer = [0_u8; 256];
    // SAFETY: writes at most the given number of bytes, a terminating zero included; one byte less is offered.
    let code = unsafe { ask(buffer.as_mut_ptr().cast(), 255, handle) };
    driver.check(call, code, Some(ordinal))?;
    Ok(CStr::from_bytes_until_nul(&buffer).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default())
}

fn uuid_text(bytes: &[u8; 16]) -> String {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_reads_as_other_tools_write_it() {
        let bytes = [0x1f, 0, 0xab, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0xff];
        assert_eq!(uuid_text(&bytes), "GPU-1f00ab03-0405-0607-0809-0a0b0c0d0eff");
    }

    #[test]
    fn a_machine_lists_its_devices_or_says_why_not() {
        match devices() {
            Ok(devices) => assert!(devices.iter().all(|device| device.uuid.starts_with("GPU-"))),
            Err(error) => assert!(error.to_string().contains("CUDA driver"), "{error}"),
        }
    }
}
