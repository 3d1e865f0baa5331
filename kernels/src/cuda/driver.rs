//! The driver's functions, constants and structs: only what is used.
//!
//! Owns the table and the one initialisation of the driver. Versions of functions are those of the CUDA 12.0 headers, so
//! driver 525 is the oldest that works.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use super::error::CudaError;
use super::library::{FoundLibrary, Library, LibraryReport, function_table};

/// Name in reports.
const NAME: &str = "CUDA driver";

pub(super) const SUCCESS: c_int = 0;
pub(super) const NOT_INITIALIZED: c_int = 3;
pub(super) const NO_DEVICE: c_int = 100;
pub(super) const INVALID_IMAGE: c_int = 200;
pub(super) const NO_BINARY_FOR_GPU: c_int = 209;
pub(super) const INVALID_PTX: c_int = 218;
pub(super) const JIT_COMPILER_NOT_FOUND: c_int = 221;
pub(super) const UNSUPPORTED_PTX_VERSION: c_int = 222;
pub(super) const JIT_DISABLED: c_int = 223;
pub(super) const NOT_READY: c_int = 600;
pub(super) const PEER_ACCESS_ALREADY_ENABLED: c_int = 704;

pub(super) const ATTRIBUTE_MULTIPROCESSOR_COUNT: c_int = 16;
pub(super) const ATTRIBUTE_L2_BYTES: c_int = 38;
pub(super) const ATTRIBUTE_CAPABILITY_MAJOR: c_int = 75;
pub(super) const ATTRIBUTE_CAPABILITY_MINOR: c_int = 76;
pub(super) const ATTRIBUTE_SHARED_BYTES_OPTIN: c_int = 97;

pub(super) const P2P_ACCESS_SUPPORTED: c_int = 2;
pub(super) const P2P_NATIVE_ATOMICS: c_int = 3;

pub(super) const HOST_ALLOC_PORTABLE: c_uint = 1;
pub(super) const HOST_ALLOC_MAPPED: c_uint = 2;
pub(super) const IPC_LAZY_PEER_ACCESS: c_uint = 1;
pub(super) const STREAM_NON_BLOCKING: c_uint = 1;
pub(super) const EVENT_DISABLE_TIMING: c_uint = 2;
pub(super) const CAPTURE_RELAXED: c_int = 2;
pub(super) const MEMORY_DEVICE: c_uint = 2;

pub(super) const FUNCTION_MAX_THREADS: c_int = 0;
pub(super) const FUNCTION_SHARED_BYTES: c_int = 1;
pub(super) const FUNCTION_LOCAL_BYTES: c_int = 3;
pub(super) const FUNCTION_REGISTERS: c_int = 4;
pub(super) const FUNCTION_DYNAMIC_SHARED_BYTES: c_int = 8;
pub(super) const FUNCTION_NON_PORTABLE_CLUSTER: c_int = 14;

pub(super) const LAUNCH_COOPERATIVE: c_uint = 2;
pub(super) const LAUNCH_CLUSTER: c_uint = 4;
pub(super) const LAUNCH_DEPENDENT: c_uint = 6;

/// `CUcontext`, `CUstream`, `CUevent`, `CUmodule`, `CUfunction`, `CUgraph`, `CUgraphExec`: addresses that mean something to the driver.
pub(super) type Handle = *mut c_void;
/// `CUdevice`.
pub(super) type RawDevice = c_int;
/// `CUdeviceptr`.
pub(super) type RawPointer = u64;

/// `CUlaunchAttribute`: an id, padding, and 64 bytes of value of which the first twelve are used here.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct LaunchAttribute {
    pub(super) id: c_uint,
    pub(super) padding: u32,
    pub(super) value: [u64; 8],
}

/// `CUlaunchConfig`.
#[repr(C)]
pub(super) struct RawLaunch {
    pub(super) grid: [c_uint; 3],
    pub(super) block: [c_uint; 3],
    pub(super) shared_bytes: c_uint,
    pub(super) stream: Handle,
    pub(super) attributes: *const LaunchAttribute,
    pub(super) num_attributes: c_uint,
}

/// `CUipcMemHandle`, passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RawIpcHandle {
    pub(super) bytes: [u8; 64],
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Default)]
pub(super) struct Copy2d {
    pub(super) src_x: usize,
    pub(super) src_y: usize,
    pub(super) src_kind: c_uint,
    pub(super) src_host: usize,
    pub(super) src_device: RawPointer,
    pub(super) src_array: usize,
    pub(super) src_pitch: usize,
    pub(super) dst_x: usize,
    pub(super) dst_y: usize,
    pub(super) dst_kind: c_uint,
    pub(super) dst_host: usize,
    pub(super) dst_device: RawPointer,
    pub(super) dst_array: usize,
    pub(super) dst_pitch: usize,
    pub(super) width_bytes: usize,
    pub(super) height: usize,
}

function_table! {
    /// The driver API.
    Driver {
        init = c"cuInit"(c_uint) -> c_int;
        driver_version = c"cuDriverGetVersion"(*mut c_int) -> c_int;
        error_name = c"cuGetErrorName"(c_int, *mut *const c_char) -> c_int;
        error_string = c"cuGetErrorString"(c_int, *mut *const c_char) -> c_int;
        device_count = c"cuDeviceGetCount"(*mut c_int) -> c_int;
        device = c"cuDeviceGet"(*mut RawDevice, c_int) -> c_int;
        device_name = c"cuDeviceGetName"(*mut c_char, c_int, RawDevice) -> c_int;
        device_uuid = c"cuDeviceGetUuid_v2"(*mut [u8; 16], RawDevice) -> c_int;
        device_memory = c"cuDeviceTotalMem_v2"(*mut usize, RawDevice) -> c_int;
        device_attribute = c"cuDeviceGetAttribute"(*mut c_int, c_int, RawDevice) -> c_int;
        device_bus_id = c"cuDeviceGetPCIBusId"(*mut c_char, c_int, RawDevice) -> c_int;
        device_p2p_attribute = c"cuDeviceGetP2PAttribute"(*mut c_int, c_int, RawDevice, RawDevice) -> c_int;
        can_access_peer = c"cuDeviceCanAccessPeer"(*mut c_int, RawDevice, RawDevice) -> c_int;
        context_retain = c"cuDevicePrimaryCtxRetain"(*mut Handle, RawDevice) -> c_int;
        context_release = c"cuDevicePrimaryCtxRelease_v2"(RawDevice) -> c_int;
        context_set_current = c"cuCtxSetCurrent"(Handle) -> c_int;
        enable_peer_access = c"cuCtxEnablePeerAccess"(Handle, c_uint) -> c_int;
        memory_info = c"cuMemGetInfo_v2"(*mut usize, *mut usize) -> c_int;
        memory_alloc = c"cuMemAlloc_v2"(*mut RawPointer, usize) -> c_int;
        memory_free = c"cuMemFree_v2"(RawPointer) -> c_int;
        host_alloc = c"cuMemHostAlloc"(*mut *mut c_void, usize, c_uint) -> c_int;
        host_free = c"cuMemFreeHost"(*mut c_void) -> c_int;
        host_device_pointer = c"cuMemHostGetDevicePointer_v2"(*mut RawPointer, *mut c_void, c_uint) -> c_int;
        copy_to_device = c"cuMemcpyHtoDAsync_v2"(RawPointer, *const c_void, usize, Handle) -> c_int;
        copy_to_host = c"cuMemcpyDtoHAsync_v2"(*mut c_void, RawPointer, usize, Handle) -> c_int;
        copy_on_device = c"cuMemcpyDtoDAsync_v2"(RawPointer, RawPointer, usize, Handle) -> c_int;
        copy_2d = c"cuMemcpy2DAsync_v2"(*const Copy2d, Handle) -> c_int;
        fill_u8 = c"cuMemsetD8Async"(RawPointer, u8, usize, Handle) -> c_int;
        fill_u32 = c"cuMemsetD32Async"(RawPointer, c_uint, usize, Handle) -> c_int;
        ipc_handle = c"cuIpcGetMemHandle"(*mut RawIpcHandle, RawPointer) -> c_int;
        ipc_open = c"cuIpcOpenMemHandle_v2"(*mut RawPointer, RawIpcHandle, c_uint) -> c_int;
        ipc_close = c"cuIpcCloseMemHandle"(RawPointer) -> c_int;
        stream_create = c"cuStreamCreateWithPriority"(*mut Handle, c_uint, c_int) -> c_int;
        stream_priorities = c"cuCtxGetStreamPriorityRange"(*mut c_int, *mut c_int) -> c_int;
        stream_destroy = c"cuStreamDestroy_v2"(Handle) -> c_int;
        stream_query = c"cuStreamQuery"(Handle) -> c_int;
        capture_begin = c"cuStreamBeginCapture_v2"(Handle, c_int) -> c_int;
        capture_end = c"cuStreamEndCapture"(Handle, *mut Handle) -> c_int;
        event_create = c"cuEventCreate"(*mut Handle, c_uint) -> c_int;
        event_destroy = c"cuEventDestroy_v2"(Handle) -> c_int;
        event_record = c"cuEventRecord"(Handle, Handle) -> c_int;
        event_query = c"cuEventQuery"(Handle) -> c_int;
        event_elapsed = c"cuEventElapsedTime"(*mut f32, Handle, Handle) -> c_int;
        graph_nodes = c"cuGraphGetNodes"(Handle, *mut Handle, *mut usize) -> c_int;
        graph_instantiate = c"cuGraphInstantiateWithFlags"(*mut Handle, Handle, u64) -> c_int;
        graph_destroy = c"cuGraphDestroy"(Handle) -> c_int;
        graph_upload = c"cuGraphUpload"(Handle, Handle) -> c_int;
        graph_launch = c"cuGraphLaunch"(Handle, Handle) -> c_int;
        graph_exec_destroy = c"cuGraphExecDestroy"(Handle) -> c_int;
        module_load = c"cuModuleLoadData"(*mut Handle, *const c_void) -> c_int;
        module_function = c"cuModuleGetFunction"(*mut Handle, Handle, *const c_char) -> c_int;
        module_unload = c"cuModuleUnload"(Handle) -> c_int;
        function_attribute = c"cuFuncGetAttribute"(*mut c_int, c_int, Handle) -> c_int;
        function_set_attribute = c"cuFuncSetAttribute"(Handle, c_int, c_int) -> c_int;
        occupancy = c"cuOccupancyMaxActiveBlocksPerMultiprocessor"(*mut c_int, Handle, c_int, usize) -> c_int;
        launch = c"cuLaunchKernelEx"(*const RawLaunch, Handle, *const *const c_void, *mut *mut c_void) -> c_int;
    }
    optional {
        // CUDA 12.4.
        function_parameter = c"cuFuncGetParamInfo"(Handle, usize, *mut usize, *mut usize) -> c_int;
    }
}

impl Driver {
    /// The driver, opened and initialised once in the life of the process.
    ///
    /// # Errors
    /// No library, one that is too old, or one that refuses (no device counts as none, not as a refusal).
    pub(super) fn open() -> Result<&'static Self, CudaError> {
        static DRIVER: OnceLock<Result<Driver, CudaError>> = OnceLock::new();
        DRIVER.get_or_init(Self::open_once).as_ref().map_err(Clone::clone)
    }

    fn open_once() -> Result<Self, CudaError> {
        let driver = Self::load(&Library::open(NAME, &["libcuda.so.1", "libcuda.so"])?)?;
        // SAFETY: `CUresult cuInit(unsigned int)`, flags must be 0.
        let code = unsafe { (driver.init)(0) };
        if code == NO_DEVICE { Ok(driver) } else { driver.check("cuInit", code, None).map(|()| driver) }
    }

    /// Version of the API, for example 13000.
    pub(super) fn version(&self) -> Result<i32, CudaError> {
        let mut version = 0;
        // SAFETY: writes one int.
        let code = unsafe { (self.driver_version)(&raw mut version) };
        self.check("cuDriverGetVersion", code, None).map(|()| version)
    }

    /// Makes an error of a code.
    pub(super) fn check(&self, call: &'static str, code: c_int, device: Option<u32>) -> Result<(), CudaError> {
        if code == SUCCESS {
            return Ok(());
        }
        Err(CudaError::Call { call, code, name: self.name_of(code), device, kernel: None })
    }

    fn name_of(&self, code: c_int) -> String {
        let ask = |function: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text = std::ptr::null();
            // SAFETY: writes one pointer, null for a code that the driver does not know.
            unsafe { function(code, &raw mut text) };
            // SAFETY: not null: a constant string of the driver.
            (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        match (ask(self.error_name), ask(self.error_string)) {
            (Some(name), Some(text)) => format!("{name}, {text}"),
            (Some(name), None) => name,
            _ => "a code that the driver does not name".into(),
        }
    }
}

/// `13000` as `13.0`.
pub(super) fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

pub(super) fn report() -> LibraryReport {
    let found = Driver::open()
        .and_then(|driver| Ok(FoundLibrary { path: driver.path.clone(), version: version_text(driver.version()?) }));
    LibraryReport { name: NAME, purpose: "any use of a GPU", found: found.map_err(|error| error.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_have_the_sizes_of_the_headers() {
        assert_eq!(size_of::<LaunchAttribute>(), 72);
        assert_eq!(std::mem::offset_of!(LaunchAttribute, value), 8);
        assert_eq!(size_of::<RawLaunch>(), 56);
        assert_eq!(std::mem::offset_of!(RawLaunch, stream), 32);
        assert_eq!(size_of::<Copy2d>(), 128);
        assert_eq!(std::mem::offset_of!(Copy2d, dst_x), 56);
        assert_eq!(version_text(13020), "13.2");
    }
}
