//! Events: points in a stream, and waiting for the device.
//!
//! **Invariant:** nothing here waits without a deadline.

use std::ffi::c_int;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

use super::context::Context;
use super::driver::{Driver, EVENT_DISABLE_TIMING, Handle, NOT_READY, SUCCESS};
use super::error::CudaError;
use super::stream::Stream;

/// How long a wait looks without pause before it begins to sleep: longer than most steps.
const SPIN: Duration = Duration::from_millis(5);
/// Pause between two looks after that.
const PAUSE: Duration = Duration::from_micros(50);

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    context: Context,
    handle: Handle,
}

impl Event {
    /// An event that orders and can be waited for.
    ///
    /// # Errors
    /// A device that is lost.
    pub fn new(context: &Context) -> Result<Self, CudaError> {
        Self::with_flags(context, EVENT_DISABLE_TIMING)
    }

    /// An event that also takes the time.
    ///
    /// # Errors
    /// A device that is lost.
    pub fn timing(context: &Context) -> Result<Self, CudaError> {
        Self::with_flags(context, 0)
    }

    fn with_flags(context: &Context, flags: u32) -> Result<Self, CudaError> {
        let mut handle = null_mut();
        // SAFETY: writes one handle.
        context.call("cuEventCreate", |driver| unsafe { (driver.event_create)(&raw mut handle, flags) })?;
        Ok(Self { context: context.clone(), handle })
    }

    /// Marks the stream's present end. An event that was never recorded counts as reached.
    ///
    /// # Errors
    /// A device that is lost.
    pub fn record(&self, stream: &Stream) -> Result<(), CudaError> {
        // SAFETY: both are live.
        self.context.call("cuEventRecord", |driver| unsafe { (driver.event_record)(self.handle, stream.handle()) })
    }

    /// Whether the device has come by.
    ///
    /// # Errors
    /// A fault of something before it.
    pub fn is_reached(&self) -> Result<bool, CudaError> {
        // SAFETY: a live event.
        is_done(&self.context, "cuEventQuery", |driver| unsafe { (driver.event_query)(self.handle) })
    }

    /// Waits until the device has come by.
    ///
    /// # Errors
    /// `Deadline`, or a fault of something before it.
    pub fn wait(&self, deadline: Duration, awaited: &'static str) -> Result<(), CudaError> {
        poll(&self.context, "cuEventQuery", deadline, awaited, |driver| {
            // SAFETY: a live event.
            unsafe { (driver.event_query)(self.handle) }
        })
    }

    /// Time on the device since an earlier event; both were made by `timing` and have been reached.
    ///
    /// # Errors
    /// One was not.
    pub fn since(&self, earlier: &Self) -> Result<Duration, CudaError> {
        let mut milliseconds = 0.0;
        // SAFETY: writes one float; both are live.
        self.context.call("cuEventElapsedTime", |driver| unsafe {
            (driver.event_elapsed)(&raw mut milliseconds, earlier.handle, self.handle)
        })?;
        Ok(Duration::try_from_secs_f32(milliseconds / 1000.0).unwrap_or_default())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created in `with_flags`, destroyed once; the driver keeps what it still needs of it.
        self.context.call_in_drop(|driver| unsafe { (driver.event_destroy)(self.handle) });
    }
}

/// Whether a query says that the device is through.
fn is_done(
    context: &Context,
    call: &'static str,
    query: impl FnOnce(&'static Driver) -> c_int,
) -> Result<bool, CudaError> {
    context.bind()?;
    match query(context.driver()) {
        SUCCESS => Ok(true),
        NOT_READY => Ok(false),
        code => Err(context.error(call, code, None)),
    }
}

/// Asks a query until it says that the device is through.
pub(super) fn poll(
    context: &Context,
    call: &'static str,
    deadline: Duration,
    awaited: &'static str,
    query: impl Fn(&'static Driver) -> c_int,
) -> Result<(), CudaError> {
    let started = Instant::now();
    loop {
        if is_done(context, call, &query)? {
            return Ok(());
        }
        let waited = started.elapsed();
        if waited >= deadline {
            let (device, kernel) = (context.ordinal(), context.last_launch());
            return Err(CudaError::Deadline { device, awaited, waited, kernel });
        }
        if waited < SPIN { std::hint::spin_loop() } else { std::thread::sleep(PAUSE) }
    }
}
