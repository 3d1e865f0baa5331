//! Memory of the device, pinned memory of the host, and memory of peers.
//!
//! Owns allocations and their release. Knows no stream: copies are the stream's.
//!
//! **Invariant:** memory is released when its owner is dropped, never earlier; the driver waits for the device before it
//! takes device or pinned memory away, so work that was launched may outlive the value that held its memory.

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::AtomicU32;

use super::context::Context;
use super::driver::{HOST_ALLOC_MAPPED, HOST_ALLOC_PORTABLE, IPC_LAZY_PEER_ACCESS, RawIpcHandle, RawPointer};
use super::error::CudaError;

/// A range of memory as the device addresses it: checked when it was made, passed to copies and kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    address: u64,
    len: usize,
}

impl Span {
    /// First address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of it.
    ///
    /// # Errors
    /// It does not lie inside.
    pub fn part(&self, range: Range<usize>) -> Result<Self, CudaError> {
        if range.start > range.end || range.end > self.len {
            let reason = format!("bytes {} to {} of memory with {}", range.start, range.end, self.len);
            return Err(CudaError::refused("span", reason));
        }
        Ok(Self { address: self.address + range.start as u64, len: range.end - range.start })
    }
}

/// Memory of a device, released when dropped.
#[derive(Debug)]
pub struct DeviceMemory {
    context: Context,
    span: Span,
}

impl DeviceMemory {
    /// Allocates; the content is what was there before. Addresses are multiples of 256.
    ///
    /// # Errors
    /// `OutOfMemory`, or a device that is lost.
    pub fn alloc(context: &Context, bytes: usize) -> Result<Self, CudaError> {
        let mut address = 0;
        // SAFETY: writes one address. Zero bytes are refused by the driver, so one is asked for.
        let result =
            context.call("cuMemAlloc", |driver| unsafe { (driver.memory_alloc)(&raw mut address, bytes.max(1)) });
        result.map_err(|error| context.alloc_error(error, bytes))?;
        Ok(Self { context: context.clone(), span: Span { address, len: bytes } })
    }

    /// All of it.
    pub fn span(&self) -> Span {
        self.span
    }

    /// A part of it.
    ///
    /// # Errors
    /// It does not lie inside.
    pub fn part(&self, range: Range<usize>) -> Result<Span, CudaError> {
        self.span.part(range)
    }

    /// First address.
    pub fn address(&self) -> u64 {
        self.span.address
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.span.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.span.len == 0
    }

    /// The device that it is on.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// What another process of this machine needs to map this memory. The memory must outlive the mapping.
    ///
    /// # Errors
    /// A platform without CUDA IPC.
    pub fn ipc_handle(&self) -> Result<IpcHandle, CudaError> {
        let mut handle = RawIpcHandle { bytes: [0; 64] };
        let address = self.span.address;
        // SAFETY: writes one handle; the address is the base of a live allocation.
        self.context.call("cuIpcGetMemHandle", |driver| unsafe { (driver.ipc_handle)(&raw mut handle, address) })?;
        Ok(IpcHandle { bytes: handle.bytes, len: self.span.len as u64 })
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let address = self.span.address;
        // SAFETY: allocated in `alloc`, released once; the driver waits for work that uses it.
        self.context.call_in_drop(|driver| unsafe { (driver.memory_free)(address) });
    }
}

/// Names another process's device memory: sent as bytes, opened with `PeerMemory::open`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpcHandle {
    /// The driver's handle.
    pub bytes: [u8; 64],
    /// Bytes of the allocation.
    pub len: u64,
}

/// Device memory of another process, mapped here, unmapped when dropped.
#[derive(Debug)]
pub struct PeerMemory {
    context: Context,
    span: Span,
}

impl PeerMemory {
    /// Maps it, and turns peer access on where the memory is on another device. A process cannot open its own handles.
    ///
    /// # Errors
    /// The other process is gone, or the devices do not reach each other.
    pub fn open(context: &Context, handle: &IpcHandle) -> Result<Self, CudaError> {
        let mut address: RawPointer = 0;
        let raw = RawIpcHandle { bytes: handle.bytes };
        context.call("cuIpcOpenMemHandle", |driver| {
            // SAFETY: writes one address; the driver checks the handle's bytes.
            unsafe { (driver.ipc_open)(&raw mut address, raw, IPC_LAZY_PEER_ACCESS) }
        })?;
        Ok(Self { context: context.clone(), span: Span { address, len: handle.len as usize } })
    }

    /// All of it.
    pub fn span(&self) -> Span {
        self.span
    }

    /// First address.
    pub fn address(&self) -> u64 {
        self.span.address
    }
}

impl Drop for PeerMemory {
    fn drop(&mut self) {
        let address = self.span.address;
        // SAFETY: opened in `open`, closed once.
        self.context.call_in_drop(|driver| unsafe { (driver.ipc_close)(address) });
    }
}

/// Plain numbers that may be read from any bytes.
pub trait Plain: Copy + sealed::Sealed + 'static {}

mod sealed {
    /// Types whose every bit pattern is a value.
    pub trait Sealed {}
}

macro_rules! plain {
    ($($ty:ty),*) => { $(impl sealed::Sealed for $ty {} impl Plain for $ty {})* };
}
plain!(u8, u16, u32, u64, i32, i64, f32, half::f16, half::bf16);

/// Host memory that the device copies from and to at full speed, and reads and writes in place; released when dropped.
#[derive(Debug)]
pub struct PinnedMemory {
    context: Context,
    host: NonNull<u8>,
    device: u64,
    len: usize,
}

impl PinnedMemory {
    /// Allocates, page-locked and mapped into every device's addresses, filled with zeroes.
    ///
    /// # Errors
    /// The system does not lock that much memory.
    pub fn alloc(context: &Context, bytes: usize) -> Result<Self, CudaError> {
        let mut host: *mut c_void = null_mut();
        let flags = HOST_ALLOC_PORTABLE | HOST_ALLOC_MAPPED;
        // SAFETY: writes one pointer.
        context.call("cuMemHostAlloc", |driver| unsafe { (driver.host_alloc)(&raw mut host, bytes.max(1), flags) })?;
        let host = NonNull::new(host.cast::<u8>())
            .ok_or_else(|| CudaError::refused("cuMemHostAlloc", "the driver gave no memory"))?;
        let mut memory = Self { context: context.clone(), host, device: 0, len: bytes };
        // SAFETY: `bytes` (or one) were allocated.
        unsafe { host.write_bytes(0, bytes) };
        let mut device = 0;
        context.call("cuMemHostGetDevicePointer", |driver| {
            // SAFETY: writes one address; the memory was allocated as mapped.
            unsafe { (driver.host_device_pointer)(&raw mut device, host.as_ptr().cast(), 0) }
        })?;
        memory.device = device;
        Ok(memory)
    }

    /// The memory as the device addresses it.
    pub fn span(&self) -> Span {
        Span { address: self.device, len: self.len }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its numbers; bytes at the end that make no whole number are left out.
    ///
    /// What the device is writing right now must not be looked at through this: wait for its event, or use `words`.
    pub fn slice<T: Plain>(&self) -> &[T] {
        // SAFETY: allocations are aligned to pages, `len` bytes long, initialised, and any bits are a `T`.
        unsafe { std::slice::from_raw_parts(self.host.as_ptr().cast(), self.len / size_of::<T>()) }
    }

    /// Its numbers, to be written. What the device reads right now must not be changed: wait for its event.
    pub fn slice_mut<T: Plain>(&mut self) -> &mut [T] {
        // SAFETY: as in `slice`, and `self` is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.host.as_ptr().cast(), self.len / size_of::<T>()) }
    }

    /// Its 32-bit words, for host and device to talk while a kernel runs: abort words, error codes, sampled tokens.
    pub fn words(&self) -> &[AtomicU32] {
        // SAFETY: as in `slice`; atomics may be shared with whoever else writes.
        unsafe { std::slice::from_raw_parts(self.host.as_ptr().cast(), self.len / size_of::<AtomicU32>()) }
    }

    pub(super) fn host_address(&self) -> *mut u8 {
        self.host.as_ptr()
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        let host = self.host;
        // SAFETY: allocated in `alloc`, released once; the driver waits for copies that use it.
        self.context.call_in_drop(|driver| unsafe { (driver.host_free)(host.as_ptr().cast()) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_stays_inside() {
        let span = Span { address: 4096, len: 100 };
        assert_eq!(span.part(10..100).unwrap(), Span { address: 4106, len: 90 });
        assert!(span.part(100..100).unwrap().is_empty());
        let backwards = Range { start: 5, end: 4 };
        for outside in [0..101, 101..101, backwards] {
            assert!(span.part(outside).is_err());
        }
    }
}
