//! Recorded work: a stream's calls, captured once and launched as one.
//!
//! Owns the executable graph. The `CUgraph` that was captured is destroyed right after instantiation: a communicator
//! whose kernels it holds could otherwise never be destroyed.
//!
//! **Invariant:** a capture that was begun is ended, whatever happens inside; an executable graph is dropped before the
//! memory that its kernels use and before communicators whose kernels it holds (the owner declares it first).

use std::ptr::null_mut;
use std::rc::Rc;

use super::context::Context;
use super::driver::{CAPTURE_RELAXED, Handle, SUCCESS};
use super::error::CudaError;
use super::stream::Stream;

/// Work that can be launched again and again.
#[derive(Debug)]
pub struct GraphExec {
    context: Context,
    handle: Handle,
    label: Rc<str>,
    num_nodes: usize,
}

impl GraphExec {
    /// What it was called when it was captured.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Kernels, copies and fills in it.
    pub fn num_nodes(&self) -> usize {
        self.num_nodes
    }

    /// Puts it on the device ahead of its first launch.
    ///
    /// # Errors
    /// No memory for it, or a device that is lost.
    pub fn upload(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: both are live.
        stream.call("cuGraphUpload", |driver| unsafe { (driver.graph_upload)(self.handle, stream.handle()) })
    }

    /// Puts it into a stream.
    ///
    /// # Safety
    /// As for `Stream::launch`, for every kernel in it: the addresses recorded still lead to live memory.
    ///
    /// # Errors
    /// A device that is lost. Faults inside come later.
    pub unsafe fn launch(&self, stream: &Stream) -> Result<(), CudaError> {
        self.context.bind()?;
        // SAFETY: both are live; the caller answers for what is recorded.
        let code = unsafe { (self.context.driver().graph_launch)(self.handle, stream.handle()) };
        if code != SUCCESS {
            return Err(self.context.error("cuGraphLaunch", code, Some(&self.label)));
        }
        self.context.note_launch(&self.label);
        Ok(())
    }
}

impl Drop for GraphExec {
    fn drop(&mut self) {
        // SAFETY: instantiated in `capture`, destroyed once; the driver lets a launch in flight end.
        self.context.call_in_drop(|driver| unsafe { (driver.graph_exec_destroy)(self.handle) });
    }
}

impl Stream {
    /// Records what `record` puts into this stream instead of running it.
    ///
    /// Nothing in `record` may wait for the device; everything it launches has run once before, so that no kernel is
    /// loaded and no workspace allocated while recording.
    ///
    /// # Errors
    /// Those of `record`, something in it that cannot be recorded, or no memory for the graph. The stream is usable again.
    pub fn capture<E: From<CudaError>>(
        &self,
        label: &str,
        record: impl FnOnce() -> Result<(), E>,
    ) -> Result<GraphExec, E> {
        self.call("cuStreamBeginCapture", |driver| {
            // SAFETY: a live stream.
            unsafe { (driver.capture_begin)(self.handle(), CAPTURE_RELAXED) }
        })?;
        let open = OpenCapture { stream: self };
        let recorded = record();
        let graph = open.end();
        recorded?;
        Ok(graph?.instantiate(label)?)
    }
}

/// A capture that must be ended.
struct OpenCapture<'a> {
    stream: &'a Stream,
}

impl OpenCapture<'_> {
    fn end(self) -> Result<Captured, CudaError> {
        let stream = self.stream;
        std::mem::forget(self);
        let mut handle = null_mut();
        let ended = stream.call("cuStreamEndCapture", |driver| {
            // SAFETY: writes one handle, null where the capture was spoilt.
            unsafe { (driver.capture_end)(stream.handle(), &raw mut handle) }
        });
        let graph = Captured { context: stream.context().clone(), handle };
        ended.map(|()| graph)
    }
}

impl Drop for OpenCapture<'_> {
    fn drop(&mut self) {
        // Reached only when `record` unwinds.
        drop(OpenCapture { stream: self.stream }.end());
    }
}

/// A `CUgraph`, for as long as it takes to instantiate it.
struct Captured {
    context: Context,
    handle: Handle,
}

impl Captured {
    fn instantiate(self, label: &str) -> Result<GraphExec, CudaError> {
        let mut num_nodes = 0;
        // SAFETY: without a list of nodes only their number is written.
        self.context.call("cuGraphGetNodes", |driver| unsafe {
            (driver.graph_nodes)(self.handle, null_mut(), &raw mut num_nodes)
        })?;
        let mut handle = null_mut();
        // SAFETY: writes one handle; the graph is live.
        self.context.call("cuGraphInstantiate", |driver| unsafe {
            (driver.graph_instantiate)(&raw mut handle, self.handle, 0)
        })?;
        Ok(GraphExec { context: self.context.clone(), handle, label: label.into(), num_nodes })
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: given by the driver, destroyed once; the executable graph does not need it.
            self.context.call_in_drop(|driver| unsafe { (driver.graph_destroy)(self.handle) });
        }
    }
}
