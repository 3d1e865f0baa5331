//! Streams: the order of work on a device.
//!
//! Owns copies and fills. Launches are in `launch`, recording in `graph`, waiting in `event`.
//!
//! **Invariant:** nothing here waits for the device without a deadline. A copy that takes a Rust slice has ended when it
//! returns; copies that go on by themselves own or guard their host memory (`PinnedRing`, `ReadBack`).

use std::ffi::c_int;
use std::ptr::null_mut;
use std::time::Duration;

use super::context::Context;
use super::driver::{Copy2d, Driver, Handle, MEMORY_DEVICE, STREAM_NON_BLOCKING};
use super::error::CudaError;
use super::event::{Event, poll};
use super::memory::{PinnedMemory, Span};
use super::transfer::ReadBack;

/// Work that runs in order. Streams of one device run beside each other; none waits for the default stream.
#[derive(Debug)]
pub struct Stream {
    context: Context,
    handle: Handle,
}

/// Which of two streams the device serves first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Priority {
    /// As other streams.
    #[default]
    Normal,
    /// Before others: for work that peers wait for.
    High,
}

impl Stream {
    /// Opens a stream.
    ///
    /// # Errors
    /// A device that is lost.
    pub fn new(context: &Context, priority: Priority) -> Result<Self, CudaError> {
        let (mut lowest, mut highest) = (0, 0);
        context.call("cuCtxGetStreamPriorityRange", |driver| {
            // SAFETY: writes two ints.
            unsafe { (driver.stream_priorities)(&raw mut lowest, &raw mut highest) }
        })?;
        let number = if priority == Priority::High { highest } else { lowest };
        let mut handle = null_mut();
        context.call("cuStreamCreateWithPriority", |driver| {
            // SAFETY: writes one handle.
            unsafe { (driver.stream_create)(&raw mut handle, STREAM_NON_BLOCKING, number) }
        })?;
        Ok(Self { context: context.clone(), handle })
    }

    /// The device.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// The driver's handle, for libraries that take a `cudaStream_t`: valid while this value lives.
    pub fn as_raw(&self) -> *mut std::ffi::c_void {
        self.handle
    }

    /// Waits until everything in the stream has ended.
    ///
    /// # Errors
    /// `Deadline`, or a fault of something in the stream.
    pub fn synchronize(&self, deadline: Duration, awaited: &'static str) -> Result<(), CudaError> {
        poll(&self.context, "cuStreamQuery", deadline, awaited, |driver| {
            // SAFETY: a live stream.
            unsafe { (driver.stream_query)(self.handle) }
        })
    }

    /// Copies on the device, or between a device and memory that is mapped into it.
    ///
    /// # Errors
    /// The two differ in length.
    pub fn copy(&self, from: Span, to: Span) -> Result<(), CudaError> {
        if from.len() != to.len() {
            return Err(CudaError::refused("copy", format!("{} bytes into {}", from.len(), to.len())));
        }
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: spans were checked when they were made.
        self.call("cuMemcpyDtoDAsync", |driver| unsafe {
            (driver.copy_on_device)(to.address(), from.address(), from.len(), self.handle)
        })
    }

    /// Copies `height` rows of `width_bytes` on the device; rows begin `pitch` bytes after each other.
    ///
    /// # Errors
    /// Rows that overlap or do not lie inside.
    pub fn copy_rows(&self, from: Rows, to: Rows, width_bytes: usize, height: usize) -> Result<(), CudaError> {
        if width_bytes == 0 || height == 0 {
            return Ok(());
        }
        for rows in [from, to] {
            let end = (height - 1).checked_mul(rows.pitch).and_then(|start| start.checked_add(width_bytes));
            if rows.pitch < width_bytes || end.is_none_or(|end| end > rows.span.len()) {
                let (pitch, len) = (rows.pitch, rows.span.len());
                let reason = format!("{height} rows of {width_bytes} bytes, {pitch} apart, in memory with {len}");
                return Err(CudaError::refused("copy_rows", reason));
            }
        }
        let copy = Copy2d {
            src_kind: MEMORY_DEVICE,
            src_device: from.span.address(),
            src_pitch: from.pitch,
            dst_kind: MEMORY_DEVICE,
            dst_device: to.span.address(),
            dst_pitch: to.pitch,
            width_bytes,
            height,
            ..Copy2d::default()
        };
        // SAFETY: the struct is that of the header; both ranges were checked.
        self.call("cuMemcpy2DAsync", |driver| unsafe { (driver.copy_2d)(&raw const copy, self.handle) })
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// A device that is lost.
    pub fn fill(&self, to: Span, byte: u8) -> Result<(), CudaError> {
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: spans were checked when they were made.
        self.call("cuMemsetD8Async", |driver| unsafe { (driver.fill_u8)(to.address(), byte, to.len(), self.handle) })
    }

    /// Sets every 32-bit word.
    ///
    /// # Errors
    /// A length that is no multiple of 4.
    pub fn fill_words(&self, to: Span, word: u32) -> Result<(), CudaError> {
        if !to.len().is_multiple_of(4) {
            return Err(CudaError::refused("fill_words", format!("{} bytes", to.len())));
        }
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: as in `fill`.
        self.call("cuMemsetD32Async", |driver| unsafe {
            (driver.fill_u32)(to.address(), word, to.len() / 4, self.handle)
        })
    }

    /// Copies host memory to the device, in the stream's order, and waits for it. For set-up; steps use a `PinnedRing`.
    ///
    /// # Errors
    /// Lengths that differ, a passed deadline.
    pub fn upload(&self, from: &[u8], to: Span, deadline: Duration) -> Result<(), CudaError> {
        if from.len() != to.len() {
            return Err(CudaError::refused("upload", format!("{} bytes into {}", from.len(), to.len())));
        }
        // A copy from memory that is not pinned may wait for what is before it, without a deadline of its own.
        self.synchronize(deadline, "what is before an upload")?;
        self.upload_raw(from.as_ptr(), to)?;
        self.synchronize(deadline, "an upload")
    }

    /// Copies device memory to the host, in the stream's order, and waits for it. For set-up and tests.
    ///
    /// # Errors
    /// Lengths that differ, a passed deadline.
    pub fn download(&self, from: Span, to: &mut [u8], deadline: Duration) -> Result<(), CudaError> {
        if from.len() != to.len() {
            return Err(CudaError::refused("download", format!("{} bytes into {}", from.len(), to.len())));
        }
        self.synchronize(deadline, "what is before a download")?;
        self.download_raw(from, to.as_mut_ptr())?;
        self.synchronize(deadline, "a download")
    }

    /// Copies device memory into pinned memory while the host goes on; the memory comes back from `ReadBack::wait`.
    ///
    /// # Errors
    /// More bytes than the pinned memory has.
    pub fn read_back(&self, from: Span, into: PinnedMemory) -> Result<ReadBack, CudaError> {
        if from.len() > into.len() {
            return Err(CudaError::refused("read_back", format!("{} bytes into {}", from.len(), into.len())));
        }
        let event = Event::new(&self.context)?;
        self.download_raw(from, into.host_address())?;
        let recorded = event.record(self);
        let pending = ReadBack::new(into, event);
        recorded.map(|()| pending)
    }

    /// Starts a copy whose source stays as it is until the copy has ended: the caller sees to that.
    pub(super) fn upload_raw(&self, from: *const u8, to: Span) -> Result<(), CudaError> {
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller's source has `to.len()` bytes and outlives the copy.
        self.call("cuMemcpyHtoDAsync", |driver| unsafe {
            (driver.copy_to_device)(to.address(), from.cast(), to.len(), self.handle)
        })
    }

    fn download_raw(&self, from: Span, to: *mut u8) -> Result<(), CudaError> {
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller's target has `from.len()` bytes and outlives the copy.
        self.call("cuMemcpyDtoHAsync", |driver| unsafe {
            (driver.copy_to_host)(to.cast(), from.address(), from.len(), self.handle)
        })
    }

    pub(super) fn handle(&self) -> Handle {
        self.handle
    }

    pub(super) fn call(
        &self,
        call: &'static str,
        function: impl FnOnce(&'static Driver) -> c_int,
    ) -> Result<(), CudaError> {
        self.context.call(call, function)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once; work in it goes on to its end.
        self.context.call_in_drop(|driver| unsafe { (driver.stream_destroy)(self.handle) });
    }
}

/// Rows inside device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// From the first row's first byte.
    pub span: Span,
    /// Bytes from one row's begin to the next one's.
    pub pitch: usize,
}
