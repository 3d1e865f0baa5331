//! What the CUDA layer says when something fails.
//!
//! Owns the error type and its words. Result codes stay integers: a driver newer than this source may answer with any.

use std::time::Duration;

/// The code of the driver for exhausted memory.
pub(super) const OUT_OF_MEMORY: i32 = 2;

/// A failed call, a missing library or a passed deadline.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CudaError {
    /// A call answered with a code.
    #[error("{}{call}{}: {name} ({code})", at(*device), of(kernel.as_deref()))]
    Call {
        /// The function of the driver or library.
        call: &'static str,
        /// Its result.
        code: i32,
        /// The code's name, and the library's sentence where it has one.
        name: String,
        /// Ordinal of the device, where one is concerned.
        device: Option<u32>,
        /// Kernel or graph that was launched, or, for a fault, the one launched last.
        kernel: Option<String>,
    },
    /// A library or one of its functions is not there.
    #[error("{library} cannot be used: {reason}")]
    Missing {
        /// The library.
        library: &'static str,
        /// Why not.
        reason: String,
    },
    /// Device memory is exhausted.
    #[error("device {device}: {bytes} bytes could not be allocated, {free_bytes} of {total_bytes} are free")]
    OutOfMemory {
        /// Ordinal of the device.
        device: u32,
        /// How much was asked for.
        bytes: u64,
        /// What is free.
        free_bytes: u64,
        /// What the device has.
        total_bytes: u64,
    },
    /// The device did not get there in time.
    #[error("device {device}: {awaited} has not ended after {waited:?}{}", after(kernel.as_deref()))]
    Deadline {
        /// Ordinal of the device.
        device: u32,
        /// What was awaited.
        awaited: &'static str,
        /// How long.
        waited: Duration,
        /// Kernel or graph that was launched last.
        kernel: Option<String>,
    },
    /// A kernel source did not compile on this machine.
    #[error("{module}.cu does not compile for {arch}: {log}")]
    Compile {
        /// The source.
        module: String,
        /// For which architecture.
        arch: String,
        /// The compiler's words.
        log: String,
    },
    /// Something was asked for that cannot be: a range outside of memory, a launch that does not fit its kernel.
    #[error("{call}: {reason}")]
    Refused {
        /// What was asked for.
        call: &'static str,
        /// Why not.
        reason: String,
    },
}

impl CudaError {
    /// The code, where a call answered with one.
    pub fn code(&self) -> Option<i32> {
        match self {
            Self::Call { code, .. } => Some(*code),
            Self::OutOfMemory { .. } => Some(OUT_OF_MEMORY),
            _ => None,
        }
    }

    pub(super) fn refused(call: &'static str, reason: impl Into<String>) -> Self {
        Self::Refused { call, reason: reason.into() }
    }
}

fn at(device: Option<u32>) -> String {
    device.map(|device| format!("device {device}: ")).unwrap_or_default()
}

fn of(kernel: Option<&str>) -> String {
    kernel.map(|kernel| format!(" ({kernel})")).unwrap_or_default()
}

fn after(kernel: Option<&str>) -> String {
    kernel.map(|kernel| format!("; launched last: {kernel}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_call_names_device_kernel_and_code() {
        let error = CudaError::Call {
            call: "cuLaunchKernelEx",
            code: 700,
            name: "CUDA_ERROR_ILLEGAL_ADDRESS".into(),
            device: Some(1),
            kernel: Some("rms_norm_bf16".into()),
        };
        assert_eq!(error.to_string(), "device 1: cuLaunchKernelEx (rms_norm_bf16): CUDA_ERROR_ILLEGAL_ADDRESS (700)");
        let late = CudaError::Deadline {
            device: 0,
            awaited: "a decode step",
            waited: Duration::from_millis(1500),
            kernel: Some("decode".into()),
        };
        assert_eq!(late.to_string(), "device 0: a decode step has not ended after 1.5s; launched last: decode");
    }
}
