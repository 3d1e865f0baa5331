//! A device that is ours: its primary context, held by the thread that opened it.
//!
//! Owns the retained context and which one is current on a thread. Everything that lives on the device keeps it alive.
//!
//! **Invariant:** a `Context` and all that hangs on it stay on the thread that opened it (their type is not `Send`); every
//! call into the driver is made with that context current.

use std::cell::{Cell, RefCell};
use std::ffi::c_int;
use std::fmt;
use std::ptr::null_mut;
use std::rc::Rc;

use super::device::{self, Device};
use super::driver::{Driver, Handle, PEER_ACCESS_ALREADY_ENABLED, RawDevice, SUCCESS};
use super::error::{CudaError, OUT_OF_MEMORY};

thread_local! {
    /// The context that is current on this thread; null before the first.
    static CURRENT: Cell<Handle> = const { Cell::new(null_mut()) };
}

/// One device, held open. Clones are the same context.
#[derive(Clone)]
pub struct Context(Rc<Inner>);

struct Inner {
    driver: &'static Driver,
    handle: Handle,
    raw_device: RawDevice,
    device: Device,
    /// What was launched last, for the words of an error that comes later.
    last_launch: RefCell<Option<Rc<str>>>,
}

/// Memory of a device as the driver sees it now, other processes included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceBytes {
    /// Free.
    pub free: u64,
    /// All.
    pub total: u64,
}

impl Context {
    /// Opens a visible device by its ordinal.
    ///
    /// # Errors
    /// No driver, no such device, or one that another process holds exclusively.
    pub fn open(ordinal: u32) -> Result<Self, CudaError> {
        let driver = Driver::open()?;
        let raw_device = device::raw(driver, ordinal)?;
        let device = device::device(driver, ordinal)?;
        let mut handle = null_mut();
        // SAFETY: writes one handle; the device comes from the driver.
        let code = unsafe { (driver.context_retain)(&raw mut handle, raw_device) };
        driver.check("cuDevicePrimaryCtxRetain", code, Some(ordinal))?;
        let context = Self(Rc::new(Inner { driver, handle, raw_device, device, last_launch: RefCell::default() }));
        context.bind()?;
        Ok(context)
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Position among the visible devices.
    pub fn ordinal(&self) -> u32 {
        self.0.device.ordinal
    }

    /// Free and total memory.
    ///
    /// # Errors
    /// A device that is lost.
    pub fn memory(&self) -> Result<DeviceBytes, CudaError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two sizes.
        self.call("cuMemGetInfo", |driver| unsafe { (driver.memory_info)(&raw mut free, &raw mut total) })?;
        Ok(DeviceBytes { free: free as u64, total: total as u64 })
    }

    /// Lets kernels of this device reach the memory of another one of this process. Asking twice is no error.
    ///
    /// # Errors
    /// No peer access between the two.
    pub fn enable_peer_access(&self, peer: &Self) -> Result<(), CudaError> {
        let handle = peer.0.handle;
        let result = self.call("cuCtxEnablePeerAccess", |driver| {
            // SAFETY: `peer` holds its context alive; the flags must be 0.
            unsafe { (driver.enable_peer_access)(handle, 0) }
        });
        match result {
            Err(error) if error.code() == Some(PEER_ACCESS_ALREADY_ENABLED) => Ok(()),
            other => other,
        }
    }

    /// Makes this context current on the thread.
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        if CURRENT.get() == self.0.handle {
            return Ok(());
        }
        // SAFETY: a retained context.
        let code = unsafe { (self.0.driver.context_set_current)(self.0.handle) };
        self.0.driver.check("cuCtxSetCurrent", code, Some(self.ordinal()))?;
        CURRENT.set(self.0.handle);
        Ok(())
    }

    pub(super) fn driver(&self) -> &'static Driver {
        self.0.driver
    }

    /// Calls the driver with this context current.
    pub(super) fn call(
        &self,
        call: &'static str,
        function: impl FnOnce(&'static Driver) -> c_int,
    ) -> Result<(), CudaError> {
        self.bind()?;
        let code = function(self.0.driver);
        if code == SUCCESS { Ok(()) } else { Err(self.error(call, code, None)) }
    }

    /// Calls the driver where nobody can be told of a failure: when something is dropped.
    pub(super) fn call_in_drop(&self, function: impl FnOnce(&'static Driver) -> c_int) {
        if self.bind().is_ok() {
            // A device that has failed refuses everything, and the process that holds it is about to end.
            let _ = function(self.0.driver);
        }
    }

    /// An error of a code. A fault of the device names what was launched last, if the caller does not know better.
    #[cold]
    pub(super) fn error(&self, call: &'static str, code: c_int, kernel: Option<&str>) -> CudaError {
        // 700 to 719 are faults inside kernels, found by whatever call comes next.
        let fault = (700..720).contains(&code).then(|| self.last_launch()).flatten();
        let kernel = kernel.map(str::to_owned).or(fault);
        match self.0.driver.check(call, code, Some(self.ordinal())) {
            Err(CudaError::Call { call, code, name, device, .. }) => {
                CudaError::Call { call, code, name, device, kernel }
            }
            Err(other) => other,
            Ok(()) => CudaError::refused(call, "no error"),
        }
    }

    /// The error of an allocation.
    #[cold]
    pub(super) fn alloc_error(&self, error: CudaError, bytes: usize) -> CudaError {
        if error.code() != Some(OUT_OF_MEMORY) {
            return error;
        }
        let memory = self.memory().unwrap_or(DeviceBytes { free: 0, total: self.device().total_bytes });
        CudaError::OutOfMemory {
            device: self.ordinal(),
            bytes: bytes as u64,
            free_bytes: memory.free,
            total_bytes: memory.total,
        }
    }

    pub(super) fn note_launch(&self, name: &Rc<str>) {
        *self.0.last_launch.borrow_mut() = Some(Rc::clone(name));
    }

    pub(super) fn last_launch(&self) -> Option<String> {
        self.0.last_launch.borrow().as_deref().map(str::to_owned)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if CURRENT.get() == self.handle {
            // SAFETY: null takes the current context away from the thread.
            unsafe { (self.driver.context_set_current)(null_mut()) };
            CURRENT.set(null_mut());
        }
        // SAFETY: retained once in `open`; everything on the device held this, so nothing of it is left.
        unsafe { (self.driver.context_release)(self.raw_device) };
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Context").field(&self.ordinal()).finish()
    }
}
